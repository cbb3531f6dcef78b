"""Train a class-conditional DDPM.

    torchrun --nproc_per_node=8 -m ddpm_dist.train                                 # the flagship, configs/cifar64.yaml
    torchrun --nproc_per_node=2 -m ddpm_dist.train --config configs/digits.yaml optim.lr=2e-4
    python -m ddpm_dist.train --config digits --print-config                       # one process; show the result only

The same command continues a run that was interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys

from ddpm_dist.config import load_config
from ddpm_dist.errors import BAD_USAGE, UserError, exit_codes


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ddpm_dist.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="cifar64", help="a YAML file or the name of a packaged config (default: cifar64)"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--fresh", action="store_true", help="refuse to continue: the run directory must be empty")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example optim.lr=2e-4")
    return parser.parse_args(argv)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        config.network_keywords()
        if os.environ.get("RANK", "0") == "0":
            print(config.to_yaml(), end="")
        return 0

    from ddpm_dist import runtime as runtimes
    from ddpm_dist.trainer import Trainer, write_exit

    runtime = runtimes.start()
    trainer = None
    try:
        trainer = Trainer(config, runtime, fresh=arguments.fresh)
        code = trainer.run()
    except UserError as error:
        if trainer is not None and runtime.is_main:
            write_exit(trainer.folder, BAD_USAGE, str(error), trainer.completed)
        raise
    runtimes.finish()
    return code


if __name__ == "__main__":
    sys.exit(main())
