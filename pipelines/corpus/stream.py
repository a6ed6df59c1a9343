"""The pixels that training reads: endless, shuffled, augmented, divided among ranks, and resumed exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.holdout import choose_holdout, sample_name, to_batch
from pipelines.corpus.images import Augmentation, Preprocessing, View
from pipelines.corpus.plan import InputShard, Plan
from pipelines.corpus.problems import BadImage, CorpusError, Problem
from pipelines.corpus.samples import SampleRef, list_samples, load_sample
from vqmill.errors import CodesError

SHUFFLE_BUFFER = 16_384  # references, some 20 MB of them; pixels and files are not held
MAX_HELD_BYTES = (
    2 << 30
)  # of files in a pool all the same, where tars are packed with gzip; two pools are there at a time
ITEMS_PER_TASK = (
    16  # what one thread decodes at a time: handing over single small images would cost more than decoding them
)
PATIENCE = 1000  # undecodable samples in a row, beyond two epochs of them, that end a stream


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a stream stands.

    Attributes:
        epoch: passes over the corpus that are complete.
        pool: the pool of this epoch that the next sample is in, or ends before.
        base: samples that lie before this pool, since the very first.
        ordinal: the first sample not given to any rank, counted in the same way.
    """

    epoch: int = 0
    pool: int = 0
    base: int = 0
    ordinal: int = 0


@dataclass(frozen=True, slots=True)
class _Pool:
    """A stretch of the global order: references in shuffled order with the views that training takes of them."""

    entries: list[tuple[InputShard, SampleRef]]
    views: list[View]
    problems: dict[str, Problem]


@dataclass(frozen=True, slots=True)
class _Item:
    """One sample on its way: the cursor is the stream's once it has been taken."""

    cursor: Cursor
    shard: InputShard
    ref: SampleRef
    view: View


@dataclass(frozen=True, slots=True)
class _Result:
    """What became of an item: pixels uint8 [C, S, S], or a problem and the name of the sample that has it."""

    cursor: Cursor
    name: str
    outcome: NDArray[np.uint8] | Problem
    label: int = -1


class TrainingStream(Iterator[dict[str, torch.Tensor]]):
    """Batches without end: `images` uint8 [B, C, S, S] in [0, 255] and `label` int64 [B], -1 for none.

    There is one global order of samples, a function of the plan, the seed, the hold-out and the size of the shuffle buffer. In every epoch
    the input shards are shuffled; the samples in them are taken up into pools as large as the shuffle buffer, and each pool is shuffled. Of
    this order rank r of w takes every w-th sample. So neither the number of threads nor their timing matters, and a stream resumes by
    reading one pool's headers. Samples that cannot be used are left out, and kept in `quarantined`.

    Attributes:
        holdout: which keys are never given.
        quarantined: the problems met so far, by sample: its key, for tars `SHARD[INDEX] KEY` since keys need not be unique there.
    """

    def __init__(
        self,
        plan: Plan,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        holdout_fraction: float = 0.0,
        num_threads: int = 2,
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ) -> None:
        """Prepares a stream; nothing is decoded until the first batch is asked for.

        Args:
            plan: the corpus.
            preprocessing: what every image is made into.
            augmentation: what varies from epoch to epoch.
            batch_size: B of this rank; all batches are full.
            seed: of the order and the augmentation, at least 0.
            rank: which part of the global order this stream gives, from 0.
            world_size: how many parts there are.
            holdout_fraction: of all samples, in [0, 1), see `choose_holdout`.
            num_threads: that decode.
            shuffle_buffer: samples in a pool.

        Raises:
            CodesError: an argument is out of range.
            CorpusError: there are not two usable samples to divide into training and hold-out.
        """
        for name, value, least in (
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("rank", rank, 0), ("world_size", world_size, 1),
            ("num_threads", num_threads, 1), ("shuffle_buffer", shuffle_buffer, 1),
        ):  # fmt: skip
            if value < least:
                raise CodesError(f"training stream: {name} must be at least {least}, not {value}.")
        if rank >= world_size:
            raise CodesError(f"training stream: rank must be below world_size {world_size}, not {rank}.")
        self._plan, self._preprocessing, self._augmentation = plan, preprocessing, augmentation
        self._batch_size, self._seed, self._rank, self._world_size = batch_size, seed, rank, world_size
        self._num_threads, self._shuffle_buffer = num_threads, shuffle_buffer
        self._holdout_fraction = holdout_fraction
        self.holdout = choose_holdout(plan, preprocessing, holdout_fraction)
        self.quarantined: dict[str, Problem] = {}
        self._cursor = Cursor()
        self._batches: Generator[dict[str, torch.Tensor]] | None = None

    @property
    def epoch(self) -> int:
        """Complete passes over the corpus."""
        return self._cursor.epoch

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._batches is None:
            self._batches = self._generate()
        return next(self._batches)

    def close(self) -> None:
        """Ends the threads; asking for a further batch starts them again, at the same place."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch it gave: a few JSON values, equal on all ranks unless some met undecodable samples."""
        cursor = self._cursor
        return {
            **self._identity(),
            "epoch": cursor.epoch,
            "pool": cursor.pool,
            "base": cursor.base,
            "ordinal": cursor.ordinal,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another stream stood: the batches to come are those it would have given.

        Raises:
            CodesError: the state is of another corpus, seed, hold-out or shuffle buffer.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                was = state.get(name)
                raise CodesError(
                    f"training stream: cannot resume: {name} is {value!r} now and was {was!r}. Use the same, or start anew."
                )
        self.close()
        self._cursor = Cursor(state["epoch"], state["pool"], state["base"], state["ordinal"])

    def _identity(self) -> dict[str, Any]:
        """All that decides the global order."""
        return {
            "plan_digest": self._plan.digest,
            "seed": self._seed,
            "holdout_fraction": self._holdout_fraction,
            "shuffle_buffer": self._shuffle_buffer,
        }

    def _generate(self) -> Generator[dict[str, torch.Tensor]]:
        executor = ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")
        try:
            images: list[np.ndarray] = []
            labels: list[int] = []
            failed = 0
            for result in self._results(executor):
                if isinstance(result.outcome, Problem):
                    self.quarantined[result.name] = result.outcome
                    failed += 1
                    if failed > 2 * self._plan.num_samples + PATIENCE:
                        detail = f"{result.name}: {result.outcome.detail}"
                        raise CorpusError(
                            f"{self._plan.corpus}: no image of it can be decoded; the last problem: {detail}"
                        )
                    continue
                failed = 0
                images.append(result.outcome)
                labels.append(result.label)
                if len(images) == self._batch_size:
                    self._cursor = result.cursor
                    yield to_batch(images, labels)
                    images, labels = [], []
        finally:
            executor.shutdown(cancel_futures=True)

    def _results(self, executor: ThreadPoolExecutor) -> Iterator[_Result]:
        """Decoded samples in order, a window of them ahead of the reader."""
        items = self._items(executor)
        ahead = 2 * max(self._num_threads, -(-self._batch_size // ITEMS_PER_TASK))
        window: deque[Future[list[_Result]]] = deque()
        while True:
            while len(window) < ahead:
                window.append(executor.submit(self._decode, list(islice(items, ITEMS_PER_TASK))))
            yield from window.popleft().result()

    def _decode(self, items: list[_Item]) -> list[_Result]:
        return [self._decode_one(item) for item in items]

    def _decode_one(self, item: _Item) -> _Result:
        sample = load_sample(item.shard, item.ref)
        try:
            pixels = decode_sample(sample, self._preprocessing, item.view).pixels
        except BadImage as bad:
            return _Result(item.cursor, sample_name(item.shard, item.ref), bad.problem)
        return _Result(item.cursor, "", pixels, -1 if sample.label is None else sample.label)

    def _items(self, executor: ThreadPoolExecutor) -> Iterator[_Item]:
        """This rank's part of the global order, from the cursor on. The next pool is read while this one is decoded."""
        cursor = self._cursor
        num_pools = -(-self._plan.num_samples // self._shuffle_buffer)
        reading = executor.submit(self._read_pool, cursor.epoch, cursor.pool)
        empty = 0
        while True:
            pool = reading.result()
            wraps = cursor.pool + 1 == num_pools
            following = (cursor.epoch + 1, 0) if wraps else (cursor.epoch, cursor.pool + 1)
            reading = executor.submit(self._read_pool, *following)
            self.quarantined.update(pool.problems)
            empty = 0 if pool.entries else empty + 1
            if empty >= num_pools:
                raise CorpusError(
                    f"{self._plan.corpus}: nothing to train on: all its samples have problems or are held out."
                )
            for ordinal in range(max(cursor.ordinal, cursor.base), cursor.base + len(pool.entries)):
                if ordinal % self._world_size == self._rank:
                    shard, ref = pool.entries[ordinal - cursor.base]
                    # All ranks take one sample of each round of `world_size`; the next round begins at the same ordinal for all of them.
                    after = Cursor(
                        cursor.epoch, cursor.pool, cursor.base, (ordinal // self._world_size + 1) * self._world_size
                    )
                    yield _Item(after, shard, ref, pool.views[ordinal - cursor.base])
            cursor = Cursor(*following, cursor.base + len(pool.entries), cursor.ordinal)

    def _read_pool(self, epoch: int, number: int) -> _Pool:
        """Lists the samples of one pool; no image is read, but for those of gzip tars."""
        order = _random(self._seed, epoch, 0).permutation(len(self._plan.shards))
        first, last = number * self._shuffle_buffer, (number + 1) * self._shuffle_buffer
        listed: list[tuple[InputShard, SampleRef]] = []
        begin = held = 0
        for shard_index in order:
            shard = self._plan.shards[shard_index]
            start, stop = max(first - begin, 0), min(last - begin, shard.num_samples)
            for ref in islice(list_samples(shard, start), max(stop - start, 0)):
                listed.append((shard, ref))
                held += ref.held_bytes
                if held > MAX_HELD_BYTES:
                    raise CorpusError(
                        f"{self._plan.corpus}: {len(listed):,} samples of tars that are packed with gzip take {held / 1e9:.1f} GB of memory, and training "
                        f"shuffles {self._shuffle_buffer:,} at a time. Unpack the tars (gunzip): of plain ones no data is held."
                    )
            begin += shard.num_samples
        problems = {sample_name(shard, ref): ref.problem for shard, ref in listed if ref.problem is not None}
        kept = [entry for entry in listed if entry[1].problem is None and entry[1].key not in self.holdout]
        random = _random(self._seed, epoch, number + 1)
        entries = [kept[place] for place in random.permutation(len(kept))]
        return _Pool(entries, [self._augmentation.view(draws) for draws in random.random((len(kept), 2))], problems)


def _random(*numbers: int) -> np.random.Generator:
    """A generator that is a function of the numbers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))
