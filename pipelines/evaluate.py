"""The command `evaluate`: how much of a corpus's images a tokenizer keeps, and how it uses its codes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pipelines.corpus.holdout import choose_holdout
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.corpus.problems import CorpusError, Problem
from pipelines.corpus.walk import NamedImage, walk_images
from pipelines.foreign import FLAG, ForeignTokenizer, load_tokenizer
from pipelines.gallery import Exhibit, Gallery
from pipelines.learned import LearnedMeasures
from pipelines.options import Device, ImageFlags, Precision, choose_device
from pipelines.outputs import RUN_FILE, OutputFolder, refuse_inside, run_record
from pipelines.pictures import save_picture
from pipelines.planning import planned
from pipelines.progress import meter
from pipelines.results import QUARANTINED, Result
from pipelines.training_record import trained_images, training_record
from tokenizer.evaluation import Evaluation, Measured
from tokenizer.frechet import DIMENSIONS
from tokenizer.protocol import ImageTokenizer, level_specs
from vqmill.commits import Counts
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json, write_whole
from vqmill.layout import parquet_bytes
from vqmill.usage import title

EVALUATION_FILE = "evaluation.json"
PICTURE_FILE = "worst_and_best.png"
QUARANTINE_FILE = "quarantine.parquet"
LISTED = 10  # undecodable samples that are named on the screen
GREY_LEVELS = 127.5  # of 255, for an error of 1 between pixels in [-1, 1]

FIGURES = {  # by name: how it is printed, and what it means
    "nmse": ("{:.4f}", "mean squared error over the variance of these images: 0 is perfect, 1 is painting all in the mean colour"),
    "psnr": ("{:.2f} dB", "peak signal over the mean squared error of the whole set"),
    "psnr_per_image": ("{:.2f} dB", "the mean of each image's own PSNR; images that are nearly perfect weigh much"),
    "ssim": ("{:.4f}", "structural similarity, mean over images: 1 is equal (11x11 Gaussian window, each channel by itself)"),
    "l1": ("{:.4f}", "mean absolute error of pixels in [-1, 1]; times 127.5 in grey levels of 255"),
    "lpips": ("{:.4f}", "distance in the eyes of a network, mean over images: 0 is equal (LPIPS 0.1)"),
    "rfid": ("{:.2f}", "Fréchet inception distance of the reconstructions from the originals: 0 is equally distributed"),
}  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """Which images of the corpus are looked at.

    Attributes:
        fraction: the hold-out; None for all images.
        words: the same for people, and why.
    """

    fraction: float | None
    words: str


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate; see `vqmill evaluate --help`."""

    size: int | None = None
    images: ImageFlags = field(default_factory=ImageFlags)
    gzip_tars: bool = False
    holdout: float | None = None
    everything: bool = False
    limit: int | None = None
    batch_size: int = 32
    device: Device = "auto"
    precision: Precision = "fp32"
    by_label: bool = False
    lpips: Path | None = None
    lpips_backbone: Path | None = None
    rfid: Path | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} must be at least 1, got {value}.")
        if self.holdout is not None and self.everything:
            raise UsageError("--holdout and --all: expected one of them at most. A hold-out is a part of all.")
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise UsageError(f"--holdout must lie between 0 and 1, got {self.holdout}. For every image give --all.")


@dataclass(frozen=True)
class _Job:
    """What is to be measured, resolved."""

    model: ImageTokenizer
    device: str
    plan: Plan
    preprocessing: Preprocessing
    selection: Selection
    options: EvaluateOptions
    learned: LearnedMeasures

    @property
    def settings(self) -> dict[str, Any]:
        """All that shapes the figures, but for how devices and batches round."""
        options = self.options
        return {
            "command": "evaluate", "tokenizer": self.model.fingerprint, "plan": self.plan.digest,
            "preprocessing": self.preprocessing.to_dict(), "holdout": self.selection.fraction, "limit": options.limit,
            "precision": options.precision, "by_label": options.by_label, **self.learned.settings,
        }  # fmt: skip


@dataclass(frozen=True)
class _Outcome:
    """What was measured: `record` is JSON and holds all that is printed."""

    record: dict[str, Any]
    gallery: Gallery
    problems: dict[str, Problem]


def evaluate(places: Sequence[str], out: Path | None, options: EvaluateOptions, *, module: str | None) -> Result:
    """Runs the command; see `vqmill evaluate --help`."""
    folder, corpus = _tokenizer_and_corpus(places, module)
    device = choose_device(options.device)
    try:
        model = load_tokenizer(folder, module)
        size = model.size if options.size is None else options.size
        level_specs(model, size)
        model.to(device)
        if isinstance(model, ForeignTokenizer):  # what is wrong with it is said before anything is made
            model.decode(model.encode(torch.zeros(1, model.channels, size, size, dtype=torch.uint8)))
    except CodesError as error:
        raise UsageError(str(error)) from error
    learned = LearnedMeasures(options.lpips, options.lpips_backbone, options.rfid, device)
    if out:
        refuse_inside(out, corpus)
    plan = planned(corpus, gzip_tars=options.gzip_tars)
    preprocessing = trained_images(folder, options.images).preprocessing(size, model.channels)
    job = _Job(model, device, plan, preprocessing, select(folder, plan, options), options, learned)
    place = str(folder or module)
    if out is None:
        outcome = _measure(job)
        result = evaluation_result(place, outcome.record)
        result.lines += _problem_lines(outcome.problems)
        result.facts["problems"] = _rows(outcome.problems)
        result.code = QUARANTINED if outcome.problems else result.code
        return result
    with OutputFolder(out, job.settings) as output:
        if not output.finished:
            named = {"tokenizer": str(folder)} if folder else {"tokenizer_module": module}
            _write(job, output.folder, run={**named, "corpus": corpus, "device": device})
            output.finish()
    return evaluation_result(place, json.loads((out / EVALUATION_FILE).read_bytes()), out, already=output.finished)


def _tokenizer_and_corpus(places: Sequence[str], module: str | None) -> tuple[Path | None, str]:
    """The tokenizer's folder, None with --tokenizer-module, and the corpus.

    Raises:
        UsageError: another number of places.
    """
    match places, module:
        case [folder, corpus], None:
            return Path(folder), corpus
        case [corpus], str():
            return None, corpus
    raise UsageError(
        "expected a tokenizer's folder and a corpus (vqmill evaluate DIR CORPUS), or a corpus and your own code "
        f"(vqmill evaluate CORPUS {FLAG} package:factory), found {' '.join([*places, f'{FLAG} {module}' if module else '']).strip() or 'nothing'}."
    )


def select(folder: Path | None, plan: Plan, options: EvaluateOptions) -> Selection:
    """Which images to look at: what training held out, where that is known, unless the user says otherwise.

    Args:
        folder: the tokenizer's, or its file; None when it is none of ours.
        plan: the corpus.
        options: `holdout` and `everything` rule.

    Raises:
        UsageError: the record of the training cannot be read.
    """
    record = training_record(folder) if folder else None
    same = record is not None and record.plan == plan.digest
    left_out = record.holdout if record else None
    if options.everything:
        return Selection(None, "all images" + (", most of which it was trained on" if same else ""))
    if options.holdout is not None:
        seen = ""
        if same and left_out is not None:
            seen = ", none of which it was trained on" if options.holdout <= left_out else (
                f", more than the {left_out:g} that training left out: it was trained on the others"
            )  # fmt: skip
        return Selection(options.holdout, f"a hold-out of {options.holdout:g}{seen}")
    if same:
        return Selection(left_out, f"the hold-out of {left_out:g} that training left out")
    if record is None:
        why = ", no settings of train-tokenizer lie beside it" if folder else ""
        return Selection(None, f"all images: what it was trained on is not known{why}")
    return Selection(
        None,
        "all images: the corpus is not as it was trained on. If it holds images of the training, take those that were left out: "
        f"--holdout {left_out:g}",
    )


def _measure(job: _Job) -> _Outcome:
    """Sends the images through their codes."""
    fraction, limit = job.selection.fraction, job.options.limit
    holdout = None if fraction is None else choose_holdout(job.plan, job.preprocessing, fraction)
    expected = round(job.plan.num_samples * (1 if fraction is None else fraction))
    expected = expected if limit is None else min(limit, expected)
    problems: dict[str, Problem] = {}
    evaluation, gallery, classes = Evaluation(job.model), Gallery(), _Classes()
    images = walk_images(job.plan, job.preprocessing, holdout, problems, limit)
    done = 0
    with meter("evaluating", "images") as show:
        while batch := list(islice(images, job.options.batch_size)):
            measured = _add(job, evaluation, batch)
            job.learned.add(measured)
            gallery.add([image.name for image in batch], measured)
            if job.options.by_label:
                classes.add([image.label for image in batch], measured)
            done += len(batch)
            show(done, max(done, expected), f"{len(problems):,} bad" if problems else "")
        if not done:
            raise CorpusError(
                f"{job.plan.corpus}: none of the images to look at can be decoded. Look at its problems with: vqmill inspect '{job.plan.corpus}'"
            )
        figures = evaluation.report() | job.learned.report()  # the distance of rFID takes a while, too
    counts = Counts(encoded=done, quarantined=len(problems), skipped=sum(job.plan.skipped.values()))
    words = job.selection.words if done != limit else f"the first {done:,} of {job.selection.words}"
    record = {
        "corpus": job.plan.corpus, "tokenizer": job.model.fingerprint, "selection": words,
        "holdout": fraction, "images": done, "size": job.preprocessing.size, "precision": job.options.precision,
        "figures": figures, "levels": [name.removesuffix("/perplexity") for name in figures if name.endswith("/perplexity")],
        "classes": classes.report(job.plan.class_names), "worst": _listed(gallery.worst), "best": _listed(gallery.best),
        "counts": asdict(counts),
    }  # fmt: skip
    return _Outcome(record, gallery, problems)


def _add(job: _Job, evaluation: Evaluation, batch: list[NamedImage]) -> Measured:
    """One batch through its codes. In bf16 the encoder is, as in `tokenize`; decoding is in fp32, as in `decode`."""
    images = torch.stack([torch.from_numpy(image.pixels) for image in batch]).to(job.device)
    with torch.autocast(job.device, torch.bfloat16, enabled=job.options.precision == "bf16"):
        codes = job.model.encode(images)
    return evaluation.add(images, codes)


class _Classes:
    """Means of per-image figures for each label."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, float]] = {}

    def add(self, labels: list[int], measured: Measured) -> None:
        figures = {"images": torch.ones(len(labels)), "psnr_per_image": measured.psnr, "l1": measured.l1}
        if measured.ssim is not None:
            figures["ssim"] = measured.ssim
        for name, values in figures.items():
            for label, value in zip(labels, values.tolist(), strict=True):
                sums = self._sums.setdefault(label, {})
                sums[name] = sums.get(name, 0.0) + value

    def report(self, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
        """One entry for each label that occurs; label -1 is of images without one."""
        return [
            {
                "label": label, "name": class_names[label] if 0 <= label < len(class_names) else "",
                "images": int(sums["images"]), **{name: value / sums["images"] for name, value in sums.items() if name != "images"},
            }
            for label, sums in sorted(self._sums.items())
        ]  # fmt: skip


def _listed(exhibits: list[Exhibit]) -> list[dict[str, Any]]:
    return [{"name": exhibit.name, "psnr": exhibit.psnr} for exhibit in exhibits]


def _write(job: _Job, folder: Path, run: Mapping[str, Any]) -> None:
    """Measures, and fills the output folder."""
    outcome = _measure(job)
    schema = pa.schema([("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
    write_whole(folder / QUARANTINE_FILE, parquet_bytes(pa.Table.from_pylist(_rows(outcome.problems), schema=schema)))
    save_picture(folder / PICTURE_FILE, outcome.gallery.draw(), job.settings)
    write_whole(folder / RUN_FILE, canonical_json(run_record(**run, settings=job.settings)))
    write_whole(folder / EVALUATION_FILE, canonical_json(outcome.record))


def _rows(problems: Mapping[str, Problem]) -> list[dict[str, str]]:
    return [
        {"key": key, "reason": str(problem.reason), "detail": problem.detail}
        for key, problem in sorted(problems.items())
    ]


def _problem_lines(problems: Mapping[str, Problem]) -> list[str]:
    lines = [f"  {row['reason']}: {row['key']} ({row['detail']})" for row in _rows(problems)]
    if lines:
        lines.insert(0, f"{len(problems):,} samples do not decode and were left out:")
    if len(problems) > LISTED:
        lines[LISTED + 1 :] = [f"  ... and {len(problems) - LISTED:,} more; --json and --out list all of them"]
    return lines


def evaluation_result(
    place: str, record: Mapping[str, Any], out: Path | None = None, *, already: bool = False
) -> Result:
    """What an evaluation's record says, so that a repeated command, and `inspect`, say the same.

    Args:
        place: the tokenizer's.
        record: the content of `evaluation.json`.
        out: the folder of the evaluation, if it was written.
        already: whether it was there before the command.
    """
    lines = [f"{out}: already evaluated with these settings; nothing to do."] if already else []
    figures, size = record["figures"], record["size"]
    lines.append(
        f"{place} (tokenizer {record['tokenizer']}) on {record['corpus']}: {record['images']:,} images of {size}x{size}"
    )
    lines.append(f"looked at: {record['selection']}")
    for name, (form, meaning) in FIGURES.items():
        if name in figures:
            lines.append(f"  {name:<15}{form.format(figures[name]):>10}  {meaning}")
        elif name == "ssim":
            lines.append(f"  {name:<15}{'-':>10}  not measured: its window is larger than the images")
    if "rfid" in figures and record["images"] < DIMENSIONS:
        lines.append(
            f"  rFID of {record['images']:,} images is biased upwards and comparable with no published one: take at least {DIMENSIONS:,}"
        )
    for level in record["levels"]:
        used, entries = int(figures[f"{level}/used_codes"]), int(figures[f"{level}/codebook_size"])
        lines.append(
            f"  {title(level)}: {used} of {entries} codes used ({used / entries:.1%}), dataset perplexity {figures[f'{level}/perplexity']:.1f} "
            f"(as many codes, equally used, would carry as much), entropy {figures[f'{level}/entropy_bits']:.2f} bits a code"
        )
    lines += _class_lines(record["classes"])
    facts = {name: value for name, value in record.items() if name not in ("figures", "counts")} | figures
    if out:
        lines.append(f"made {out / EVALUATION_FILE} and {out / PICTURE_FILE}")
        facts["out"] = str(out)
    return Result(lines, Counts(**record["counts"]), 0, facts, quarantine=str(out / QUARANTINE_FILE) if out else "")


def _class_lines(classes: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in classes:
        named = f" {entry['name']}" if entry["name"] else ""
        title = f"label {entry['label']}{named}" if entry["label"] >= 0 else "no label"
        similar = f", SSIM {entry['ssim']:.4f}" if "ssim" in entry else ""
        lines.append(
            f"  {title}: {entry['images']:,} images, PSNR per image {entry['psnr_per_image']:.2f} dB{similar}, "
            f"L1 {entry['l1'] * GREY_LEVELS:.1f} of 255 grey levels"
        )
    return lines
