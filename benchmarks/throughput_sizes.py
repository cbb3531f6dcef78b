"""Several batch sizes of ``benchmarks.train_throughput``, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ddpm_dist.errors import OK, RunFailed, UserError


def of_one_size(argv: list[str], batch: int, json_path: Path | None) -> list[str]:
    """The same command for one of its sizes, with a file of its own."""
    words, kept = iter(argv), []
    for word in words:
        if word in ("--batch", "--json"):
            next(words, None)
        elif not word.startswith(("--batch=", "--json=")):
            kept.append(word)
    own = ["--json", str(json_path.with_name(f"{json_path.stem}_b{batch}{json_path.suffix}"))] if json_path else []
    return ["--batch", str(batch), *own, *kept]


def one_after_the_other(batches: list[int], json_path: Path | None, argv: list[str]) -> int:
    """Each size in a process of its own; a size that fails does not keep the others from running.

    Raises UserError under a launcher, which has one process for each rank already, and RunFailed where a size failed.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--batch with several sizes needs a process for each: under a launcher name one size at a time")
    failed = []
    for batch in batches:
        command = [sys.executable, "-m", "benchmarks.train_throughput", *of_one_size(argv, batch, json_path)]
        if subprocess.run(command, check=False).returncode:
            failed.append(str(batch))
        print(flush=True)
    if failed:
        raise RunFailed(f"no report of batch {', '.join(failed)}, see above")
    return OK
