"""`--tokenizer-module`: other people's tokenizers through the whole chain, on Ray, and only when the user names them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import priors
import vqmill
from pipelines.cli import app
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.corpus.walk import walk_images
from pipelines.decode import original_images
from pipelines.foreign import ForeignTokenizer, load_module, packed
from vqmill.errors import CodesError, UsageError
from vqmill.spec import LevelSpec
from vqmill.verify import verify_store

# Blocks of 4 x 4 pixels by their mean; FINGERPRINT and SHIFT are filled in by each test.
CODE = """
from pathlib import Path
import uuid

import torch


class Means:
    name, fingerprint, channels, size = "means", {fingerprint}, 3, 16
    levels = {{"top": 5, "bottom": 300}}

    def grid(self, level, size):
        if level not in self.levels or size % 8:
            raise ValueError("8 must divide the size")
        return (size // 8, size // 8) if level == "top" else (size // 4, size // 4)

    def encode(self, images):
        assert not torch.is_grad_enabled()
        means = torch.nn.functional.avg_pool2d(images.float().mean(1, keepdim=True), 4)[:, 0]
        return {{"top": (means[:, ::2, ::2] / 64).long() + {shift}, "bottom": means.long()}}

    def decode(self, codes):
        grey = codes["bottom"][:, None].expand(-1, 3, -1, -1)
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)

    def to(self, device):
        return self


Path(__file__).with_suffix(".imported").touch()
make = Means
"""


def run(*words: str | Path | int) -> int:
    return app([str(word) for word in words])


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a module into the current directory; the name is new each time, as Python imports a name once."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)

    def write(name: str, *, fingerprint: str = '"means-1"', shift: str = "0", code: str = CODE) -> str:
        (tmp_path / f"{name}.py").write_text(code.format(fingerprint=fingerprint, shift=shift))
        return f"{name}:make"

    return write


def small_prior(store: Path) -> Path:
    """An untrained prior for a store's codes, saved."""
    spec = vqmill.open_codes(store).spec
    levels = tuple(priors.LevelShape(level.name, level.codebook_size, level.grid) for level in spec.levels)
    torch.manual_seed(0)
    config = priors.preset_config("pixelcnn-tiny", levels, 4, spec.tokenizer["fingerprint"], num_layers=1)
    folder = store.with_name("prior")
    priors.save(priors.Prior(config).eval(), folder)
    return folder


@pytest.mark.usefixtures("ray_session")
def test_the_whole_chain(
    scenes: str, tmp_path: Path, write_module: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    module, out = write_module("foreign_chain"), tmp_path / "codes.zarr"
    command = ("tokenize", scenes, "--tokenizer-module", module, "--out", out, "--workers", 2, "--shard-rows", 64)
    assert run(*command) == 0
    codes = vqmill.open_codes(out)
    assert verify_store(out).problems == ()
    assert {name: codes[name][0:1].dtype for name in codes.levels} == {"top": np.uint8, "bottom": np.uint16}
    record = codes.spec.tokenizer
    assert (record["fingerprint"], record["preset"], record["module"]) == ("means-1", "means", module)
    images = torch.from_numpy(original_images(plan_corpus(scenes), codes, range(300), 16, 3))
    expected = load_module(module).encode(images)
    for name in codes.levels:
        assert np.array_equal(codes[name][:], expected[name].numpy())
    assert json.loads((tmp_path / "codes.zarr.run.json").read_bytes())["tokenizer_module"] == module
    assert run(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["resumed_rows"] == 300
    assert run("inspect", out) == 0
    assert f"--tokenizer-module {module}" in capsys.readouterr().out

    assert run("decode", out, "--out", "grid.png", "--rows", "0:4", "--tokenizer-module", module) == 0
    prior = small_prior(out)
    drawn = tmp_path / "drawn.zarr"
    assert run("sample", prior, "--tokenizer-module", module, "--num", 4, "--out", "s.png", "--codes", drawn) == 0
    assert vqmill.open_codes(drawn).spec.tokenizer == {"fingerprint": "means-1", "module": module}
    assert json.loads((tmp_path / "drawn.zarr.run.json").read_bytes())["tokenizer_module"] == module
    assert run("slice", out, "--out", "part.zarr", "--rows", "0:9") == 0
    assert "--tokenizer DIR" not in capsys.readouterr().out
    assert vqmill.open_codes(tmp_path / "part.zarr").spec.tokenizer["module"] == module

    other = write_module("foreign_other", fingerprint='"means-2"')
    assert run(*command[:3], other, *command[4:]) == 2
    assert 'tokenizer.fingerprint: there "means-1", now "means-2"' in capsys.readouterr().err
    assert run("decode", out, "--out", "other.png", "--tokenizer-module", other) == 2
    assert "foreign_other:make holds tokenizer means-2" in capsys.readouterr().err


def test_a_store_never_imports_code(
    stores: Any, tmp_path: Path, write_module: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    module, out = write_module("foreign_named"), tmp_path / "codes.zarr"
    spec = stores.two_levels
    stores.write(out, spec, stores.codes(spec, 8))
    stores.edit_json(out / "zarr.json", lambda group: group["attributes"]["vqmill"]["tokenizer"].update(module=module))
    assert run("decode", out, "--out", "grid.png") == 2
    assert f"which only you can allow to run: --tokenizer-module {module}" in capsys.readouterr().err
    assert run("inspect", out) == 3, "its one quarantined sample"
    assert "foreign_named" not in sys.modules
    assert not (tmp_path / "foreign_named.imported").exists()


def test_codes_out_of_range_are_refused_before_anything_is_made(
    scenes: str, tmp_path: Path, write_module: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    module = write_module("foreign_wrong", shift="7")
    assert run("tokenize", scenes, "--tokenizer-module", module, "--out", "codes.zarr") == 2
    assert "means: encode: level 'top' gave code 7, but its codebook_size is 5 (valid 0..4)" in capsys.readouterr().err
    assert not (tmp_path / "codes.zarr").exists()


@pytest.mark.usefixtures("ray_session")
def test_codes_out_of_range_of_some_images_stop_the_job(
    scenes: str, tmp_path: Path, write_module: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    module = write_module("foreign_rare", shift="(4 if images.any() else 0)")
    assert run("tokenize", scenes, "--tokenizer-module", module, "--out", "codes.zarr", "--workers", 1) == 1
    said = capsys.readouterr().err
    assert "means: encode: level 'top' gave code" in said
    assert "To try again" not in said, "it would end the same way"
    assert len(vqmill.open_codes(tmp_path / "codes.zarr", allow_incomplete=True)) == 0


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_makes_another_tokenizer_is_refused(
    scenes: str, write_module: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    module = write_module("foreign_random", fingerprint="uuid.uuid4().hex")
    assert run("tokenize", scenes, "--tokenizer-module", module, "--out", "codes.zarr", "--workers", 1) == 1
    assert "its factory must make the same each time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("foreign_form", "", "expected package.module:factory"),
        ("foreign_form:", "", "expected package.module:factory"),
        ("../foreign:make", "", "expected package.module:factory"),
        ("foreign_absent.models:make", "", "there is no foreign_absent, neither installed nor in"),
        ("foreign_needs:make", "import foreign_needed", "importing it failed: ModuleNotFoundError"),
        ("foreign_syntax:make", "def", "importing it failed: SyntaxError"),
        ("foreign_name:mak", "def make(): ...", "has no function mak. Did you mean 'make'?"),
        ("foreign_fails:make", "def make():\n    raise OSError('no weights')", "make() failed: OSError('no weights')"),
        ("foreign_none:make", "def make(): ...", "a NoneType has no name, fingerprint"),
    ],
    ids=["no-factory", "empty", "path", "absent", "dependency", "syntax", "typo", "raises", "nothing"],
)
def test_what_cannot_be_used_is_named(
    module: str, code: str, message: str, tmp_path: Path, write_module: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if code:
        write_module(module.partition(":")[0], code=code)
    assert run("tokenize", "photos", "--tokenizer-module", module, "--out", "codes.zarr") == 2
    error = capsys.readouterr().err
    assert message in error
    if "failed: OSError" in message:
        assert f"({tmp_path / 'foreign_fails.py'}, line 2)" in error


def test_exactly_one_tokenizer_is_named(tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tokenize", "photos", "--out", "codes.zarr") == 2
    assert "name one tokenizer" in capsys.readouterr().err
    assert run("sample", "prior", "--tokenizer", tokenizer_folder, "--tokenizer-module", "a:b", "--out", "s.png") == 2
    capsys.readouterr()


def evaluated(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_evaluate_gives_the_figures_of_any_tokenizer(
    scenes: str, tmp_path: Path, write_module: Callable[..., str], published_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    module, out = write_module("foreign_measured"), tmp_path / "evaluation"
    command = ("evaluate", scenes, "--tokenizer-module", module, "--limit", 20, "--out", out, "--json")
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert f"{module} (tokenizer means-1) on" in printed
    assert "looked at: the first 20 of all images: what it was trained on is not known\n" in printed
    found = json.loads(printed.splitlines()[-1])
    walk = walk_images(plan_corpus(scenes), Preprocessing(size=16), None, {}, 20)
    images = torch.from_numpy(np.stack([image.pixels for image in walk]))
    model = load_module(module)
    codes = model.encode(images)
    error = (model.decode(codes).double() - images) / 127.5
    assert found["l1"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert found["psnr"] == pytest.approx(float(10 * torch.log10(4 / error.square().mean())), rel=1e-4)
    assert found["nmse"] == pytest.approx(float(error.square().mean() / (images / 127.5).double().var()), rel=1e-3)
    assert 0 < found["ssim"] < 1
    for level, size in model.levels.items():
        shares = codes[level].flatten().bincount(minlength=size) / codes[level].numel()
        assert (found[f"{level}/used_codes"], found[f"{level}/codebook_size"]) == (int((shares > 0).sum()), size)
        assert found[f"{level}/perplexity"] == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-4)
    record = json.loads((out / "run.json").read_bytes())
    assert (record["tokenizer_module"], "tokenizer" in record) == (module, False)
    assert run(*command) == 0
    assert "already evaluated" in capsys.readouterr().out

    weights = ("--lpips", published_weights / "alex.pth", "--lpips-backbone", published_weights / "checkpoints/alexnet-owt-7be5be79.pth")  # fmt: skip
    assert run(*command[:4], "--limit", 3, "--size", 32, "--precision", "bf16", "--json", *weights) == 0
    assert evaluated(capsys)["lpips"] > 0


@pytest.mark.parametrize(
    "words",
    [(), ("tok",), ("tok", "photos", "more"), ("--tokenizer-module", "a:b"), ("tok", "photos", "--tokenizer-module", "a:b")],
    ids=["nothing", "one", "three", "no-corpus", "both"],
)  # fmt: skip
def test_evaluate_takes_a_folder_or_a_module(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", *words) == 2
    error = capsys.readouterr().err
    assert "expected a tokenizer's folder and a corpus" in error
    assert f"found {' '.join(words) or 'nothing'}." in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (".float() / 255", "expected torch.uint8 in [0, 255], found torch.float32 from 0"),
        (".to(torch.uint8)[..., ::2, ::2]", "S] of a size S that has these codes, top 2x2, bottom 4x4; found ["),
        (".div(255).to(torch.uint8)", "expected pixels in [0, 255], found at most 1, even for a white image"),
    ],
    ids=["floats", "size", "unscaled"],
)
def test_images_that_break_the_protocol_are_named(
    change: str, message: str, stores: Any, scenes: str, tmp_path: Path, write_module: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = CODE.replace(".repeat_interleave(4, 3).to(torch.uint8)", f".repeat_interleave(4, 3){change}")
    module = write_module(f"foreign_images_{len(change)}", code=code)
    levels = (LevelSpec("top", 5, (2, 2)), LevelSpec("bottom", 300, (4, 4)))
    spec = replace(stores.two_levels, levels=levels, tokenizer={"fingerprint": "means-1"})
    store = stores.write(tmp_path / "codes.zarr", spec, stores.codes(spec, 8))
    out, given = tmp_path / "out.png", ("--tokenizer-module", module, "--out", tmp_path / "out.png")
    commands = {"decode": (store,), "sample": (small_prior(store), "--num", 4), "evaluate": (scenes,)}
    for name, words in commands.items():
        assert run(name, *words, *given) == (2 if name == "evaluate" else 1)
        error = capsys.readouterr().err
        assert f"--tokenizer-module {module}: means: decode: expected " in error
        assert message in error
        assert f"Try: vqmill check-tokenizer {module}" in error
        assert not out.exists()


def test_evaluate_refuses_reconstructions_of_another_size(
    scenes: str, write_module: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = CODE.replace("size % 8", "size < 1").replace("size //", "(size + 7) // 8 * 8 //")
    code = code.replace(
        "avg_pool2d(images", "avg_pool2d(torch.nn.functional.pad(images, (0, -images.shape[3] % 8) * 2)"
    )
    module = write_module("foreign_padded", code=code)
    assert run("evaluate", scenes, "--tokenizer-module", module, "--limit", 2) == 0
    assert run("evaluate", scenes, "--tokenizer-module", module, "--limit", 2, "--size", 20) == 1
    assert "of those that were encoded, [2, 3, 20, 20], found [2, 3, 24, 24]" in capsys.readouterr().err


def test_an_installed_package_comes_before_the_current_directory(write_module: Callable[..., str]) -> None:
    write_module("json", code="raise RuntimeError('the file was imported')")
    with pytest.raises(UsageError, match="has no function make"):
        load_module("json.decoder:make")


def test_results_are_looked_at_and_errors_told(write_module: Callable[..., str]) -> None:
    model = load_module(write_module("foreign_checked"))
    with pytest.raises(CodesError, match=r"decode failed: KeyError\('bottom'\)"):
        model.decode({"top": torch.zeros(1, 2, 2, dtype=torch.int64)})
    with pytest.raises(CodesError, match="encode failed: "):
        model.encode(torch.zeros(3))
    assert isinstance(again := packed(model)(), ForeignTokenizer)
    assert again.fingerprint == model.fingerprint
    assert again.to("cpu") is again


def test_the_scale_of_black_images_is_looked_at_once(
    write_module: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_module(write_module("foreign_dark"))
    encoded: list[int] = []
    inner: Any = model._model
    monkeypatch.setattr(inner, "encode", lambda images, real=inner.encode: encoded.append(len(images)) or real(images))
    black = {"top": torch.zeros(3, 2, 2, dtype=torch.int64), "bottom": torch.zeros(3, 4, 4, dtype=torch.int64)}
    for _ in range(2):
        assert not model.decode(black).any()
    assert encoded == [1], "one white image"


def test_check_tokenizer_prints_each_check(
    write_module: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_module("foreign_good"), write_module("foreign_bad", shift="9")
    assert run("check-tokenizer", good) == 0
    printed = capsys.readouterr().out
    assert printed.count("pass: ") == 8
    assert f"all is well: --tokenizer-module {good} can be used" in printed
    assert run("check-tokenizer", bad, "--json") == 1
    printed = capsys.readouterr().out
    assert "FAIL: encode gives int64 codes" in printed
    assert "level 'top' gave code" in json.loads(printed.splitlines()[-1])["problem"]
