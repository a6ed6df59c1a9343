"""The command `sample`: from a prior to codes to new images."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

import priors
from pipelines.class_names import EACH, find_class, heading, label_words, name_of
from pipelines.decode import decode_rows
from pipelines.foreign import load_tokenizer, store_record
from pipelines.options import Device, choose_device, in_flags, row_range
from pipelines.outputs import require_room, run_record
from pipelines.pictures import (
    Panel,
    Pixels,
    check_columns,
    check_picture,
    fits,
    good_scale,
    row_captions,
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
from vqmill.files import canonical_json
from vqmill.layout import smallest_codec
from vqmill.spec import LevelSpec, Segment, StoreSpec, default_rows_per_shard
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import StoreWriter, write_shard

USUAL_NUM = 64  # images, when nobody says how many
MOST_NUM = 256  # of those, when there are very many classes
MOST_COLUMNS = 32  # in which classes have columns of their own
FLAGS = {name: f"--{name.replace('_', '-')}" for name in ("num", "seed", "batch_size", *asdict(priors.Drawing()))}
FLAGS["labels"] = "--label"


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
    complete: str | Path | None = None
    rows: str | None = None
    keep: float | None = None
    codes: str | Path | None = None
    columns: int | None = None
    batch_size: int = 64
    device: Device = "auto"


@dataclass(frozen=True)
class _Asked:
    """What is drawn: how many, with which labels, what is known of them, what that was taken from, and what to say about it."""

    num: int
    label: str | None  # as asked for: a number, "each" or None
    labels: torch.Tensor | None
    columns: int
    notes: list[str]
    given: dict[str, torch.Tensor] | None = None
    whole: dict[str, np.ndarray[Any, Any]] | None = None
    source: dict[str, Any] | None = None
    captions: list[list[str]] = field(default_factory=list)


def sample(
    prior_path: Path, tokenizer_path: Path | None, out: Path, *, module: str | None, options: SampleOptions
) -> Result:
    """Runs the command; see `vqmill sample --help`."""
    prior, model = priors.load(prior_path), load_tokenizer(tokenizer_path, module)
    try:
        prior.config.check_tokenizer(model.fingerprint)
    except CodesError as error:
        raise UsageError(f"{prior_path} with {tokenizer_path or module}: {error}") from error
    asked = _completions(prior, prior_path, options.complete, options) if options.complete else _draws(prior, options)
    try:
        drawing = priors.Drawing(
            options.temperature, options.top_k, options.top_p, options.guidance, options.candidates
        )
        priors.check_sampling(prior, asked.num, asked.labels, options.seed, drawing, asked.given, options.batch_size)
    except CodesError as error:
        raise UsageError(in_flags(str(error), FLAGS)) from error
    settings = {
        "prior": prior.fingerprint, "tokenizer": model.fingerprint, "num": asked.num, "seed": options.seed, "label": asked.label,
        "drawing": asdict(drawing), "completed": asked.source, "columns": options.columns,
    }  # fmt: skip
    check_picture(out, settings)
    check_columns(options.columns)
    chosen = choose_device(options.device)
    model.to(chosen)
    spec = _spec(prior, model, settings)
    if options.codes is not None:
        require_room(options.codes, asked.num * spec.row_bytes)
        StoreWriter(options.codes, spec).close()  # refuses a place that holds something else, before the drawing
    with meter("sampling", "codes") as show:
        drawn = priors.sample(
            prior, asked.num, asked.labels, options.seed, drawing, asked.given, options.batch_size, device=chosen, progress=show,
        )  # fmt: skip
    arrays = {name: values.numpy() for name, values in drawn.items()}
    images = decode_rows(model, arrays, options.batch_size)
    whole = None if asked.whole is None else decode_rows(model, asked.whole, options.batch_size)
    words = ", ".join(
        [f"seed {options.seed}", _label_words(asked, prior), *_drawing_words(drawing), *_kept_words(asked)]
    )
    save_picture(out, _picture(images, whole, asked, prior, words), settings)
    lines = [*asked.notes, f"made {out}: {asked.num} images, {words}"]
    facts: dict[str, Any] = {"out": str(out), "seed": options.seed, "label": asked.label}
    if (codes := options.codes) is not None:
        _write_codes(codes, spec, arrays, asked.labels, images.shape[-1])
        record = run_record(**tokenizer_place(tokenizer_path, module, codes), settings=settings)
        run_file(codes).write(canonical_json(record))
        lines.append(f"made {codes}: {asked.num} rows")
        facts["codes"] = str(codes)
    return Result(lines, Counts(encoded=asked.num), asked.num, facts)


def _label_words(asked: _Asked, prior: priors.Prior) -> str:
    if asked.labels is None:
        return "a prior without labels" if prior.config.num_classes == 0 else "any label"
    if asked.label is None:
        return "the rows' own labels"
    if asked.label == EACH:
        return f"each of {prior.config.num_classes:,} classes in turn"
    return label_words(label := int(asked.label), name_of(label, prior.class_names))


def _drawing_words(drawing: priors.Drawing) -> list[str]:
    """What differs from the model as it is."""
    plain = asdict(priors.Drawing())
    return [f"{name} {value:g}" for name, value in asdict(drawing).items() if value != plain[name]]


def _kept_words(asked: _Asked) -> list[str]:
    return [] if asked.source is None else ["the upper {} of {} rows of codes kept".format(*asked.source["kept"])]


def each_layout(num_classes: int, num: int | None) -> tuple[int, int]:
    """How many images `--label each` draws, and in how many columns: of every class equally many, and no row ragged, unless `num` says otherwise.

    Up to 32 classes have columns of their own. More are laid out as a rectangle, and more than 256 are not all drawn unasked.

    >>> each_layout(10, None), each_layout(3, None), each_layout(100, None), each_layout(1000, None)
    ((60, 10), (63, 9), (100, 10), (256, 16))

    Args:
        num_classes: at least 1.
        num: how many are asked for; None for about 64.
    """
    if num_classes <= MOST_COLUMNS:
        columns = num_classes * max(1, round((num or USUAL_NUM) ** 0.5 / num_classes))
        return num or columns * max(1, round(USUAL_NUM / columns)), columns
    if num is not None:
        return num, _square(num)
    num = min(num_classes * max(1, round(USUAL_NUM / num_classes)), MOST_NUM)
    return num, next(columns for columns in range(math.ceil(num**0.5), num + 1) if num % columns == 0)


def _square(num: int) -> int:
    return max(1, round(num**0.5))


def _draws(prior: priors.Prior, options: SampleOptions) -> _Asked:
    """Samples of nothing but labels.

    Raises:
        UsageError: an option without --complete, or out of its range.
    """
    for flag, value in (("--rows", options.rows), ("--keep", options.keep)):
        if value is not None:
            raise UsageError(f"{flag} says what of the store that --complete names is taken; give both.")
    if options.num is not None and options.num < 1:
        raise UsageError(f"--num must be at least 1, got {options.num}.")
    label, notes = _label(options.label, prior)
    num_classes = prior.config.num_classes
    if label == EACH:
        num, columns = each_layout(num_classes, options.num)
        if num < num_classes:
            notes.append(f"each: the first {num:,} of {num_classes:,} classes; --num {num_classes} draws all of them")
    else:
        num = USUAL_NUM if options.num is None else options.num
        columns = _square(num)
    return _Asked(num, label, _labels(label, num, num_classes), options.columns or columns, notes)


def _completions(prior: priors.Prior, place: Path, store: str | Path, options: SampleOptions) -> _Asked:
    """Rows of a store, of each of whose grids the upper part is kept.

    Raises:
        UsageError: the store is not of this prior's codes, or nothing is left to draw or to keep.
    """
    codes = open_codes(store)
    check_store(prior.config, place, codes)
    if options.num is not None:
        raise UsageError("--num: with --complete, as many images are made as --rows chooses; leave one of them out.")
    keep = 0.5 if options.keep is None else options.keep
    # Coarse codes decide, so that no finer one is kept under a coarse one that is drawn.
    height = prior.config.levels[0].grid[0]
    kept = round(keep * height) if 0 < keep < 1 else 0
    if not 0 < kept < height:
        raise UsageError(
            f"--keep {keep:g}: would keep {kept} of the {height} rows of level '{prior.levels[0]}', so that nothing is left to "
            f"{'draw' if kept else 'keep'}. Take {' or '.join(dict.fromkeys((f'{1 / height:.2f}', f'{1 - 1 / height:.2f}')))}, or between."
        )
    rows = row_range(options.rows, len(codes))
    whole = {name: codes[name][rows.start : rows.stop].astype(np.int64) for name in prior.levels}
    given = {}
    for level in prior.config.levels:
        given[level.name] = torch.from_numpy(whole[level.name].copy())
        given[level.name][:, kept * level.grid[0] // height :] = -1
    label, notes = _label(options.label, prior)
    labels = _labels(label, len(rows), prior.config.num_classes)
    if label is None and prior.config.num_classes:
        known = codes.label_array[rows.start : rows.stop].astype(np.int64)
        notes, labels = check_labels(prior, place, codes, rows, known), torch.from_numpy(known)
    source = {"store": codes.spec.settings(), "rows": [rows.start, rows.stop], "kept": [kept, height]}
    captions = row_captions(codes, np.asarray(rows))
    columns = options.columns or _square(len(rows))
    return _Asked(len(rows), label, labels, columns, notes, given, whole, source, captions)


def _picture(images: Pixels, whole: Pixels | None, asked: _Asked, prior: priors.Prior, words: str) -> Image.Image:
    """A grid of the images with their classes, or beside what they were completed from; `words` say how they were drawn."""
    columns, scale, names = asked.columns, good_scale(images.shape[-1]), prior.class_names
    if whole is not None and asked.source is not None:
        kept, height = asked.source["kept"]
        upper = whole.copy()
        upper[:, :, kept * whole.shape[2] // height :] = 128
        panels = [Panel("decoded", whole, asked.captions), Panel("kept", upper), Panel(f"completed: {words}", images)]
        return side_by_side(panels, columns, scale)
    if asked.label != EACH:
        return side_by_side([Panel(words, images)], columns, scale)
    num_classes = prior.config.num_classes
    side = scale * images.shape[-1]
    headings = [
        heading(number % num_classes, names, lambda name: fits(name, side))
        for number in range(max(columns, len(images)))
    ]
    if columns % num_classes == 0:
        return side_by_side([Panel(words, images, headings=headings[:columns])], columns, scale)
    return side_by_side([Panel(words, images, [[name] for name in headings[: len(images)]])], columns, scale)


def _label(text: str | None, prior: priors.Prior) -> tuple[str | None, list[str]]:
    """What --label asks for, a number, "each" or None for any class; and what is to be said of it.

    Raises:
        UsageError: not a class, or the prior knows no classes.
    """
    if text is None or (text == EACH and prior.config.num_classes):
        return text, []
    if prior.config.num_classes == 0:
        raise UsageError("--label: this prior was trained without labels; leave the flag out.")
    label, note = find_class(text, prior.config.num_classes, prior.class_names)
    return str(label), [note] if note else []


def _labels(label: str | None, num: int, num_classes: int) -> torch.Tensor | None:
    """int64 [num], or None for any class."""
    if label is None:
        return None
    return torch.arange(num) % num_classes if label == EACH else torch.full((num,), int(label))


def _spec(prior: priors.Prior, model: ImageTokenizer, settings: dict[str, Any]) -> StoreSpec:
    levels = tuple(LevelSpec(level.name, level.codebook_size, level.grid) for level in prior.config.levels)
    plan = hashlib.sha256(canonical_json(settings)).hexdigest()[:32]  # other seeds and drawings are other stores
    return StoreSpec(
        levels=levels,
        rows_per_shard=default_rows_per_shard(levels),
        tokenizer={name: value for name, value in store_record(model).items() if name != "preset"},
        corpus={"sampled": settings} | ({"class_names": list(prior.class_names)} if prior.class_names else {}),
        segments=(Segment(f"sampled {plan}", 0, 0, 1, settings["num"]),),
    )


def _write_codes(
    path: str | Path, spec: StoreSpec, codes: dict[str, np.ndarray[Any, Any]], labels: torch.Tensor | None, side: int
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
