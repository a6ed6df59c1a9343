"""Batches from several stores, mixed by weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, cast

import numpy as np

from vqmill.errors import CodesError
from vqmill.order import philox
from vqmill.settings import different_settings
from vqmill.source import (
    Allocate,
    Batch,
    RowSource,
    RowStream,
    Shape,
    Split,
    checked_integer,
    num_threads,
    reading_threads,
    whole_number,
)
from vqmill.store import Codes


class MixedBatches:
    """An endless iterable over batches that hold rows of several stores, each in its share; every `iter()` goes on where it was left.

    Each store is gone through epoch after epoch by itself, each row once an epoch, in the order that `Codes.batches` gives. After any
    number of batches the rows of a store differ from its share by less than the number of stores, on every rank. A batch is as from
    `Codes.batches`, with `store` beside: int64 [B], the place of each row's store in the list; rows of the stores are spread evenly over it.
    """

    def __init__(
        self, stores: Sequence[tuple[Codes, float]], batch_size: int, *, shuffle: bool = False, seed: int = 0, rank: int = 0, world_size: int = 1,
        levels: Sequence[str] | None = None, rows: Sequence[np.ndarray[Any, Any] | None] | None = None, pool_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        """Checks that the stores can be mixed.

        Args:
            stores: each with its weight, above 0; weights need not sum to one.
            batch_size: rows of a batch on this rank.
            shuffle: whether each store's rows come in another order every epoch of it.
            seed: names the orders; each store has its own.
            rank: which part of each global batch is ours.
            world_size: how many ranks share it.
            levels: which levels to read; all by default.
            rows: for each store which rows, or None for all.
            pool_bytes: memory of this rank, divided among the stores by weight; by default that of `Codes.batches`, divided likewise.
            threads: that read and decode.

        Raises:
            CodesError: stores of different tokenizers or grids, without rows, or an option out of its range.
        """
        pairs = cast("Sequence[Any]", stores)
        if not all(isinstance(pair, tuple) and isinstance(pair[0], Codes) for pair in pairs):
            raise CodesError(
                "stores must be a list of pairs, each an open store and its weight: [(codes_a, 0.7), (codes_b, 0.3)]."
            )
        self._weights = _shares([weight for _, weight in stores])
        first = stores[0][0]
        for codes, _ in stores[1:]:
            _check_alike(first, codes)
        names = tuple(levels) if levels is not None else first.levels
        chosen = rows if rows is not None else [None] * len(stores)
        if len(chosen) != len(stores):
            raise CodesError(
                f"rows: {len(chosen)} selections for {len(stores)} stores; give one for each, None for all rows."
            )
        seed = checked_integer("seed", seed, 0, 2**64 - 1)
        self._sources = [
            RowSource(codes, names, which, shuffle, int(philox(seed, number).random_raw()))
            for number, ((codes, _), which) in enumerate(zip(stores, chosen, strict=True))
        ]
        for (codes, _), source in zip(stores, self._sources, strict=True):
            if source.num_rows == 0:
                raise CodesError(f"{codes.place.name}: no rows to mix in. Leave this store out, or choose other rows.")
        self._split = Split.checked(batch_size, rank, world_size)
        self._threads = num_threads(threads)
        self._shapes = [
            source.shape(self._split, None if pool_bytes is None else int(pool_bytes * weight), weight)
            for source, weight in zip(self._sources, self._weights, strict=True)
        ]
        self._places = [0] * len(stores)  # rows of each store that were given to all ranks
        self._given = [0] * len(stores)  # the same on each rank

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; JSON-able."""
        stores = [
            {**source.identity, "lanes": shape.lanes, "pool_rows": shape.pool_rows, "place": place, "given": given}
            for source, shape, place, given in zip(self._sources, self._shapes, self._places, self._given, strict=True)
        ]
        return {"weights": [str(weight) for weight in self._weights], "stores": stores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, with any batch size and world size.

        Raises:
            CodesError: taken with other weights, another seed or other rows, or damaged.
        """
        mine = [str(weight) for weight in self._weights]
        stores = cast("object", state.get("stores"))
        if state.get("weights") != mine or not isinstance(stores, list):
            raise CodesError(
                f"the loader's state was taken with weights {state.get('weights')}, this loader has {mine}."
            )
        found_stores = cast("list[object]", stores)
        if len(found_stores) != len(mine) or not all(isinstance(found, Mapping) for found in found_stores):
            raise CodesError(f"the loader's state is damaged: it has {len(found_stores)} stores, expected {len(mine)}.")
        states = cast("list[Mapping[str, Any]]", stores)
        for source, found in zip(self._sources, states, strict=True):
            source.check(found)
        self._shapes = [Shape.of(found) for found in states]
        self._places = [whole_number(found, "place") for found in states]
        self._given = [whole_number(found, "given") for found in states]

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(np.empty)

    def iterate(self, allocate: Allocate) -> Iterator[Batch]:
        """The same as `iter()`, with memory for the batches from `allocate(shape, dtype)`."""
        with reading_threads(self._threads) as executor:
            streams = [
                RowStream(
                    source,
                    source.memory(shape, self._split.world_size),
                    partial(source.order, shape=shape),
                    place,
                    self._split,
                    executor,
                )
                for source, shape, place in zip(self._sources, self._shapes, self._places, strict=True)
            ]
            while True:
                counts = self._counts()
                store = np.repeat(np.arange(len(counts)), counts)
                spread = np.argsort(
                    np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in counts]), kind="stable"
                )
                batch = self._sources[0].empty(self._split.batch_size, allocate)
                taken = self._sources[0].empty(self._split.batch_size, np.empty)
                first = 0
                for number, (stream, count) in enumerate(zip(streams, counts, strict=True)):
                    stream.take({name: values[first : first + count] for name, values in taken.items()})
                    first += count
                    self._given[number] += count
                    self._places[number] += count * self._split.world_size
                for name, values in taken.items():
                    np.take(values, spread, axis=0, out=batch[name], mode="clip")
                yield {**batch, "store": store[spread]}

    def _counts(self) -> list[int]:
        """How many rows of the next batch come from each store: its share rounded down, and the rest where most is owing."""
        size, total = self._split.batch_size, sum(self._given) + self._split.batch_size
        counts = [int(weight * size) for weight in self._weights]
        owing = [
            weight * total - given - count
            for weight, given, count in zip(self._weights, self._given, counts, strict=True)
        ]
        for _ in range(size - sum(counts)):
            place = owing.index(max(owing))
            counts[place] += 1
            owing[place] -= 1
        return counts


def _shares(weights: Sequence[float]) -> list[Fraction]:
    if not weights or not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise CodesError(f"weights must be above 0, one for each store, got {list(weights)}.")
    exact = [Fraction(weight) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def _check_alike(first: Codes, other: Codes) -> None:
    def facts(codes: Codes) -> dict[str, Any]:
        levels = {level.name: {"codebook_size": level.codebook_size, "grid": level.grid} for level in codes.spec.levels}
        found = {"levels": levels, "fingerprint": codes.spec.tokenizer.get("fingerprint")}
        return found | ({"class_names": codes.class_names} if first.class_names and other.class_names else {})

    sides = (first.place.name, other.place.name)
    differences = different_settings(facts(first), facts(other), sides)
    if differences:
        listing = "\n".join(f"  {line}" for line in differences)
        raise CodesError(
            f"{first.place.name} and {other.place.name} cannot be mixed, their codes mean different things:\n{listing}"
        )
