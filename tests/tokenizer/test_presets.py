"""Every preset and every combination of options trains a step, codes and decodes, and survives its file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import PRESETS, Tokenizer, TokenizerConfig, TokenizerStep, preset_config


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_for(config: TokenizerConfig, number: int, size: int, seed: int = 0) -> torch.Tensor:
    frames = () if config.frames == 1 else (config.frames,)
    return torch.randint(
        0, 256, (number, *frames, config.channels, size, size), generator=seeded(seed), dtype=torch.uint8
    )


def new(config: TokenizerConfig) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(config)


def train(step: TokenizerStep, number: int, batch: int = 4, size: int | None = None) -> list[torch.Tensor]:
    """Steps of plain gradient descent; gives the loss of each."""
    config, losses = step.tokenizer.config, []
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-3)
    for seed in range(number):
        out = step({"images": images_for(config, batch, size or config.size, seed)})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.update(out.sums, out.pools, seeded(seed))
        losses.append(out.loss.detach())
    return losses


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_a_step(name):
    config = preset_config(name)
    model = new(config)
    step = TokenizerStep(model)
    weights = {key: tensor.clone() for key, tensor in model.named_parameters()}
    books = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.endswith("codebook")}
    (loss,) = train(step, 1, batch=1, size=config.downsample)
    assert loss.isfinite()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in model.parameters())
    moved = [key for key, tensor in model.named_parameters() if not torch.equal(tensor, weights[key])]
    assert len(moved) > len(weights) // 2
    state = model.state_dict()
    assert all(not torch.equal(state[key], book) for key, book in books.items()) or config.first_update
    assert all(int(state[key]) == 1 for key in state if key.endswith("num_updates"))
    grids = {level: config.grid(level, config.downsample) for level in config.level_names}
    assert {
        level: tuple(codes.shape[1:]) for level, codes in model.encode(images_for(config, 1, config.downsample)).items()
    } == grids


SIZES = st.sampled_from(["strided", "unixpickle", "grouped"])


@st.composite
def configs(draw: st.DrawFn) -> TokenizerConfig:
    architecture = draw(SIZES)
    levels = 1 if architecture == "grouped" else draw(st.integers(1, 3))
    values = {
        "architecture": architecture, "channels": draw(st.sampled_from([1, 3])), "frames": draw(st.integers(1, 3)), "num_levels": levels,
        "num_residual_blocks": draw(st.integers(1, 2)), "hidden_dim": 8, "residual_dim": 8 if architecture == "unixpickle" else 2,
        "code_dim": 8, "codebook_size": draw(st.integers(2, 20)), "num_groups": draw(st.integers(2, 4)) if architecture == "grouped" else 0,
        "loss": draw(st.sampled_from(["mse", "l1", "log_laplace"])), "codebook_start": draw(st.sampled_from(["kmeans", "uniform", "normal"])),
        "start_step": 1, "revival": draw(st.sampled_from(["rare", "unused", "none"])), "rotation": draw(st.booleans()),
        "quantizer": draw(st.sampled_from(["ema", "gradient", "fsq"])), "num_quantizers": draw(st.integers(1, 3)),
    }  # fmt: skip
    if values["quantizer"] == "fsq":
        fsq = {"fsq_levels": [3, 2, 4], "codebook_size": 24, "code_dim": 3, "num_quantizers": 1, "rotation": False}
        values |= fsq | (
            {"fsq_levels": [2] * 8, "codebook_size": 256, "code_dim": 8} if architecture == "unixpickle" else {}
        )
    elif values["num_quantizers"] == 1:
        values["normalize"] = draw(st.booleans())
    sides = 2 ** (values["num_groups"] - 1) if architecture == "grouped" else 2 ** (levels + 1)
    return TokenizerConfig(**values, size=sides * draw(st.integers(1, 2)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(config=configs())
def test_any_configuration_codes_decodes_and_survives_its_file(config):
    step = TokenizerStep(new(config))
    train(step, 2, batch=2)
    model = step.tokenizer.eval()
    images = images_for(config, 3, config.size, seed=9)
    codes = model.encode(images)
    assert {level: tuple(found.shape) for level, found in codes.items()} == {
        level: (3, *config.grid(level)) for level in config.level_names
    }
    assert all(0 <= found.min() <= found.max() < config.codebook_size for found in codes.values())
    with torch.no_grad():
        result = model(model.prepare(images))
    decoded = model.decode(codes, torch.float32)
    assert decoded.shape == images.shape
    if all(
        torch.equal(codes[level], result.levels[level].codes) for level in codes
    ):  # else a tie fell to the other side
        torch.testing.assert_close(decoded, result.images.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    loaded = tokenizer.loads(tokenizer.dumps(model))
    assert loaded.fingerprint == model.fingerprint
    assert loaded.config == config
    again = loaded.encode(images)
    assert all(torch.equal(again[level], found) for level, found in codes.items())


KINDS = {
    "strided": {},
    "three levels": {"num_levels": 3},
    "gradient": {"quantizer": "gradient"},
    "residual": {"num_quantizers": 3},
    "residual gradient": {"num_quantizers": 2, "quantizer": "gradient"},
    "normalized": {"normalize": True},
    "fsq": {"quantizer": "fsq", "fsq_levels": (8, 5, 5), "codebook_size": 200, "code_dim": 3},
    "unixpickle": {"architecture": "unixpickle", "residual_dim": 16, "code_dim": 16, "num_levels": 2},
    "grouped": {"architecture": "grouped", "num_groups": 3, "residual_dim": 4},
}


def varied(name: str, codebook_size: int) -> TokenizerStep:
    """A small tokenizer whose codes vary."""
    sizes = {"size": 16, "hidden_dim": 16, "residual_dim": 8, "code_dim": 8, "num_residual_blocks": 1, "start_step": 1}
    step = TokenizerStep(new(TokenizerConfig(**{**sizes, "codebook_size": codebook_size, **KINDS[name]})))
    with torch.no_grad():
        for parameter in step.tokenizer.parameters():
            parameter *= 2 if parameter.ndim == 4 else 1
    train(step, 4, batch=32)
    return step


@pytest.mark.parametrize("name", KINDS)
def test_codes_do_not_depend_on_the_batch(name):
    model = varied(name, 64).tokenizer.eval()
    images = images_for(model.config, 64, 16, seed=5)
    whole = model.encode(images)
    assert all(len(found.unique()) > 10 for found in whole.values()), "these codes would not show a difference"
    for size in (1, 7, 33):
        parts = [model.encode(part) for part in images.split(size)]
        for level, found in whole.items():
            assert torch.equal(torch.cat([part[level] for part in parts]), found)
    assert all(found.shape[0] == 0 for found in model.encode(images[:0]).values())


@pytest.mark.parametrize("name", KINDS)
def test_sorting_by_use_keeps_reconstructions(name):
    model = varied(name, 16).tokenizer.eval()
    images = images_for(model.config, 16, 16, seed=5)
    codes, fingerprint = model.encode(images), model.fingerprint
    before = model.decode(codes, torch.float32)
    model.sort_by_usage()
    after = model.encode(images)
    assert torch.equal(model.decode(after, torch.float32), before)
    if name == "fsq":
        assert model.fingerprint == fingerprint
        assert all(torch.equal(after[level], found) for level, found in codes.items())
        return
    assert any(not torch.equal(after[level], found) for level, found in codes.items())
    counts = [tensor for key, tensor in model.state_dict().items() if key.endswith("ema_counts")]
    assert len(counts) == model.config.num_levels * model.config.num_quantizers
    assert all((each.diff() <= 0).all() for each in counts)
