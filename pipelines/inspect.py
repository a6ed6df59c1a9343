"""The command `inspect`: what something is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.check import usage_lines
from pipelines.inspect_corpus import inspect_corpus
from pipelines.outputs import PARTIAL_SUFFIX, SETTINGS_FILE, WORK
from pipelines.planning import planned
from pipelines.progress import meter
from pipelines.results import Result
from pipelines.train import FINAL_FILE
from vqmill.commits import Commit, Counts
from vqmill.layout import commit_file, read_spec
from vqmill.places import Folder
from vqmill.spec import MISSING_LABEL, StoreSpec
from vqmill.store import Codes
from vqmill.usage import StoreUsage

LISTED = 10
BLOCK_ROWS = 65_536


def inspect(path: str) -> Result:
    """Runs the command; see `vqmill inspect --help`."""
    place = Path(path)
    if (place / "zarr.json").is_file():
        return _inspect_store(place)
    for name in ("tokenizer.safetensors", "prior.safetensors"):
        if (place / name).is_file() or (place.name == name and place.is_file()):
            return _inspect_checkpoint(place, prior=name.startswith("prior"))
    if place.name.endswith(PARTIAL_SUFFIX) and (place / SETTINGS_FILE).is_file():
        return _inspect_unfinished(place)
    return inspect_corpus(planned(path))


def _inspect_unfinished(path: Path) -> Result:
    command = json.loads((path / SETTINGS_FILE).read_bytes()).get("command", "a command")
    trained = sorted(file.parent.name for file in (path / WORK).glob(f"*/{FINAL_FILE}"))
    lines = [f"{path}: an unfinished run of {command}; give the same command again to go on with it"]
    if trained:
        lines.append(f"levels that are trained: {', '.join(trained)}")
    return Result(lines, facts={"kind": "unfinished", "command": command, "trained": trained})


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
    disk = sum(file.stat().st_size for level in codes.levels for file in (path / level).rglob("*") if file.is_file())
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
        f"quarantined: {quarantine.num_rows:,} samples"
        + (f", in {path / 'quarantine'}" if quarantine.num_rows else ""),
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
    commits = [Commit.read(path / commit_file(shard)) for shard in range(spec.num_commits)]
    counts = sum(
        (commit.counts for commit in commits), Counts(skipped=sum(dict(spec.corpus.get("skipped", {})).values()))
    )
    return Result(lines, counts, len(codes), facts, quarantine=str(path / "quarantine"))


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
