"""The command `train-prior`: a code store in, a PixelCNN for each level out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import priors
from pipelines.cluster import ray_cluster
from pipelines.fit import Batch, FitConfig, Stream
from pipelines.options import TENSORBOARD_FOLDER, FitFlags, choose_device
from pipelines.outputs import RUN_FILE, OutputFolder, refuse_inside, require_room, run_record
from pipelines.precision import resolved
from pipelines.prior_inputs import BASELINE_CODES, evenly, level_shapes, num_classes, split_rows
from pipelines.recipes import PRIOR_RECIPES, level_fits, read_tables, shortened
from pipelines.results import Result, say
from pipelines.train import FINAL_FILE, Task, Trained, run_job
from pipelines.training_log import METRICS_FILE
from vqmill import Codes, open_codes
from vqmill.commits import Counts
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json, write_whole
from vqmill.loader import CodeBatches
from vqmill.places import Place
from vqmill.settings import did_you_mean, refuse_other_settings

EVALUATION_LIMIT = 4096  # held-out samples that an evaluation looks at
ALL_LEVELS = "all"
FIT_FILE = "fit.json"  # in a level's working folder: its recipe
POOR_SHARE = 0.25  # of the bits of a code that is used evenly; with fewer a prior is hardly worth training


class CodeStream:
    """Training batches from a store without end: epoch after epoch, in another order each."""

    def __init__(self, batches: CodeBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for batch in self._batches:
                yield to_tensors(batch)

    def state_dict(self) -> dict[str, Any]:
        """The loader's place."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a place."""
        self._batches.load_state_dict(state)


def to_tensors(batch: Mapping[str, np.ndarray[Any, Any]]) -> Batch:
    """A loader's batch as int64 tensors, as embeddings take them."""
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}


@dataclass(frozen=True)
class PriorJob:
    """The training of one level, ready to be sent to any machine that sees the store."""

    store: Place
    level: str
    config: priors.PriorConfig
    fit: FitConfig
    holdout_fraction: float

    def build(self, rank: int, world_size: int) -> Task:
        """A new network for the level, the same on every rank, and this rank's codes."""
        torch.manual_seed(self.fit.seed)
        step = priors.PriorStep(priors.Prior(self.config), self.level)
        codes = open_codes(self.store)
        kept, held_out = split_rows(codes, self.holdout_fraction)
        size = self.fit.rank_batch(world_size)
        names = self._names()
        stream = codes.batches(
            size,
            shuffle=True,
            seed=self.fit.seed,
            rank=rank,
            world_size=world_size,
            last="pad",
            rows=kept,
            levels=names,
        )
        return Task(step, CodeStream(stream), self._validation(codes, evenly(held_out, EVALUATION_LIMIT)))

    def _validation(self, codes: Codes, rows: np.ndarray[Any, Any]) -> Callable[[], Iterable[Batch]]:
        names = self._names()
        return lambda: (to_tensors(batch) for batch in codes.batches(self.fit.batch_size, rows=rows, levels=names))

    def _names(self) -> tuple[str, ...]:
        """The level and those above it: all that its network reads."""
        return self.config.level_names[: self.config.level_index(self.level) + 1]

    def quarantined(self, stream: Stream) -> dict[str, dict[str, str]]:
        """Nothing: a store has been checked."""
        return {}


def train_prior(
    store: str | Path, out: Path, *, preset: str, config: Path | None, level: str, holdout: float, flags: FitFlags
) -> Result:
    """Runs the command; see `vqmill train-prior --help`."""
    tables = read_tables(config, ("prior", "fit"))
    if not 0 < holdout < 1:
        raise UsageError(f"--holdout must lie between 0 and 1, got {holdout}.")
    refuse_inside(out, str(store), "store")
    codes = open_codes(store)
    shapes = level_shapes(codes)
    if level not in (ALL_LEVELS, *codes.levels):
        known = (*codes.levels, ALL_LEVELS)
        raise UsageError(f"--level {level}: expected {', '.join(known)}.{did_you_mean(level, known)}")
    split_rows(codes, holdout)
    try:
        prior_config = priors.preset_config(
            preset, shapes, num_classes(codes), codes.spec.tokenizer["fingerprint"], **tables["prior"]
        )
    except CodesError as error:
        raise UsageError(str(error)) from error
    recipe = PRIOR_RECIPES[preset]
    flags.check()
    device = choose_device(flags.device)
    fits = level_fits(recipe, tables["fit"], flags.fit(), codes.levels)
    for fit in fits.values():
        fit.rank_batch(flags.workers)
    settings = {
        "command": "train-prior",
        "store": codes.spec.settings(),
        "rows": len(codes),
        "prior": prior_config.to_dict(),
        "holdout": holdout,
    }
    with torch.device("meta"):
        require_room(out, 8 * 4 * priors.Prior(prior_config).num_parameters)
    asked = codes.levels if level == ALL_LEVELS else (level,)
    with OutputFolder(out, settings) as place:
        already = place.finished
        fits = _with_recorded(place, fits, asked, device)
        jobs = {name: PriorJob(codes.place, name, prior_config, fits[name], holdout) for name in codes.levels}
        if not already:
            say(_notes(recipe, tables["fit"], {name: fits[name] for name in asked}))
            wanted = [name for name in jobs if name in asked or (place.work / name / FINAL_FILE).exists()]
            with ray_cluster(flags.workers, device) if flags.workers > 1 else nullcontext():  # one Ray for all levels
                trained = {name: _train_level(jobs[name], place, flags, device) for name in wanted}
            if missing := [name for name in jobs if name not in trained]:
                return _unfinished(out, level, missing)
            prior = priors.Prior(prior_config, codes.class_names[: prior_config.num_classes]).eval()
            for name, found in trained.items():
                priors.PriorStep(prior, name).load_state_dict(found.tensors)
            priors.save(prior, place.folder)
            record = run_record(
                store=str(store), settings=settings | {"fit": {name: asdict(fit) for name, fit in fits.items()}}, workers=flags.workers, device=device, fingerprint=prior.fingerprint,
                parameters=prior.num_parameters, evaluation={name: found.evaluation for name, found in trained.items()}, rows=len(codes),
            )  # fmt: skip
            write_whole(place.folder / RUN_FILE, canonical_json(record))
            place.finish()
        return _report(out, already=already)


def _notes(recipe: FitConfig, table: Mapping[str, Any], fits: Mapping[str, FitConfig]) -> list[str]:
    """What a short run has cut, once for all levels that it holds for."""
    notes = {name: shortened(recipe, {**table, **table.get(name, {})}, fit) for name, fit in fits.items()}
    same = len(set(map(tuple, notes.values()))) == 1
    if same:
        return next(iter(notes.values()))
    return [f"level {name}: {line}" for name, lines in notes.items() for line in lines]


def _with_recorded(
    place: OutputFolder, fits: Mapping[str, FitConfig], asked: Iterable[str], device: str
) -> dict[str, FitConfig]:
    """The recipe of each level: that with which it was trained before, or began to be; else that of `fits`.

    Raises:
        UsageError: a level that is asked for was trained otherwise; each may have its own recipe, but only one.
    """
    if place.finished:
        found = json.loads((place.out / RUN_FILE).read_bytes())["settings"]["fit"]
    else:
        files = {name: place.work / name / FIT_FILE for name in fits}
        found = {name: json.loads(file.read_bytes()) for name, file in files.items() if file.exists()}
    fits = {
        name: replace(fit, precision=resolved(fit.precision, device, found.get(name, {}).get("precision")))
        for name, fit in fits.items()
    }
    both = found.keys() & set(asked)
    there = {"fit": {name: found[name] for name in both}}
    now = {"fit": {name: asdict(fits[name]) for name in both}}
    advice = "Repeat its settings, choose another --out, or remove it. With --level the flags are of that level alone."
    refuse_other_settings(str(place.out if place.finished else place.folder), there, now, advice)
    return fits | {name: FitConfig(**values) for name, values in found.items()}


def _train_level(job: PriorJob, place: OutputFolder, flags: FitFlags, device: str) -> Trained:
    """Trains one level, or finds it trained; its evaluation has the baselines beside it."""
    work = place.work / job.level
    work.mkdir(exist_ok=True)
    write_whole(work / FIT_FILE, canonical_json(asdict(job.fit)))
    kept, held_out = split_rows(open_codes(job.store), job.holdout_fraction)
    say(
        [
            f"level {job.level}: {len(kept):,} rows to train on, {len(held_out):,} held out; {job.fit.steps:,} steps of {job.fit.batch_size}, {job.fit.precision}"
        ]
    )
    crude = _baselines(open_codes(job.store), job)
    if crude["unigram_bits_per_code"] < POOR_SHARE * crude["uniform_bits_per_code"]:
        say([_poor(job.level, crude)])
    trained = run_job(
        job, work, workers=flags.workers, device=device, title=f"training the prior: {job.level}",
        tensorboard=place.folder / TENSORBOARD_FOLDER / job.level if flags.tensorboard else None,
    )  # fmt: skip
    write_whole(place.folder / f"metrics-{job.level}.jsonl", (work / METRICS_FILE).read_bytes())
    return replace(trained, evaluation=trained.evaluation | crude)


def _poor(level: str, crude: Mapping[str, float]) -> str:
    return (
        f"level {level}: its codes carry {crude['unigram_bits_per_code']:.2f} of {crude['uniform_bits_per_code']:.2f} bits by their "
        "frequencies alone, so there is little that a prior could learn. Is the codebook used? See: vqmill inspect STORE"
    )


def _unfinished(out: Path, level: str, missing: list[str]) -> Result:
    lines = [
        f"level {level}: trained; still to train: {', '.join(missing)}",
        f"give the same command with --level {missing[0]}, or without --level for the rest; then {out} is made",
    ]
    return Result(lines, Counts(), 0, {"out": str(out), "trained": level, "missing": missing})


def _baselines(codes: Codes, job: PriorJob) -> dict[str, float]:
    """What the crudest models, counted on training rows, need for held-out ones: bits per code."""
    kept, held_out = split_rows(codes, job.holdout_fraction)
    level = codes.spec.level(job.level)
    limit = max(1, BASELINE_CODES // math.prod(level.grid))
    array = codes[job.level]
    found = priors.baselines(
        array[evenly(held_out, EVALUATION_LIMIT)], level.codebook_size, train=array[evenly(kept, limit)]
    )
    return {f"{name}_bits_per_code": bits for name, bits in asdict(found).items()}


def _report(out: Path, *, already: bool) -> Result:
    record = json.loads((out / RUN_FILE).read_bytes())
    lines = [f"{out}: already trained with these settings; nothing to do."] if already else []
    lines.append(f"prior {record['fingerprint']}: {record['parameters']:,} parameters")
    lines += result_lines(record)
    lines.append(f"made {out / priors.FILE_NAME}")
    facts = {"out": str(out), "fingerprint": record["fingerprint"], "evaluation": record["evaluation"]}
    return Result(lines, Counts(encoded=record["rows"]), record["rows"], facts)


def result_lines(record: Mapping[str, Any]) -> list[str]:
    """How good the levels came out, as the run's own record says."""
    lines: list[str] = []
    for name in (level["name"] for level in record["settings"]["prior"]["levels"]):
        found = record["evaluation"][name]
        known = {key: found[f"{key}_bits_per_code"] for key in ("uniform", "unigram", "bigram")}
        crude = ", ".join(f"{key} {bits:.3f}" for key, bits in known.items())
        lines.append(f"level {name}: {found['bits_per_code']:.3f} bits per held-out code ({crude})")
        if found["bits_per_code"] >= known["bigram"]:
            lines.append(
                f"level {name}: it knows less than its codes' left neighbours say (bigram): train for more --steps"
            )
    return lines
