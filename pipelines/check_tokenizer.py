"""The command `check-tokenizer`: whether the user's own tokenizer keeps to the protocol."""

from __future__ import annotations

from pathlib import Path

from pipelines.foreign import find_factory
from pipelines.results import FAILED, OK, Result
from tokenizer.conformance import check_tokenizer as run_checks


def check_tokenizer(module: str) -> Result:
    """Runs the command; see `vqmill check-tokenizer --help`."""
    checks = run_checks(find_factory(module, str(Path.cwd())))
    lines = [
        f"{'FAIL' if check.problem else 'pass'}: {check.title}" + (f": {check.problem}" if check.problem else "")
        for check in checks
    ]
    problem = checks[-1].problem
    lines.append("later checks were left out" if problem else f"all is well: --tokenizer-module {module} can be used")
    facts = {"module": module, "passed": sum(not check.problem for check in checks), "problem": problem}
    return Result(lines, facts=facts, code=FAILED if problem else OK)
