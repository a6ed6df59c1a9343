"""Evaluation: what is measured is decode(encode(x)), every figure against a plain one, and the cut into batches does not matter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

import tokenizer
from tokenizer import Evaluation, TokenizerStep
from tokenizer.metrics import ssim
from vqmill import CodesError


class Rounding:
    """A tokenizer that one can work out: one code for each 4x4 block of a grey image, its mean in 16 steps."""

    name, fingerprint, channels, size = "rounding", "rounding-1", 1, 16
    levels = {"codes": 16}  # noqa: RUF012

    def __init__(self, stages: int = 0) -> None:
        self.stages = stages

    def grid(self, level: str, size: int) -> tuple[int, ...]:
        return ((2,) if self.stages else ()) + (size // 4, size // 4)

    def to(self, device: torch.device) -> Rounding:
        return self

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        codes = torch.nn.functional.avg_pool2d(images.float(), 4)[:, 0].div(16).long()  # [N, h, w]
        return {"codes": torch.stack([codes, codes % 2], dim=1) if self.stages else codes}

    def decode(self, codes: Mapping[str, torch.Tensor]) -> torch.Tensor:
        grid = codes["codes"][:, 0] if self.stages else codes["codes"]
        return (grid * 16 + 8).to(torch.uint8)[:, None].repeat_interleave(4, -1).repeat_interleave(4, -2)


def pictures(num: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """uint8 [N, 1, size, size]: noise on grey levels that differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(30, 220, (num, 1, 1, 1), generator=generator)
    return (level + torch.randint(-30, 30, (num, 1, size, size), generator=generator)).to(torch.uint8)


def test_every_figure_is_the_plain_one():
    model, images = Rounding(), pictures(12)
    found = tokenizer.evaluate(model, images.split(5))
    original = images.double() / 127.5 - 1
    error = model.decode(model.encode(images)) / 127.5 - 1 - original
    mse = error.square().mean()
    per_image = [10 * math.log10(4 / float(one.square().mean())) for one in error]
    similar = ssim((original + error + 1) / 2, (original + 1) / 2)
    codes = model.encode(images)["codes"].flatten().tolist()
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    bits = -sum(share * math.log2(share) for share in shares)
    expected = {
        "nmse": float(mse / original.var(unbiased=False)), "psnr": 10 * math.log10(4 / float(mse)),
        "psnr_per_image": sum(per_image) / 12, "l1": float(error.abs().mean()), "ssim": float(similar.mean()),
        "codes/used_codes": len(shares), "codes/perplexity": 2**bits, "codes/entropy_bits": bits, "codes/codebook_size": 16,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["psnr_per_image"] > found["psnr"]
    assert 3 < len(shares) < 16


def test_each_image_has_its_own_figures():
    model, images = Rounding(), pictures(4)
    measured = Evaluation(model).add(images)
    alone = [Evaluation(model).add(image[None]) for image in images]
    assert measured.ssim is not None
    for name in ("psnr", "ssim", "l1"):
        torch.testing.assert_close(getattr(measured, name), torch.cat([getattr(one, name) for one in alone]))
    assert len(set(measured.psnr.tolist())) == 4
    assert torch.equal(measured.images, images / 127.5 - 1)


def test_codes_of_the_caller_are_those_decoded():
    model, images = Rounding(), pictures(4)
    evaluation = Evaluation(model)
    measured = evaluation.add(images, {"codes": torch.full((4, 4, 4), 3)})
    assert torch.equal(measured.reconstructions, torch.full((4, 1, 16, 16), 56 / 127.5 - 1))
    assert evaluation.report()["codes/used_codes"] == 1


def test_residual_stages_are_counted_each_by_itself():
    images = pictures(6)
    found = tokenizer.evaluate(Rounding(stages=2), [images])
    plain = tokenizer.evaluate(Rounding(), [images])
    assert found["codes/0/perplexity"] == plain["codes/perplexity"]
    assert found["codes/1/used_codes"] == 2
    assert "codes/perplexity" not in found


def test_images_smaller_than_the_window_have_no_ssim():
    found = tokenizer.evaluate(Rounding(), [pictures(3, size=8)])
    assert "ssim" not in found
    assert found["psnr"] > 0


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(CodesError, match="nothing to evaluate"):
        tokenizer.evaluate(Rounding(), [])


@pytest.mark.parametrize("preset", ["grey28", "rgb32"])
def test_the_step_measures_what_comes_out_of_the_codes(preset, monkeypatch):
    torch.manual_seed(0)
    model = tokenizer.from_preset(
        preset, codebook_size=16, code_dim=8, hidden_dim=16, residual_dim=8, num_residual_blocks=1
    )
    step = TokenizerStep(model)
    images = torch.randint(0, 256, (6, model.config.channels, 16, 16), dtype=torch.uint8)
    output = step({"images": images})
    step.update(output.sums, output.pools, torch.Generator().manual_seed(0))
    found = step.evaluate([{"images": part} for part in images.split(4)])
    loss = found.pop("loss")
    assert found == pytest.approx(tokenizer.evaluate(model.eval(), [images]), rel=1e-5)
    assert loss > found["nmse"]
    monkeypatch.setattr(
        model, "decode", lambda codes, dtype: torch.zeros(len(codes[model.config.level_names[-1]]), *images.shape[1:])
    )
    assert step.evaluate([{"images": images}])["psnr"] == pytest.approx(
        10 * math.log10(4 / float((images.double() / 127.5 - 1).square().mean()))
    )
