"""Commit records: what belongs to a Zarr shard, what it stands for, and where in the corpus the next one begins."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vqmill.errors import CodesError
from vqmill.files import canonical_json, sealed
from vqmill.places import MAX_RECORD_BYTES, Where, place_of, read_file
from vqmill.spec import StoreSpec


@dataclass(frozen=True)
class Counts:
    """Input samples: seen = encoded + quarantined + skipped."""

    encoded: int = 0
    quarantined: int = 0
    skipped: int = 0

    @property
    def seen(self) -> int:
        """All samples met."""
        return self.encoded + self.quarantined + self.skipped

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.encoded + other.encoded, self.quarantined + other.quarantined, self.skipped + other.skipped)


@dataclass(frozen=True)
class Cursor:
    """Where in the corpus the next Zarr shard begins: an input shard, a span in it, and rows of that span already written."""

    input_shard: int = 0
    span: int = 0
    row: int = 0


@dataclass(frozen=True)
class Commit:
    """The record that makes one Zarr shard count."""

    shard: int
    first_row: int
    rows: int
    cursor: Cursor
    counts: Counts
    files: Mapping[str, Mapping[str, Any]]

    def to_bytes(self) -> bytes:
        """The file's content: nothing of time, place or number of workers."""
        return canonical_json(sealed(asdict(self)))

    @classmethod
    def read(cls, store: Where, file: str) -> Commit:
        """Reads a record of a store.

        Raises:
            CodesError: missing or damaged.
            OSError: it cannot be had.
        """
        place = place_of(store)
        path = f"{place.name}/{file}"
        try:
            record = json.loads(read_file(place, file, MAX_RECORD_BYTES))
            if sealed(record) != record:
                raise ValueError("not what its sha256 says")
            numbers = [record[key] for key in ("shard", "first_row", "rows")]
            numbers += [record["cursor"][field.name] for field in fields(Cursor)]
            numbers += [record["counts"][field.name] for field in fields(Counts)]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("numbers must be whole")
            for name, facts in record["files"].items():
                if not (
                    type(facts["bytes"]) is int
                    and facts["bytes"] >= 0
                    and re.fullmatch("[0-9a-f]{64}", facts["sha256"])
                ):
                    raise ValueError(f"the size or checksum of {name} is none")
            return cls(
                shard=int(record["shard"]),
                first_row=int(record["first_row"]),
                rows=int(record["rows"]),
                cursor=Cursor(**record["cursor"]),
                counts=Counts(**record["counts"]),
                files={str(name): dict(facts) for name, facts in record["files"].items()},
            )
        except FileNotFoundError as error:
            raise CodesError(f"{path}: this commit record is missing. Restore it from a copy.") from error
        except OSError as error:
            raise OSError(f"{path}: cannot be read: {error.strerror or error}") from error
        except CodesError as error:
            raise CodesError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CodesError(f"{path}: damaged commit record ({error}). Restore it from a copy.") from error


def counts_of(spec: StoreSpec, commits: Iterable[Commit]) -> Counts:
    """Samples of a store, each counted once: those that were tried again count as what became of them then."""
    total = sum((commit.counts for commit in commits), Counts())
    return replace(total, quarantined=total.quarantined - spec.retried(total.seen))


def file_facts(data: bytes) -> dict[str, Any]:
    """What a commit record says of a file: its size in bytes and its SHA-256."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
