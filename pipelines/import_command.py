"""The command `import-checkpoint`: a `.pt` file of a published project in, a tokenizer of ours out. Nothing else here reads such files."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

import tokenizer
from pipelines.options import Layout, PixelRange
from pipelines.outputs import RUN_FILE, OutputFolder, require_room, run_record
from pipelines.results import Result
from tokenizer.imports import convert, unwrap
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json, write_whole
from vqmill.kinds import held_by

RANGES: dict[PixelRange, tuple[float, float]] = {"signed": (-1.0, 1.0), "half": (-0.5, 0.5), "unit": (0.0, 1.0)}


def import_checkpoint(
    file: Path, out: Path, *, layout: Layout, size: int | None, pixel_range: PixelRange | None
) -> Result:
    """Runs the command; see `vqmill import-checkpoint --help`."""
    if not file.is_file():
        found = held_by(file) if file.exists() else "no such file"
        raise UsageError(f"{file}: {found}. Name the .pt file that a training of {layout}'s wrote.")
    data = file.read_bytes()
    state, notes = _tensors(data, file)
    try:
        model = convert(state, layout, size=size, pixel_range=RANGES[pixel_range] if pixel_range else None)
    except CodesError as error:
        raise CodesError(f"{file}: {error}") from error
    config = model.config
    settings = {
        "command": "import-checkpoint", "layout": layout, "sha256": hashlib.sha256(data).hexdigest(),
        "tokenizer": config.to_dict(),
    }  # fmt: skip
    require_room(out, 4 * sum(tensor.numel() for tensor in model.state_dict().values()))
    with OutputFolder(out, settings) as place:
        if not place.finished:
            tokenizer.save(model, place.folder)
            record = run_record(
                checkpoint=str(file), settings=settings, fingerprint=model.fingerprint, parameters=model.num_parameters, notes=notes
            )  # fmt: skip
            write_whole(place.folder / RUN_FILE, canonical_json(record))
            place.finish()
        lines = [f"{out}: already imported from this file; nothing to do."] if place.finished else []
    lines += [f"{file}: {note}" for note in notes]
    grids = ", ".join(f"{level} {'x'.join(map(str, model.grid(level)))}" for level in model.levels)
    lines += [
        f"tokenizer {model.fingerprint}: {model.num_parameters:,} parameters, codebook {config.codebook_size} x {config.code_dim} "
        f"({config.quantizer}), {grids}",
        _assumed("size", f"{config.size} pixels", given=size is not None, layout=layout),
        _assumed("pixel-range", "black {:g}, white {:g}".format(*config.pixel_range), given=pixel_range is not None, layout=layout),
        f"made {out / tokenizer.FILE_NAME}",
    ]  # fmt: skip
    return Result(lines, facts={"out": str(out), "fingerprint": model.fingerprint, "config": config.to_dict()})


def _assumed(flag: str, value: str, *, given: bool, layout: str) -> str:
    return f"{flag}: {value}" + ("" if given else f" (no tensor tells; as {layout} trains. Otherwise say --{flag})")


def _tensors(data: bytes, file: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a `.pt` file, and what there is to say about them; nothing in it is run.

    Raises:
        CodesError: not a checkpoint, damaged, or it needs code to be read.
    """
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        raise CodesError(
            f"{file}: expected a .pt file of torch, found safetensors. If vqmill wrote it, it is a tokenizer already: --tokenizer {file}. "
            f"Else make it one: torch.save(safetensors.torch.load_file({file.name!r}), 'weights.pt')."
        )
    try:
        _check_sums(data)
        with warnings.catch_warnings(action="ignore"):  # of old protocols; what cannot be read is an error
            loaded: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return unwrap(loaded)
    except CodesError as error:
        raise CodesError(f"{file}: {error}") from error
    except pickle.UnpicklingError as error:
        raise CodesError(
            f"{file}: refused, as it is no checkpoint of torch, or reading it would run code ({_reason(error)}). In the project that wrote it, "
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt')."
        ) from error
    except Exception as error:  # damage leads to almost any
        raise CodesError(
            f"{file}: not a whole checkpoint of torch ({_reason(error)}). Restore it from a copy."
        ) from error


def _check_sums(data: bytes) -> None:
    """Torch writes a CRC of every tensor into its zip archives, and does not look at it.

    Raises:
        CodesError: one does not fit; the part is named.
    """
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if damaged := archive.testzip():
                raise CodesError(f"damaged: the CRC of {damaged} does not fit. Restore it from a copy.")


def _reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong; others advise to load without the safeguard."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Weights only load")]
    return lines[0] if lines else type(error).__name__
