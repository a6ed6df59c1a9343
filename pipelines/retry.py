"""Plans in which samples that were set aside are tried again, behind all others.

Of every input shard that has such samples there is one more at the end of the plan, which holds these samples only. Where they lay first
their problems are told as they were, so that lost Zarr shards can be made again although the samples may be good by now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import pyarrow as pa

from pipelines.corpus.plan import InputShard, Plan, Retried
from pipelines.corpus.problems import Problem, Reason
from pipelines.corpus.samples import list_samples
from vqmill.errors import CodesError, UsageError
from vqmill.layout import quarantine_file
from vqmill.places import Place
from vqmill.retries import hash_rows, hash_samples
from vqmill.spec import Segment, StoreSpec
from vqmill.store import Codes
from vqmill.tables import QUARANTINE_SCHEMA


@dataclass(frozen=True)
class SetAside:
    """A quarantine line: sample `index` of an input shard of the corpus, and why."""

    input_shard: int
    index: int
    problem: Problem


def set_aside(table: pa.Table) -> list[SetAside]:
    """The lines of a quarantine table.

    Raises:
        CodesError: a reason that is not of the closed list.
    """
    try:
        return [
            SetAside(line["input_shard"], line["index"], Problem(Reason(line["reason"]), line["detail"]))
            for line in table.to_pylist()
        ]
    except ValueError as error:
        raise CodesError(f"quarantine: {error}; the store was made by another vqmill. Use that one.") from error


def tried_again(store: Place, spec: StoreSpec) -> list[SetAside]:
    """The quarantine lines that retries of a store have taken up; no part behind them is read, for it may be lost.

    Raises:
        CodesError: a part that holds some is missing or damaged.
    """
    wanted = sum(segment.retries for segment in spec.segments)
    if not wanted:
        return []
    codes = Codes(store, spec)
    parts = [QUARANTINE_SCHEMA.empty_table()]
    for shard in range(spec.num_commits):
        if sum(part.num_rows for part in parts) < wanted:
            parts.append(codes.table(quarantine_file(shard), QUARANTINE_SCHEMA))
    lines = pa.concat_tables(parts)
    if lines.num_rows < wanted:
        raise CodesError(
            f"{store.name}: {lines.num_rows:,} samples are set aside, {wanted:,} were tried again. See: vqmill verify {store.name}"
        )
    return set_aside(lines.slice(0, wanted))


def corpus_totals(segments: Sequence[Segment]) -> list[int]:
    """Where in the corpus segments end: samples up to there, each counted once."""
    retries = np.cumsum([segment.retries for segment in segments])
    return [segment.num_samples - int(again) for segment, again in zip(segments, retries, strict=True)]


def with_retries(plan: Plan, segments: Sequence[Segment], lines: Sequence[SetAside]) -> Plan:
    """A corpus with a store's retries where they lie in it.

    Args:
        plan: the corpus, cut where the segments end.
        segments: the store's.
        lines: from `tried_again`.
    """
    corpus = iter(plan.shards)
    shards: list[InputShard] = []
    behind = 0
    for segment in segments:
        if segment.retries:
            shards = _trying(shards, lines[behind : behind + segment.retries])
            behind += segment.retries
        while len(shards) < segment.input_shards and (shard := next(corpus, None)):
            shards.append(shard)
    return replace(plan, shards=(*shards, *corpus))


def retry_plan(plan: Plan, found: StoreSpec, tried: Sequence[SetAside], codes: Codes) -> Plan:
    """The plan that tries again all that a finished store has set aside, and nothing that the corpus has more.

    Files may have been restored meanwhile, so that sizes differ from those in the store's plan. Then every sample must still have its
    name and place.

    Args:
        plan: the corpus of now.
        found: the store's specification.
        tried: from `tried_again`.
        codes: the store.

    Raises:
        UsageError: the corpus is not the one that the store was made from.
        CodesError: the store's tables are damaged.
    """
    last = found.segments[-1]
    whole = with_retries(plan.cut_at(corpus_totals(found.segments)), found.segments, tried)
    held = whole.first(last.input_shards)
    if held.num_samples != last.num_samples or held.digest != last.plan:
        _require_same_names(held, codes)
    return replace(held, shards=tuple(_trying(held.shards, set_aside(codes.quarantine()))))


def _trying(shards: Sequence[InputShard], lines: Sequence[SetAside]) -> list[InputShard]:
    """Input shards with these samples tried again behind them; where each was tried last, its problem is known from now on."""
    first = {shard.index: place for place, shard in enumerate(shards) if shard.kind != "retry"}
    again = {
        (shard.index, index): place
        for place, shard in enumerate(shards)
        if isinstance(shard.content, Retried)
        for index in shard.content.indices
    }
    known: dict[int, list[tuple[int, Problem]]] = {}
    more: list[InputShard] = []
    for number, group in groupby(lines, key=lambda line: line.input_shard):
        if number not in first:
            continue  # the corpus has fewer input shards than the store's, which the plan's digest shows
        samples = list(group)
        for line in samples:
            place = again.get((number, line.index), first[number])
            known.setdefault(place, []).append((line.index, line.problem))
        base = replace(shards[first[number]], known=())
        indices = tuple(line.index for line in samples)
        num_bytes = base.num_bytes * len(indices) // max(1, base.num_samples)
        more.append(InputShard(number, f"{base.name} again", len(indices), num_bytes, Retried(base, indices)))
    told = [replace(shard, known=(*shard.known, *known.get(place, ()))) for place, shard in enumerate(shards)]
    return [*told, *more]


def _require_same_names(plan: Plan, codes: Codes) -> None:
    """Whether each sample of a corpus is in a store under the same name, from the same place, and no other is.

    Raises:
        UsageError: one is not.
    """
    there = np.unique(np.concatenate([hash_rows(codes), hash_samples(codes.quarantine())]))
    held = set(there.tolist())
    number = 0
    for sample, name in _names(plan):
        number += 1
        if sample not in held:
            raise UsageError(
                f"{plan.corpus}: holds {name}, which {codes.place.name} does not hold at this place. Samples are tried again in the corpus that they "
                "were set aside in: its files may be restored, but none may come between them or go. Restore it, or make another store."
            )
    if number != len(there):
        raise UsageError(
            f"{plan.corpus}: has {number:,} samples where {codes.place.name} has {len(there):,}. Name the whole corpus, as it was."
        )


def _names(plan: Plan) -> Iterator[tuple[int, str]]:
    """A hash of each sample of the corpus, as `hash_samples` gives them, and words for it."""
    for shard in plan.shards:
        if shard.kind != "retry":
            for ref in list_samples(shard):
                yield hash((shard.index, ref.index, ref.source, ref.key)), f"sample {ref.key!r} of {ref.source}"
