"""The command line's frame: what all commands have in common, and how one ends."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cyclopts import App

import vqmill
from pipelines.errors import Diverged, RunFailed, told
from pipelines.options import Common
from pipelines.results import FAILED, USAGE, Result, plain_console, printable
from vqmill.errors import CodesError, UsageError

app = App(
    name="vqmill",
    version=vqmill.__version__,
    help="""Turn image collections into small grids of integers, and train models on them.

    A run, from pictures to pictures:

        vqmill train-tokenizer photos/ --out runs/tok --preset rgb32
        vqmill tokenize photos/ --tokenizer runs/tok --out codes.zarr
        vqmill train-prior codes.zarr --out runs/prior
        vqmill sample runs/prior --tokenizer runs/tok --num 64 --out samples.png

    CORPUS is a folder of images (sub-folders are classes), tar shards in webdataset form ("shards/{000000..000009}.tar", quoted), or
    "torchvision:FashionMNIST?root=DATA&split=train". Exit codes: 0 all well, 3 done with quarantined samples, 1 failed, 2 usage.
    """,
    help_format="markdown",
    result_action="return_value",
)


def run(common: Common, job: Callable[[], Result]) -> int:
    """Runs a command's job: errors become messages, and everything becomes an exit code."""
    start = time.monotonic()
    errors = plain_console(stderr=True)
    try:
        return job().finish(as_json=common.json, seconds=time.monotonic() - start)
    except UsageError as error:
        errors.print(printable(f"error: {error}"))
        return _failed(common, USAGE, str(error))
    except (
        CodesError,
        Diverged,
    ) as error:  # the message says what to mend; until then the same command ends the same way
        errors.print(printable(f"error: {error}"))
        return _failed(common, FAILED, str(error))
    except (RunFailed, OSError) as error:
        errors.print(printable(f"error: {told(error)}"))
        errors.print(f"To try again: {_command()}")
        return _failed(common, FAILED, told(error))
    except KeyboardInterrupt:
        errors.print(
            f"stopped. Whatever was committed, or saved as a resume point, is kept; the same command goes on from there: {_command()}"
        )
        return _failed(common, FAILED, "stopped")


def _failed(common: Common, code: int, error: str) -> int:
    """Ends the output with a JSON line here too, when one was asked for."""
    if common.json:
        plain_console().print(json.dumps({"error": error, "exit_code": code}, ensure_ascii=False))
    return code


def _command() -> str:
    """What was typed, ready to be pasted."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
