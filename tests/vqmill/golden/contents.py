"""What the golden stores hold, by arithmetic: each store's specification, and each value as a function of its place."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqmill.spec import LevelSpec, Segment, StoreSpec

INPUT_SHARD_ROWS = 23  # good samples of each input shard; one more is bad


@dataclass(frozen=True)
class Golden:
    """One store: what it is, and over how many input shards."""

    spec: StoreSpec
    input_shards: int

    @property
    def num_rows(self) -> int:
        """Rows of the store."""
        return INPUT_SHARD_ROWS * self.input_shards


def _golden(levels: tuple[LevelSpec, ...], rows_per_shard: int, codec: str, input_shards: int) -> Golden:
    samples = (INPUT_SHARD_ROWS + 1) * input_shards
    spec = StoreSpec(
        levels=levels,
        rows_per_shard=rows_per_shard,
        tokenizer={"fingerprint": "0123456789abcdef" * 2, "preset": "golden", "precision": "fp32", "batch_size": 32},
        preprocessing={"size": 256, "crop": "center", "decoder": "none"},
        corpus={
            "description": "golden",
            "num_samples": samples,
            "class_names": ["cat", "dög"],
            "skipped": {"not an image": 2},
        },
        segments=(Segment("9f86d081884c7d65", 0, 0, input_shards, samples),),
        codec=codec,
    )
    return Golden(spec, input_shards)


GOLDEN = {
    # 32 rows are two chunks of `bottom`; the last Zarr shard has 5 rows, so that its second chunk is missing from the index
    "image": _golden((LevelSpec("top", 512, (16, 16)), LevelSpec("bottom", 512, (64, 64))), 32, "blosc-zstd", 3),
    "clip": _golden((LevelSpec("codes", 255, (8, 8)),), 64, "blosc-lz4", 4),
    "video": _golden((LevelSpec("codes", 70_000, (4, 8, 8)),), 16, "zstd", 2),
}


def codes(level: LevelSpec, num_rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The codes of a level, int64 [N, *grid]: blocks of four by four (by four) that count up with the row; 0 and K-1 among them."""
    row, *place = np.indices((num_rows, *level.grid), dtype=np.int64)
    values = row * 7_919 + sum(axis // 4 * (31 * number + 1) for number, axis in enumerate(place))
    values = values % level.codebook_size
    values[0].flat[0], values[-1].flat[-1] = 0, level.codebook_size - 1
    return values


def sample(row: int) -> dict[str, Any]:
    """The line of the samples table of a row."""
    input_shard, index = divmod(row, INPUT_SHARD_ROWS)
    return {
        "key": f"sample-{row:04d}",
        "source": f"shard-{input_shard:06d}.tar",
        "input_shard": input_shard,
        "index": index,
        "label": None if row % 5 == 4 else row % 2,
        "caption": f"a caption, été {row}" if row % 3 == 0 else None,
        "json": json.dumps({"row": row}) if row % 2 else None,
        "width": 256 + row,
        "height": 300,
    }


def bad_sample(input_shard: int) -> dict[str, Any]:
    """The line of the quarantine table of an input shard: its last sample."""
    place = {"source": f"shard-{input_shard:06d}.tar", "input_shard": input_shard, "index": INPUT_SHARD_ROWS}
    return {"key": f"bad-{input_shard:04d}", **place, "reason": "truncated", "detail": "ends in the middle"}
