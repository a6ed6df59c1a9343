"""One rank of a two-rank training run; started by test_ranks.py as `rank_main.py FOLDER RANK CASE`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tokenizer
from pipelines.context import RankContext
from pipelines.errors import RunFailed
from pipelines.fit import FitConfig, fit
from pipelines.scenes import CLASSES, scene


class Pictures:
    """This rank's half of each global batch of 16."""

    def __init__(self, rank: int) -> None:
        import numpy as np

        drawn = [scene(CLASSES[i % 4], np.random.default_rng(i), 16).transpose(2, 0, 1) for i in range(64)]
        self.images, self.rank, self.place = torch.from_numpy(np.stack(drawn)), rank, 0

    def __iter__(self):
        while True:
            first = self.place * 16 % 64 + 8 * self.rank
            self.place += 1
            yield {"images": self.images[first : first + 8]}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Poisoned(Pictures):
    """From step 5 on, rank 1 meets a picture that is not a number."""

    def __iter__(self):
        for batch in super().__iter__():
            images = batch["images"].float() / 127.5 - 1
            if self.place >= 5 and self.rank == 1:
                images[3, 0, 0, 0] = float("nan")
            yield {"images": images}


def make_step(quantizer: str = "ema") -> tokenizer.TokenizerStep:
    """The same architecture for all cases."""
    model = tokenizer.from_preset(
        "rgb32", size=16, codebook_size=16, code_dim=8, hidden_dim=16, residual_dim=8, start_step=3, quantizer=quantizer
    )
    return tokenizer.TokenizerStep(model).to(
        memory_format=torch.channels_last
    )  # as jobs do; other kernels round otherwise


CONFIG = FitConfig(steps=10, batch_size=16, learning_rate=1e-3, warmup_steps=1, save_every=4)


class Stopped(Exception):
    """Stands for a kill of all ranks."""


def main() -> None:
    torch.set_num_threads(1)
    folder, rank, case = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    # The ranks meet in a file: a port may be taken, and its owner may leave first.
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    context = RankContext(torch.device("cpu"), lambda metrics: None)
    torch.manual_seed(context.rank)  # the ranks begin apart; data-parallel training must bring them together
    step = make_step("gradient" if case == "gradient" else "ema")
    stream = (Poisoned if case == "poison" else Pictures)(context.rank)

    def on_step(done: int, loss: float) -> None:
        if case == "stop" and done == 6:
            raise Stopped

    try:
        fit(step, stream, lambda: [{"images": stream.images}], CONFIG, context, folder, on_step)
    except RunFailed as error:
        (folder / f"error-{rank}").write_text(str(error))
    except Stopped:
        pass
    (folder / f"fingerprint-{rank}").write_text(step.tokenizer.fingerprint)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
