"""A VQModel of Hugging Face's diffusers as a tokenizer of vqmill.

The weights here are random, so that the example needs no download. For trained ones, replace the constructor in `make` by
`VQModel.from_pretrained("path/to/folder")`. From the folder above this one:

    vqmill check-tokenizer examples.diffusers_vqmodel:make
    vqmill tokenize photos/ --tokenizer-module examples.diffusers_vqmodel:make --out codes.zarr
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import VQModel
from torch import Tensor

from vqmill.checkpoint import fingerprint

SIZES = {
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "num_vq_embeddings": 64,
}


class DiffusersTokenizer:
    """See docs/tokenizer-protocol.md.

    Args:
        model: with a VectorQuantizer in it; images in [-1, 1].
        size: side of the images it was trained on, pixels.
        name: for people.
    """

    def __init__(self, model: VQModel, size: int, name: str) -> None:
        self.model, self.size, self.name = model.eval(), size, name
        self.channels = model.config.in_channels
        self.levels = {"codes": model.config.num_vq_embeddings}
        self.pixels_per_code = 2 ** (len(model.config.block_out_channels) - 1)

    @property
    def fingerprint(self) -> str:
        """A hash of all weights; the name stands for the configuration."""
        return fingerprint(self.model.state_dict(), {"name": self.name})

    def grid(self, level: str, size: int) -> tuple[int, int]:
        """(h, w) for images of size x size pixels."""
        if level not in self.levels or size % self.pixels_per_code:
            raise ValueError(f"level 'codes' of sizes that {self.pixels_per_code} divides")
        return size // self.pixels_per_code, size // self.pixels_per_code

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [N, C, H, W] -> int64 [N, h, w]."""
        latents = self.model.encode(images / 127.5 - 1).latents
        codes = self.model.quantize(latents)[2][2]
        return {"codes": codes.view(len(images), *latents.shape[2:])}

    def decode(self, codes: Mapping[str, Tensor]) -> Tensor:
        """int64 [N, h, w] -> uint8 [N, C, H, W]."""
        grid = codes["codes"]
        vectors = self.model.quantize.get_codebook_entry(grid.flatten(), (*grid.shape, -1))
        images = self.model.decode(vectors, force_not_quantize=True).sample
        return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def to(self, device: str | torch.device) -> DiffusersTokenizer:
        """Moves the weights."""
        self.model.to(device)
        return self


def make() -> DiffusersTokenizer:
    """The factory: the same weights every time, in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQModel(**SIZES)
        torch.nn.init.normal_(model.quantize.embedding.weight)  # spread out, so that random weights use several codes
    return DiffusersTokenizer(model, size=32, name="diffusers-vqmodel-random")
