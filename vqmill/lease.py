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
PUTS = 3  # of one state; each is asked for again by the client, too, when the server fails

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
        guarded_state = _state(place, guarded)
        self._guarded_version: Version | Literal["create"] = guarded_state[1] if guarded_state else "create"
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
            self._guarded_version = _put_surely(self._place, self._guarded, data, self._guarded_version)
        except ConflictError:
            self._lost = True
            self._refuse_lost()

    def close(self) -> None:
        """See `Hold`."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if not self._lost:
            try:
                given_back = canonical_json({"owner": None, "last": self._holder})
                _put_surely(self._room, self._file, given_back, self._version)
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
            if not (state := _state(self._room, self._file)):
                return "create"
            content, version = state
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
                _put_surely(self._room, self._file, b"{}", condition)
            except ConflictError:
                continue
            raise UsageError(f"{self._room.name}/{self._file}: {NO_CONDITIONS}")

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
        while True:
            asked = time.monotonic()
            try:
                self._version = self._put(self._version)
            except ConflictError:
                content, self._version = _state(self._room, self._file) or (b"", {})
                if _read(content).get("owner") != self._holder["owner"]:
                    self._lost = True
                    return
            else:  # after a conflict, too: the state that was found is an earlier turn of ours, whose answer was lost
                self._renewed = asked
                return

    def _put(self, known: Version | Literal["create"]) -> Version:
        self._turn += 1
        return _put_surely(self._room, self._file, self._content(), known)

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


def _put_surely(place: Bucket, file: str, data: bytes, known: Version | Literal["create"]) -> Version:
    """Puts on a condition, and looks what became of it when no answer came, or one that may be to a second asking.

    Raises:
        ConflictError: the object was in another state.
        OSError: it is still in the known state, and cannot be put.
    """
    for left in reversed(range(PUTS)):
        try:
            return place.put(file, data, known)
        except (ConflictError, OSError) as error:
            content, version = _state(place, file) or (None, "create")
            if content == data and version != "create":
                return version
            if version != known:
                raise ConflictError("in another state") from None
            if not left:
                raise OSError(str(error)) from None
    raise AssertionError


def _state(place: Bucket, file: str) -> tuple[bytes, Version] | None:
    """An object's content and state; None where there is none."""
    try:
        return place.get(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"{place.name}/{file}: cannot be read: {error}") from None


def _read(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing when it is none."""
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


def _holder(content: bytes) -> str | None:
    """Who holds a lease, for people; None when it was given back."""
    found = _read(content)
    if "owner" not in found:
        return "somebody unknown"
    return None if found["owner"] is None else f"process {found.get('process')} on {found.get('host')}"
