"""The command line: help for every command, and clear errors before any work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import priors
from pipelines.cli import app
from pipelines.prior_inputs import level_shapes
from vqmill import open_codes

COMMANDS = (
    "train-tokenizer",
    "evaluate",
    "tokenize",
    "inspect",
    "verify",
    "repair",
    "merge",
    "slice",
    "decode",
    "train-prior",
    "sample",
    "score",
    "import-checkpoint",
    "check-tokenizer",
    "demo",
    "doctor",
)


def run(*words: str | Path) -> int:
    """The exit code of `vqmill WORDS`."""
    try:
        return app([str(word) for word in words]) or 0  # --help returns nothing
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def prior_folder(finished_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained prior of the finished store."""
    codes, folder = open_codes(finished_store), tmp_path_factory.mktemp("prior")
    fingerprint = codes.spec.tokenizer["fingerprint"]
    priors.save(priors.from_preset("pixelcnn-tiny", level_shapes(codes), 0, fingerprint, depth=8), folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "--json" in text
    flags = re.findall(r"--[a-z-]+", text)
    for line in text.splitlines():
        if match := re.match(r"│ +\*? +(?:[A-Z]+ )?--[a-z-]+ *(?:[A-Z]+)? *│$", line):
            pytest.fail(f"{command}: no help for {match.group()}")
    assert flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train-tokenizer", "NOWHERE", "--out", "OUT"), "no such file or folder"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--preset", "rgb23"), "Did you mean 'rgb32'"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--step", "3"), "Did you mean --steps"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--steps", "0"), "at least 1"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--size", "33"), "multiple of 8"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--holdout", "1"), "between 0 and 1"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--batch-size", "7", "--workers", "2"), "multiple of 2"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--config", "NOWHERE"), "cannot be read"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--workers", "0"), "at least 1"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--seed", "-1"), "not be negative"),
        (("train-tokenizer", "SCENES", "--out", "OUT", "--learning-rate", "nan"), "positive"),
        (("train-tokenizer", "FOLDER", "--out", "FOLDER/out"), "lies inside the corpus"),
        (("tokenize", "FOLDER", "--tokenizer", "TOKENIZER", "--out", "FOLDER/out"), "lies inside the corpus"),
        (("train-tokenizer", "SCENES"), "--out"),
        (("tokenise", "SCENES"), 'Did you mean "tokenize"'),
        (("tokenize", "NOWHERE", "--tokenizer", "TOKENIZER", "--out", "OUT"), "no such file or folder"),
        (("tokenize", "SCENES", "--tokenizer", "NOWHERE", "--out", "OUT"), "no such tokenizer"),
        (("tokenize", "SCENES", "--tokenizer", "TOKENIZER", "--out", "OUT", "--workers", "0"), "at least 1"),
        (("tokenize", "SCENES", "--tokenizer", "TOKENIZER", "--out", "OUT", "--size", "20"), "multiple of 8"),
        (("tokenize", "torchvision:CIFAR10?root=.", "--tokenizer", "TOKENIZER", "--out", "OUT"), "CIFAR10"),
        (("decode", "NOWHERE", "--out", "OUT.png"), "no such code store"),
        (("train-prior", "NOWHERE", "--out", "OUT"), "no such code store"),
        (("sample", "NOWHERE", "--tokenizer", "TOKENIZER", "--out", "OUT.png"), "no such prior"),
        (("inspect", "NOWHERE"), "no such file or folder"),
        (("verify", "NOWHERE"), "no such code store"),
        (("sample", "STORE", "--tokenizer", "TOKENIZER", "--out", "OUT.png"), "not a prior: it holds a code store"),
        (("sample", "PRIOR", "--tokenizer", "STORE", "--out", "OUT.png"), "not a tokenizer: it holds a code store"),
        (("score", "TOKENIZER", "STORE", "--out", "OUT"), "not a prior: it holds a tokenizer"),
        (("score", "PRIOR", "TOKENIZER", "--out", "OUT"), "not a code store: it holds a tokenizer"),
        (("tokenize", "SCENES", "--tokenizer", "PRIOR", "--out", "OUT"), "not a tokenizer: it holds a prior"),
        (("tokenize", "STORE", "--tokenizer", "TOKENIZER", "--out", "OUT"), "not a corpus: it holds a code store"),
        (("evaluate", "STORE", "SCENES"), "not a tokenizer: it holds a code store"),
        (("evaluate", "TOKENIZER", "PRIOR"), "not a corpus: it holds a prior"),
        (("train-tokenizer", "TOKENIZER", "--out", "OUT"), "not a corpus: it holds a tokenizer"),
        (("train-prior", "FOLDER", "--out", "OUT"), "not a code store: nothing in it is an output of vqmill's"),
        (("decode", "FOLDER", "--out", "OUT.png"), "not a code store: nothing in it is an output of vqmill's"),
        (("decode", "STORE", "--tokenizer", "PRIOR", "--out", "OUT.png"), "not a tokenizer: it holds a prior"),
        (("verify", "PRIOR"), "not a code store: it holds a prior"),
        (("slice", "TOKENIZER", "--rows", "0:2", "--out", "OUT"), "not a code store: it holds a tokenizer"),
        (("import-checkpoint", "PRIOR", "--layout", "zalando", "--out", "OUT"), "it holds a prior. Name the .pt file"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    words: tuple[str, ...],
    message: str,
    scenes: str,
    tokenizer_folder: Path,
    prior_folder: Path,
    finished_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(Path(scenes).parent)
    places = {
        "FOLDER": folder,
        "FOLDER/out": f"{folder}/out",
        "SCENES": scenes,
        "TOKENIZER": str(tokenizer_folder),
        "PRIOR": str(prior_folder),
        "STORE": str(finished_store),
        "NOWHERE": str(tmp_path / "nowhere"),
        "OUT": str(tmp_path / "out"),
        "OUT.png": str(tmp_path / "out.png"),
    }
    assert run(*(places.get(word, word) for word in words)) == 2
    assert message in re.sub(r"\s*│?\n│?\s*", " ", capsys.readouterr().err)
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
