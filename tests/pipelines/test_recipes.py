"""Recipes: a preset, a TOML file over it, flags over both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from pipelines.cli import train_tokenizer
from pipelines.cli_priors import train_prior
from pipelines.fit import FitConfig
from pipelines.precision import native_bf16, resolved
from pipelines.recipes import PRIOR_RECIPES, TOKENIZER_RECIPES, fit_config, level_fits, read_tables, shortened
from vqmill.errors import UsageError

RECIPE = TOKENIZER_RECIPES["rgb32"]


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[fit]\nsteps = 7000\nlearning_rate = 1\n[tokenizer]\nhidden_dim = 64\n")
    tables = read_tables(path, ("tokenizer", "fit"))
    assert tables["tokenizer"] == {"hidden_dim": 64}
    config = fit_config(RECIPE, tables["fit"], {"steps": 5000, "seed": None})
    assert (config.steps, config.learning_rate, config.seed) == (5000, 1, RECIPE.seed)


def test_short_runs_warm_up_shortly() -> None:
    assert fit_config(RECIPE, {}, {"steps": 50}).warmup_steps == 5
    assert fit_config(RECIPE, {"warmup_steps": 20}, {"steps": 50}).warmup_steps == 20


def test_what_a_short_run_has_cut_is_told_in_one_line() -> None:
    short, long = fit_config(RECIPE, {}, {"steps": 50}), fit_config(RECIPE, {}, {"steps": 5000})
    warmup = f"a short run, of 50 steps: warmup_steps is 5 instead of {RECIPE.warmup_steps}"
    assert shortened(RECIPE, {}, short) == [f"{warmup} (--config can set it)"]
    assert shortened(RECIPE, {}, short, start_step=(50, 6)) == [
        f"{warmup}, start_step is 6 instead of 50 (--config can set them)"
    ]
    assert shortened(RECIPE, {}, long, start_step=(0, 0)) == []
    table = {"warmup_steps": 20}
    assert shortened(RECIPE, table, fit_config(RECIPE, table, {"steps": 50})) == [], "as the table says"


@pytest.mark.parametrize(
    ("content", "message"),
    [("[fits]\nsteps = 1", "Did you mean 'fit'"), ("steps = 1", "tables"), ("[fit", "not a TOML")],
)
def test_files_that_are_not_understood_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_tables(path, ("tokenizer", "fit"))


@pytest.mark.parametrize(("table", "own"), [("tokenizer", "fit"), ("prior", "fit"), ("prior.bottom", "fit.bottom")])
def test_a_setting_of_the_training_in_another_table_is_sent_to_its_own(tmp_path: Path, table: str, own: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[{table}]\nsteps = 100\n")
    message = rf"\[{table}\] steps is a setting of the training; write it into the table \[{own}\]\."
    with pytest.raises(UsageError, match=message):
        read_tables(path, ("tokenizer", "prior", "fit"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_tables(tmp_path / "no.toml", ("fit",))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"step": 1}, "Did you mean 'steps'"),
        ({"steps": "many"}, "expected int"),
        ({"steps": True}, "expected int"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_bad_keys_and_values_are_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_config(RECIPE, table, {})


@pytest.mark.parametrize(("command", "recipes"), [(train_tokenizer, TOKENIZER_RECIPES), (train_prior, PRIOR_RECIPES)])
def test_help_says_what_presets_train_for(command: Callable[..., int], recipes: dict[str, FitConfig]) -> None:
    found = [line.strip() for line in (command.__doc__ or "").splitlines() if line.strip().startswith("|")]
    images = [name for name in recipes if not name.startswith("video")]  # which alone can be trained so far
    rows = [
        f"| {name} | {fit.steps:,} | {fit.batch_size} | {fit.learning_rate:g} | {fit.precision} |"
        for name, fit in recipes.items()
        if name in images
    ]
    assert found[2:] == rows


def test_a_level_has_values_of_its_own_under_the_flags() -> None:
    table = {"steps": 70, "batch_size": 8, "bottom": {"steps": 90, "learning_rate": 1e-4, "batch_size": 16}}
    fits = level_fits(RECIPE, table, {"batch_size": 4}, ("top", "bottom"))
    assert [(name, fit.steps, fit.learning_rate, fit.batch_size) for name, fit in fits.items()] == [
        ("top", 70, RECIPE.learning_rate, 4), ("bottom", 90, 1e-4, 4),
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"\[fit.botom\]: the levels are 'top', 'bottom'. Did you mean 'bottom'"):
        level_fits(RECIPE, {"botom": {"steps": 9}}, {}, ("top", "bottom"))
    with pytest.raises(UsageError, match=r"\[fit.top\]: unknown key 'step'.* Did you mean 'steps'"):
        level_fits(RECIPE, {"top": {"step": 9}}, {}, ("top", "bottom"))
    with pytest.raises(UsageError, match=r"\[fit.top\] steps: expected int"):
        level_fits(RECIPE, {"top": {"steps": "x"}}, {}, ("top", "bottom"))
    with pytest.raises(UsageError, match="level 'top': --steps must be at least 1"):
        level_fits(RECIPE, {"top": {"steps": 0}}, {}, ("top", "bottom"))
    with pytest.raises(UsageError, match="Tables of levels are for train-prior"):
        fit_config(RECIPE, {"top": {"steps": 9}}, {})


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": False, "avx2": True}, "fp32"), ({}, "fp32")],
    ids=["native", "emulated", "unknown"],
)
def test_auto_takes_bf16_where_it_is_native(
    features: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert resolved("auto", "cpu", None) == expected
    assert resolved("fp32", "cpu", None) == "fp32"
    assert [resolved("auto", "cpu", begun) for begun in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_auto_does_not_take_bf16_whose_products_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert native_bf16("cpu")
    monkeypatch.setattr(torch.Tensor, "float", lambda values: values.to(torch.float32) * 1.1)
    assert not native_bf16("cpu")


def test_the_configuration_page_has_every_recipe_and_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    table = page.partition("Where a preset says otherwise:\n\n")[2].partition("\n\n")[0].splitlines()
    names = [name.strip() for name in table[0].strip("|").split("|")][1:]
    recipes = TOKENIZER_RECIPES | PRIOR_RECIPES
    rows = [
        f"| `{preset}` | {' | '.join(str(getattr(fit, name)) for name in names)} |" for preset, fit in recipes.items()
    ]
    assert [line for line in table[2:] if line] == rows
    for field in fields(FitConfig):
        if field.name in names[:3]:
            assert f"| `{field.name}` |  |" in page, "each recipe has its own"
            continue
        assert f"| `{field.name}` | `{field.default}` |" in page
        said_below = field.name in names
        assert said_below or all(getattr(fit, field.name) == field.default for fit in recipes.values()), field.name
