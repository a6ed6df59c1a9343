"""Networks with the structure, the tensor names and the forward pass of three published projects, in a few lines each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def entries_of(codebook, codes):
    """[K, D] and [N, h, w] -> [N, D, h, w]."""
    return codebook[codes].permute(0, 3, 1, 2)


def nearest_naive(codebook, z):
    """[K, D] and [N, D, h, w] -> [N, h, w]: the index of the smallest squared distance."""
    return (z[:, None] - codebook[None, :, :, None, None]).square().sum(2).argmin(1)


def body(width, inner, bias=True, in_place=False):
    return nn.Sequential(
        nn.ReLU(in_place), nn.Conv2d(width, inner, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(inner, width, 1, bias=bias)
    )  # fmt: skip


class Holder(nn.Module):
    """Modules and tensors under the names that a state dict has."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def __call__(self, x):
        raise NotImplementedError


class Zalando(nn.Module):
    """One level; `shared` blocks as in the notebook's earlier versions. The first ReLU of a block overwrites its input, as there."""

    def __init__(self, *, channels=3, hidden=8, inner=4, blocks=2, dim=5, size=11, ema=True, bias=False, shared=False):
        super().__init__()

        def stack():
            layers = [Holder(_block=body(hidden, inner, bias, in_place=True)) for _ in range(blocks)]
            return Holder(_layers=nn.ModuleList([layers[0]] * blocks if shared else layers))

        self._encoder = Holder(
            _conv_1=nn.Conv2d(channels, hidden // 2, 4, stride=2, padding=1), _conv_2=nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1),
            _conv_3=nn.Conv2d(hidden, hidden, 3, padding=1), _residual_stack=stack(),
        )  # fmt: skip
        self._pre_vq_conv = nn.Conv2d(hidden, dim, 1)
        averages = {"_ema_cluster_size": torch.rand(size) + 1, "_ema_w": torch.randn(size, dim)} if ema else {}
        self._vq_vae = Holder(_embedding=nn.Embedding(size, dim), **averages)
        self._decoder = Holder(
            _conv_1=nn.Conv2d(dim, hidden, 3, padding=1), _residual_stack=stack(),
            _conv_trans_1=nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1),
            _conv_trans_2=nn.ConvTranspose2d(hidden // 2, channels, 4, stride=2, padding=1),
        )  # fmt: skip

    @staticmethod
    def _stack(stack, x):
        for layer in stack._layers:
            x = x + layer._block(x)
        return F.relu(x)

    def encode(self, x):
        coder = self._encoder
        x = coder._conv_3(F.relu(coder._conv_2(F.relu(coder._conv_1(x)))))
        return {
            "codes": nearest_naive(
                self._vq_vae._embedding.weight, self._pre_vq_conv(self._stack(coder._residual_stack, x))
            )
        }

    def decode(self, codes):
        coder = self._decoder
        x = self._stack(
            coder._residual_stack, coder._conv_1(entries_of(self._vq_vae._embedding.weight, codes["codes"]))
        )
        return coder._conv_trans_2(F.relu(coder._conv_trans_1(x)))


class Added(Holder):
    """A residual block under the name `conv`."""

    def __call__(self, x):
        return x + self.conv(x)


class Rosinality(nn.Module):
    """Two levels, the bottom conditioned on the decoded top; codebooks lie as [D, K]."""

    def __init__(self, *, channels=3, hidden=8, inner=4, blocks=2, dim=5, size=11, bias=True):
        super().__init__()

        def residuals():
            return [Added(conv=body(hidden, inner, bias)) for _ in range(blocks)]

        def half(width, out):
            return [nn.Conv2d(width, out, 4, stride=2, padding=1), nn.ReLU()]

        def double(width, out):
            return nn.ConvTranspose2d(width, out, 4, stride=2, padding=1)

        def coder(*layers):
            return Holder(blocks=nn.Sequential(*layers))

        last = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.enc_b = coder(*half(channels, hidden // 2), *half(hidden // 2, hidden), last, *residuals(), nn.ReLU())
        self.enc_t = coder(
            *half(hidden, hidden // 2), nn.Conv2d(hidden // 2, hidden, 3, padding=1), *residuals(), nn.ReLU()
        )
        self.quantize_conv_t, self.quantize_conv_b = nn.Conv2d(hidden, dim, 1), nn.Conv2d(hidden + dim, dim, 1)
        for level in "tb":
            facts = {
                "embed": torch.randn(dim, size),
                "cluster_size": torch.rand(size) + 1,
                "embed_avg": torch.randn(dim, size),
            }
            self.add_module(f"quantize_{level}", Holder(**facts))
        self.dec_t = coder(nn.Conv2d(dim, hidden, 3, padding=1), *residuals(), nn.ReLU(), double(hidden, dim))
        self.upsample_t = double(dim, dim)
        pixels = (double(hidden, hidden // 2), nn.ReLU(), double(hidden // 2, channels))
        self.dec = coder(nn.Conv2d(2 * dim, hidden, 3, padding=1), *residuals(), nn.ReLU(), *pixels)

    def encode(self, x):
        bottom = self.enc_b.blocks(x)
        top = nearest_naive(self.quantize_t.embed.T, self.quantize_conv_t(self.enc_t.blocks(bottom)))
        above = self.dec_t.blocks(entries_of(self.quantize_t.embed.T, top))
        return {
            "top": top,
            "bottom": nearest_naive(self.quantize_b.embed.T, self.quantize_conv_b(torch.cat([above, bottom], 1))),
        }

    def decode(self, codes):
        top, bottom = (
            entries_of(getattr(self, f"quantize_{level[0]}").embed.T, codes[level]) for level in ("top", "bottom")
        )
        return self.dec.blocks(torch.cat([self.upsample_t(top), bottom], 1))


class Unixpickle(nn.Module):
    """One level or two; encoders count from the bottom, decoders from the top."""

    def __init__(self, *, channels=3, hidden=8, size=11, levels=2):
        super().__init__()

        def parts(blocks):
            return {f"residual{i + 1}": body(hidden, hidden) for i in range(blocks)}

        def book():
            return Holder(
                dictionary=torch.randn(size, hidden),
                usage_count=torch.randint(0, 100, (size,)).index_fill(0, torch.tensor(0), 100),
            )

        def double(out):
            return nn.ConvTranspose2d(hidden, out, 4, stride=2, padding=1)

        self.levels = levels
        self.encoder_0 = Holder(
            vq=book(),
            conv1=nn.Conv2d(channels, hidden, 4, stride=2),
            conv2=nn.Conv2d(hidden, hidden, 4, stride=2),
            **parts(2),
        )
        if levels == 1:
            self.decoder_0 = Holder(conv1=double(hidden), conv2=double(channels), **parts(2))
            return
        self.encoder_1 = Holder(vq=book(), conv=nn.Conv2d(hidden, hidden, 3, stride=2, padding=1), **parts(2))
        self.decoder_0 = Holder(conv=double(hidden), **parts(2))
        mixed = nn.Conv2d(2 * hidden, hidden, 3, padding=1)
        self.decoder_1 = Holder(
            conv1=double(hidden), conv2=mixed, conv3=double(hidden), conv4=double(channels), **parts(4)
        )

    def encode(self, x):
        coder = self.encoder_0
        x = F.relu(coder.conv1(F.pad(x, (1, 2, 1, 2))))
        x = self._add(coder, coder.conv2(F.pad(x, (1, 2, 1, 2))), 1, 2)
        found = {"bottom" if self.levels == 2 else "codes": nearest_naive(coder.vq.dictionary, x)}
        if self.levels == 1:
            return found
        coder = self.encoder_1
        return {"top": nearest_naive(coder.vq.dictionary, self._add(coder, coder.conv(x), 1, 2)), **found}

    def decode(self, codes):
        if self.levels == 1:
            coder = self.decoder_0
            x = self._add(coder, entries_of(self.encoder_0.vq.dictionary, codes["codes"]), 1, 2)
            return coder.conv2(F.relu(coder.conv1(F.relu(x))))
        coder = self.decoder_1
        x = self._add(coder, entries_of(self.encoder_1.vq.dictionary, codes["top"]), 1, 2)
        x = torch.cat([F.relu(coder.conv1(F.relu(x))), entries_of(self.encoder_0.vq.dictionary, codes["bottom"])], 1)
        x = self._add(coder, coder.conv2(x), 3, 4)
        return coder.conv4(F.relu(coder.conv3(F.relu(x))))

    @staticmethod
    def _add(coder, x, *numbers):
        for number in numbers:
            x = x + getattr(coder, f"residual{number}")(x)
        return x
