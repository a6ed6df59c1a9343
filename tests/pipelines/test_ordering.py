"""Zarr shards are cut in corpus order, whatever the spans look like and wherever a job begins again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipelines.ordering import ShardCutter, ShardJob
from vqmill.commits import Counts, Cursor

Span = tuple[int, int, int, int]  # input shard, span, rows, quarantined

corpora = st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=4), min_size=1, max_size=6)


def spans_of(corpus: list[list[tuple[int, int]]]) -> list[Span]:
    return [(unit, span, rows, bad) for unit, spans in enumerate(corpus) for span, (rows, bad) in enumerate(spans)]


def cut(
    spans: list[Span], units: int, rows_per_shard: int, first_shard: int = 0, cursor: Cursor | None = None
) -> list[ShardJob[Span]]:
    cutter: ShardCutter[Span] = ShardCutter(rows_per_shard, ShardJob(first_shard), cursor or Cursor())
    jobs = [job for span in spans for job in cutter.add(span[0], span[1], span[2], Counts(span[2], span[3]), span)]
    return [*jobs, *cutter.finish(units)]


def rows_of(job: ShardJob[Span]) -> list[tuple[int, int, int]]:
    return [(piece.payload[0], piece.payload[1], row) for piece in job.pieces for row in range(piece.first, piece.stop)]


def quarantine_of(job: ShardJob[Span]) -> list[tuple[int, int, int]]:
    return [
        (piece.payload[0], piece.payload[1], bad)
        for piece in job.pieces
        if piece.ends_span
        for bad in range(piece.payload[3])
    ]


@given(corpora, st.integers(1, 12))
def test_every_row_and_every_quarantine_row_once_and_in_order(corpus: list[list[tuple[int, int]]], size: int) -> None:
    spans = spans_of(corpus)
    jobs = cut(spans, len(corpus), size)
    assert [row for job in jobs for row in rows_of(job)] == [(u, s, r) for u, s, rows, _ in spans for r in range(rows)]
    assert [row for job in jobs for row in quarantine_of(job)] == [
        (u, s, b) for u, s, _, bad in spans for b in range(bad)
    ]
    assert sum((job.counts for job in jobs), Counts()) == sum(
        (Counts(rows, bad) for _, _, rows, bad in spans), Counts()
    )
    assert all(job.rows == size for job in jobs[:-1])
    assert all(job.rows == len(rows_of(job)) for job in jobs)
    assert [job.shard for job in jobs] == list(range(len(jobs)))


@given(corpora, st.integers(1, 12))
def test_resuming_at_any_commit_gives_the_same_shards(corpus: list[list[tuple[int, int]]], size: int) -> None:
    spans = spans_of(corpus)
    jobs = cut(spans, len(corpus), size)
    for done, job in enumerate(jobs, start=1):
        start = job.cursor
        left = [span for span in spans if (span[0], span[1]) >= (start.input_shard, start.span)]
        again = cut(left, len(corpus), size, done, start)
        assert [(j.shard, rows_of(j), quarantine_of(j), j.counts, j.cursor) for j in again] == [
            (j.shard, rows_of(j), quarantine_of(j), j.counts, j.cursor) for j in jobs[done:]
        ]


@given(corpora, corpora, st.integers(1, 12))
def test_a_longer_corpus_goes_on_in_the_last_shard_opened_again(
    old: list[list[tuple[int, int]]], new: list[list[tuple[int, int]]], size: int
) -> None:
    spans = spans_of([*old, *new])
    before = cut([span for span in spans if span[0] < len(old)], len(old), size)
    whole = cut(spans, len(old) + len(new), size)
    if not sum((job.counts for job in before), Counts()).seen:
        return  # a store of no samples is never made, so there is nothing to open
    last = before[-1]
    cutter: ShardCutter[Span] = ShardCutter(size, ShardJob(last.shard, rows=last.rows, counts=last.counts), last.cursor)
    jobs = [
        job
        for span in spans
        if span[0] >= len(old)
        for job in cutter.add(span[0], span[1], span[2], Counts(span[2], span[3]), span)
    ]
    jobs += cutter.finish(len(old) + len(new))
    jobs[0].pieces[:0] = last.pieces
    assert [*before[:-1], *jobs] == whole
