"""README and docs say what is true: snippets run, commands parse, the reference is what --help says."""

from __future__ import annotations

import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import priors
import tokenizer
import vqmill
from pipelines.cli import app
from pipelines.corpus.problems import Reason
from pipelines.fit import FitConfig
from pipelines.pictures import check_picture
from pipelines.prior_inputs import level_shapes
from vqmill.errors import UsageError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_python_snippets_run(
    reference: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "codes.zarr").symlink_to(reference)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tok").symlink_to(tokenizer_folder)
    monkeypatch.chdir(tmp_path)
    codes = vqmill.open_codes("codes.zarr")
    prior = priors.from_preset("pixelcnn-tiny", level_shapes(codes), 0, codes.spec.tokenizer["fingerprint"], depth=8)
    priors.save(prior, "runs/prior")
    assert app(["score", "runs/prior", "codes.zarr", "--rows", "0:16", "--out", "runs/scores"]) == 0
    snippets = [snippet for page in PAGES for snippet in blocks(page, "python")]
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_commands_parse() -> None:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("vqmill ")]
    assert len(commands) > 5
    for command in commands:
        app.parse_args(command[1:], exit_on_error=False, print_error=True)


def test_the_command_reference_is_what_help_says() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == app.generate_docs(), "run: make docs"


def test_the_readme_lists_every_reason() -> None:
    listed = re.search(r"one of these reasons:(.*?)\.\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert listed
    assert re.findall(r"`(\w+)`", listed[1]) == list(Reason)


def test_the_configuration_page_knows_every_field() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for config in (tokenizer.TokenizerConfig, priors.PixelCNNConfig, priors.GPTConfig, FitConfig):
        for field in fields(config):
            default = "" if field.default is MISSING else f"`{field.default}`"
            if config is not tokenizer.TokenizerConfig:
                assert f"| `{field.name}` | {default} |" in text
            assert field.name == "preset" or f"| `{field.name}` |" in text


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pictures_say_how_they_were_made() -> None:
    pictures = list((ROOT / "docs").rglob("*.png"))
    assert pictures
    for picture in pictures:
        with pytest.raises(UsageError, match="other settings"):
            check_picture(picture, {"not": "its settings"})
