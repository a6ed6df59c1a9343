"""Prints the learning curves of training runs side by side, from their metrics.jsonl.

    python -m benchmarks.curves runs/classic runs/ours

`nmse` and `perplexity` are of training batches, averaged over what was logged in the 100 steps before; `held out` is the last evaluation so
far. Perplexities are of the level `codes`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

STEPS = (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
WINDOW = 100
COLUMNS = ("nmse", "perplexity", "held-out nmse", "held-out perplexity")


def row(records: list[dict[str, Any]], step: int) -> list[float | None]:
    """The figures of one run at a step; None for what it has not."""
    recent = [record for record in records if step - WINDOW < record["step"] <= step and "nmse" in record]
    evaluated = [record for record in records if record["step"] <= step and "validation/nmse" in record]
    return [
        *(statistics.fmean(record[name] for record in recent) if recent else None for name in ("nmse", "codes/batch_perplexity")),
        *(evaluated[-1][name] if evaluated else None for name in ("validation/nmse", "validation/codes/perplexity")),
    ]  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold a metrics.jsonl")
    runs: list[Path] = parser.parse_args().runs
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    last = max(log[-1]["step"] for log in logs)
    print("| step | " + " | ".join(f"{run.name}: {column}" for run in runs for column in COLUMNS) + " |")
    print("|---" * (1 + len(runs) * len(COLUMNS)) + "|")
    for step in sorted({step for step in STEPS if step < last} | {last}):
        cells = ["" if value is None else f"{value:.4g}" for log in logs for value in row(log, step)]
        print(f"| {step} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
