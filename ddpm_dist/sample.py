"""Generate images from a run, a checkpoint or a weights file.

    python -m ddpm_dist.sample runs/cifar64 --classes 6 --num 64 --guidance 3 --out frogs.png
    python -m ddpm_dist.sample runs/digits --num 100 --out digits.png --gif reverse.gif
    python -m ddpm_dist.sample runs/digits --num 40 --guidance 1,1.5,3 --with-real --out compared.png
    python -m ddpm_dist.sample runs/digits --sampler dpmpp_2m --steps 20 --steps-picture steps.png
    python -m ddpm_dist.sample cifar64 --forward-process forward.png                     # a run or a configuration
    torchrun --nproc_per_node=8 -m ddpm_dist.sample runs/cifar64 -n 50000 --out-dir generated/
    python -m ddpm_dist.sample runs/cifar64 -n 50000 --part 3/16 --out-dir generated/    # task 3 of 16 of an array job

(Write -n under torchrun: with Python 3.11 it takes a --num behind the module for its own --numa-binding and stops.)

Sampler and guidance are by default what the run uses for its previews (section sampling of its config); an exported file knows
them, too. For other weights files they are guidance 3 and every timestep of ddpm with variance beta, no thresholding.

Several guidance scales make one picture: a column for each class, the images of the scales below each other, of the same noise,
and with --with-real the first real images of each class below them. Real images come from the run's shards or from --shards.

Image i depends on the seed and i only (and its class): neither the number of processes or tasks nor the batch size changes it.

A folder (--out-dir) can be continued: images that are there are not made again, however many tasks or processes come next, and a
larger --num adds to them. Its sample.json holds the settings, among them the checkpoint: the first task decides which one is the newest,
the others use the same. Other settings are refused. When all parts are done, the same command without --part and with
--out images.npz collects the images of the folder. SIGTERM and SIGUSR1 stop the making of a folder after the current
batch with exit code 75: start it again.
"""

from __future__ import annotations

import argparse

from ddpm_dist import rendezvous
from ddpm_dist.errors import BAD_USAGE, FAILED, OK, UserError, exit_codes, leave
from ddpm_dist.exit_file import forget_last_exit, is_rank_0
from ddpm_dist.sample_job import Job, forward_picture_of, or_say
from ddpm_dist.sample_options import check_arguments, parse, samples
from ddpm_dist.sample_output import check_targets
from ddpm_dist.tracking.captions import save_picture


@exit_codes
def main(argv: list[str] | None = None) -> int:
    a = parse(argv, __doc__)
    job, code, reason, mine = Job(a), FAILED, "failed", False
    try:
        rendezvous.join()  # from here on RANK is known
        forget_last_exit()
        check_arguments(a)
        code, reason = job.run() if samples(a) else _forward_process_alone(a)
        return code
    except UserError as error:
        code, reason, mine = BAD_USAGE, str(error), getattr(error, "one_rank", False)
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if mine or is_rank_0():
            job.write_exit(code, reason)


def _forward_process_alone(a: argparse.Namespace) -> tuple[int, str]:
    if is_rank_0():  # the others have nothing to do, and nobody waits for them
        picture = forward_picture_of(a)
        check_targets(a)
        or_say(a.forward_process, lambda: save_picture(picture, a.forward_process))
        print(a.forward_process)
    return OK, "the picture is there"


def entry() -> None:
    """The console command."""
    leave(main())


if __name__ == "__main__":
    entry()
