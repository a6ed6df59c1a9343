"""An encoder actor that does nothing. Import it only when Ray has been started, as pipelines/remote.py."""

from __future__ import annotations

from collections.abc import Iterator

import ray

from benchmarks.made_up import span_of
from benchmarks.stores import draw_codes
from pipelines.assembly import SpanFacts
from pipelines.corpus.plan import InputShard
from pipelines.encoder import SPAN_SAMPLES, Span, describe_device
from vqmill.spec import StoreSpec


@ray.remote(max_restarts=0)
class Costless:
    """Stands for `EncoderActor`."""

    def __init__(self, spec: StoreSpec) -> None:
        self._spec = spec
        self._codes = {level.name: draw_codes(SPAN_SAMPLES, level) for level in spec.levels}

    def describe(self) -> str:
        """See `encoder.describe_device`."""
        return describe_device("cpu")

    def encode(self, shard: InputShard, first_span: int, stop_span: int | None) -> Iterator[Span | SpanFacts]:
        """Each span, then its facts."""
        for index in range(first_span, -(-shard.num_samples // SPAN_SAMPLES)):
            span = span_of(self._spec, shard, index, self._codes)
            yield span
            yield SpanFacts(index, span.samples.num_rows, span.counts)
