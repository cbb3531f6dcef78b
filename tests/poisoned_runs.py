"""``several_runs.py`` with a loss that is not finite: of every run's five steps the third, on rank 1 only, behind all statistics."""

import os
import sys

from ddpm_dist.diffusion import objective

good, calls = objective.mse_per_image, 0


def bad(prediction, target):
    global calls
    calls += 1
    loss = good(prediction, target)
    return loss * float("nan") if calls % 5 == 3 and os.environ["RANK"] == "1" else loss


objective.mse_per_image = bad

if __name__ == "__main__":
    from several_runs import main

    sys.exit(main())
