"""Checks of the tokenizer protocol: ours passes, and each way of breaking it is found and named."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenizer import Tokenizer, TokenizerConfig
from tokenizer.conformance import check_tokenizer
from tokenizer.protocol import check_facts, check_images, check_scale
from vqmill.errors import CodesError

COUNTER = itertools.count()


class Means:
    """Blocks of 4 x 4 pixels by their mean: as plain as a tokenizer can be, with two levels of different K."""

    name, fingerprint, channels, size = "means", "means-1", 1, 8
    levels = {"top": 4, "bottom": 300}  # noqa: RUF012

    def grid(self, level, size):
        sides = {"top": size // 8, "bottom": size // 4}
        if level not in sides or size % 8:
            raise ValueError(f"no {level} of {size}")
        return sides[level], sides[level]

    def encode(self, images):
        means = torch.nn.functional.avg_pool2d(images.float(), 4)[:, 0]
        return {"top": (means[:, ::2, ::2] / 64).long(), "bottom": means.long()}

    def decode(self, codes):
        return codes["bottom"][:, None].repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)

    def to(self, device):
        return self


def means(**changes):
    """A factory of Means with other members."""
    return lambda: type("Means", (Means,), changes)()


def encode_with(change):
    return lambda self, images: change(Means.encode(self, images), images)


def test_ours_and_a_plain_one_pass():
    torch.manual_seed(0)
    for overrides in ({}, {"num_quantizers": 3, "num_levels": 2}):
        config = TokenizerConfig(size=16, hidden_dim=8, residual_dim=4, code_dim=4, codebook_size=16, **overrides)
        model = Tokenizer(config).eval()
        assert [check.problem for check in check_tokenizer(lambda model=model: model)] == [""] * 8
    assert [check.problem for check in check_tokenizer(Means)] == [""] * 8


def decode_with(change):
    return lambda self, codes: change(Means.decode(self, codes))


BROKEN = {
    "no-member": ({"encode": property(lambda self: self.gone)}, 0, "a Means has no encode; a tokenizer has name, fingerprint"),
    "no-fingerprint": ({"fingerprint": ""}, 0, "fingerprint: expected 1 to 128 printable characters, found ''"),
    "channels": ({"channels": 2}, 0, "channels: expected 1 (grey) or 3 (RGB), found 2"),
    "size": ({"size": "8"}, 0, "size: expected a number of pixels, found '8'"),
    "levels": ({"levels": {"codes": 4.0}}, 0, "levels: expected each level's codebook size"),
    "grid": ({"grid": lambda self, level, size: (2.0, 2)}, 0, "expected (h, w) or (Q, h, w), found (2.0, 2)"),
    "own-size": ({"size": 12}, 0, "size 12 does not fit: grid('top', 12) says ValueError('no top of 12')"),
    "level-names": ({"encode": encode_with(lambda codes, images: {"codes": codes["top"]})}, 1, "expected levels top, bottom, found codes"),
    "no-mapping": ({"encode": encode_with(lambda codes, images: codes["top"])}, 1, "expected levels top, bottom, found Tensor"),
    "dtype": ({"encode": encode_with(lambda codes, images: {name: code.int() for name, code in codes.items()})}, 1, "level 'top': expected int64 [8, 1, 1], found torch.int32 [8, 1, 1]"),
    "shape": ({"encode": encode_with(lambda codes, images: codes | {"bottom": codes["top"]})}, 1, "level 'bottom': expected int64 [8, 2, 2], found torch.int64 [8, 1, 1]"),
    "range": ({"levels": {"top": 2, "bottom": 300}}, 1, "level 'top' gave code 2, but its codebook_size is 2 (valid 0..1)"),
    "negative": ({"encode": encode_with(lambda codes, images: codes | {"top": codes["top"] - 9})}, 1, "(valid 0..3)"),
    "raises": ({"encode": encode_with(lambda codes, images: codes["middle"])}, 1, "it raised KeyError('middle')"),
    "overwrites": ({"encode": encode_with(lambda codes, images: (codes, images.zero_())[0])}, 1, "encode changed the images"),
    "random": ({"encode": encode_with(lambda codes, images: codes | {"top": (codes["top"] + next(COUNTER)) % 4})}, 2, "is something random in it"),
    "batch": ({"encode": encode_with(lambda codes, images: codes | {"top": (codes["top"] + len(images)) % 4})}, 3, "one by one have other codes"),
    "no-images": ({"decode": lambda self, codes: None}, 4, "decode: expected torch.uint8 in [0, 255], found NoneType"),
    "floats": ({"decode": decode_with(lambda images: images / 255)}, 4, "expected torch.uint8 in [0, 255], found torch.float32 from 0."),
    "smaller": ({"decode": decode_with(lambda images: images[..., ::2, ::2])}, 4, "of a size S that has these codes, top 1x1, bottom 2x2; found [8, 1, 4, 4]. By its grid, size 8 has top 1x1, bottom 2x2, and size 4 has none (ValueError('no top of 4'))"),
    "larger": ({"decode": decode_with(lambda images: images.repeat(1, 1, 2, 2))}, 4, "found [8, 1, 16, 16]. By its grid, size 8 has top 1x1, bottom 2x2, and size 16 has top 2x2, bottom 4x4"),
    "oblong": ({"decode": decode_with(lambda images: images[..., :4, :])}, 4, "found [8, 1, 4, 8]"),
    "colours": ({"decode": decode_with(lambda images: images.repeat(1, 3, 1, 1))}, 4, "expected torch.uint8 [8, 1, S, S]"),
    "unscaled": ({"decode": decode_with(lambda images: (images / 255).to(torch.uint8))}, 4, "expected pixels in [0, 255], found at most 1, even for a white image"),
    "signed": ({"decode": decode_with(lambda images: (images / 127.5 - 1).to(torch.int16).to(torch.uint8))}, 4, "expected pixels in [0, 255], found at most 1, even for a white image"),
    "padded": ({"size": 12, "grid": lambda self, level, size: ((size + 7) // 8 * (2 if level == "bottom" else 1),) * 2, "encode": lambda self, images: Means.encode(self, torch.nn.functional.pad(images, (0, 4, 0, 4)))}, 4, "expected the shape that was encoded, [8, 1, 12, 12], found [8, 1, 16, 16]"),
    "moves": ({"encode": lambda self, images: (setattr(self, "fingerprint", "moved"), Means.encode(self, images))[1]}, 5, "changed the fingerprint"),
    "sizes": ({"grid": lambda self, level, size: (size // 8,) * 2 if level == "top" else (size // 4,) * 2}, 7, "no ValueError"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name):
    changes, place, message = BROKEN[name]
    checks = check_tokenizer(means(**changes))
    assert message.lower() in checks[-1].problem.lower()
    assert [bool(check.problem) for check in checks] == [False] * place + [True], "the list ends with the first problem"


@pytest.mark.parametrize("shade", [0, 1, 255])
def test_images_may_be_as_dark_or_as_plain_as_they_are(shade):
    model = Means()
    codes = model.encode(torch.full((2, 1, 8, 8), shade, dtype=torch.uint8))
    check_images(model, model.decode(codes), codes)
    check_scale(model, model.decode(codes))
    binary = means(decode=decode_with(lambda images: (images > 127).to(torch.uint8) * 255))()
    check_images(binary, binary.decode(codes), codes)
    check_scale(binary, binary.decode(codes))


def test_a_factory_must_repeat_itself():
    made = check_tokenizer(lambda: means(fingerprint=f"means-{next(COUNTER)}")())
    assert "Load fixed weights, or seed the random ones" in made[-1].problem
    shift = itertools.count()

    def other_codes():
        by = next(shift)
        return means(encode=encode_with(lambda codes, images: codes | {"top": (codes["top"] + by) % 4}))()

    assert "under the same fingerprint" in check_tokenizer(other_codes)[-1].problem


def test_facts_are_checked_without_encoding():
    check_facts(Means())
    with pytest.raises(CodesError, match="a dict has no name, fingerprint"):
        check_facts({})
