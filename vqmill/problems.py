"""What `verify` finds: one `Problem` for each thing that is wrong, with its place and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal[
    "unfinished", "pending", "reopened", "leftover", "link", "metadata", "record", "damaged", "content", "counts"
]
NO_DAMAGE = ("unfinished", "pending", "reopened")
LISTED = 4


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        kind: `unfinished`, the plan is not all in; `pending`, a file of a Zarr shard that is not committed yet in an unfinished store;
            `reopened`, a file of the last Zarr shard that was written anew with more rows, whose record is still the old one; `leftover`, a file that belongs to nothing; `link`, a symbolic link; `metadata`, a zarr.json that is not what the store's should
            be; `record`, a commit record that is missing, damaged or contradicts the store; `damaged`, a committed file that is missing or
            has other bytes than were committed; `content`, the committed bytes, but what they hold cannot be; `counts`, numbers of the whole
            store that do not add up.
        file: its path in the store.
        wrong: what was found, and expected.
        array: the level, or `label`, when the file is a Zarr shard.
        shards: first and last Zarr shard concerned.
        rows: first and last row concerned.
        input_shards: first and last input shard that the rows came from.
        sources: files of the corpus that the rows came from, as far as known.
        advice: what to do.
    """

    kind: Kind
    file: str
    wrong: str
    array: str | None = None
    shards: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None
    input_shards: tuple[int, int] | None = None
    sources: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        where = ", ".join(self._place())
        return f"{self.file}{f' ({where})' if where else ''}: {self.wrong}. {self.advice}".rstrip()

    def _place(self) -> Iterable[str]:
        if self.array is not None:
            yield "array 'label'" if self.array == "label" else f"level '{self.array}'"
        if self.shards is not None:
            yield span("Zarr shard", self.shards)
        if self.rows is not None:
            yield span("row", self.rows)
        if self.input_shards is not None:
            named = f" ({some(self.sources)})" if self.sources else ""
            yield f"from {span('input shard', self.input_shards)}{named}"

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON, its sentence with it."""
        return {**asdict(self), "message": str(self)}


def span(unit: str, numbers: tuple[int, int]) -> str:
    """One number or a range of them, in words.

    >>> span("row", (12288, 12351)), span("Zarr shard", (3, 3))
    ('rows 12,288..12,351', 'Zarr shard 3')
    """
    first, last = numbers
    return f"{unit} {first:,}" if first == last else f"{unit}s {first:,}..{last:,}"


def some(names: Sequence[str]) -> str:
    """A few of many names.

    >>> some(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d and 2 more'
    """
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest:,} more" if rest > 0 else "")


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges, first and last of each.

    >>> runs([1, 2, 3, 7])
    [(1, 3), (7, 7)]
    """
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def whole_commits(num_commits: int, problems: Iterable[Problem]) -> int:
    """How many commits are left when those are given up, from the last one backwards, that no tokenizing can mend in their place.

    Such are commits whose record is lost, or whose committed bytes are wrong: there is nothing to compare new ones with. A file that is
    merely damaged can be made again and compared with its record.

    >>> whole_commits(5, [Problem("record", "", "", shards=(3, 4)), Problem("content", "", "", shards=(1, 1))])
    3
    """
    lost = [problem.shards for problem in problems if problem.kind in ("record", "content") and problem.shards]
    for first, last in sorted(lost, key=lambda shards: shards[1], reverse=True):
        if last >= num_commits - 1:
            num_commits = min(num_commits, first)
    return num_commits
