"""The statistics of a run's input shards: JSON lines in a file beside the store, `STORE.runs/BEGUN.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from vqmill.places import FileAt, Folder, Where, place_of

Note = Callable[[Mapping[str, Any]], None]


@contextmanager
def shard_log(store: Where) -> Iterator[tuple[FileAt, Note]]:
    """Gives the file, and what adds a line to it.

    On a disk a line is there at once; in a bucket, whose objects do not grow, all of them at the end, also of a job that fails. No line,
    no file.
    """
    place = place_of(store)
    beside, begun = place.beside(), datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    file = FileAt(beside, f"{place.base}.runs/{begun}.jsonl")
    lines: list[str] = []

    def note(facts: Mapping[str, Any]) -> None:
        line = json.dumps(facts, ensure_ascii=False) + "\n"
        if isinstance(beside, Folder):
            path = beside.path / file.file
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as log:
                log.write(line)
        else:
            lines.append(line)

    try:
        yield file, note
    finally:
        if lines:
            file.write("".join(lines).encode())
