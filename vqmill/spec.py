"""The store's specification: which arrays there are, how they are cut, and what the group's metadata says.

docs/format.md is the prose of this file. Everything here is pure: no disk, no Zarr.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vqmill.errors import CodesError

FORMAT_VERSION = 1
CHUNK_BYTES = 128 * 1024  # raw bytes of one chunk: the smallest at which blosc-zstd has reached its ratio
SHARD_BYTES = 16 * 1024 * 1024  # raw bytes of one Zarr shard, from which object stores read at full speed
MAX_ROWS_PER_SHARD = 4096  # else small grids put a whole corpus into one shard, and a resume starts again
RESERVED_NAMES = (
    "samples",
    "quarantine",
    "commits",
    "label",
    "row",
    "store",
)  # the store's folders, and names in batches
CODECS = ("blosc-zstd", "blosc-lz4", "zstd")  # layout.py builds them
MAX_ROW_BYTES = 64 * 1024 * 1024  # what a reader takes memory for on the word of a file: one row,
MAX_CHUNK_BYTES = 16 * 1024 * 1024  # a chunk of several rows,
MOST_ROWS_PER_SHARD = MAX_CHUNK_BYTES // 8  # whose labels are one chunk,
MAX_CHUNKS_PER_SHARD = 65_536  # the index of a Zarr shard,
MAX_SHARD_BYTES = 4 * 1024 * 1024 * 1024  # one Zarr shard of one level,
MAX_ROWS = 2**48  # and a whole store
MISSING_LABEL = -1
LABEL_FILL = -(2**63)  # never a label, so that a lost Zarr shard can be told from samples without one


def dtype_for(codebook_size: int) -> np.dtype[Any]:
    """The narrowest unsigned dtype that holds codes 0..K-1 and keeps its maximum free as the fill value.

    >>> dtype_for(255), dtype_for(256), dtype_for(65536)
    (dtype('uint8'), dtype('uint16'), dtype('uint32'))
    """
    if codebook_size < 1:
        raise CodesError(f"codebook_size must be at least 1, got {codebook_size}.")
    for dtype in (np.uint8, np.uint16, np.uint32):
        if codebook_size <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise CodesError(f"codebook_size {codebook_size} does not fit 32 bits.")


@dataclass(frozen=True)
class LevelSpec:
    """One level of codes; a row of the store is one grid.

    Attributes:
        name: of the level and its array.
        codebook_size: K; codes lie in [0, K).
        grid: (h, w) for images, (t, h, w) for video, (Q, h, w) for the Q stages of residual codes.
        outer: what the first of three sizes counts, `time` or `depth`; `time` for other grids.
    """

    name: str
    codebook_size: int
    grid: tuple[int, ...]
    outer: str = "time"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype, by codebook size."""
        return dtype_for(self.codebook_size)

    @property
    def fill_value(self) -> int:
        """The dtype's maximum: never a code, so that what was not written can be told from code 0."""
        return int(np.iinfo(self.dtype).max)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the array's dimensions, rows first."""
        return ("row", *(self.outer, "y", "x")[-len(self.grid) :])

    @property
    def row_bytes(self) -> int:
        """Raw bytes of one row."""
        return math.prod(self.grid) * self.dtype.itemsize

    def rows_per_chunk(self, rows_per_shard: int) -> int:
        """Rows of one chunk: about CHUNK_BYTES, a divisor of the Zarr shard."""
        target = max(1, CHUNK_BYTES // self.row_bytes)
        if target >= rows_per_shard:
            return rows_per_shard
        return max(rows for rows in range(1, target + 1) if rows_per_shard % rows == 0)


def default_rows_per_shard(levels: Sequence[LevelSpec]) -> int:
    """Rows of one Zarr shard: SHARD_BYTES of the coarsest level, a power of two, at most MAX_ROWS_PER_SHARD."""
    rows = max(SHARD_BYTES // level.row_bytes for level in levels)
    return min(MAX_ROWS_PER_SHARD, 1 << max(0, rows.bit_length() - 1))


def usable_rows_per_shard(levels: Sequence[LevelSpec], wanted: int) -> int:
    """The next number of rows, from `wanted` upwards, that divides into chunks of CHUNK_BYTES to CHUNK_BYTES / 2 of the finest level.

    A prime would else give chunks of one row, which neither compress nor read well.

    >>> usable_rows_per_shard([LevelSpec("codes", 512, (64, 64))], 1009)    # 101 chunks of 10 rows
    1010
    """
    finest = max(levels, key=lambda level: level.row_bytes)
    most = max(1, CHUNK_BYTES // finest.row_bytes)
    if wanted <= most:
        return wanted
    return min(-(-wanted // rows) * rows for rows in range(most // 2 + 1, most + 1))


@dataclass(frozen=True)
class Segment:
    """Rows that one plan brought.

    Attributes:
        plan: digest of the plan: of all its input shards, those of earlier segments among them.
        first_row: the first row that this plan brought.
        first_commit: the commit that holds this row, once there is one: first_row // rows_per_shard. It may hold rows of the segment
            before, too.
        input_shards: how many input shards the plan has; a longer plan begins with exactly these.
        num_samples: how many samples they hold; those that are tried again are counted again.
        retries: how many quarantine lines this plan takes up: all that counted before it. Its input shards behind those of the segment
            before hold these samples, and no others.
    """

    plan: str
    first_row: int = 0
    first_commit: int = 0
    input_shards: int = 0
    num_samples: int = 0
    retries: int = 0

    def to_json(self) -> dict[str, Any]:
        """The entry of `segments`; `retries` is there only when there are some."""
        entry = asdict(self)
        return entry if self.retries else {name: value for name, value in entry.items() if name != "retries"}


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds and how it was made: the group's `attributes.vqmill`.

    Attributes:
        levels: coarse to fine; one level is called `codes`, two are `top` and `bottom`.
        rows_per_shard: rows of one Zarr shard, the same at every level.
        tokenizer: `fingerprint` always; `preset`, `precision`, `batch_size` and `computed_on` when the codes were made by encoding.
        preprocessing: at least `size`, `crop` and `decoder` of encoded images; empty for codes that a prior drew.
        corpus: `description`, `num_samples`, `class_names` and `skipped` of encoded images; `sampled`, and `class_names` where the prior
            has them, of codes that a prior drew.
        segments: in commit order; one at least in all that our commands write.
        codec: one of CODECS, how chunks are compressed; None until the first Zarr shard has chosen.
        num_rows: committed rows; what readers trust.
        num_commits: committed Zarr shards.
        complete: whether the whole plan is in.
    """

    levels: tuple[LevelSpec, ...]
    rows_per_shard: int
    tokenizer: Mapping[str, Any]
    preprocessing: Mapping[str, Any] = field(default_factory=dict[str, Any])
    corpus: Mapping[str, Any] = field(default_factory=dict[str, Any])
    segments: tuple[Segment, ...] = ()
    codec: str | None = None
    num_rows: int = 0
    num_commits: int = 0
    complete: bool = False

    def __post_init__(self) -> None:
        names = [level.name for level in self.levels]
        if not names or len(set(names)) != len(names):
            raise CodesError(f"a store needs one or more levels with different names, got {names}.")
        for level in self.levels:
            dtype_for(level.codebook_size)
            if not level.name.isidentifier() or level.name.startswith("__") or level.name in RESERVED_NAMES:
                raise CodesError(
                    f"level name {level.name!r} is not usable: expected letters, digits and _, and none of the store's own names."
                )
            if level.outer not in ("time", "depth"):
                raise CodesError(
                    f"level {level.name!r}: expected the outer axis to be time or depth, got {level.outer!r}."
                )
            if not 1 <= len(level.grid) <= 3 or min(level.grid) < 1:
                raise CodesError(
                    f"level {level.name!r}: expected a grid of one to three positive sizes, got {list(level.grid)}."
                )
            if level.row_bytes > MAX_ROW_BYTES or max(level.row_bytes, 8) * self.rows_per_shard > MAX_SHARD_BYTES:
                raise CodesError(
                    f"level {level.name!r}: rows of {level.row_bytes:,} bytes, {self.rows_per_shard:,} in a Zarr shard; at most "
                    f"{MAX_ROW_BYTES:,} bytes a row and {MAX_SHARD_BYTES:,} a Zarr shard are read or written."
                )
        if not 1 <= self.rows_per_shard <= MOST_ROWS_PER_SHARD:
            raise CodesError(f"rows per Zarr shard must be in 1..{MOST_ROWS_PER_SHARD:,}, got {self.rows_per_shard:,}.")
        for level in self.levels:
            if (chunks := self.rows_per_shard // level.rows_per_chunk(self.rows_per_shard)) > MAX_CHUNKS_PER_SHARD:
                raise CodesError(
                    f"{self.rows_per_shard:,} rows per Zarr shard cut level {level.name!r} into {chunks:,} chunks; choose a number with more "
                    "divisors, such as a power of two."
                )
        if self.codec is not None and self.codec not in CODECS:
            raise CodesError(f"codec {self.codec!r} is not known; choose one of {', '.join(CODECS)}.")
        fits = (
            max(0, self.num_commits - 1) * self.rows_per_shard
            <= self.num_rows
            <= self.num_commits * self.rows_per_shard
        )
        if self.num_rows >= MAX_ROWS or not fits:
            raise CodesError(
                f"{self.num_rows:,} rows in {self.num_commits:,} commits of {self.rows_per_shard:,}: these numbers do not belong together."
            )

    def level(self, name: str) -> LevelSpec:
        """The level of that name.

        Raises:
            CodesError: no such level.
        """
        for level in self.levels:
            if level.name == name:
                return level
        raise CodesError(f"no level {name!r} in this store; it has {', '.join(level.name for level in self.levels)}.")

    @property
    def row_bytes(self) -> int:
        """Raw bytes of one row over all levels."""
        return sum(level.row_bytes for level in self.levels)

    def retried(self, seen: int) -> int:
        """How many of the samples that commits count were counted before, as quarantined, and have been tried again since.

        So many quarantine lines count no more: the first ones of the store.

        Args:
            seen: samples over all commits.
        """
        again = behind = 0
        for segment in self.segments:
            again += min(segment.retries, max(0, seen - behind))
            behind = segment.num_samples
        return again

    def with_progress(self, *, num_rows: int, num_commits: int, complete: bool) -> StoreSpec:
        """The same store, further on."""
        return replace(self, num_rows=num_rows, num_commits=num_commits, complete=complete)

    def with_plan_of(self, other: StoreSpec) -> StoreSpec:
        """The same settings, for the corpus of another store."""
        return replace(self, segments=other.segments, corpus=other.corpus)

    def settings(self) -> dict[str, Any]:
        """All that two runs must share to write the same codes.

        Left out: the progress, all but the last segment's plan, and of the corpus its address (`description`) and the files beside
        its samples (`skipped`), which come and go without changing a code; the plan's digest says which samples there are.
        """
        attributes = self.to_attributes()
        for progress in ("num_rows", "num_commits", "complete"):
            del attributes[progress]
        attributes["levels"] = {level.pop("name"): level for level in attributes["levels"]}
        attributes["plan"] = attributes.pop("segments")[-1]["plan"] if self.segments else None
        for free in ("description", "skipped"):
            attributes["corpus"].pop(free, None)
        return attributes

    def to_attributes(self) -> dict[str, Any]:
        """The JSON object under `attributes.vqmill`."""
        levels = [
            {
                "name": level.name,
                "codebook_size": level.codebook_size,
                "grid": list(level.grid),
                "axes": list(level.axes),
            }
            for level in self.levels
        ]
        return {
            "format_version": FORMAT_VERSION,
            "levels": levels,
            "rows_per_shard": self.rows_per_shard,
            "tokenizer": dict(self.tokenizer),
            "preprocessing": dict(self.preprocessing),
            "corpus": dict(self.corpus),
            "segments": [segment.to_json() for segment in self.segments],
            "codec": self.codec,
            "num_rows": self.num_rows,
            "num_commits": self.num_commits,
            "complete": self.complete,
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], source: str) -> StoreSpec:
        """Reads `attributes.vqmill`.

        Raises:
            CodesError: another format version, or something missing or of the wrong kind; `source` names the store.
        """
        version = attributes.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise CodesError(
                f"{source}: format_version is {version!r}; this vqmill reads version {FORMAT_VERSION}. Install a newer vqmill."
            )
        try:
            levels = tuple(_level(level) for level in attributes["levels"])
            segments = tuple(
                Segment(
                    str(segment["plan"]),
                    *(_whole(segment[name]) for name in ("first_row", "first_commit", "input_shards", "num_samples")),
                    retries=_whole(segment.get("retries", 0)),
                )
                for segment in attributes["segments"]
            )
            corpus = dict(attributes["corpus"])
            for number in dict(corpus.get("skipped", {})).values():
                _whole(number)
            if not all(isinstance(name, str) for name in list(corpus.get("class_names", []))):
                raise TypeError("class_names must be a list of names")
            return cls(
                levels=levels,
                rows_per_shard=_whole(attributes["rows_per_shard"]),
                tokenizer=dict(attributes["tokenizer"]),
                preprocessing=dict(attributes["preprocessing"]),
                corpus=corpus,
                segments=segments,
                codec=None if attributes["codec"] is None else str(attributes["codec"]),
                num_rows=_whole(attributes["num_rows"]),
                num_commits=_whole(attributes["num_commits"]),
                complete=attributes["complete"] is True,
            )
        except CodesError as error:
            raise CodesError(f"{source}: damaged store metadata: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CodesError(
                f"{source}: damaged store metadata ({type(error).__name__}: {error}). Restore zarr.json from a copy."
            ) from error


def _level(level: Mapping[str, Any]) -> LevelSpec:
    grid, axes = tuple(_whole(size) for size in level["grid"]), list(level["axes"])
    outer = str(axes[1]) if len(grid) == len(axes) - 1 == 3 else "time"
    found = LevelSpec(str(level["name"]), _whole(level["codebook_size"]), grid, outer)
    if axes != list(found.axes):
        raise ValueError(
            f"level {found.name!r}: axes {axes} do not fit a grid of {len(grid)}, expected {list(found.axes)}"
        )
    return found


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a whole number, got {json.dumps(value, default=str)}")
    return value
