"""Ranks of a data-parallel run end with the same weights and the same codebooks, to the bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def test_two_ranks_agree_to_the_bit(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("rank_main.py")
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(subprocess.Popen([sys.executable, script, tmp_path], env={**os.environ, **place}))
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    found = {(tmp_path / f"fingerprint-{rank}").read_text() for rank in range(2)}
    assert len(found) == 1
