"""Whether a tokenizer keeps to the protocol: a list of checks that people can run on theirs (`vqmill check-tokenizer`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizer.protocol import ImageTokenizer, check_codes, check_facts, check_images, check_scale
from vqmill.errors import CodesError

NUMBER = 8  # images that are encoded
SAME_FRACTION = 0.99  # of the codes: other batch sizes may run other kernels, which round differently


@dataclass(frozen=True)
class Check:
    """One thing that a tokenizer must do.

    Attributes:
        title: what.
        problem: what is wrong and what to do; empty when it does it.
    """

    title: str
    problem: str = ""


def check_tokenizer(factory: Callable[[], ImageTokenizer]) -> list[Check]:
    """Checks what a factory makes; a problem ends the list, for later checks rest on earlier ones.

    Args:
        factory: makes the tokenizer. It is called twice, as every encoder process of a job calls it.
    """
    done: list[Check] = []
    for title, check in _checks(factory):
        try:
            check()
        except Exception as error:  # somebody else's code; whatever it raises is what we are here to say
            return [*done, Check(title, str(error) if isinstance(error, CodesError) else f"it raised {error!r}")]
        done.append(Check(title))
    return done


def _checks(factory: Callable[[], ImageTokenizer]) -> Iterator[tuple[str, Callable[[], None]]]:
    made: list[ImageTokenizer] = []
    results: dict[str, Any] = {}

    def make() -> None:
        made.append(factory())
        check_facts(made[0])

    yield "it is made, and has name, fingerprint, channels, size, levels, grid", make
    model = made[0]
    size, before = model.size, model.fingerprint
    noise = torch.randint(
        0, 256, (NUMBER, model.channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    ramp = torch.linspace(0, 255, size).to(torch.uint8).expand(model.channels, size, size)
    images = torch.cat([noise[:-1], ramp[None]])
    given = images.clone()

    def encode() -> None:
        results["codes"] = _encoded(model, images)
        if not torch.equal(images, given):
            raise CodesError("encode changed the images that it was given. Work on a copy.")

    def repeat() -> None:
        _require_same(results["codes"], _encoded(model, images), 1.0, "a second encode of the same images gave other codes. Is something random in it, such as dropout, or a module in training mode?")  # fmt: skip

    def batches() -> None:
        single = [_encoded(model, images[i : i + 1]) for i in range(NUMBER)]
        joined = {level: torch.cat([codes[level] for codes in single]) for level in model.levels}
        _require_same(results["codes"], joined, SAME_FRACTION, "images one by one have other codes than together. Does something look at the whole batch, such as batch normalisation in training mode?")  # fmt: skip

    def decode() -> None:
        with torch.no_grad():
            images = model.decode(results["codes"])
            check_images(model, images, results["codes"])
            check_scale(model, images)
            if images.shape != given.shape:
                raise CodesError(
                    f"decode: expected the shape that was encoded, {list(given.shape)}, found {list(images.shape)}."
                )

    def stay() -> None:
        if model.fingerprint != before:
            raise CodesError(
                "encoding or decoding changed the fingerprint. Put the model into evaluation mode in the factory."
            )

    def again() -> None:
        other = factory()
        if other.fingerprint != before:
            raise CodesError(f"the factory made fingerprint {before}, then {other.fingerprint}. Load fixed weights, or seed the random ones.")  # fmt: skip
        _require_same(results["codes"], _encoded(other, images), 1.0, "a second one from the factory gives other codes under the same fingerprint. Hash all that codes depend on.")  # fmt: skip

    def sizes() -> None:
        try:
            model.grid("no such level", size)
        except ValueError:  # CodesError is one
            return
        raise CodesError("grid of a level that does not exist raised no ValueError.")

    yield "encode gives int64 codes of the grids it promises, within the codebooks", encode
    yield "the same images give the same codes again", repeat
    yield f"an image has the same codes alone and among {NUMBER} (at least {SAME_FRACTION:.0%} of them)", batches
    yield "decode gives uint8 images of the same shape", decode
    yield "encoding and decoding leave the fingerprint as it was", stay
    yield "the factory makes the same tokenizer again", again
    yield "grid refuses what it does not know with a ValueError", sizes


def _encoded(model: ImageTokenizer, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        codes = model.encode(images)
    check_codes(model, codes, len(images), images.shape[-1])
    return {level: values.cpu() for level, values in codes.items()}


def _require_same(first: dict[str, Tensor], second: dict[str, Tensor], fraction: float, problem: str) -> None:
    for level, codes in first.items():
        same = (codes == second[level]).double().mean().item()
        if same < fraction:
            raise CodesError(f"level {level!r}: {1 - same:.2%} of the codes differ: {problem}")
