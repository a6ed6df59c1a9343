"""Keeps what Pillow says about bad files out of the program's warnings, safely when many threads decode.

`warnings.catch_warnings` swaps the filters of the whole process (until Python 3.14), so two threads that use it undo each other. And where
warnings are errors, a mere remark on a file's metadata would make a sound image fail. So the name `warnings` inside Pillow's modules gets
a stand-in, which drops what is said by a thread while that thread is inside `quiet()`, and passes on all the rest.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_thread = threading.local()


class _Warnings:
    """Stands in for the module `warnings`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    def warn(
        self,
        message: str | Warning,
        category: type[Warning] | None = None,
        stacklevel: int = 1,
        *more: Any,
        **options: Any,
    ) -> None:
        if not getattr(_thread, "quiet", False):
            warnings.warn(message, category, stacklevel + 1, *more, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """While inside, this thread hears no warning from Pillow about the file in hand."""
    _thread.quiet = True
    try:
        yield
    finally:
        _thread.quiet = False


def install() -> None:
    """Puts the stand-in into the modules of Pillow that are loaded; notes to programmers (deprecations) stay as they are."""
    stand_in = _Warnings()
    for name, module in list(sys.modules.items()):
        said_of_files = name.startswith("PIL.") and name != "PIL._deprecate"
        if said_of_files and isinstance(module, ModuleType) and vars(module).get("warnings") is warnings:
            setattr(module, "warnings", stand_in)  # noqa: B010 - type checkers know better than to allow the assignment
