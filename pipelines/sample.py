"""The command `sample`: from a prior to codes to new images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

import priors
from pipelines.foreign import load_tokenizer, store_record
from pipelines.options import Device, choose_device, row_range
from pipelines.outputs import require_room, run_record
from pipelines.pictures import (
    Panel,
    Pixels,
    check_columns,
    check_picture,
    good_scale,
    image_grid,
    save_picture,
    side_by_side,
)
from pipelines.prior_inputs import check_labels, check_store
from pipelines.progress import meter
from pipelines.results import Result
from pipelines.tokenize_command import run_file, tokenizer_place
from tokenizer.protocol import ImageTokenizer
from vqmill import open_codes
from vqmill.commits import Counts, Cursor
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json, write_whole
from vqmill.layout import smallest_codec
from vqmill.settings import did_you_mean
from vqmill.spec import LevelSpec, Segment, StoreSpec, default_rows_per_shard
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import StoreWriter, write_shard


@dataclass(frozen=True)
class SampleOptions:
    """What `vqmill sample` is asked for; see its --help."""

    num: int | None = None
    seed: int = 0
    label: str | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    candidates: int = 1
    complete: Path | None = None
    rows: str | None = None
    keep: float = 0.5
    codes: Path | None = None
    columns: int | None = None
    batch_size: int = 64
    device: Device = "auto"


@dataclass(frozen=True)
class _Asked:
    """What is drawn: how many, with which labels, what is known of them, what that was taken from, and what to say about it."""

    num: int
    labels: torch.Tensor | None
    given: dict[str, torch.Tensor] | None = None
    whole: dict[str, torch.Tensor] | None = None
    source: dict[str, Any] | None = None
    warning: str = ""


def sample(
    prior_path: Path, tokenizer_path: Path | None, out: Path, *, module: str | None, options: SampleOptions
) -> Result:
    """Runs the command; see `vqmill sample --help`."""
    prior, model = priors.load(prior_path), load_tokenizer(tokenizer_path, module)
    try:
        prior.config.check_tokenizer(model.fingerprint)
        drawing = priors.Drawing(
            options.temperature, options.top_k, options.top_p, options.guidance, options.candidates
        )
    except CodesError as error:
        raise UsageError(f"{prior_path} with {tokenizer_path or module}: {error}") from error
    asked = _completions(prior, prior_path, options.complete, options) if options.complete else _draws(prior, options)
    settings = {
        "prior": prior.fingerprint, "tokenizer": model.fingerprint, "num": asked.num, "seed": options.seed, "label": options.label,
        "drawing": asdict(drawing), "completed": asked.source, "columns": options.columns,
    }  # fmt: skip
    check_picture(out, settings)
    check_columns(options.columns)
    chosen = choose_device(options.device)
    spec = _spec(prior, model, settings)
    if options.codes is not None:
        require_room(options.codes, asked.num * spec.row_bytes)
        StoreWriter(options.codes, spec).close()  # refuses a place that holds something else, before the drawing
    with meter("sampling", "codes") as show:
        try:
            drawn = priors.sample(
                prior, asked.num, asked.labels, options.seed, drawing, asked.given, options.batch_size, device=chosen, progress=show,
            )  # fmt: skip
        except CodesError as error:
            raise UsageError(str(error)) from error
    images = _decode(model, drawn, chosen, options.batch_size)
    whole = None if asked.whole is None else _decode(model, asked.whole, chosen, options.batch_size)
    save_picture(out, _picture(images, whole, options, prior.config.num_classes), settings)
    lines = [asked.warning] if asked.warning else []
    lines.append(f"made {out}: {asked.num} images, seed {options.seed}")
    facts: dict[str, Any] = {"out": str(out), "seed": options.seed}
    if (codes := options.codes) is not None:
        arrays = {name: values.numpy() for name, values in drawn.items()}
        _write_codes(codes, spec, arrays, asked.labels, images.shape[-1])
        write_whole(
            run_file(codes),
            canonical_json(run_record(**tokenizer_place(tokenizer_path, module, codes), settings=settings)),
        )
        lines.append(f"made {codes}: {asked.num} rows")
        facts["codes"] = str(codes)
    return Result(lines, Counts(encoded=asked.num), asked.num, facts)


def _draws(prior: priors.Prior, options: SampleOptions) -> _Asked:
    """Samples of nothing but labels.

    Raises:
        UsageError: an option without --complete, or out of its range.
    """
    if options.rows is not None:
        raise UsageError("--rows chooses rows of the store that --complete names; give both.")
    num = 64 if options.num is None else options.num
    if num < 1:
        raise UsageError(f"--num must be at least 1, got {num}.")
    return _Asked(num, _labels(options.label, num, prior.config.num_classes))


def _completions(prior: priors.Prior, place: Path, store: Path, options: SampleOptions) -> _Asked:
    """Rows of a store, of each of whose grids the upper part is kept.

    Raises:
        UsageError: the store is not of this prior's codes, or nothing is left to draw or to keep.
    """
    codes = open_codes(store)
    check_store(prior.config, place, codes)
    if options.num is not None:
        raise UsageError("--num: with --complete, as many images are made as --rows chooses; leave one of them out.")
    if not 0 < options.keep < 1:
        raise UsageError(f"--keep must lie between 0 and 1, got {options.keep}.")
    rows = row_range(options.rows or "0:16", len(codes))
    whole = {name: torch.from_numpy(codes[name][rows.start : rows.stop].astype(np.int64)) for name in prior.levels}
    given = {}
    for level in prior.config.levels:
        given[level.name] = whole[level.name].clone()
        given[level.name][:, max(1, round(options.keep * level.grid[0])) :] = -1
    known, warning = codes.labels[rows.start : rows.stop], ""
    if options.label is not None:
        labels = _labels(options.label, len(rows), prior.config.num_classes)
    else:
        warning = check_labels(prior.config, place, codes, rows, known)
        labels = torch.from_numpy(known.copy()) if prior.config.num_classes else None
    source = {
        "segments": [segment.plan for segment in codes.spec.segments], "rows": [rows.start, rows.stop], "keep": options.keep,
    }  # fmt: skip
    return _Asked(len(rows), labels, given, whole, source, warning)


def _picture(images: Pixels, whole: Pixels | None, options: SampleOptions, num_classes: int) -> Image.Image:
    """A grid of the images; beside what they were completed from, if they were."""
    columns, scale = options.columns, good_scale(images.shape[-1])
    if columns is None:
        columns = num_classes if options.label == "each" else max(1, round(len(images) ** 0.5))
    if whole is None:
        return image_grid(images, columns, scale)
    kept = whole.copy()
    kept[:, :, round(options.keep * whole.shape[2]) :] = 128
    panels = [Panel("whole", whole), Panel("kept, about", kept), Panel("completed", images)]
    return side_by_side(panels, columns, scale)


def _labels(label: str | None, num: int, num_classes: int) -> torch.Tensor | None:
    """int64 [num], or None for any class.

    Raises:
        UsageError: not a class, or the prior knows no classes.
    """
    if label is None:
        return None
    if num_classes == 0:
        raise UsageError("--label: this prior was trained without labels; leave the flag out.")
    if label == "each":
        return torch.arange(num) % num_classes
    if not label.isdecimal():
        raise UsageError(
            f"--label {label!r}: expected a class number 0..{num_classes - 1}, or each.{did_you_mean(label, ['each'])}"
        )
    if int(label) >= num_classes:
        raise UsageError(f"--label {label}: this prior knows the classes 0..{num_classes - 1}.")
    return torch.full((num,), int(label))


def _decode(
    model: ImageTokenizer, codes: dict[str, torch.Tensor], device: str, batch_size: int
) -> np.ndarray[Any, Any]:
    model.to(device)
    number = len(next(iter(codes.values())))
    parts = []
    for first in range(0, number, batch_size):
        batch = {name: values[first : first + batch_size] for name, values in codes.items()}
        parts.append(model.decode(batch).cpu())
    return torch.cat(parts).numpy()


def _spec(prior: priors.Prior, model: ImageTokenizer, settings: dict[str, Any]) -> StoreSpec:
    levels = tuple(LevelSpec(level.name, level.codebook_size, level.grid) for level in prior.config.levels)
    return StoreSpec(
        levels=levels,
        rows_per_shard=default_rows_per_shard(levels),
        tokenizer={name: value for name, value in store_record(model).items() if name != "preset"},
        corpus={"sampled": settings},
        segments=(Segment(f"sampled from {settings['prior']}", 0, 0, 1, settings["num"]),),
    )


def _write_codes(
    path: Path, spec: StoreSpec, codes: dict[str, np.ndarray[Any, Any]], labels: torch.Tensor | None, side: int
) -> None:
    number = len(next(iter(codes.values())))
    with StoreWriter(path, spec) as writer:
        if writer.spec.complete:
            return
        if writer.spec.codec is None:
            writer.choose_codec(
                smallest_codec(spec, {name: values[: spec.rows_per_shard] for name, values in codes.items()})
            )
        for first in range(writer.spec.num_rows, number, spec.rows_per_shard):
            rows = range(first, min(number, first + spec.rows_per_shard))
            known = [
                {"key": f"sample-{row:08d}", "source": "sampled", "input_shard": 0, "index": row, "width": side, "height": side,
                 "label": None if labels is None else int(labels[row])}
                for row in rows
            ]  # fmt: skip
            files = write_shard(
                path, writer.spec, writer.spec.num_commits, {name: values[rows.start : rows.stop] for name, values in codes.items()},
                pa.Table.from_pylist(known, schema=SAMPLES_SCHEMA), QUARANTINE_SCHEMA.empty_table(),
            )  # fmt: skip
            writer.commit(len(rows), Cursor(0, 0, rows.stop), Counts(encoded=len(rows)), files)
        writer.finish()
