"""Number formats: what float32 means on a GPU, and where bfloat16 pays."""

from __future__ import annotations

import torch


def exact_float32() -> None:
    """No TF32 in this process: `fp32` is float32 when a tokenizer is trained, evaluated, encodes and decodes, or codes would differ."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def native_bf16(device: str) -> bool:
    """Whether a device multiplies bfloat16 in hardware and its products come out right; emulated ones are slower than float32.

    Products of an autocast layer are held against float32's: their rounding is 2**-9 of each factor.

    Args:
        device: `cpu` or `cuda`.
    """
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # names of CPU features, such as avx512_bf16; torch before 2.10 does not tell
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(bool(there) for name, there in known.items() if name.endswith("bf16"))
    if not native:
        return False
    left, right = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device, torch.bfloat16):
        product = left @ right
    return torch.allclose(product.float(), left @ right, rtol=0.02)


def resolved(precision: str, device: str, recorded: str | None) -> str:
    """`auto` as what the run was begun with, else as `bf16` where that is native, else as `fp32`; another precision as it is."""
    if precision != "auto":
        return precision
    if recorded is not None:
        return recorded
    return "bf16" if native_bf16(device) else "fp32"
