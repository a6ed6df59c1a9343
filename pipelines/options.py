"""Flags that several commands share, and what they resolve to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from pipelines.cluster import Share, address_to_join
from pipelines.training_log import require_tensorboard
from vqmill.errors import CodesError, UsageError

if TYPE_CHECKING:
    from pipelines.corpus.images import Preprocessing

TENSORBOARD_FOLDER = "tensorboard"
FIRST_ROWS = 16  # that a picture shows when nobody says which
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
Codec = Literal["auto", "blosc-zstd", "blosc-lz4", "zstd"]
Layout = Literal["zalando", "unixpickle", "rosinality"]
PixelRange = Literal["signed", "half", "unit"]


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every command takes."""

    json: Annotated[bool, Parameter(negative="")] = False
    """End the output with one line of JSON: seen, encoded, quarantined, skipped, rows, seconds, and what the command made."""


@Parameter(name="*")
@dataclass(frozen=True)
class CorpusFlags:
    """How a corpus is read."""

    gzip_tars: Annotated[bool, Parameter(negative="")] = False
    """Also read tars packed with gzip, .tar.gz and .tgz. Each pass unpacks them from their start; docs/corpora.md."""


@Parameter(name="*")
@dataclass(frozen=True)
class FitFlags:
    """What people change daily about a training run; the preset and --config decide what is not given."""

    steps: int | None = None
    """Optimizer steps; the preset's if not given."""
    batch_size: int | None = None
    """Samples of a step, over all workers; the preset's if not given."""
    learning_rate: float | None = None
    """Peak of the schedule (linear warm-up, then half a cosine); the preset's if not given."""
    precision: Literal["auto", "fp32", "bf16"] | None = None
    """bf16 computes the networks in bfloat16, quantizers stay in fp32; auto takes it where the device has it in hardware. The preset's if not given."""
    seed: int | None = None
    """Of everything random; 0 by default."""
    workers: int = 1
    """1 trains in this process; more train data-parallel on Ray, one device each."""
    device: Device = "auto"
    """auto takes the GPU if there is one."""
    tensorboard: Annotated[bool, Parameter(negative="")] = False
    """Also write TensorBoard's event files, into OUT/tensorboard; needs the extra `tensorboard`."""

    def check(self) -> None:
        """Refuses what cannot be done as asked, before the training starts.

        Raises:
            UsageError: --tensorboard without the package.
        """
        if self.tensorboard:
            require_tensorboard()

    def fit(self) -> dict[str, object]:
        """The flags that are fields of FitConfig."""
        return {name: getattr(self, name) for name in ("steps", "batch_size", "learning_rate", "precision", "seed")}


@Parameter(name="*")
@dataclass(frozen=True)
class ImageFlags:
    """How images become squares of pixels; None leaves it to what is recorded, and to the defaults of `Preprocessing` where nothing is."""

    fit: Literal["crop", "pad"] | None = None
    """crop takes the square in the middle of an image; pad takes all of it, and fills the square up with --background. If not given, crop for training; after it, as the tokenizer was trained, where that is known."""
    max_image_memory: float | None = None
    """MB (10^6 bytes) that decoding one image may take; images that need more are quarantined. If not given, 200 for training; after it, as for --fit."""
    background: str | None = None
    """R,G,B from 0 to 255: what is seen through transparent pixels, and beside the image with --fit pad. If not given, 255,255,255 for training; after it, as for --fit."""

    def or_recorded(self, record: Mapping[str, Any]) -> ImageFlags:
        """The same flags, with what was not given taken from a record.

        Args:
            record: of a training or of a store, as `Preprocessing.to_dict` gives it; it may lack any of it.

        Raises:
            UsageError: the record is none of ours.
        """
        try:
            memory, background = record.get("max_memory_bytes"), record.get("background")
            return ImageFlags(
                self.fit or record.get("fit"),
                self.max_image_memory if self.max_image_memory is not None or memory is None else memory / 1e6,
                self.background or (background and ",".join(str(int(value)) for value in background)),
            )
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The recorded preprocessing {dict(record)} is none of ours ({error}). Give --fit, --max-image-memory and --background."
            ) from error

    def preprocessing(self, size: int, channels: int) -> Preprocessing:
        """What a tokenizer's images are made into.

        Args:
            size: side of the square, pixels.
            channels: 1 or 3.

        Raises:
            UsageError: a value is out of range.
        """
        from pipelines.corpus.images import Preprocessing

        chosen: dict[str, Any] = {} if self.fit is None else {"fit": self.fit}
        if self.max_image_memory is not None:
            if not 1 <= self.max_image_memory < 1e9:
                raise UsageError(f"--max-image-memory must be at least 1 (MB), got {self.max_image_memory:g}.")
            chosen["max_memory_bytes"] = round(self.max_image_memory * 1e6)
        if self.background is not None:
            values = self.background.split(",")
            if len(values) != 3 or not all(value.strip().isdecimal() and int(value) <= 255 for value in values):
                raise UsageError(
                    f"--background {self.background!r}: expected R,G,B, each from 0 to 255, for example 0,0,0."
                )
            chosen["background"] = tuple(map(int, values))
        try:
            return Preprocessing(size=size, channels=channels, **chosen)
        except CodesError as error:
            raise UsageError(str(error)) from error


@Parameter(name="*")
@dataclass(frozen=True)
class ClusterFlags:
    """Where encoder workers run, and what each takes. Of these, only --allow-mixed can change what comes out."""

    address: str | None = None
    """Join the Ray cluster that is there, rather than start a Ray on this machine: HOST:PORT of its head, or auto for the one that this machine is part of. If not given, the one that RAY_ADDRESS names, as it does inside `ray job submit`; local joins none."""
    cpus_per_worker: int = 1
    """CPU slots that each worker takes, for its decode threads; one thread encodes in any case."""
    gpus_per_worker: float | None = None
    """How much of a GPU each worker takes: with 0.5, two share one. 1 if not given."""
    decode_threads: int | None = None
    """Threads of each worker that decode images; one more than --cpus-per-worker if not given."""
    allow_mixed: Annotated[bool, Parameter(negative="")] = False
    """Let machines of several kinds (CPU type, GPU model, torch version) work on one store. They round differently, so a few codes depend on which machine made them; the store records all the kinds. Without this, a machine of another kind is refused, also when a stopped job goes on."""

    def resolved(self) -> ClusterFlags:
        """The same flags with the address of the cluster to join; None when there is none.

        Raises:
            UsageError: a value is out of range.
        """
        for flag, value in (("--cpus-per-worker", self.cpus_per_worker), ("--decode-threads", self.decode_threads)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} must be at least 1, got {value}.")
        if self.gpus_per_worker is not None and not 0 < self.gpus_per_worker <= 1:
            raise UsageError(
                f"--gpus-per-worker must be above 0 and at most 1, since a worker computes on one GPU; got {self.gpus_per_worker:g}."
            )
        return replace(self, address=address_to_join(self.address))

    def check_device(self, device: str) -> None:
        """Refuses a share of GPUs for workers that compute on CPUs.

        Raises:
            UsageError: it was asked for.
        """
        if self.gpus_per_worker is not None and device == "cpu":
            raise UsageError("--gpus-per-worker: the workers compute on CPUs here; it goes with --device cuda.")

    @property
    def share(self) -> Share:
        """What each worker takes of a machine."""
        return Share(self.cpus_per_worker, self.gpus_per_worker)

    @property
    def threads(self) -> int:
        """Decode threads of a worker."""
        return self.decode_threads or self.cpus_per_worker + 1


def choose_device(device: Device) -> str:
    """Resolves `auto`, and sees to it that `fp32` means float32 on a GPU.

    Raises:
        UsageError: CUDA was asked for and is not there.
    """
    import torch

    from pipelines.precision import exact_float32

    exact_float32()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU on this machine. See: vqmill doctor")
    return device


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of the Python API in the words of the command line.

    >>> in_flags("top_p: expected a probability in (0, 1], found 2.", {"top_p": "--top-p"})
    '--top-p: expected a probability in (0, 1], found 2.'

    Args:
        message: in which arguments are called by their names.
        flags: for each name, what sets it.
    """
    return re.sub(rf"\b({'|'.join(flags)})\b", lambda found: flags[found[0]], message)


def default_workers(device: str, share: Share = Share()) -> int:
    """As many workers as this machine's GPUs have room for, or its cores."""
    import torch

    if device == "cuda":
        return int(torch.cuda.device_count() / (share.gpus or 1) + 1e-6)
    return max(1, (os.cpu_count() or 1) // share.cpus)


def row_range(text: str | None, number: int) -> range:
    """Resolves `--rows START:STOP` in a store; either side may be left out, but neither may lie outside.

    >>> row_range("8:", 10)
    range(8, 10)

    Args:
        text: what was typed; None for the first 16 rows, or as many as there are.
        number: rows of the store.

    Raises:
        UsageError: not of this form, or not all of these rows are there.
    """
    if text is None:
        text = f":{min(FIRST_ROWS, number)}"
    start, colon, stop = text.partition(":")
    if not colon or not all(part.isdecimal() or not part for part in (start, stop)):
        raise UsageError(f"--rows {text!r}: expected START:STOP, for example 0:64.")
    first, last = int(start or 0), int(stop or number)
    if first >= last or last > number:
        problem = "no rows there" if first >= min(last, number) else f"rows {number}:{last} are not there"
        raise UsageError(f"--rows {text}: {problem}; the store has rows 0:{number}.")
    return range(first, last)
