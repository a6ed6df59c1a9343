"""What float32 means on a GPU."""

from __future__ import annotations

import torch


def exact_float32() -> None:
    """No TF32 in this process: `fp32` is float32 when a tokenizer is trained, evaluated, encodes and decodes, or codes would differ."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
