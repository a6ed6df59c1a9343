"""Training runs on Ray that lose a rank, or fail; started by test_ranks.py as `ray_main.py FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rank_main import CONFIG, Pictures, Poisoned, make_step

from pipelines.cluster import ray_cluster
from pipelines.errors import RunFailed
from pipelines.fit import FitConfig
from pipelines.train import ATTEMPTS_FILE, Task, run_job
from vqmill.errors import CodesError


class Dying(Pictures):
    """Kills rank 1 in its sixth step, once."""

    marker: Path

    def __iter__(self):
        for batch in super().__iter__():
            if self.place == 6 and self.rank == 1 and not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


class Broken(Pictures):
    """Rank 1 cannot read on in its third step."""

    def __iter__(self):
        for batch in super().__iter__():
            if self.place == 3 and self.rank == 1:
                raise CodesError("the corpus is gone")
            yield batch


@dataclass(frozen=True)
class PictureJob:
    kind: type[Pictures]
    marker: Path
    fit: FitConfig = CONFIG

    def build(self, rank: int, world_size: int) -> Task:
        torch.manual_seed(self.fit.seed)
        stream = self.kind(rank)
        stream.marker = self.marker
        return Task(make_step(), stream, lambda: [{"images": stream.images}], 3)

    def quarantined(self, stream):
        return {}


def main() -> None:
    root, outcomes = Path(sys.argv[1]), {}
    kinds = {"killed": Dying, "broken": Broken, "poisoned": Poisoned, "unlucky": Dying}
    expected = {
        "killed": "",
        "broken": "the corpus is gone",
        "poisoned": "from rank 1",
        "unlucky": "max_failures in [fit] is 0",
    }
    with ray_cluster(2):
        for name, kind in kinds.items():
            folder = root / name
            folder.mkdir()
            job = PictureJob(kind, folder / "marker", replace(CONFIG, max_failures=0) if name == "unlucky" else CONFIG)
            raised, said = "", ""
            try:
                run_job(job, folder, workers=2, device="cpu", title=name)
            except (CodesError, RunFailed) as error:
                raised, said = type(error).__name__, str(error)
            outcomes[name] = [raised, expected[name] in said, (folder / ATTEMPTS_FILE).stat().st_size]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
