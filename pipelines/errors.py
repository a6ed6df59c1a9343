"""Failures of a job that was rightly asked for."""

from __future__ import annotations

import errno

ADVICE = {
    errno.ENOSPC: "Free some room there.",
    errno.EDQUOT: "Free some room there, or ask for more.",
    errno.EROFS: "Make the place writable, or choose another --out.",
    errno.EACCES: "Make the place writable, or choose another --out.",
}


class RunFailed(RuntimeError):  # noqa: N818 - it reads as what it is
    """A job stopped half-way; what it had committed is safe, and the same command goes on."""


class Diverged(RunFailed):
    """A training step was not finite; the same command would come to the same step."""


class WriteLost(RunFailed):
    """A Zarr shard was not written because a machine or a process was lost, with what it was to hold; trying again may go well."""


def told(error: BaseException) -> str:
    """What went wrong, and what helps, where that is known."""
    text = str(error) if isinstance(error, (OSError, RunFailed)) else repr(error)
    advice = ADVICE.get(getattr(error, "errno", None) or 0)
    return f"{text}. {advice}" if advice else text
