"""The command `inspect`: what something is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.check import usage_lines
from pipelines.inspect_corpus import inspect_corpus
from pipelines.inspect_runs import inspect_evaluation, inspect_scores, inspect_unfinished, made_by
from pipelines.outputs import disk_bytes, recorded_command
from pipelines.planning import planned
from pipelines.progress import meter
from pipelines.results import Result
from pipelines.tokenize_command import run_file
from vqmill.commits import Commit, Counts, counts_of
from vqmill.kinds import kind_of, unfinished_of
from vqmill.layout import commit_file, read_spec
from vqmill.places import Folder
from vqmill.spec import MISSING_LABEL, StoreSpec
from vqmill.store import Codes
from vqmill.usage import StoreUsage

LISTED = 10
BLOCK_ROWS = 65_536


def inspect(path: str) -> Result:
    """Runs the command; see `vqmill inspect --help`."""
    place = unfinished_of(Path(path)) or Path(path)
    match kind_of(place):
        case "store" | "zarr":
            return _inspect_store(place)
        case "tokenizer" | "prior" as kind:
            return _inspect_checkpoint(place, kind)
        case "evaluation":
            return inspect_evaluation(place)
        case "scores":
            return inspect_scores(place)
        case "unfinished":
            return inspect_unfinished(place)
        case None:
            return inspect_corpus(planned(path))


def _inspect_store(path: Path) -> Result:
    codes = Codes(Folder(path), read_spec(path))
    spec = codes.spec
    usage = StoreUsage(spec.levels)
    total = len(codes) * len(spec.levels)
    with meter("reading codes", "rows") as show:
        for number, level in enumerate(spec.levels):
            for first in range(0, len(codes), BLOCK_ROWS):
                usage.add(level.name, codes[level.name][first : first + BLOCK_ROWS])
                show(number * len(codes) + min(len(codes), first + BLOCK_ROWS), total)
    disk = sum(disk_bytes(path / level) for level in codes.levels)
    raw = len(codes) * spec.row_bytes
    labels = codes.labels
    labelled = int((labels != MISSING_LABEL).sum())
    quarantine = codes.quarantine()
    state = "complete" if spec.complete else "UNFINISHED: run the command that made it again to finish it"
    lines = [
        f"{path}: a code store, {state}: {len(codes):,} rows in {spec.num_commits} Zarr shards of {spec.rows_per_shard:,}",
        _origin(spec),
        f"{labelled:,} rows with labels, {len(np.unique(labels[labels != MISSING_LABEL]))} classes",
        *usage_lines(spec, usage.used, usage.perplexity),
        f"codes on disk: {disk / 1e6:,.2f} MB, {raw / max(disk, 1):.2f} times smaller than raw {raw / 1e6:,.2f} MB",
        f"quarantined: {quarantine.num_rows:,} samples"
        + (f", in {path / 'quarantine'}" if quarantine.num_rows else ""),
    ]
    lines += [
        f"  {row['reason']}: {row['source']}: {row['key']} ({row['detail']})"
        for row in quarantine.slice(0, LISTED).to_pylist()
    ]
    if command := recorded_command(run_file(path), path):
        lines.append(f"made by: {command}")
    facts = {
        "kind": "store",
        "complete": spec.complete,
        "used_codes": usage.used,
        "perplexity": usage.perplexity,
        "disk_bytes": disk,
        "raw_bytes": raw,
    }
    commits = [Commit.read(path / commit_file(shard)) for shard in range(spec.num_commits)]
    counts = counts_of(spec, commits) + Counts(skipped=sum(dict(spec.corpus.get("skipped", {})).values()))
    return Result(lines, counts, len(codes), facts, quarantine=str(path / "quarantine"))


def _origin(spec: StoreSpec) -> str:
    fingerprint = spec.tokenizer["fingerprint"]
    if drawn := spec.corpus.get("sampled"):
        return f"drawn by prior {drawn['prior']}, label {drawn['label']}, seed {drawn['seed']}; for tokenizer {fingerprint}"
    made = f"{spec.tokenizer.get('preset')}, {spec.tokenizer.get('precision')}"
    if module := spec.tokenizer.get("module"):
        made += f"; --tokenizer-module {module}"
    return f"made from {spec.corpus.get('description')} by tokenizer {fingerprint} ({made})"


def _inspect_checkpoint(path: Path, kind: Literal["tokenizer", "prior"]) -> Result:
    if kind == "prior":
        import priors as package
    else:
        import tokenizer as package
    model = package.load(path)
    config, facts = model.config.to_dict(), model.config.to_dict()
    lines = [
        f"{path}: a {kind}, preset {config['preset']}, {model.num_parameters:,} parameters, fingerprint {model.fingerprint}"
    ]
    if kind == "prior":
        lines += _level_lines(config.pop("levels"), config.pop("networks"))
    lines += [f"  {key}: {value}" for key, value in config.items() if key != "preset"]
    return Result(
        [*lines, *made_by(path if path.is_dir() else path.parent)],
        facts={"kind": kind, "fingerprint": model.fingerprint, "parameters": model.num_parameters, "config": facts},
    )


def _level_lines(levels: list[dict[str, Any]], networks: list[dict[str, Any]]) -> list[str]:
    return [
        f"  level {level['name']}: {'x'.join(map(str, level['grid']))} codes of {level['codebook_size']}; "
        + ", ".join(f"{key} {value}" for key, value in network.items())
        for level, network in zip(levels, networks, strict=True)
    ]
