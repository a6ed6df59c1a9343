"""Turns the samples of an input shard into codes, span by span: what an encoder actor does, without Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.careful import SAMPLE_TIMEOUT, CarefulDecoder
from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Decoded, Preprocessing
from pipelines.corpus.plan import InputShard
from pipelines.corpus.problems import BadImage, Reason
from pipelines.corpus.samples import RawSample, SampleRef, list_samples, load_sample
from pipelines.precision import exact_float32
from tokenizer.models import Tokenizer
from tokenizer.protocol import ImageTokenizer
from vqmill.commits import Counts
from vqmill.spec import dtype_for
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA

REMOTE_THREADS = 8  # that decode what comes from a bucket: they wait for it most of the time
SPAN_SAMPLES = 256  # what is sent to the store at a time, and what a resume may have to encode again
MAX_HELD_BYTES = 64 << 20  # of files of a gzip tar that wait to be decoded
PADDED_SIZES = (1, 8, 32)  # the last batch of a span is padded to the next of these, so that few shapes are ever run


@dataclass(frozen=True)
class Encoding:
    """How codes are computed: recorded in the store, because the bytes may depend on it.

    Attributes:
        batch_size: images of a full batch.
        precision: `fp32`, or `bf16` for autocast outside the quantizer.
        compiled: whether torch.compile makes the networks; see `Tokenizer.compile_encoder`.
    """

    batch_size: int = 32
    precision: str = "fp32"
    compiled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What a store records; of `compiled` only that it is so, as stores were made before there was a choice."""
        return {name: value for name, value in asdict(self).items() if name != "compiled" or value}


@dataclass(frozen=True)
class Span:
    """One span's result. Row i of every level and of `samples` is the same sample."""

    index: int
    codes: dict[str, np.ndarray[Any, Any]]
    samples: pa.Table
    quarantine: pa.Table

    @property
    def counts(self) -> Counts:
        """Encoded and quarantined samples."""
        return Counts(encoded=self.samples.num_rows, quarantined=self.quarantine.num_rows)

    @property
    def reasons(self) -> Counter[str]:
        """Quarantined samples by reason."""
        return Counter(map(str, self.quarantine["reason"].to_pylist()))


def describe_device(device: str) -> str:
    """The kind of device and the torch version: with these equal, codes are equal to the bit. Recorded in the store."""
    place = torch.device(device)
    kind = torch.cuda.get_device_name(place) if place.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{place.type} {kind}, torch {torch.__version__}"


class SpanEncoder:
    """Decodes and encodes on one device. Codes are a function of the input shard, the tokenizer, and `describe_device`."""

    def __init__(
        self,
        build: Callable[[], ImageTokenizer],
        preprocessing: Preprocessing,
        encoding: Encoding,
        device: str,
        num_threads: int = 2,
        sample_timeout: float = SAMPLE_TIMEOUT,
        within: Callable[[float], AbstractContextManager[None]] = lambda seconds: nullcontext(),
    ) -> None:
        """Loads the tokenizer.

        Args:
            build: makes it; see `foreign.packed`.
            preprocessing: size, channels and crop.
            encoding: batch size and precision.
            device: `cpu`, `cuda` or another torch device.
            num_threads: decode threads beside the encoder.
            sample_timeout: seconds that decoding a sample may take; a batch may take as long as its samples.
            within: what is done to steps that take longer, see `deadlines.Deadlines`; nothing if not given.
        """
        torch.set_num_threads(1)  # one actor a core; more threads would also change the order of additions
        exact_float32()
        self._device = torch.device(device)
        self._tokenizer = build()
        self._tokenizer.to(self._device)
        if encoding.compiled:
            assert isinstance(self._tokenizer, Tokenizer), "other people's tokenizers compile themselves"
            self._tokenizer.compile_encoder()
            side = preprocessing.size
            blank = torch.zeros(1, preprocessing.channels, side, side, dtype=torch.uint8, device=self._device)
            with self._autocast(encoding):
                self._tokenizer.encode(blank)  # compiles: what takes long, or fails, is the start and no batch
        self._preprocessing, self._encoding = preprocessing, encoding
        self._sample_timeout, self._within = sample_timeout, within
        # int64 would weigh four to eight times as much
        self._dtypes = {level: dtype_for(size) for level, size in self._tokenizer.levels.items()}
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._waiting_threads = ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="fetch")

    def _autocast(self, encoding: Encoding) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=encoding.precision == "bf16")

    def spans(self, shard: InputShard, first_span: int = 0, stop_span: int | None = None) -> Iterator[Span]:
        """Encodes an input shard from a span on, to its end or up to another span. The next span is decoded while this one is encoded."""
        refs = _refs(shard, first_span, stop_span)
        upcoming = self._decode_next(shard, refs)
        index = first_span
        while upcoming:
            span, upcoming = upcoming, self._decode_next(shard, refs)
            yield self._encode(index, shard, (future.result() for future in span))
            index += 1

    def careful_spans(self, shard: InputShard, first_span: int = 0, stop_span: int | None = None) -> Iterator[Span]:
        """The same spans, whatever decoders do; see careful.py. Nothing is decoded before its time, so that no span suffers from the next."""
        refs = _refs(shard, first_span, stop_span)
        with CarefulDecoder(self._preprocessing, self._sample_timeout) as decoder:
            for index in count(first_span):
                if (first := next(refs, None)) is None:
                    return
                span = chain([first], islice(refs, SPAN_SAMPLES - 1))  # those of a gzip tar hold their files
                yield self._encode(index, shard, decoder.outcomes(load_sample(shard, ref) for ref in span))

    def _decode_next(self, shard: InputShard, refs: Iterator[SampleRef]) -> list[Future[_Outcome]]:
        threads = self._waiting_threads if shard.remote else self._threads
        span: list[Future[_Outcome]] = []
        held = 0
        for ref in islice(refs, SPAN_SAMPLES):
            span.append(threads.submit(self._load, shard, ref))
            held += ref.held_bytes
            if held > MAX_HELD_BYTES:  # each lets go of its data when it is decoded
                wait(span)
                held = 0
        return span

    def _load(self, shard: InputShard, ref: SampleRef) -> _Outcome:
        """Reads and decodes one sample; its file's bytes are let go before the pixels wait for their turn."""
        sample = load_sample(shard, ref)
        try:
            with self._within(self._sample_timeout):
                outcome: Decoded | BadImage = decode_sample(sample, self._preprocessing)
        except BadImage as problem:
            outcome = problem
            if problem.reason is Reason.OUT_OF_MEMORY:  # perhaps its neighbours' fault; careful mode knows
                with CarefulDecoder(self._preprocessing, self._sample_timeout) as decoder:
                    [(_, outcome)] = decoder.outcomes(iter([sample]))
        return replace(sample, image=None), outcome

    def _encode(self, index: int, shard: InputShard, span: Iterable[_Outcome]) -> Span:
        pixels, rows, quarantined = [], [], []
        for sample, outcome in span:
            place = {"key": sample.key, "source": sample.source, "input_shard": shard.index, "index": sample.index}
            if isinstance(outcome, BadImage):
                quarantined.append({**place, "reason": str(outcome.reason), "detail": outcome.detail})
                continue
            pixels.append(outcome.pixels)
            facts = {"label": sample.label, "caption": sample.caption, "json": sample.json}
            rows.append({**place, **facts, "width": outcome.width, "height": outcome.height})
        return Span(
            index,
            self._encode_pixels(pixels),
            pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA),
            pa.Table.from_pylist(quarantined, schema=QUARANTINE_SCHEMA),
        )

    def _encode_pixels(self, pixels: list[np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        parts: list[dict[str, torch.Tensor]] = []
        batch_size = self._encoding.batch_size
        for first in range(0, len(pixels), batch_size):
            images = np.stack(pixels[first : first + batch_size])
            padded = min(size for size in (*PADDED_SIZES, batch_size) if len(images) <= size <= batch_size)
            batch = torch.zeros(padded, *images.shape[1:], dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            batch.numpy()[: len(images)] = images
            with self._within(self._sample_timeout * batch_size), self._autocast(self._encoding):
                codes = self._tokenizer.encode(batch.to(self._device, non_blocking=True))
            # Copied, as somebody's code may use its memory again; but fetched behind the last batch: a GPU is not waited for before.
            parts.append({level: values[: len(images)].clone() for level, values in codes.items()})
        with self._within(self._sample_timeout * batch_size):
            return {
                level: torch.cat([part[level] for part in parts]).cpu().numpy().astype(self._dtypes[level])
                for level in (parts[0] if parts else ())
            }


_Outcome = tuple[RawSample, Decoded | BadImage]


def _refs(shard: InputShard, first_span: int, stop_span: int | None) -> Iterator[SampleRef]:
    wanted = None if stop_span is None else (stop_span - first_span) * SPAN_SAMPLES
    return islice(list_samples(shard, start=first_span * SPAN_SAMPLES), wanted)
