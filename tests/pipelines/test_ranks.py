"""Ranks of a data-parallel run end with the same weights and the same codebooks, to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_two_ranks_agree_to_the_bit(tmp_path: Path) -> None:
    script = Path(__file__).with_name("rank_main.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    found = [(tmp_path / f"fingerprint-{rank}").read_text() for rank in range(2)]
    assert found[0] == found[1]
