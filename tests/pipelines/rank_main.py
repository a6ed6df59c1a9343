"""One rank of a two-rank training run; started by test_ranks.py as `rank_main.py FOLDER RANK`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tokenizer
from pipelines.context import RankContext
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


def main() -> None:
    torch.set_num_threads(1)
    meeting = Path(sys.argv[1]) / "meeting"  # a file: a port may be taken, and its owner may leave first
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(sys.argv[2]), world_size=2)
    context = RankContext(torch.device("cpu"), lambda metrics: None)
    torch.manual_seed(context.rank)  # the ranks begin apart; data-parallel training must bring them together
    model = tokenizer.from_preset(
        "rgb32", size=16, codebook_size=16, code_dim=8, hidden_dim=16, residual_dim=8, start_step=3
    )
    step = tokenizer.TokenizerStep(model)
    stream = Pictures(context.rank)
    folder = Path(sys.argv[1])
    config = FitConfig(steps=10, batch_size=16, learning_rate=1e-3, warmup_steps=1)
    fit(step, stream, lambda: [{"images": stream.images}], config, context, folder)
    (folder / f"fingerprint-{context.rank}").write_text(model.fingerprint)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
