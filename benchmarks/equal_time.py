"""Priors at equal CPU time: trains each preset on a store's codes for so many CPU-seconds, and prints bits per held-out code.

    python -m benchmarks.equal_time codes.zarr --seconds 60 --presets pixelcnn gpt --rates 1e-3 3e-3 --seeds 0

One thread; AdamW, batches of 64, a linear rise over the first 3 % of the time and half a cosine to 0 over the rest. The held-out rows are those
of `vqmill train-prior`. Every run is printed, so that the sweep of rates is kept.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

import priors
from pipelines.prior_inputs import BASELINE_CODES, evenly, level_shapes, num_classes, split_rows
from pipelines.train_prior import CodeStream, to_tensors
from vqmill import Codes, open_codes

HOLDOUT, EVALUATED, BATCH, RISE = 0.05, 2048, 64, 0.03


def trained(codes: Codes, level: str, preset: str, rate: float, seed: int, seconds: float) -> tuple[int, int, float]:
    """Trains for so many CPU-seconds: parameters, steps, bits per held-out code."""
    kept, held_out = split_rows(codes, HOLDOUT)
    names = codes.levels[: codes.levels.index(level) + 1]
    torch.manual_seed(seed)
    prior = priors.from_preset(preset, level_shapes(codes), num_classes(codes), codes.spec.tokenizer["fingerprint"])
    step = priors.PriorStep(prior, level).to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(step.parameters(), lr=rate, weight_decay=0.01)
    batches = iter(CodeStream(codes.batches(BATCH, shuffle=True, seed=seed, last="pad", rows=kept, levels=names)))
    begun, steps = time.process_time(), 0
    while (share := (time.process_time() - begun) / seconds) < 1:
        factor = min(share / RISE, 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.zero_grad()
        step(next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        optimizer.step()
        steps += 1
    rows = evenly(held_out, EVALUATED)
    bits = step.evaluate(to_tensors(batch) for batch in codes.batches(BATCH, rows=rows, levels=names))["bits_per_code"]
    return sum(parameter.numel() for parameter in step.parameters()), steps, bits


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equal_time", description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--level", help="the last one if not given")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--presets", nargs="+", default=["pixelcnn", "gpt"], choices=list(priors.PRESETS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    codes = open_codes(asked.store)
    level = asked.level or codes.levels[-1]
    kept, held_out = split_rows(codes, HOLDOUT)
    size = codes.spec.level(level).codebook_size
    array = codes[level]
    limit = max(1, BASELINE_CODES // math.prod(array.shape[1:]))
    crude = priors.baselines(array[evenly(held_out, EVALUATED)], size, train=array[evenly(kept, limit)])
    print(
        f"{asked.store} {level}: uniform {crude.uniform:.3f}, unigram {crude.unigram:.3f}, bigram {crude.bigram:.3f} bits per code"
    )
    print(
        "| preset | parameters | CPU-seconds | rate | seed | steps | bits per held-out code |\n|---|---|---|---|---|---|---|"
    )
    for preset in asked.presets:
        for rate in asked.rates:
            for seed in asked.seeds:
                size, steps, bits = trained(codes, level, preset, rate, seed, asked.seconds)
                print(
                    f"| `{preset}` | {size:,} | {asked.seconds:g} | {rate:g} | {seed} | {steps:,} | {bits:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
