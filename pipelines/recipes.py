"""Training recipes: defaults for each preset, a TOML file over them, and flags over both."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pipelines.fit import FitConfig
from vqmill.errors import UsageError
from vqmill.settings import did_you_mean

# Ours are for a laptop and some tens of thousands of images: grey28 and rgb32 as in docs/experiments/, the others after them; rgb256 after
# Razavi et al. 2019 with a higher rate for its shorter schedule, tried at 128 pixels only. Those of published tokenizers have the
# rates of their sources, and their steps and batches where they say; the sources have neither warm-up nor decay. Priors: ours; large never run.
TOKENIZER_RECIPES = {
    "grey28": FitConfig(steps=2000, batch_size=64, learning_rate=2e-3),
    "rgb32": FitConfig(steps=3000, batch_size=64, learning_rate=2e-3),
    "rgb256": FitConfig(steps=20000, batch_size=32, learning_rate=1e-3, warmup_steps=500),
    "fsq32": FitConfig(steps=3000, batch_size=64, learning_rate=2e-3),
    "dalle64": FitConfig(steps=5000, batch_size=32, learning_rate=1e-3),
    "nngen_mnist": FitConfig(steps=28125, batch_size=64, learning_rate=1e-3),  # 30 epochs of 60,000
    "zalando_cifar": FitConfig(steps=15000, batch_size=256, learning_rate=1e-3),
    "sonnet_cifar": FitConfig(steps=10000, batch_size=32, learning_rate=3e-4),
    "unixpickle_256": FitConfig(steps=100000, batch_size=16, learning_rate=1e-3),
    "video_stacked_13m": FitConfig(steps=160000, batch_size=24, learning_rate=1e-4),
    "video_stacked_small": FitConfig(steps=3000, batch_size=16, learning_rate=1e-3),
}
_PRIOR = FitConfig(
    steps=2000, batch_size=64, learning_rate=2e-3, weight_ema=0.995, weight_decay=0.01, keep_best=True, precision="auto"
)
_LARGE_PRIOR = replace(_PRIOR, steps=40_000, batch_size=128, learning_rate=5e-4, warmup_steps=1000, weight_ema=0.9999)
PRIOR_RECIPES = {
    "pixelcnn-tiny": FitConfig(steps=400, batch_size=32, learning_rate=6e-3, warmup_steps=20, weight_ema=0.98),
    "pixelcnn": _PRIOR,
    "pixelcnn-large": _LARGE_PRIOR,
    "razavi": replace(_LARGE_PRIOR, learning_rate=2e-4),
    "gpt-tiny": FitConfig(steps=400, batch_size=32, learning_rate=3e-3, warmup_steps=20, weight_ema=0.98),
    "gpt": replace(_PRIOR, learning_rate=1e-3),
    "gpt-large": _LARGE_PRIOR,
}


def read_tables(path: Path | None, tables: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Reads a TOML file of settings.

    Args:
        path: the file; None gives empty tables.
        tables: which tables the command knows.

    Raises:
        UsageError: no such file, not TOML, a table that is not known, or a key of [fit] in another one.
    """
    known = list(tables)
    found: dict[str, dict[str, Any]] = {name: {} for name in known}
    if path is None:
        return found
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UsageError(f"--config {path}: not a TOML file ({error}).") from error
    for name, table in content.items():
        if name not in known or not isinstance(table, dict):
            raise UsageError(
                f"--config {path}: unknown entry {name!r}; expected the tables {', '.join(f'[{table}]' for table in known)}.{did_you_mean(name, known)}"
            )
        found[name] = table
        if name != "fit":
            _refuse_of_fit(path, name, table)
    return found


def _refuse_of_fit(path: Path, name: str, table: Mapping[str, Any]) -> None:
    """Sends a setting of the training, which people look for where the model's are, to its table."""
    of_fit = {field.name for field in fields(FitConfig)}
    for key, value in table.items():
        if key in of_fit:
            raise UsageError(
                f"--config {path}: [{name}] {key} is a setting of the training; write it into the table [fit{''.join(name.partition('.')[1:])}]."
            )
        if isinstance(value, dict):
            _refuse_of_fit(path, f"{name}.{key}", value)


def fit_config(recipe: FitConfig, table: Mapping[str, Any], flags: Mapping[str, Any]) -> FitConfig:
    """A preset's recipe, overridden by a TOML table `[fit]`, overridden by the flags that were given (not None).

    Args:
        recipe: of the preset.
        table: fields of FitConfig.
        flags: fields of FitConfig, None for those not given.

    Raises:
        UsageError: an unknown key, or a value of another kind.
    """
    _check_table(recipe, table, "fit")
    given = {name: value for name, value in flags.items() if value is not None}
    changed = replace(recipe, **{**table, **given})
    if "warmup_steps" in table:
        return changed
    return replace(changed, warmup_steps=min(changed.warmup_steps, max(1, changed.steps // 10)))


def _check_table(recipe: FitConfig, table: Mapping[str, Any], where: str) -> None:
    kinds = {field.name: type(getattr(recipe, field.name)) for field in fields(FitConfig)}
    for name, value in table.items():
        if name not in kinds:
            hint = (
                "Tables of levels are for train-prior."
                if isinstance(value, dict)
                else did_you_mean(name, kinds).strip()
            )
            raise UsageError(f"[{where}]: unknown key {name!r}; expected one of {', '.join(kinds)}. {hint}".rstrip())
        if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
            raise UsageError(f"[{where}] {name}: expected {kinds[name].__name__}, got {value!r}.")


def level_fits(
    recipe: FitConfig, table: Mapping[str, Any], flags: Mapping[str, Any], levels: Sequence[str]
) -> dict[str, FitConfig]:
    """`fit_config` for each level: a table `[fit.LEVEL]` goes over `[fit]`, and flags over both.

    Raises:
        UsageError: a table for another level, an unknown key, or a value of another kind.
    """
    own = {name: value for name, value in table.items() if isinstance(value, dict)}
    for name in own:
        if name not in levels:
            known = ", ".join(map(repr, levels))
            raise UsageError(f"[fit.{name}]: the levels are {known}.{did_you_mean(name, levels)}")
        _check_table(recipe, own[name], f"fit.{name}")
    everywhere = {name: value for name, value in table.items() if name not in own}
    fits: dict[str, FitConfig] = {}
    for level in levels:
        try:
            fits[level] = fit_config(recipe, {**everywhere, **own.get(level, {})}, flags)
        except UsageError as error:
            raise UsageError(f"level {level!r}: {error}" if level in own else str(error)) from error
    return fits


def shortened(recipe: FitConfig, table: Mapping[str, Any], fit: FitConfig, **lengths: tuple[int, int]) -> list[str]:
    """One line about what a short run has cut, or none.

    Args:
        recipe: of the preset.
        table: the TOML table `[fit]`; what it says is not cut.
        fit: what `fit_config` made of both.
        lengths: what else there is: by name of an option, what the preset has and what is taken.
    """
    lengths = {"warmup_steps": (table.get("warmup_steps", recipe.warmup_steps), fit.warmup_steps), **lengths}
    cut = [f"{name} is {taken} instead of {usual}" for name, (usual, taken) in lengths.items() if taken < usual]
    if not cut:
        return []
    return [
        f"a short run, of {fit.steps} steps: {', '.join(cut)} (--config can set {'it' if len(cut) == 1 else 'them'})"
    ]
