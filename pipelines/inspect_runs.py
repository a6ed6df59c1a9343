"""What `inspect` says of folders that a command made, or has begun to make: how far it is, what came out, and which command it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines import train_prior, train_tokenizer
from pipelines.evaluate import EVALUATION_FILE, evaluation_result
from pipelines.outputs import RUN_FILE, WORK, recorded_command
from pipelines.results import Result
from pipelines.score import score_result
from pipelines.train import FINAL_FILE
from pipelines.training_log import METRICS_FILE, newest_record
from pipelines.training_state import RESUME_FILE
from vqmill.checkpoint import read_description
from vqmill.errors import CodesError
from vqmill.files import PARTIAL_SUFFIX, SETTINGS_FILE
from vqmill.kinds import command_of

VALIDATION = "validation/"


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: the last one that was logged, 0 for none.
        resume_step: the one of the resume point, 0 for none.
        trained: whether it has come to its end.
        loss: of the last logged step.
        evaluation_step: the step of the last evaluation.
        evaluation: its figures.
    """

    step: int = 0
    resume_step: int = 0
    trained: bool = False
    loss: float | None = None
    evaluation_step: int | None = None
    evaluation: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Progress:
        """Read from the folder in which `fit` works."""
        last = newest_record(folder / METRICS_FILE, "learning_rate") or {}
        judged = newest_record(folder / METRICS_FILE, f"{VALIDATION}loss") or {}
        resume = folder / RESUME_FILE
        resume_step = int(read_description(resume)["done"]) if resume.exists() else 0
        figures = {name.removeprefix(VALIDATION): value for name, value in judged.items() if VALIDATION in name}
        return cls(
            max(last.get("step", 0), resume_step), resume_step, (folder / FINAL_FILE).exists(), last.get("loss"), judged.get("step"), figures
        )  # fmt: skip

    def lines(self, title: str, steps: int | None) -> list[str]:
        """In words, `title` before them; `steps` is of how many, None where it has not begun."""
        if not self.step or steps is None:
            return [f"{title}not begun" + (f", of {steps:,} steps" if steps else "")]
        state = f"{title}step {self.step:,} of {steps:,}"
        if self.trained:
            state = f"{title}trained, {self.step:,} steps"
        elif self.resume_step:
            state += f", resume point at step {self.resume_step:,}"
        else:
            state += ", no resume point yet"
        if self.loss is not None:
            state += f"; loss {self.loss:.4g}"
        figures = [f"{name} {value:.4g}" for name, value in self.evaluation.items() if "codebook_size" not in name]
        if not figures:
            return [state]
        return [state, f"  last evaluation, step {self.evaluation_step:,}: {', '.join(figures)}"]


def inspect_unfinished(path: Path) -> Result:
    """An output that is not finished: stopped, or just being made."""
    command, work = command_of(path) or "a command", path / WORK
    try:
        settings = json.loads((path / SETTINGS_FILE).read_bytes())
        if command == "train-prior":
            found = {level["name"]: Progress.of(work / level["name"]) for level in settings["prior"]["levels"]}
            fits = {name: _json_of(work / name / train_prior.FIT_FILE) for name in found}
        else:
            fits = {"": settings["fit"]} if "fit" in settings else {}
            found = {name: Progress.of(work) for name in fits}
        titles = {name: f"level {name}: " if name else "" for name in found}
        progress = [line for name, one in found.items() for line in one.lines(titles[name], fits[name].get("steps"))]
    except CodesError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    out = path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))
    untrained = [name for name, one in found.items() if not one.trained]
    again = recorded_command(path / RUN_FILE, out, untrained)
    lines = [f"{path}: an unfinished run of {command}, stopped or still running", *progress]
    lines.append(f"to go on with it: {again}" if again else "to go on with it, give the same command again")
    facts = {
        "kind": "unfinished", "command": command, "again": again, "trained": [name for name, one in found.items() if one.trained],
        "progress": {name: asdict(one) for name, one in found.items()},
    }  # fmt: skip
    return Result(lines, facts=facts)


def inspect_evaluation(path: Path) -> Result:
    """What `vqmill evaluate --out` made."""
    try:
        record, run = (json.loads((path / name).read_bytes()) for name in (EVALUATION_FILE, RUN_FILE))
        result = evaluation_result(str(run.get("tokenizer") or run.get("tokenizer_module")), record, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    result.lines = [f"{path}: an evaluation of a tokenizer", *result.lines, *made_by(path)]
    result.facts["kind"] = "evaluation"
    return result


def inspect_scores(path: Path) -> Result:
    """What `vqmill score` made."""
    try:
        result = score_result(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    result.lines = [f"{path}: scores of rows by a prior", *result.lines, *made_by(path)]
    result.facts["kind"] = "scores"
    return result


def results_of(folder: Path, fingerprint: str) -> list[str]:
    """What a training said of the checkpoint that it made; nothing when another record, or none, lies beside it."""
    record = _json_of(folder / RUN_FILE)
    if record.get("fingerprint") != fingerprint or "evaluation" not in record:
        return []
    module = train_prior if record.get("settings", {}).get("command") == "train-prior" else train_tokenizer
    return module.result_lines(record)


def made_by(folder: Path) -> list[str]:
    """One line with the command that made a folder, none where that is not recorded."""
    command = recorded_command(folder / RUN_FILE, folder, [train_prior.ALL_LEVELS])
    return [f"made by: {command}"] if command else []


def _json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}


def _unreadable(path: Path, error: Exception) -> CodesError:
    return CodesError(f"{path}: its records cannot be read ({error!r}). Restore them from a copy, or make it again.")
