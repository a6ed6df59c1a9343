"""The Ray side of tokenizing: encoder actors and writer tasks. Import it only when Ray has been started (see cluster.py)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.assembly import Order, SpanFacts, Written, carry_out
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import InputShard
from pipelines.deadlines import Deadlines
from pipelines.encoder import Encoding, Span, SpanEncoder, describe_device
from pipelines.errors import RunFailed, WriteLost, told
from pipelines.fleet import Machine
from tokenizer.protocol import ImageTokenizer
from vqmill.errors import CodesError
from vqmill.places import Folder, Place


@ray.remote(max_restarts=0)
class EncoderActor:
    """Owns one device and its decode threads; pixels never leave it."""

    def __init__(
        self, build: Callable[[], ImageTokenizer], preprocessing: Preprocessing, encoding: Encoding, device: str, decode_threads: int,
        sample_timeout: float,
    ) -> None:  # fmt: skip
        within = Deadlines().within  # an actor is a process that may end: what it had in hand is done again, carefully
        self._encoder = SpanEncoder(
            build, preprocessing, encoding, device, decode_threads, sample_timeout=sample_timeout, within=within
        )
        self._device = device

    def describe(self, corpus: Path | None) -> Machine:
        """Says where it runs, and whether a path of the corpus is there."""
        node = ray.get_runtime_context().get_node_id()
        return Machine(socket.gethostname(), describe_device(self._device), corpus is None or corpus.exists(), node)

    def encode(
        self, shard: InputShard, first_span: int, stop_span: int, *, careful: bool
    ) -> Iterator[Span | SpanFacts]:
        """Streams each span, then its facts: facts that arrive say that the span is safely stored."""
        encode = self._encoder.careful_spans if careful else self._encoder.spans
        spans = encode(shard, first_span, stop_span)
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

    def __init__(self, store: Place) -> None:
        """Decides where they run: on this machine, when the store is a folder, which other machines need not have."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._write = write_remotely.options(scheduling_strategy=here if isinstance(store, Folder) else "DEFAULT")

    def submit(self, order: Order, payloads: list[Any]) -> Any:
        """Starts a task; the payloads are references to spans."""
        return self._write.remote(order, *payloads)

    def ready(self, handle: Any) -> bool:
        """Whether the task has ended, well or not."""
        return bool(ray.wait([handle], timeout=0, fetch_local=False)[0])

    def collect(self, handle: Any) -> Written:
        """Waits for the task.

        Raises:
            CodesError: what it read or was given is wrong.
            WriteLost: its spans were lost with a machine, or its own process was, over and over.
            RunFailed: it could not write.
        """
        try:
            return ray.get(handle)
        except RayTaskError as error:
            if isinstance(error.cause, CodesError):
                raise error.cause from error
            # A lost span is an argument that could not be had: of many kinds, even that of an actor which is gone.
            kind = WriteLost if isinstance(error.cause, RayError) else RunFailed
            raise kind(
                f"a Zarr shard could not be written; what was committed before is safe: {told(error.cause)}"
            ) from error
        except RayError as error:
            raise WriteLost(f"a Zarr shard could not be written; what was committed before is safe: {error}") from error
