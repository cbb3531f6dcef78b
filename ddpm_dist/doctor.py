"""Is this machine fit for training? Versions, GPUs, file systems, limits, SLURM, and two ranks that add numbers; what to do about it.

    python -m ddpm_dist.doctor                                             # runs/ and shards/ of this folder
    python -m ddpm_dist.doctor --run-dir /scratch/runs --shards /data/shards/cifar64 --json doctor.json

Every line says ok, note (works, but know it) or problem (with the remedy). Exit code 0: no problem, 1: a problem, 2: bad usage. Every
check has a time limit. Only the standard library is imported here, so that it can say what is missing. On a cluster run it on a compute
node (srun python -m ddpm_dist.doctor): the login node is another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm_dist import doctor_machine as machine
from ddpm_dist import doctor_software as software
from ddpm_dist.doctor_report import STATES, Finding, limited
from ddpm_dist.errors import FAILED, OK, UserError, exit_codes


def checks(run_dir: Path, shards: Path) -> Iterable[tuple[str, Callable[[], Iterable[Finding]], float]]:
    """(word, check, time limit in seconds), in the order of the report."""
    probed: dict[str, Any] = {}  # what torch said; later checks look at it
    yield "python", software.python, 10
    yield "packages", software.packages, 120
    yield "versions", software.pip_check, 90
    yield "torch", lambda: software.gpus(probed), 240
    yield "run dir", lambda: machine.files("run dir", run_dir), 120
    yield "shards", lambda: machine.files("shards", shards), 120
    yield "memory", machine.memory, 10
    yield "open files", machine.open_files, 10
    yield "/dev/shm", machine.shared_memory, 10
    yield "host name", machine.host_name, 30
    yield "ports", machine.ports, 10
    yield "SLURM", lambda: machine.slurm(probed), 60
    yield "two ranks", lambda: software.two_ranks(probed), 400


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ddpm_dist.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs are written (default: runs)")
    parser.add_argument("--shards", type=Path, default=Path("shards"), help="where the shards are (default: shards)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    return parser.parse_args(argv)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.json is not None and not (arguments.json.absolute().parent.is_dir() and not arguments.json.is_dir()):
        raise UserError(f"--json {arguments.json}: give a file in a folder that exists")
    host = socket.gethostname()
    print(f"ddpm_dist doctor on {host}, {platform.platform(terse=True)}, {os.cpu_count()} cores\n", flush=True)
    findings: list[Finding] = []
    for about, check, seconds in checks(arguments.run_dir, arguments.shards):
        for finding in limited(about, check, seconds):
            print(finding, flush=True)
            findings.append(finding)
    count = {state: sum(finding.state == state for finding in findings) for state in STATES}
    print(f"\n{count['problem']} problem(s), {count['note']} note(s), {count['ok']} ok")
    if arguments.json is not None:
        report = {"host": host, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "count": count}
        report["findings"] = [asdict(finding) for finding in findings]
        try:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {arguments.json} cannot be written: {error.strerror}") from None
    return FAILED if count["problem"] else OK


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code or OK)  # without waiting for checks that hang
