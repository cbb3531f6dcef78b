"""Train a class-conditional DDPM.

    torchrun --nproc_per_node=8 -m ddpm_dist.train                                 # the flagship, configs/cifar64.yaml
    torchrun --nproc_per_node=2 -m ddpm_dist.train --config configs/digits.yaml optim.lr=2e-4
    deepspeed --hostfile hosts --module ddpm_dist.train --config digits            # the deepspeed launcher
    srun --ntasks=16 python -m ddpm_dist.train                                     # one task per GPU of a SLURM job
    python -m ddpm_dist.train --config digits --print-config                       # one process; show the result only

The same command continues a run that was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_dist import rendezvous
from ddpm_dist.config import Config, load_config
from ddpm_dist.errors import BAD_USAGE, FAILED, OK, RunFailed, UserError, exit_codes, leave

if TYPE_CHECKING:
    from ddpm_dist.trainer import Trainer


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ddpm_dist.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="cifar64", help="a YAML file or the name of a packaged config (default: cifar64)"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--fresh", action="store_true", help="refuse to continue: the run directory must be empty")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "--accept-data-change",
        action="store_true",
        help="continue a run although its data has changed (it is recorded)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example optim.lr=2e-4")
    return parser.parse_args(argv)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    code, reason, trainer, mine = FAILED, "failed", None, False
    try:
        rendezvous.join()  # from here on RANK is known
        forget_last_exit()
        read_config = functools.partial(load_config, arguments.config, arguments.overrides)
        if arguments.print_config:
            config = read_config()
            build_model_keywords(config)
            if is_rank_0():
                print(config.to_yaml(), end="")
            code, reason = OK, "configuration printed"
            return code
        if os.environ.get("WORLD_SIZE", "1") == "1":
            config = read_config()  # what is wrong with it is said before the slow imports
        from ddpm_dist import runtime as runtimes
        from ddpm_dist.trainer import Trainer

        runtimes.catch_stop_signals()  # from here on a stop request waits for a step boundary
        runtime = runtimes.start()
        config = runtime.together(read_config)  # the file may be missing on one node only
        trainer = Trainer(config, runtime)
        trainer.prepare(arguments.fresh, arguments.accept_data_change)
        if is_rank_0():
            write_exit(trainer, None, "training")
        code = trainer.run(last_words=functools.partial(write_exit, trainer, FAILED))
        reason = trainer.reason
        runtimes.finish()
        return code
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        taken_over = trainer.taken_over() if trainer is not None else None
        if taken_over is not None:  # whatever it stumbled over, this is why
            reason = taken_over
            raise RunFailed(taken_over) from None
        if isinstance(error, UserError):
            code, reason = BAD_USAGE, str(error)
            mine = getattr(error, "one_rank", False)
            raise
        missing = None
        if isinstance(error, RuntimeError) and trainer is not None and trainer.watch is not None:  # as collectives fail
            missing = trainer.watch.missing()
        if missing is None:
            raise
        reason, mine = (
            f"{missing} died or is lost ({reason})",
            os.environ["RANK"] == "1",
        )  # it may be rank 0 that is missing
        failed = RunFailed(reason)
        failed.one_rank = mine
        raise failed from error
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if mine or is_rank_0():
            write_exit(trainer, code, reason)
        if trainer is not None:
            trainer.close()


def is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def forget_last_exit() -> None:
    """Empty the file of DDPM_DIST_EXIT_JSON: what an earlier start left there must not be taken for this one's code."""
    wanted = os.environ.get("DDPM_DIST_EXIT_JSON")
    if wanted and is_rank_0() and Path(wanted).is_file():
        with contextlib.suppress(OSError):
            os.truncate(wanted, 0)


def build_model_keywords(config: Config) -> None:
    """Find wrong model keywords without building anything large. Raises UserError."""
    import torch

    from ddpm_dist.models import build_model

    with torch.device("meta"):
        build_model(config.model.name, **config.network_keywords())


def write_exit(trainer: Trainer | None, code: int | None, reason: str) -> None:
    """exit.json in the run directory (if this process owns one) and where DDPM_DIST_EXIT_JSON says.

    torchrun exits with 1 whatever its workers returned; the launch scripts read the code from here. A rank that alone met bad
    input writes too, and rank 0, which then only sees a peer vanish, does not replace its words. code None: about to train;
    said only where DDPM_DIST_EXIT_JSON says, for a script that has to know how far a run was that was killed.
    """
    workplace = trainer.workplace if trainer is not None else None
    wanted = os.environ.get("DDPM_DIST_EXIT_JSON")
    said = {"code": code, "reason": reason, "step": trainer.completed if trainer is not None else None}

    def write(path: Path, values: dict[str, Any], place: Callable[[Path, str], None]) -> None:
        try:
            if code != FAILED or read_exit(path).get("code") is None:
                place(path, json.dumps(values) + "\n")
        except OSError as error:
            print(f"warning: {path} could not be written: {error.strerror}", file=sys.stderr, flush=True)

    if code is not None and workplace is not None and workplace.taken_over() is None:
        write(trainer.folder / "exit.json", said, workplace.write_text)
    if wanted:
        run = str(trainer.folder.absolute()) if trainer is not None else None
        said |= {"start_step": trainer.start_step if trainer is not None else None, "run": run}
        write(Path(wanted), said, replace_text)


def read_exit(path: Path) -> dict[str, Any]:
    """What an exit file says; {} for a missing, empty or foreign one."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def replace_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".incomplete")
    aside.write_text(text)
    os.replace(aside, path)


def entry() -> None:
    """The console command."""
    leave(main())


if __name__ == "__main__":
    entry()
