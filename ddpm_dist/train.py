"""Train a class-conditional DDPM.

    torchrun --nproc_per_node=8 -m ddpm_dist.train                                 # the flagship, configs/cifar64.yaml
    torchrun --nproc_per_node=2 -m ddpm_dist.train --config configs/digits.yaml optim.lr=2e-4
    python -m ddpm_dist.train --config digits --print-config                       # one process; show the result only

The same command continues a run that was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_dist.config import Config, load_config
from ddpm_dist.errors import BAD_USAGE, FAILED, OK, UserError, exit_codes, leave

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
    parser.add_argument(
        "--accept-data-change", action="store_true", help="continue a run although its data has changed (it is recorded)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example optim.lr=2e-4")
    return parser.parse_args(argv)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    code, reason, trainer, mine = FAILED, "failed", None, is_rank_0()
    forget_last_exit()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            build_model_keywords(config)
            if is_rank_0():
                print(config.to_yaml(), end="")
            code, reason = OK, "configuration printed"
            return code
        from ddpm_dist import runtime as runtimes
        from ddpm_dist.trainer import Trainer

        runtimes.catch_stop_signals()  # from here on a stop request waits for a step boundary
        runtime = runtimes.start()
        trainer = Trainer(config, runtime)
        trainer.prepare(arguments.fresh, arguments.accept_data_change)
        code = trainer.run()
        reason = trainer.reason
        runtimes.finish()
        return code
    except UserError as error:
        code, reason = BAD_USAGE, str(error)
        mine = mine or getattr(error, "one_rank", False)
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if mine:
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


def write_exit(trainer: Trainer | None, code: int, reason: str) -> None:
    """exit.json in the run directory (if this process owns one) and where DDPM_DIST_EXIT_JSON says.

    torchrun exits with 1 whatever its workers returned; the launch scripts read the code from here. A rank that alone met bad
    input writes too, and rank 0, which then only sees a peer vanish, does not replace its words.
    """
    owned = trainer is not None and (trainer.lock is not None or not trainer.runtime.is_main)
    folders = [trainer.folder / "exit.json"] if owned else []
    wanted = os.environ.get("DDPM_DIST_EXIT_JSON")
    step = trainer.completed if trainer is not None else None
    for path in [*folders, *([Path(wanted)] if wanted else [])]:
        aside = path.with_name(path.name + ".incomplete")
        try:
            if code == FAILED and path.is_file() and path.stat().st_size:
                continue
            aside.write_text(json.dumps({"code": code, "reason": reason, "step": step}) + "\n")
            os.replace(aside, path)
        except OSError as error:
            print(f"warning: {path} could not be written: {error.strerror}", file=sys.stderr, flush=True)


def entry() -> None:
    """The console command."""
    leave(main())


if __name__ == "__main__":
    entry()
