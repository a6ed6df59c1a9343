"""The command `tokenize`: checks what was asked for, runs it, and says what came out."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipelines.careful import SAMPLE_TIMEOUT
from pipelines.encoder import Encoding
from pipelines.foreign import ForeignTokenizer, load_tokenizer
from pipelines.options import ClusterFlags, Codec, Device, ImageFlags, Precision, choose_device, default_workers
from pipelines.outputs import disk_bytes, refuse_inside, run_record
from pipelines.planning import planned
from pipelines.progress import meter
from pipelines.rehearsal import dry_run as dry_run_of
from pipelines.results import Result, grids
from pipelines.tokenize import TokenizeOptions, TokenizeResult, tokenize_corpus
from pipelines.training_record import trained_images
from tokenizer.protocol import level_specs
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json
from vqmill.places import FileAt, Folder, Where, place_of
from vqmill.spec import MOST_ROWS_PER_SHARD, LevelSpec

LISTED = 10
MAX_SAMPLE_TIMEOUT = 86_400


def tokenize(
    corpus: str, tokenizer_path: Path | None, out: str | Path, *, module: str | None, size: int | None, workers: int | None, batch_size: int, shard_rows: int | None,
    codec: Codec, precision: Precision, device: Device, dry_run: bool, limit: int | None = None, compiled: bool = False,
    retry_quarantined: bool = False, images: ImageFlags = ImageFlags(), sample_timeout: int = SAMPLE_TIMEOUT, cluster: ClusterFlags = ClusterFlags(),
    gzip_tars: bool = False,
) -> Result:  # fmt: skip
    """Runs the command; see `vqmill tokenize --help`."""
    for flag, value in (
        ("--workers", workers),
        ("--batch-size", batch_size),
        ("--shard-rows", shard_rows),
        ("--limit", limit),
        ("--sample-timeout", sample_timeout),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}.")
    if sample_timeout > MAX_SAMPLE_TIMEOUT:
        raise UsageError(f"--sample-timeout must be at most {MAX_SAMPLE_TIMEOUT:,} (a day), got {sample_timeout:,}.")
    if shard_rows is not None and shard_rows > MOST_ROWS_PER_SHARD:
        raise UsageError(f"--shard-rows must be at most {MOST_ROWS_PER_SHARD:,}, got {shard_rows:,}.")
    if compiled and module:
        raise UsageError("--compile: your own code does that itself: give your factory's networks to torch.compile.")
    try:
        model = load_tokenizer(tokenizer_path, module)
        size = size if size is not None else model.size
        levels = level_specs(model, size)
        if isinstance(model, ForeignTokenizer):  # what is wrong with it is said before anything is made
            model.encode(torch.zeros(1, model.channels, size, size, dtype=torch.uint8))
    except CodesError as error:
        raise UsageError(str(error)) from error
    cluster = cluster.resolved()
    chosen = device if cluster.address else choose_device(device)  # a cluster's head need not have a GPU
    cluster.check_device(chosen)
    if workers is None and not cluster.address:
        workers = default_workers(chosen, cluster.share)
    options = TokenizeOptions(
        size, trained_images(tokenizer_path, images), Encoding(batch_size, precision, compiled), shard_rows, None if codec == "auto" else codec,
        sample_timeout, workers, chosen, cluster,
    )  # fmt: skip
    refuse_inside(out, corpus)
    place_of(out)  # an address that holds a secret is refused before it can be recorded
    plan = planned(corpus, gzip_tars=gzip_tars)
    if limit is not None:
        plan = plan.first_samples(limit)
    if dry_run:
        return dry_run_of(plan, model, out, options, retry=retry_quarantined)

    def record(**outcome: Any) -> None:
        place = tokenizer_place(tokenizer_path, module, out)
        facts = run_record(corpus=corpus, **place, workers=options.workers, device=chosen, **outcome)
        run_file(out).write(canonical_json(facts))

    with meter("tokenizing", "samples") as show:
        # Said at the beginning, too: who finds an unfinished store looks there for the command that finishes it.
        made = tokenize_corpus(plan, model, out, options, show, started=record, say=show.say, retry=retry_quarantined)
    if made.did_something or not run_file(out).exists():
        encoders = [worker.facts() for worker in made.workers]
        record(rows=made.rows, counts=asdict(made.counts), seconds=made.seconds, encoders=encoders)
    size = disk_bytes(out)
    lines = _made_lines(out, levels, made, size)
    lines += _retry_lines(made) if retry_quarantined else []
    if made.appended_rows:
        lines.append(f"appended: {made.appended_rows:,} rows, behind the {made.rows - made.appended_rows:,} of before")
    if made.mended:
        lines.append(
            f"made again, as files of them were missing or damaged: Zarr shards {', '.join(map(str, made.mended))}"
        )
    if shard_rows not in (None, made.rows_per_shard):
        lines.append(f"--shard-rows {shard_rows} was raised to {made.rows_per_shard}, which divides into good chunks")
    if options.workers and options.workers > len(plan.shards):
        lines.append(
            f"only {len(plan.shards)} of {options.workers} workers had something to do: the corpus is {len(plan.shards)} input shards"
        )
    lines += [f"quarantined: {count:,} {reason}" for reason, count in sorted(made.reasons.items())]
    lines += [f"skipped: {count:,} {reason}" for reason, count in sorted(plan.skipped.items())]
    if made.statistics:
        lines.append(f"each input shard in numbers: {made.statistics}")
    lines.append(f"next: {next_command(out, levels)}")
    facts = {
        "out": str(out),
        "resumed_rows": made.resumed_rows,
        "store_bytes": size,
        "appended_rows": made.appended_rows,
        "mended_shards": list(made.mended),
        "reasons": made.reasons,
        "input_shard_statistics": made.statistics,
        "retried": made.retried,
        "fingerprint": model.fingerprint,
    }
    return Result(lines, made.counts, made.rows, facts, quarantine=f"{out}/quarantine")


def _made_lines(out: str | Path, levels: Iterable[LevelSpec], made: TokenizeResult, size: int) -> list[str]:
    """What is there, and what this run did for it."""
    new = made.rows - made.resumed_rows
    run = "nothing to do: it was finished before"
    if made.did_something:
        run = f"this run: {new:,} rows in {made.seconds:,.1f} s, start-up included ({new / made.seconds:,.0f} rows/s)"
        run += f"; {made.resumed_rows:,} rows were committed before" if made.resumed_rows else ""
    return [
        f"{out}: {made.rows:,} rows of {grids(levels)}; {size / 1e6:,.2f} MB on disk, "
        f"{made.counts.quarantined:,} samples quarantined",
        run,
    ]


def _retry_lines(made: TokenizeResult) -> list[str]:
    """What became of the samples that were tried again, and why the first ones of those that stay set aside do."""
    good = made.retried - len(made.still_bad)
    lines = ["no quarantined sample was there to be tried again"]
    if made.retried:
        lines = [
            f"tried again: {made.retried:,} quarantined samples; {good:,} are rows now, {len(made.still_bad):,} stay quarantined"
        ]
    lines += [f"  {bad['reason']}: {bad['source']}: {bad['key']} ({bad['detail']})" for bad in made.still_bad[:LISTED]]
    if made.waiting:
        lines.append(
            f"the corpus has {made.waiting:,} samples more than the store: the same command without --retry-quarantined appends them"
        )
    return lines


def next_command(out: str | Path, levels: Iterable[LevelSpec]) -> str:
    """What to do with a new store: train a prior, where its levels are such as priors model."""
    flat = all(len(level.grid) == 2 for level in levels)
    place = shlex.quote(str(out))
    return f"vqmill train-prior {place} --out DIR" if flat else f"vqmill inspect {place}"


def run_file(store: Where) -> FileAt:
    """The record beside a store: when, where and how it was made. Not inside, where it would differ from run to run."""
    place = place_of(store)
    return FileAt(place.beside(), f"{place.base}.run.json")


def tokenizer_place(path: Path | None, module: str | None, store: Where) -> dict[str, str | None]:
    """What the record beside a store says of where its tokenizer is."""
    return {"tokenizer": relative_to_store(path, store)} if path else {"tokenizer_module": module}


def recorded_tokenizer(store: Where) -> Path:
    """The tokenizer's folder, as recorded beside a store.

    Raises:
        UsageError: no record.
    """
    path = run_file(store)
    folder = path.place.path if isinstance(path.place, Folder) else Path()
    try:
        place = folder / json.loads(path.read_bytes())["tokenizer"]
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is not there, so the tokenizer's place is not known. Name it with --tokenizer DIR."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: does not say where the tokenizer is ({error!r}). Name its folder with --tokenizer DIR."
        ) from error
    if not place.exists():
        raise UsageError(
            f"{place}: the tokenizer that {path} names is not there. Name its folder with --tokenizer DIR."
        )
    return place


def relative_to_store(what: Where, store: Where) -> str:
    """A tokenizer's or another store's place as seen from a store's folder, so that both can be moved together.

    Its address, or its absolute path, when one of the two lies in a bucket.
    """
    place, folder = place_of(what), place_of(store).beside()
    if not isinstance(place, Folder):
        return place.name
    path = place.path.absolute()
    return os.path.relpath(path, folder.path.absolute()) if isinstance(folder, Folder) else str(path)
