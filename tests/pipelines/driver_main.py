"""The command line on a cluster that is there: `driver_main.py ADDRESS WORDS...`."""

from __future__ import annotations

import logging
import sys

import ray

from pipelines.cli import app
from pipelines.cluster import WORKER_ENVIRONMENT


def main() -> int:
    address, *words = sys.argv[1:]
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    try:
        return app(words)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
