"""The right to write a store in a bucket: an object that its holder renews, and that conditional puts keep to one holder.

No clocks are compared. Who finds a lease watches it: when it is renewed, its holder lives; when it stays the same for LEASE_SECONDS, its
holder is dead or asleep, and it is taken over. A holder that wakes up late finds out: at the latest when it replaces the store's
`zarr.json`, which succeeds only if nobody else has replaced it since.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from vqmill.bucket import NO_CONDITIONS, Bucket, ConflictError, Version
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json

LEASE_SECONDS = 30.0
RENEW_SECONDS = 5.0
LOOK_SECONDS = 1.0

log = logging.getLogger(__name__)


class Lease:
    """Held from its making until `close`; see `places.Hold`. The object `.NAME.lock` beside the store stays, as the lock file on a disk does."""

    def __init__(self, place: Bucket, advice: str, guarded: str) -> None:
        self._place, self._advice, self._guarded = place, advice, guarded
        self._room, self._file = place.beside(), f".{place.base}.lock"
        self._holder: dict[str, Any] = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        self._turn = 0
        self._lost = False
        self._mutex = threading.Lock()
        self._renewed = time.monotonic()
        self._version = self._take()
        self._prove()
        self._guarded_version: Version | Literal["create"] = self._state_of_guarded()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See `Hold`."""
        with self._mutex:
            if time.monotonic() - self._renewed > LEASE_SECONDS / 2:
                self._renew()
            self._refuse_lost()

    def create(self, files: Mapping[str, bytes], last: bytes) -> None:
        """See `Hold`. What a killed creation left is a part of the same, and replaced."""
        if other := self._place.list().keys() - files.keys():
            raise UsageError(
                f"{self._place.name}: objects are there that are not a code store's ({min(other)}). Choose another --out, or remove them."
            )
        for name, data in files.items():
            self._place.write(name, data)
        self.publish(last)

    def publish(self, data: bytes) -> None:
        """See `Hold`."""
        self.check()
        try:
            self._guarded_version = self._place.put(self._guarded, data, self._guarded_version)
        except ConflictError:
            found, version = self._place.get(self._guarded)
            if found != data:  # else it is our own put, whose answer was lost
                self._lost = True
                self._refuse_lost()
            self._guarded_version = version

    def close(self) -> None:
        """See `Hold`."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if not self._lost:
            try:
                self._room.put(self._file, canonical_json({"owner": None, "last": self._holder}), self._version)
            except (ConflictError, OSError):
                log.warning("%s: the lease could not be given back; it ends by itself", self._place.name)

    def _take(self) -> Version:
        try:
            return self._put("create")
        except ConflictError:
            version = self._watch()
        try:
            return self._put(version)
        except ConflictError:
            raise self._taken() from None

    def _watch(self) -> Version | Literal["create"]:
        """The state of the lease once it may be taken.

        Raises:
            UsageError: its holder lives.
        """
        first: Version | None = None
        end = time.monotonic() + LEASE_SECONDS
        while True:
            try:
                content, version = self._room.get(self._file)
            except FileNotFoundError:
                return "create"
            holder = _holder(content)
            if holder is None or (version == first and time.monotonic() >= end):
                return version
            if first is None:
                log.warning(
                    "%s: held by %s; waiting up to %.0f s to see whether that job still lives",
                    self._place.name, holder, LEASE_SECONDS,
                )  # fmt: skip
                first = version
            elif version != first:
                raise self._taken(holder)
            time.sleep(LOOK_SECONDS)

    def _prove(self) -> None:
        """Sees whether this object store keeps to conditions at all: some take no notice of them."""
        stale = self._version
        self._renewed, self._version = time.monotonic(), self._put(self._version)
        for condition in ("create", stale):
            try:
                self._room.put(self._file, b"{}", condition)
            except ConflictError:
                continue
            raise UsageError(f"{self._room.name}/{self._file}: {NO_CONDITIONS}")

    def _state_of_guarded(self) -> Version | Literal["create"]:
        try:
            return self._place.get(self._guarded)[1]
        except FileNotFoundError:
            return "create"

    def _keep(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            with self._mutex:
                if self._lost:
                    return
                try:
                    self._renew()
                except OSError as error:  # `check` says so if it lasts
                    log.warning("%s: the lease could not be renewed: %s", self._place.name, error)

    def _renew(self) -> None:
        asked = time.monotonic()
        try:
            self._version = self._put(self._version)
        except ConflictError:
            try:
                content, version = self._room.get(self._file)
            except FileNotFoundError:
                content, version = b"", {}
            if content != self._content():  # else it is our own put, whose answer was lost
                self._lost = True
                return
            self._version = version
        self._renewed = asked

    def _put(self, known: Version | Literal["create"]) -> Version:
        self._turn += 1
        return self._room.put(self._file, self._content(), known)

    def _content(self) -> bytes:
        return canonical_json({**self._holder, "turn": self._turn})

    def _refuse_lost(self) -> None:
        if self._lost:
            raise CodesError(
                f"{self._place.name}: this job stood still for so long that another one took the store over. What was committed is safe; let the "
                "other job finish."
            )

    def _taken(self, holder: str | None = None) -> UsageError:
        return UsageError(f"{self._place.name}: locked{f' by {holder}' if holder else ''}. {self._advice}")


def _holder(content: bytes) -> str | None:
    """Who holds a lease, for people; None when it was given back."""
    try:
        found = json.loads(content)
        owner, host, process = found["owner"], found.get("host"), found.get("process")
    except (ValueError, LookupError, TypeError, AttributeError):
        return "somebody unknown"
    return None if owner is None else f"process {process} on {host}"
