"""The command `train-tokenizer`: a corpus in, a tokenizer and a picture of what it keeps out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import tokenizer
from pipelines.corpus.holdout import choose_holdout
from pipelines.corpus.images import Augmentation, Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.corpus.problems import Problem
from pipelines.corpus.samples import list_samples
from pipelines.corpus.stream import TrainingStream
from pipelines.corpus.walk import holdout_batches
from pipelines.fit import Batch, FitConfig, Stream
from pipelines.options import TENSORBOARD_FOLDER, FitFlags, ImageFlags, choose_device
from pipelines.outputs import RUN_FILE, OutputFolder, recorded_settings, refuse_inside, require_room, run_record
from pipelines.pictures import Panel, code_panels, good_scale, save_picture, side_by_side
from pipelines.planning import planned
from pipelines.precision import resolved
from pipelines.recipes import TOKENIZER_RECIPES, fit_config, read_tables, shortened
from pipelines.results import Result, say
from pipelines.train import Task, run_job
from pipelines.training_log import METRICS_FILE
from vqmill.commits import Counts
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json, write_whole
from vqmill.layout import parquet_bytes
from vqmill.usage import title

QUARANTINE_FILE = "quarantine.parquet"
PICTURE_FILE = "reconstructions.png"
EVALUATION_LIMIT = 4096  # held-out samples that an evaluation looks at
PICTURES = 8


@dataclass(frozen=True)
class TokenizerJob:
    """A tokenizer's training, ready to be sent to any machine that sees the corpus."""

    plan: Plan
    config: tokenizer.TokenizerConfig
    fit: FitConfig
    augmentation: Augmentation
    holdout_fraction: float
    images: ImageFlags = field(default_factory=ImageFlags)
    num_threads: int = 2

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are brought to the tokenizer's size."""
        return self.images.preprocessing(self.config.size, self.config.channels)

    def build(self, rank: int, world_size: int) -> Task:
        """A new tokenizer, the same on every rank, and this rank's images."""
        torch.manual_seed(self.fit.seed)
        step = tokenizer.TokenizerStep(tokenizer.Tokenizer(self.config))
        stream = TrainingStream(
            self.plan,
            self.preprocessing,
            self.augmentation,
            batch_size=self.fit.rank_batch(world_size),
            seed=self.fit.seed,
            rank=rank,
            world_size=world_size,
            holdout_fraction=self.holdout_fraction,
            num_threads=self.num_threads,
        )
        return Task(step, stream, self.validation(), self.config.first_update)

    def validation(
        self, limit: int = EVALUATION_LIMIT, problems: dict[str, Problem] | None = None
    ) -> Callable[[], Iterable[Batch]]:
        """Gives the held-out images, from the beginning each time; `problems` collects those that cannot be read."""
        return lambda: holdout_batches(
            self.plan, self.preprocessing, self.holdout_fraction, self.fit.batch_size, limit, problems
        )

    def quarantined(self, stream: Stream) -> dict[str, dict[str, str]]:
        """Samples that could not be read."""
        assert isinstance(stream, TrainingStream)
        return _rows(stream.quarantined)


def train_tokenizer(
    corpus: str,
    out: Path,
    *,
    preset: str,
    config: Path | None,
    size: int | None,
    holdout: float,
    flags: FitFlags,
    images: ImageFlags = ImageFlags(),
    gzip_tars: bool = False,
) -> Result:
    """Runs the command; see `vqmill train-tokenizer --help`."""
    refuse_inside(out, corpus)
    job, device, notes = _plan_job(
        corpus,
        preset=preset,
        config=config,
        size=size,
        holdout=holdout,
        flags=flags,
        images=images,
        gzip_tars=gzip_tars,
        begun=recorded_settings(out),
    )
    settings = {
        "command": "train-tokenizer",
        "plan": job.plan.digest,
        "tokenizer": job.config.to_dict(),
        "preprocessing": job.preprocessing.to_dict(),
        "augmentation": asdict(job.augmentation),
        "fit": asdict(job.fit),
        "holdout": holdout,
    }
    require_room(out, _room(job))
    with OutputFolder(out, settings) as place:
        if not place.finished:
            say(notes)
            trained = run_job(
                job, place.work, workers=flags.workers, device=device, title="training the tokenizer",
                tensorboard=place.folder / TENSORBOARD_FOLDER if flags.tensorboard else None,
            )  # fmt: skip
            step = tokenizer.TokenizerStep(tokenizer.Tokenizer(job.config))
            step.load_state_dict(trained.tensors)
            model = step.tokenizer.eval()
            model.sort_by_usage()
            tokenizer.save(model, place.folder)
            held_out = _look_at_holdout(job, model, place.folder / PICTURE_FILE)
            quarantined = trained.quarantined | _rows(held_out.problems)
            rows = [{"key": key, **problem} for key, problem in sorted(quarantined.items())]
            schema = pa.schema([("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
            write_whole(place.folder / QUARANTINE_FILE, parquet_bytes(pa.Table.from_pylist(rows, schema=schema)))
            record = run_record(
                corpus=corpus, settings=settings, workers=flags.workers, device=device, fingerprint=model.fingerprint,
                parameters=model.num_parameters, evaluation=trained.evaluation, counts=asdict(_counts(job, held_out.images, len(rows))),
            )  # fmt: skip
            write_whole(place.folder / RUN_FILE, canonical_json(record))
            write_whole(place.folder / METRICS_FILE, (place.work / METRICS_FILE).read_bytes())
            place.finish()
        return _report(out, already=place.finished)


def _plan_job(
    corpus: str,
    *,
    preset: str,
    config: Path | None,
    size: int | None,
    holdout: float,
    flags: FitFlags,
    images: ImageFlags,
    gzip_tars: bool,
    begun: Mapping[str, Any],
) -> tuple[TokenizerJob, str, list[str]]:
    """The job, the device, and what is to be said about a short run."""
    tables = read_tables(config, ("tokenizer", "fit"))
    overrides = tables["tokenizer"] | ({"size": size} if size is not None else {})
    model_config = _checked_config(preset, overrides)
    if not 0 < holdout < 1:
        raise UsageError(f"--holdout must lie between 0 and 1, got {holdout}.")
    recipe = TOKENIZER_RECIPES[preset]
    flags.check()
    device = choose_device(flags.device)
    fit = fit_config(recipe, tables["fit"], flags.fit())
    fit = replace(fit, precision=resolved(fit.precision, device, begun.get("fit", {}).get("precision")))
    fit.rank_batch(flags.workers)
    if model_config.frames > 1:
        raise UsageError(
            f"--preset {preset} codes clips of {model_config.frames} frames, and training reads images only so far."
        )
    # a short run must not end before its codebooks have begun
    usual_start = model_config.first_update
    if model_config.first_update and "start_step" not in overrides:
        model_config = _checked_config(
            preset, overrides | {"start_step": max(1, min(model_config.start_step, fit.steps // 8))}
        )
    if model_config.first_update >= fit.steps:
        raise UsageError(
            f"[tokenizer] start_step {model_config.start_step}: with --steps {fit.steps} the codebooks would never begin. Take fewer, a quarter at most."
        )
    notes = shortened(recipe, tables["fit"], fit, start_step=(usual_start, model_config.first_update))
    images.preprocessing(model_config.size, model_config.channels)  # refused before the corpus is read
    plan = planned(corpus, gzip_tars=gzip_tars)
    return TokenizerJob(plan, model_config, fit, Augmentation(), holdout, images), device, notes


def _checked_config(preset: str, overrides: dict[str, Any]) -> tokenizer.TokenizerConfig:
    try:
        return tokenizer.preset_config(preset, **overrides)
    except CodesError as error:
        raise UsageError(str(error)) from error


def _room(job: TokenizerJob) -> int:
    """Bytes: weights, optimizer state and the final copies."""
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in tokenizer.Tokenizer(job.config).state_dict().values())
    return 8 * 4 * parameters


@dataclass(frozen=True)
class _HeldOut:
    """What lies in the hold-out: images that decode, and those that do not."""

    images: int
    problems: dict[str, Problem]


def _look_at_holdout(job: TokenizerJob, model: tokenizer.Tokenizer, path: Path) -> _HeldOut:
    """Goes through the held-out images as the evaluation did; draws the first, what the tokenizer keeps of them, and their codes."""
    problems: dict[str, Problem] = {}
    number = 0
    shown = []
    for batch in job.validation(problems=problems)():
        if number < PICTURES:
            shown.append(batch["images"][: PICTURES - number])
        number += len(batch["images"])
    images = torch.cat(shown)
    codes = model.encode(images)
    panels = [Panel("original", images.numpy()), Panel("reconstruction", model.decode(codes).numpy())]
    side = images.shape[-1]
    panels += code_panels({level: values.numpy() for level, values in codes.items()}, side)
    save_picture(path, side_by_side(panels, columns=2, scale=good_scale(side)), {"fingerprint": model.fingerprint})
    return _HeldOut(number, problems)


def _counts(job: TokenizerJob, evaluated: int, quarantined: int) -> Counts:
    """The samples that were trained on, each counted once, and those that were evaluated."""
    holdout = choose_holdout(job.plan, job.preprocessing, job.holdout_fraction)
    keys = (ref.key for shard in job.plan.shards for ref in list_samples(shard) if ref.problem is None)
    available = sum(key not in holdout for key in keys)
    trained = min(job.fit.steps * job.fit.batch_size, max(0, available - quarantined))
    return Counts(encoded=trained + evaluated, quarantined=quarantined, skipped=sum(job.plan.skipped.values()))


def _rows(problems: Mapping[str, Problem]) -> dict[str, dict[str, str]]:
    return {key: {"reason": str(problem.reason), "detail": problem.detail} for key, problem in problems.items()}


def _report(out: Path, *, already: bool) -> Result:
    """What the run's own record says, so that a repeated command says the same."""
    record = json.loads((out / RUN_FILE).read_bytes())
    counts = Counts(**record["counts"])
    lines = [f"{out}: already trained with these settings; nothing to do."] if already else []
    lines.append(f"tokenizer {record['fingerprint']}: {record['parameters']:,} parameters; {result_lines(record)[0]}")
    lines += result_lines(record)[1:]
    lines.append(f"made {out / tokenizer.FILE_NAME} and {out / PICTURE_FILE}")
    facts = {
        "out": str(out),
        "fingerprint": record["fingerprint"],
        "steps": record["settings"]["fit"]["steps"],
        **record["evaluation"],
    }
    return Result(lines, counts, 0, facts, quarantine=str(out / QUARANTINE_FILE))


def result_lines(record: Mapping[str, Any]) -> list[str]:
    """How good it came out, as the run's own record says."""
    evaluation = record["evaluation"]
    lines = [f"held out: normalised MSE {evaluation['nmse']:.4f}, PSNR {evaluation['psnr']:.2f} dB"]
    levels = tokenizer.TokenizerConfig.from_dict(record["settings"]["tokenizer"]).level_names
    names = [key.removesuffix("/used_codes") for key in evaluation if key.endswith("/used_codes")]
    for name in sorted(names, key=lambda name: levels.index(name.partition("/")[0])):  # stages stay in their order
        used, size = int(evaluation[f"{name}/used_codes"]), int(evaluation[f"{name}/codebook_size"])
        lines.append(
            f"{title(name)}: {used} of {size} codes used ({used / size:.1%}), dataset perplexity {evaluation[f'{name}/perplexity']:.1f} "
            "(as many codes, equally used, would carry as much)"
        )
    return lines
