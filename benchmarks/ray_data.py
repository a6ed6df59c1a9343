"""The stages of a Ray Data pipeline that does what our encoder actors do. Import it only when Ray has been started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.samples import RawSample, read_samples
from pipelines.encoder import SpanEncoder

Batch = dict[str, Any]


class EncodeShard:
    """Reads, decodes and encodes whole input shards."""

    def __init__(self, build: Callable[[], Any]) -> None:
        from benchmarks.tokenizing import encoder_of

        self._encoder: SpanEncoder = encoder_of(build)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Codes, span by span."""
        for shard in batch["shard"]:
            for span in self._encoder.spans(shard):
                yield {"key": np.array(span.samples["key"].to_pylist()), **span.codes}


def read_shard(row: Batch) -> Iterator[Batch]:
    """The files of an input shard."""
    for sample in read_samples(row["shard"]):
        yield {"key": sample.key, "image": sample.image}


class Decode:
    """Files to pixels."""

    def __init__(self, size: int) -> None:
        self._preprocessing = Preprocessing(size=size, channels=3)

    def __call__(self, batch: Batch) -> Batch:
        """Pixels of a batch."""
        decoded = [
            decode_sample(RawSample(key, "", index, image), self._preprocessing).pixels
            for index, (key, image) in enumerate(zip(batch["key"], batch["image"], strict=True))
        ]
        return {"key": batch["key"], "pixels": np.stack(decoded)}


class Encode:
    """Pixels to codes."""

    def __init__(self, build: Callable[[], Any]) -> None:
        torch.set_num_threads(1)
        self._model = build()

    def __call__(self, batch: Batch) -> Batch:
        """Codes of a batch."""
        codes = self._model.encode(torch.from_numpy(batch["pixels"]))
        return {"key": batch["key"], **{level: values.numpy().astype(np.uint16) for level, values in codes.items()}}
