"""Trains many small runs quickly: ``python several_runs.py JOBS.json``.

JOBS is a list of {"ranks": W, "runs": [[overrides], ...]}. Importing torch and DeepSpeed is most of the time of a small run, so this
process imports them once and forks the ranks of every job, which then form a real gloo process group and train the job's runs one
after the other. What torchrun adds is tested elsewhere.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import traceback

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401  (imported before the fork, used by the engines)

import ddpm_dist.engines.deepspeed  # noqa: F401
from ddpm_dist import runtime as runtimes
from ddpm_dist.config import load_config
from ddpm_dist.trainer import Trainer


def train(runs: list[list[str]]) -> None:
    runtime = runtimes.start()
    for overrides in runs:
        trainer = Trainer(load_config(None, overrides), runtime)
        trainer.prepare()
        assert trainer.run() == 0
        trainer.close()
        del trainer
        gc.collect()
    runtimes.finish()


def start(rank: int, ranks: int, port: int, runs: list[list[str]]) -> int:
    child = os.fork()
    if child:
        return child
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    code = 1
    try:
        train(runs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [start(rank, job["ranks"], port, job["runs"]) for rank in range(job["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            print(f"the job of {job['ranks']} ranks ended with {codes}", file=sys.stderr)
            return 1
    print(f"finished {sum(len(job['runs']) for job in jobs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
