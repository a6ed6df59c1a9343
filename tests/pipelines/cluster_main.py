"""A Ray cluster of several nodes on this machine; started by tests that take nodes away, as `cluster_main.py NODES`.

The head has no CPU slot, so that encoders run on the other nodes. Prints a line of JSON when it stands, and after each line of its input:
`lose N` has node N die with all its processes, and another one join.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import chain
from pathlib import Path
from typing import Any

NODE = {"num_cpus": 2, "object_store_memory": 100 * 1024 * 1024}


def descendants(process: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(words[1]), []).append(int(path.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(**NODE) for _ in range(int(sys.argv[1]))]
    for line in chain([""], sys.stdin):
        if line:
            number = int(line.split()[1])
            for process in descendants(raylet(nodes[number])):
                os.kill(process, signal.SIGKILL)
            cluster.remove_node(nodes[number], allow_graceful=False)
            nodes[number] = cluster.add_node(**NODE)
        print(json.dumps({"address": cluster.address, "raylets": [raylet(node) for node in nodes]}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
