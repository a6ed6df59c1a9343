"""The command `inspect`: what something is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.check import usage_lines
from pipelines.inspect_corpus import inspect_corpus
from pipelines.inspect_runs import inspect_evaluation, inspect_scores, inspect_unfinished, made_by, results_of
from pipelines.outputs import recorded_command
from pipelines.planning import planned
from pipelines.progress import meter
from pipelines.results import Result, preprocessing_line
from pipelines.tokenize_command import run_file
from vqmill.commits import Counts, counts_of
from vqmill.errors import UsageError
from vqmill.kinds import kind_of, unfinished_of
from vqmill.layout import GROUP, read_spec
from vqmill.places import FileAt, place_of
from vqmill.spec import MISSING_LABEL, StoreSpec
from vqmill.store import Codes
from vqmill.usage import StoreUsage
from vqmill.writer import read_commits

LISTED = 10
BLOCK_ROWS = 65_536


def inspect(path: str, *, gzip_tars: bool = False) -> Result:
    """Runs the command; see `vqmill inspect --help`."""
    remote = "://" in path
    place = Path(path) if remote else unfinished_of(Path(path)) or Path(path)
    kind = kind_of(place)
    if remote:
        kind = "store" if FileAt(place_of(path), GROUP).exists() else None
    if kind is None:
        return inspect_corpus(planned(path, gzip_tars=gzip_tars))
    if gzip_tars:
        raise UsageError(f"{path}: --gzip-tars says how a corpus is read, and this is none. Leave it out.")
    match kind:
        case "store" | "zarr":
            return _inspect_store(path if remote else str(place))
        case "tokenizer":
            return _inspect_tokenizer(place)
        case "prior":
            return _inspect_prior(place)
        case "evaluation":
            return inspect_evaluation(place)
        case "scores":
            return inspect_scores(place)
        case "unfinished":
            return inspect_unfinished(place)


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
    state = "complete" if spec.complete else f"UNFINISHED, of {spec.segments[-1].num_samples:,} samples"
    lines = [
        f"{path}: a code store, {state}: {len(codes):,} rows in {spec.num_commits} Zarr shards of {spec.rows_per_shard:,}",
        _origin(spec),
        *([f"images: {words}"] if (words := preprocessing_line(spec.preprocessing)) else []),
        f"{labelled:,} rows with labels, {len(np.unique(labels[labels != MISSING_LABEL]))} classes",
        *(usage_lines(spec, usage.used, usage.perplexity) if len(codes) else ()),
        f"codes on disk: {disk / 1e6:,.2f} MB, {raw / max(disk, 1):.2f} times smaller than raw {raw / 1e6:,.2f} MB",
        f"quarantined: {quarantine.num_rows:,} samples" + (f", in {path}/quarantine" if quarantine.num_rows else ""),
    ]
    lines += [
        f"  {row['reason']}: {row['source']}: {row['key']} ({row['detail']})"
        for row in quarantine.slice(0, LISTED).to_pylist()
    ]
    if (more := quarantine.num_rows - LISTED) > 0:
        counts = Counter(map(str, quarantine["reason"].to_pylist()))
        lines.append(
            f"  ... and {more:,} more; in all {', '.join(f'{count:,} {reason}' for reason, count in counts.most_common())}"
        )
    if command := recorded_command(run_file(path), path):
        lines.append(f"{'made by' if spec.complete else 'to go on with it'}: {command}")
    facts = {
        "kind": "store",
        "complete": spec.complete,
        "used_codes": usage.used,
        "perplexity": usage.perplexity,
        "disk_bytes": disk,
        "raw_bytes": raw,
    }
    commits = read_commits(codes.place, range(spec.num_commits))
    counts = counts_of(spec, commits) + Counts(skipped=sum(dict(spec.corpus.get("skipped", {})).values()))
    return Result(lines, counts, len(codes), facts, quarantine=f"{path}/quarantine")


def _origin(spec: StoreSpec) -> str:
    fingerprint = spec.tokenizer["fingerprint"]
    if drawn := spec.corpus.get("sampled"):
        return f"drawn by prior {drawn['prior']}, label {drawn['label']}, seed {drawn['seed']}; for tokenizer {fingerprint}"
    made = f"{spec.tokenizer.get('preset')}, {spec.tokenizer.get('precision')}"
    if module := spec.tokenizer.get("module"):
        made += f"; --tokenizer-module {module}"
    return f"made from {spec.corpus.get('description')} by tokenizer {fingerprint} ({made})"


def _inspect_tokenizer(path: Path) -> Result:
    import tokenizer

    model = tokenizer.load(path)
    config = model.config.to_dict()
    fields = [f"  {key}: {value}" for key, value in config.items() if key != "preset"]
    return _checkpoint("tokenizer", path, model.fingerprint, model.num_parameters, config, fields, {})


def _inspect_prior(path: Path) -> Result:
    import priors

    model = priors.load(path)
    config, names = model.config.to_dict(), list(model.class_names)
    lines = _level_lines(config["levels"], config["networks"])
    lines += [f"  {key}: {config[key]}" for key in config if key not in ("preset", "levels", "networks")]
    if names:
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(names[:LISTED]))
        lines.append(f"  classes: {listed}{' ...' if len(names) > LISTED else ''}")
    return _checkpoint("prior", path, model.fingerprint, model.num_parameters, config, lines, {"class_names": names})


def _checkpoint(
    kind: str, path: Path, fingerprint: str, parameters: int, config: dict[str, Any], lines: list[str], facts: dict[str, Any]
) -> Result:  # fmt: skip
    """What a checkpoint is, how good its training found it, its settings, and the command that made it."""
    folder = path if path.is_dir() else path.parent
    head = f"{path}: a {kind}, preset {config['preset']}, {parameters:,} parameters, fingerprint {fingerprint}"
    return Result(
        [head, *results_of(folder, fingerprint), *lines, *made_by(folder)],
        facts={"kind": kind, "fingerprint": fingerprint, "parameters": parameters, "config": config, **facts},
    )


def _level_lines(levels: list[dict[str, Any]], networks: list[dict[str, Any]]) -> list[str]:
    return [
        f"  level {level['name']}: {'x'.join(map(str, level['grid']))} codes of {level['codebook_size']}; "
        + ", ".join(f"{key} {value}" for key, value in network.items())
        for level, network in zip(levels, networks, strict=True)
    ]
