"""The Ray side of tokenizing: encoder actors and writer tasks. Import it only when Ray has been started (see cluster.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipelines.assembly import Order, SpanFacts, Written, carry_out
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import InputShard
from pipelines.encoder import Encoding, Span, SpanEncoder, describe_device
from pipelines.errors import RunFailed
from tokenizer.protocol import ImageTokenizer
from vqmill.errors import CodesError


@ray.remote(max_restarts=0)
class EncoderActor:
    """Owns one device and its decode threads; pixels never leave it."""

    def __init__(
        self, build: Callable[[], ImageTokenizer], preprocessing: Preprocessing, encoding: Encoding, device: str
    ) -> None:
        self._encoder = SpanEncoder(build, preprocessing, encoding, device)
        self._device = device

    def describe(self) -> str:
        """See `encoder.describe_device`."""
        return describe_device(self._device)

    def encode(self, shard: InputShard, first_span: int, stop_span: int | None) -> Iterator[Span | SpanFacts]:
        """Streams each span, then its facts: facts that arrive say that the span is safely stored."""
        spans = self._encoder.spans(shard, first_span, stop_span)
        begun = time.monotonic()
        while span := next(spans, None):
            seconds = time.monotonic() - begun
            yield span
            yield SpanFacts(span.index, span.samples.num_rows, span.counts, span.reasons, seconds)
            begun = time.monotonic()


@ray.remote(num_cpus=0)
def write_remotely(order: Order, *spans: Span) -> Written:
    """See `assembly.carry_out`."""
    return carry_out(order, *spans)


class RayHands:
    """Writer tasks on Ray: the `Hands` of assembly.py."""

    def submit(self, order: Order, payloads: list[Any]) -> Any:
        """Starts a task; the payloads are references to spans."""
        return write_remotely.remote(order, *payloads)

    def ready(self, handle: Any) -> bool:
        """Whether the task has ended, well or not."""
        return bool(ray.wait([handle], timeout=0, fetch_local=False)[0])

    def collect(self, handle: Any) -> Written:
        """Waits for the task.

        Raises:
            CodesError: what it read or was given is wrong.
            RunFailed: it could not write.
        """
        try:
            return ray.get(handle)
        except RayTaskError as error:
            if isinstance(error.cause, CodesError):
                raise error.cause from error
            raise RunFailed(
                f"a Zarr shard could not be written: {error.cause!r}. What was committed before is safe."
            ) from error
        except RayError as error:
            raise RunFailed(
                f"a Zarr shard could not be written: {error}. What was committed before is safe."
            ) from error
