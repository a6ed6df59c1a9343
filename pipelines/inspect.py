"""The command `inspect`: what something is."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.check import usage_lines
from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Decoded, Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.corpus.problems import BadImage
from pipelines.corpus.samples import RawSample, read_samples
from pipelines.outputs import PARTIAL_SUFFIX, SETTINGS_FILE, WORK
from pipelines.planning import planned
from pipelines.progress import meter
from pipelines.results import OK, QUARANTINED, Result
from pipelines.train import FINAL_FILE
from vqmill.commits import Counts
from vqmill.layout import GROUP, read_spec
from vqmill.places import FileAt, place_of
from vqmill.spec import MISSING_LABEL, StoreSpec
from vqmill.store import Codes
from vqmill.usage import StoreUsage
from vqmill.writer import read_commits

PROBE_SIZE = 32  # what images are decoded to when only their health is of interest
THREADS = 4
LISTED = 10
BLOCK_ROWS = 65_536


def inspect(path: str) -> Result:
    """Runs the command; see `vqmill inspect --help`."""
    if FileAt(place_of(path), GROUP).exists() if "://" in path else (Path(path) / GROUP).is_file():
        return _inspect_store(path)
    place = Path(path)
    for name in ("tokenizer.safetensors", "prior.safetensors"):
        if (place / name).is_file() or (place.name == name and place.is_file()):
            return _inspect_checkpoint(place, prior=name.startswith("prior"))
    if place.name.endswith(PARTIAL_SUFFIX) and (place / SETTINGS_FILE).is_file():
        return _inspect_unfinished(place)
    return _inspect_corpus(planned(path))


def _inspect_unfinished(path: Path) -> Result:
    command = json.loads((path / SETTINGS_FILE).read_bytes()).get("command", "a command")
    trained = sorted(file.parent.name for file in (path / WORK).glob(f"*/{FINAL_FILE}"))
    lines = [f"{path}: an unfinished run of {command}; give the same command again to go on with it"]
    if trained:
        lines.append(f"levels that are trained: {', '.join(trained)}")
    return Result(lines, facts={"kind": "unfinished", "command": command, "trained": trained})


def _inspect_store(path: str) -> Result:
    place = place_of(path)
    codes = Codes(place, read_spec(place))
    spec = codes.spec
    usage = StoreUsage(spec.levels)
    total = len(codes) * len(spec.levels)
    with meter("reading codes", "rows") as show:
        for number, level in enumerate(spec.levels):
            for first in range(0, len(codes), BLOCK_ROWS):
                usage.add(level.name, codes[level.name][first : first + BLOCK_ROWS])
                show(number * len(codes) + min(len(codes), first + BLOCK_ROWS), total)
    disk = sum(size for file, size in place.list().items() if file.split("/")[0] in codes.levels)
    raw = len(codes) * spec.row_bytes
    labels = codes.labels
    labelled = int((labels != MISSING_LABEL).sum())
    quarantine = codes.quarantine()
    state = "complete" if spec.complete else "UNFINISHED: run the same `vqmill tokenize` command to finish it"
    lines = [
        f"{path}: a code store, {state}: {len(codes):,} rows in {spec.num_commits} Zarr shards of {spec.rows_per_shard:,}",
        _origin(spec),
        f"{labelled:,} rows with labels, {len(np.unique(labels[labels != MISSING_LABEL]))} classes",
        *usage_lines(spec, usage.used, usage.perplexity),
        f"codes on disk: {disk / 1e6:,.2f} MB, {raw / max(disk, 1):.2f} times smaller than raw {raw / 1e6:,.2f} MB",
        f"quarantined: {quarantine.num_rows:,} samples" + (f", in {path}/quarantine" if quarantine.num_rows else ""),
    ]
    lines += [
        f"  {row['reason']}: {row['source']}: {row['key']} ({row['detail']})"
        for row in quarantine.slice(0, LISTED).to_pylist()
    ]
    facts = {
        "kind": "store",
        "complete": spec.complete,
        "used_codes": usage.used,
        "perplexity": usage.perplexity,
        "disk_bytes": disk,
        "raw_bytes": raw,
    }
    commits = read_commits(codes.place, range(spec.num_commits))
    counts = sum(
        (commit.counts for commit in commits), Counts(skipped=sum(dict(spec.corpus.get("skipped", {})).values()))
    )
    return Result(lines, counts, len(codes), facts, quarantine=f"{path}/quarantine")


def _origin(spec: StoreSpec) -> str:
    fingerprint = spec.tokenizer["fingerprint"]
    if drawn := spec.corpus.get("sampled"):
        return f"drawn by prior {drawn['prior']}, label {drawn['label']}, seed {drawn['seed']}; for tokenizer {fingerprint}"
    made = f"{spec.tokenizer.get('preset')}, {spec.tokenizer.get('precision')}"
    if module := spec.tokenizer.get("module"):
        made += f"; --tokenizer-module {module}"
    return f"made from {spec.corpus.get('description')} by tokenizer {fingerprint} ({made})"


def _inspect_checkpoint(path: Path, *, prior: bool) -> Result:
    if prior:
        import priors as kind
    else:
        import tokenizer as kind
    model = kind.load(path)
    config, facts = model.config.to_dict(), model.config.to_dict()
    name = "prior" if prior else "tokenizer"
    lines = [
        f"{path}: a {name}, preset {config['preset']}, {model.num_parameters:,} parameters, fingerprint {model.fingerprint}"
    ]
    if prior:
        lines += _level_lines(config.pop("levels"), config.pop("networks"))
    lines += [f"  {key}: {value}" for key, value in config.items() if key != "preset"]
    return Result(
        lines,
        facts={"kind": name, "fingerprint": model.fingerprint, "parameters": model.num_parameters, "config": facts},
    )


def _level_lines(levels: list[dict[str, Any]], networks: list[dict[str, Any]]) -> list[str]:
    return [
        f"  level {level['name']}: {'x'.join(map(str, level['grid']))} codes of {level['codebook_size']}; "
        + ", ".join(f"{key} {value}" for key, value in network.items())
        for level, network in zip(levels, networks, strict=True)
    ]


def _inspect_corpus(plan: Plan) -> Result:
    reasons: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
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
