"""Failures of a job that was rightly asked for."""


class RunFailed(RuntimeError):  # noqa: N818 - it reads as what it is
    """A job stopped half-way; what it had committed is safe, and the same command goes on."""


class Diverged(RunFailed):
    """A training step was not finite; the same command would come to the same step."""
