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
import functools
import os

from ddpm_dist import rendezvous, signals
from ddpm_dist.config import Config, load_config
from ddpm_dist.errors import BAD_USAGE, FAILED, OK, RunFailed, UserError, exit_codes, leave
from ddpm_dist.exit_file import forget_last_exit, is_rank_0, write_exit


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
    return parser.parse_intermixed_args(argv)  # overrides may stand before, between and behind the options


@exit_codes
def main(argv: list[str] | None = None) -> int:
    code, reason, trainer, mine = FAILED, "failed", None, False
    try:
        rendezvous.join()  # from here on RANK is known
        forget_last_exit()
        arguments = parse(argv)
        if not arguments.print_config:
            signals.catch_stop_signals()  # from here on, which is before the slow imports, a stop request waits for a step boundary
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
        reason = f"{missing} died or is lost ({reason})"
        mine = os.environ.get("RANK") == "1"  # where rank 0 is the one that is missing, rank 1 speaks
        failed = RunFailed(reason)
        failed.one_rank = mine
        raise failed from error
    except SystemExit as error:  # of the argument parser, which has said why
        code, reason = int(error.code or 0), "bad usage" if error.code else "help printed"
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if mine or is_rank_0():
            write_exit(trainer, code, reason)
        if trainer is not None:
            trainer.close()


def build_model_keywords(config: Config) -> None:
    """Find wrong model keywords without building anything large. Raises UserError."""
    import torch

    from ddpm_dist.models import build_model

    with torch.device("meta"):
        build_model(config.model.name, **config.network_keywords())


def entry() -> None:
    """The console command."""
    leave(main())


if __name__ == "__main__":
    entry()
