"""The command `inspect` on a corpus: every sample is read and decoded; counts, sizes, labels, and what would be quarantined and why."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Decoded, Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.corpus.problems import BadImage
from pipelines.corpus.samples import RawSample, read_samples
from pipelines.progress import meter
from pipelines.results import OK, QUARANTINED, Result
from vqmill.commits import Counts

PROBE_SIZE = 32  # what images are decoded to when only their health is of interest
THREADS = 4
LISTED = 10


def inspect_corpus(plan: Plan) -> Result:
    """Reads and decodes everything in a corpus, and says what is there."""
    reasons: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    kinds: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    problems: list[dict[str, str]] = []
    examples: list[str] = []
    done = 0
    with meter("reading the corpus", "samples") as show, ThreadPoolExecutor(THREADS) as threads:
        for sample, future in _decoded(plan, threads):
            done += 1
            try:
                decoded = future.result()
            except BadImage as problem:
                reasons[str(problem.reason)] += 1
                place = {"source": sample.source, "key": sample.key}
                problems.append({**place, "reason": str(problem.reason), "detail": problem.detail})
                if len(examples) < LISTED:
                    examples.append(f"  {problem.reason}: {sample.source}: {sample.key} ({problem.detail})")
            else:
                sizes[(decoded.width, decoded.height)] += 1
                kinds[decoded.kind] += 1
                if sample.label is not None:
                    labels[sample.label] += 1
            show(done, plan.num_samples, f"{reasons.total():,} bad" if reasons else "")
    counts = Counts(encoded=sizes.total(), quarantined=reasons.total(), skipped=sum(plan.skipped.values()))
    lines = [
        f"{plan.corpus}: a corpus of {len(plan.shards):,} input shards, {plan.num_samples:,} samples, {plan.num_bytes / 1e6:,.1f} MB"
    ]
    lines.append(f"good: {counts.encoded:,}; bad: {counts.quarantined:,}; skipped: {counts.skipped:,}")
    if sizes:
        common = ", ".join(f"{width}x{height} ({count:,})" for (width, height), count in sizes.most_common(3))
        lines.append(f"sizes: {len(sizes):,} different, most often {common}")
        lines.append("formats and modes: " + ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common()))
    named = (
        f", named {', '.join(plan.class_names[:5])}{' ...' if len(plan.class_names) > 5 else ''}"
        if plan.class_names
        else ""
    )
    lines.append(f"labels: {labels.total():,} samples in {len(labels):,} classes{named}")
    lines += [f"bad, {reason}: {count:,}" for reason, count in sorted(reasons.items())] + examples
    if len(problems) > len(examples):
        lines.append(f"  ... and {len(problems) - len(examples):,} more; --json lists all of them")
    lines += [f"skipped, {reason}: {count:,}" for reason, count in sorted(plan.skipped.items())]
    facts = {
        "kind": "corpus",
        "input_shards": len(plan.shards),
        "reasons": dict(reasons),
        "kinds": dict(kinds),
        "classes": len(labels),
        "skipped_reasons": dict(plan.skipped),
        "problems": problems,
    }
    code = QUARANTINED if problems else OK
    return Result(lines, counts, 0, facts, code)


def _decoded(plan: Plan, threads: ThreadPoolExecutor) -> Iterator[tuple[RawSample, Future[Decoded]]]:
    """Every sample with its decoded image to come; a bounded number of them in flight."""
    preprocessing = Preprocessing(size=PROBE_SIZE, channels=3)
    samples = (sample for shard in plan.shards for sample in read_samples(shard))
    waiting: deque[tuple[RawSample, Future[Decoded]]] = deque()
    for sample in samples:
        waiting.append((sample, threads.submit(decode_sample, sample, preprocessing)))
        if len(waiting) >= 16 * THREADS:
            yield waiting.popleft()
    yield from waiting
