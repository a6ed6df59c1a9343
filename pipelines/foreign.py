"""Tokenizers from anywhere: a folder of ours, or what the user's own importable code makes (`--tokenizer-module package:factory`)."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenizer
from tokenizer.protocol import ImageTokenizer, check_codes, check_facts, check_images, check_scale
from vqmill.errors import CodesError, UsageError
from vqmill.settings import did_you_mean

FLAG = "--tokenizer-module"


class ForeignTokenizer:
    """A tokenizer that somebody else wrote, every result of which is looked at before it is used.

    Args:
        module: the `package:factory` that made it.
        folder: where its code was looked for besides the installed packages.
        model: what was made.
    """

    def __init__(self, module: str, folder: str, model: ImageTokenizer) -> None:
        self.module, self.folder, self._model = module, folder, model
        self._device, self._scaled = torch.device("cpu"), False
        try:
            check_facts(model)
        except CodesError as error:
            raise UsageError(f"{FLAG} {module}: {error} Try: vqmill check-tokenizer {module}") from error
        self.name, self.fingerprint = model.name, model.fingerprint
        self.channels, self.size, self.levels = model.channels, model.size, dict(model.levels)

    def grid(self, level: str, size: int) -> tuple[int, ...]:
        """See `ImageTokenizer`."""
        return tuple(self._model.grid(level, size))

    def to(self, device: str | torch.device) -> ForeignTokenizer:
        """See `ImageTokenizer`."""
        self._device = torch.device(device)
        self._model.to(self._device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """See `ImageTokenizer`.

        Raises:
            CodesError: what came out is no codes of its codebooks.
        """
        try:
            codes = self._model.encode(images.to(self._device))
        except Exception as error:  # somebody else's code
            raise CodesError(f"{FLAG} {self.module}: encode failed: {_told(error)}") from error
        check_codes(self, codes, len(images), images.shape[-1])
        return dict(codes)

    @torch.no_grad()
    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """See `ImageTokenizer`.

        Raises:
            CodesError: what came out is no images of these codes.
        """
        try:
            images = self._model.decode({level: values.to(self._device) for level, values in codes.items()})
        except Exception as error:  # somebody else's code
            raise CodesError(f"{FLAG} {self.module}: decode failed: {_told(error)}") from error
        try:
            check_images(self._model, images, codes)
            if not self._scaled:  # a fact of the code, not of a batch
                check_scale(self._model, images)
                self._scaled = True
        except CodesError as error:
            raise CodesError(f"{FLAG} {self.module}: {error} Try: vqmill check-tokenizer {self.module}") from error
        return images


def load_tokenizer(path: Path | None, module: str | None) -> ImageTokenizer:
    """The tokenizer that a command was told to use.

    Raises:
        UsageError: both or none were named, or there is none.
    """
    if (path is None) == (module is None):
        raise UsageError(
            f"name one tokenizer: --tokenizer DIR (a folder of ours), or {FLAG} package:factory (your own code)."
        )
    return tokenizer.load(path) if path is not None else load_module(module or "")


def packed(model: ImageTokenizer) -> Callable[[], ImageTokenizer]:
    """What makes the same tokenizer in another process; small enough to be sent there."""
    if isinstance(model, tokenizer.Tokenizer):
        return partial(tokenizer.loads, tokenizer.dumps(model))
    assert isinstance(model, ForeignTokenizer)
    return partial(load_module, model.module, folder=model.folder, fingerprint=model.fingerprint)


def store_record(model: ImageTokenizer) -> dict[str, Any]:
    """What a store records of the tokenizer that made it. `module` is a fact for people: nothing imports it because a store names it."""
    module = {"module": model.module} if isinstance(model, ForeignTokenizer) else {}
    return {"fingerprint": model.fingerprint, "preset": model.name, **module}


def load_module(module: str, folder: str | None = None, fingerprint: str | None = None) -> ForeignTokenizer:
    """Imports the user's code, and calls its factory.

    Args:
        module: `package.module:factory`, found among the installed packages or, after those, in `folder`.
        folder: where else to look; the current directory when None.
        fingerprint: that of the tokenizer that is to be made; anything when None.

    Raises:
        UsageError: there is no such code, it fails, or it makes no tokenizer.
    """
    model = ForeignTokenizer(module, (folder := folder or str(Path.cwd())), find_factory(module, folder)())
    if fingerprint not in (None, model.fingerprint):
        raise UsageError(
            f"{FLAG} {module}: made tokenizer {model.fingerprint} in a worker, but {fingerprint} when the job began: its factory must make the "
            f"same each time, on every machine. Try: vqmill check-tokenizer {module}"
        )
    return model


def find_factory(module: str, folder: str) -> Callable[[], ImageTokenizer]:
    """The factory that a name stands for; what it raises is told with the place.

    Raises:
        UsageError: there is no such code; and when called, what the factory raised.
    """
    place, colon, name = module.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in place.split(".")):
        raise UsageError(f"{FLAG} {module!r}: expected package.module:factory, for example my_models.vqgan:make.")
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file there stands in for no installed package
    importlib.invalidate_caches()  # the file may be younger than this process
    try:
        code = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise UsageError(
                f"{FLAG} {module}: there is no {error.name}, neither installed nor in {folder}."
            ) from error
        raise UsageError(f"{FLAG} {module}: importing it failed: {_told(error)}") from error
    except Exception as error:  # somebody else's code
        raise UsageError(f"{FLAG} {module}: importing it failed: {_told(error)}") from error
    factory = getattr(code, name, None)
    if not callable(factory):
        raise UsageError(f"{FLAG} {module}: {code.__file__} has no function {name}.{did_you_mean(name, vars(code))}")

    def made() -> Any:
        try:
            return factory()
        except Exception as error:  # somebody else's code
            raise UsageError(f"{FLAG} {module}: {name}() failed: {_told(error)}") from error

    return made


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error!r} ({last.filename}, line {last.lineno})"
