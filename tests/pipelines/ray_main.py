"""Training runs on Ray that lose a rank; started by test_ranks.py as `ray_main.py FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rank_main import CONFIG, Pictures, make_step

from pipelines.cluster import ray_cluster
from pipelines.errors import RunFailed
from pipelines.fit import FitConfig
from pipelines.train import Task, run_job


class Dying(Pictures):
    """Kills rank 1 in its sixth step, once."""

    marker: Path

    def __iter__(self):
        for batch in super().__iter__():
            if self.place == 6 and self.rank == 1 and not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


@dataclass(frozen=True)
class PictureJob:
    marker: Path
    fit: FitConfig

    def build(self, rank: int, world_size: int) -> Task:
        torch.manual_seed(self.fit.seed)
        stream = Dying(rank)
        stream.marker = self.marker
        return Task(make_step(), stream, lambda: [{"images": stream.images}], 3)

    def quarantined(self, stream):
        return {}


def main() -> None:
    root, outcomes = Path(sys.argv[1]), {}
    allowed = {"killed": 3, "unlucky": 0}
    with ray_cluster(2):
        for name, max_failures in allowed.items():
            folder = root / name
            folder.mkdir()
            job = PictureJob(folder / "marker", replace(CONFIG, max_failures=max_failures))
            try:
                run_job(job, folder, workers=2, device="cpu", title=name)
            except RunFailed as error:
                outcomes[name] = str(error)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
