"""Goes once through a corpus, or its hold-out: decoded images with their names, threads working ahead."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.holdout import Holdout, choose_holdout, hash_of_key, sample_name, to_batch
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import InputShard, Plan
from pipelines.corpus.problems import BadImage, CorpusError, Problem
from pipelines.corpus.samples import SampleRef, list_samples, load_sample
from vqmill.errors import CodesError

THREADS = 4
AHEAD = 16 * THREADS  # samples that are read and decoded before they are asked for
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedImage:
    """A sample that decodes.

    Attributes:
        name: as `sample_name` gives it.
        pixels: uint8 [C, S, S].
        label: of its class, -1 for none.
    """

    name: str
    pixels: NDArray[np.uint8]
    label: int


def walk_images(
    plan: Plan,
    preprocessing: Preprocessing,
    holdout: Holdout | None,
    problems: dict[str, Problem],
    limit: int | None = None,
) -> Iterator[NamedImage]:
    """The samples that decode, cropped at the centre, in the order of `holdout_batches`, whatever the threads do.

    Args:
        plan: the corpus.
        preprocessing: what every image is made into.
        holdout: only these samples; all if None.
        problems: takes up the samples that were met and do not decode, by name.
        limit: at most this many images; samples behind the last one are not looked at.
    """
    waiting: deque[tuple[str, Future[NamedImage | Problem]]] = deque()
    refs = _refs(plan, holdout)
    given = 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="decode") as threads:
        try:
            while limit is None or given < limit:
                while len(waiting) < AHEAD and (found := next(refs, None)) is not None:
                    shard, ref = found
                    waiting.append((sample_name(shard, ref), threads.submit(_decode, shard, ref, preprocessing)))
                if not waiting:
                    return
                name, future = waiting.popleft()
                outcome = future.result()
                if isinstance(outcome, Problem):
                    problems[name] = outcome
                else:
                    given += 1
                    yield outcome
        finally:
            threads.shutdown(cancel_futures=True)


def holdout_batches(
    plan: Plan,
    preprocessing: Preprocessing,
    fraction: float,
    batch_size: int,
    limit: int | None = None,
    problems: dict[str, Problem] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """The held-out samples, cropped at the centre, the same ones in the same order every time.

    Input shards are visited in an order drawn from their names, so that a limited number does not come from the first classes only.

    Args:
        plan: the corpus.
        preprocessing: as for training.
        fraction: as for training, above 0.
        batch_size: B; the last batch may be smaller.
        limit: at most this many samples.
        problems: takes up the held-out samples that were met and left out, named by `sample_name`.

    Yields:
        `images`: uint8 [B, C, S, S]; `label`: int64 [B], -1 for none. Samples that do not decode are left out, see `problems`.

    Raises:
        CodesError: the fraction is out of range or 0.
        CorpusError: no held-out sample decodes, or there are not two samples to divide.
    """
    if fraction == 0:
        raise CodesError("hold-out: a fraction of 0 holds out nothing to validate with; choose one above 0.")
    holdout = choose_holdout(plan, preprocessing, fraction)
    if holdout.forced:
        _log.warning(
            "%s: a hold-out of %g caught no usable sample, so one sample is held out alone", plan.corpus, fraction
        )
    found = walk_images(plan, preprocessing, holdout, {} if problems is None else problems, limit)
    empty = True
    while batch := list(islice(found, batch_size)):
        empty = False
        yield to_batch([image.pixels for image in batch], [image.label for image in batch])
    if empty:
        raise CorpusError(
            f"{plan.corpus}: none of the held-out images can be decoded. Look at its problems with: vqmill inspect '{plan.corpus}'"
        )


def _refs(plan: Plan, holdout: Holdout | None) -> Iterator[tuple[InputShard, SampleRef]]:
    for shard in sorted(plan.shards, key=lambda shard: hash_of_key(shard.name)):
        for ref in list_samples(shard):
            if holdout is None or ref.key in holdout:
                yield shard, ref


def _decode(shard: InputShard, ref: SampleRef, preprocessing: Preprocessing) -> NamedImage | Problem:
    sample = load_sample(shard, ref)
    try:
        pixels = decode_sample(sample, preprocessing).pixels
    except BadImage as bad:
        return bad.problem
    return NamedImage(sample_name(shard, ref), pixels, -1 if sample.label is None else sample.label)
