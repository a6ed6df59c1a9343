"""Training: exact accumulation, buffers that move only in update(), honest evaluation, and learning."""

from __future__ import annotations

import math

import pytest
import torch

import tokenizer
from tokenizer import TokenizerStep
from vqmill import CodesError

SMALL = {"codebook_size": 16, "code_dim": 8, "hidden_dim": 16, "residual_dim": 8, "num_residual_blocks": 1}


def blobs(num: int, seed: int, channels: int = 1, size: int = 16) -> torch.Tensor:
    """uint8 images of one bright disc on a slope: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(num, 2, 1, 1, generator=generator) * size
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = (y - centres[:, 0]).square() + (x - centres[:, 1]).square()
    images = 8 * x + 120 * (distance < 12)
    return images[:, None].expand(-1, channels, -1, -1).to(torch.uint8)


def new_step(preset: str = "grey28", **overrides) -> TokenizerStep:
    torch.manual_seed(0)
    return TokenizerStep(tokenizer.from_preset(preset, **{**SMALL, "start_step": 2, **overrides}))


def train(
    step: TokenizerStep, num_steps: int, generator: torch.Generator, first: int = 0, batch: int = 16
) -> list[float]:
    optimizer = torch.optim.Adam(step.parameters(), lr=3e-3)
    losses = []
    for index in range(first, first + num_steps):
        out = step({"images": blobs(batch, index, step.tokenizer.config.channels)})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.update(out.sums, out.pools, generator)
        losses.append(float(out.metrics["nmse"]))
    return losses


def state(step: TokenizerStep) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in step.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("preset", ["grey28", "rgb32"])
def test_learns_and_uses_its_codebook(preset):
    step = new_step(preset, start_step=40)
    generator = torch.Generator().manual_seed(0)
    images = [{"images": blobs(64, 1000, step.tokenizer.config.channels)}]
    before = step.evaluate(images)
    train(step, 200, generator)
    after = step.evaluate(images)
    assert after["nmse"] < 0.35 < 0.9 < before["nmse"]
    for name in step.tokenizer.config.level_names:
        assert after[f"{name}/used_codes"] > 8
        assert after[f"{name}/perplexity"] > 4


def test_the_top_learns_alone_in_the_first_half_of_the_warm_up():
    step = new_step("rgb32", start_step=4)
    generator = torch.Generator().manual_seed(0)
    images = {"images": blobs(4, 0, 3)}

    def bottom_gradient() -> float:
        step.zero_grad()
        step(images).loss.backward()
        gradient = step.tokenizer.net.to_code[1].weight.grad
        assert gradient is not None  # DistributedDataParallel needs every parameter in use
        return float(gradient.abs().sum())

    for expected in (False, False, True, True, True):
        assert (bottom_gradient() > 0) == expected
        train(step, 1, generator)


def test_loss_is_scaled_error_plus_commitment():
    step = new_step(commitment_cost=0.7)
    generator = torch.Generator().manual_seed(0)
    train(step, 3, generator)
    images = blobs(8, 5)
    out = step({"images": images})
    result = step.tokenizer(step.tokenizer.prepare(images))
    seen = torch.cat([blobs(16, index) for index in range(3)]).double() / 127.5 - 1
    error = (result.images - step.tokenizer.prepare(images)).square().mean() / seen.var(unbiased=False)
    torch.testing.assert_close(out.metrics["nmse"], error.float().detach())
    torch.testing.assert_close(out.loss, (error + result.levels["codes"].loss).float())
    torch.testing.assert_close(out.metrics["loss"], out.loss.detach())
    assert not any(metric.requires_grad for metric in out.metrics.values())
    assert 1 <= out.metrics["codes/batch_perplexity"] <= 16


def test_forward_and_evaluation_move_nothing():
    step = new_step("rgb32")
    train(step, 3, torch.Generator().manual_seed(0))
    before, random_state = state(step), torch.get_rng_state()
    step.tokenizer.net.encoders[1].eval()  # a mode that evaluation must put back
    step({"images": blobs(4, 0, 3)})
    step.evaluate([{"images": blobs(4, 0, 3)}])
    assert same(before, state(step))
    assert torch.equal(random_state, torch.get_rng_state())
    assert step.training
    assert not step.tokenizer.net.encoders[1].training


def test_micro_batches_add_up_to_the_whole_batch():
    step = new_step("rgb32")
    train(step, 3, torch.Generator().manual_seed(0))
    images = blobs(12, 7, 3)
    whole = step({"images": images})
    parts = [step({"images": part}) for part in images.split(3)]
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value, rtol=1e-5, atol=1e-4)
    for name, value in whole.pools.items():
        torch.testing.assert_close(torch.cat([part.pools[name] for part in parts]), value)
    torch.testing.assert_close(torch.stack([part.loss for part in parts]).mean(), whole.loss)


def test_the_first_step_too_is_the_same_in_parts():
    step = new_step()
    images = blobs(12, 7)
    parts = [step({"images": part}).loss for part in images.split(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), step({"images": images}).loss)


def test_resumes_exactly_from_its_state():
    first, generator = new_step("rgb32"), torch.Generator().manual_seed(0)
    train(first, 4, generator)
    second, copied = new_step("rgb32"), torch.Generator()
    second.load_state_dict(state(first))
    copied.set_state(generator.get_state())
    train(first, 3, generator, first=4)
    train(second, 3, copied, first=4)
    assert same(state(first), state(second))


def test_all_ranks_hold_the_same_bits():
    ranks = [new_step("rgb32", start_step=1), new_step("rgb32", start_step=1)]
    for index in range(4):
        outs = [step({"images": blobs(4, 10 * index + rank, 3)}) for rank, step in enumerate(ranks)]
        sums = {name: outs[0].sums[name] + outs[1].sums[name] for name in outs[0].sums}
        pools = {name: torch.cat([out.pools[name] for out in outs]) for name in outs[0].pools}
        for step in ranks:
            step.update(sums, pools, torch.Generator().manual_seed(index))
    assert same(state(ranks[0]), state(ranks[1]))


def test_data_variance_is_that_of_all_images_seen():
    step = new_step()
    assert float(step.data_variance) == pytest.approx(1 / 3)
    train(step, 2, torch.Generator().manual_seed(0))
    seen = torch.cat([blobs(16, 0), blobs(16, 1)]).double() / 127.5 - 1
    assert float(step.data_variance) == pytest.approx(float(seen.var(unbiased=False)), rel=1e-5)


def test_evaluation_is_over_the_whole_set_however_it_is_cut():
    step = new_step("rgb32")
    train(step, 6, torch.Generator().manual_seed(0))
    images = blobs(20, 3, 3)
    whole = step.evaluate([{"images": images}])
    parts = step.evaluate({"images": part} for part in images.split(7))
    assert parts == pytest.approx(whole, rel=1e-5)
    codes = step.tokenizer.encode(images)
    pixels = images.double() / 127.5 - 1
    mse = float((step.tokenizer.decode(codes, torch.float32) - pixels).square().mean())
    assert whole["nmse"] == pytest.approx(mse / float(pixels.var(unbiased=False)), rel=1e-5)
    assert whole["psnr"] == pytest.approx(10 * math.log10(4 / mse), rel=1e-5)
    for name, level in codes.items():
        shares = torch.bincount(level.flatten(), minlength=16).double() / level.numel()
        assert whole[f"{name}/used_codes"] == int((shares > 0).sum())
        assert whole[f"{name}/perplexity"] == pytest.approx(float(torch.exp(torch.special.entr(shares).sum())))
        assert whole[f"{name}/codebook_size"] == 16
    assert whole["loss"] == pytest.approx(float(step.eval()({"images": images}).loss.detach()), rel=1e-5)


def test_evaluating_nothing_is_refused():
    with pytest.raises(CodesError, match="nothing to evaluate"):
        new_step().evaluate([])
