"""The Ray side of tokenizing: encoder actors and writer tasks. Import it only when Ray has been started (see cluster.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import InputShard
from pipelines.encoder import Encoding, Span, SpanEncoder, describe_device
from vqmill.spec import StoreSpec
from vqmill.writer import Counts, write_shard


@dataclass(frozen=True)
class SpanFacts:
    """What the driver needs to know of a span; the codes themselves stay in the object store."""

    index: int
    rows: int
    counts: Counts


@ray.remote(max_restarts=0)
class EncoderActor:
    """Owns one device and its decode threads; pixels never leave it."""

    def __init__(self, checkpoint: bytes, preprocessing: Preprocessing, encoding: Encoding, device: str) -> None:
        self._encoder = SpanEncoder(checkpoint, preprocessing, encoding, device)
        self._device = device

    def describe(self) -> str:
        """See `encoder.describe_device`."""
        return describe_device(self._device)

    def encode(self, shard: InputShard, first_span: int) -> Iterator[Span | SpanFacts]:
        """Streams each span, then its facts: facts that arrive say that the span is safely stored."""
        for span in self._encoder.spans(shard, first_span):
            yield span
            yield SpanFacts(span.index, span.samples.num_rows, span.counts)


@ray.remote(num_cpus=0)
def write_pieces(
    store: Path, spec: StoreSpec, shard: int, pieces: list[tuple[int, int, bool]], *spans: Span
) -> dict[str, dict[str, Any]]:
    """Writes one Zarr shard from pieces (first row, stop row, whether the span's quarantine comes along) of as many spans."""
    cut = [(span, first, stop, ends) for span, (first, stop, ends) in zip(spans, pieces, strict=True)]
    filled = [(span, first, stop) for span, first, stop, _ in cut if stop > first]
    codes = {
        level.name: np.concatenate([span.codes[level.name][first:stop] for span, first, stop in filled])
        for level in spec.levels
        if filled
    }
    samples = pa.concat_tables([span.samples.slice(first, stop - first) for span, first, stop, _ in cut])
    quarantine = pa.concat_tables([span.quarantine.slice(0, None if ends else 0) for span, _, _, ends in cut])
    return write_shard(store, spec, shard, codes, samples, quarantine)
