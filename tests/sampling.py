"""``ddpm_dist.sample`` called in this process: a start of Python with torch takes seconds."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import torch

from ddpm_dist import sample
from ddpm_dist.models import build_model, save_weights


def run_sample(*arguments: object) -> SimpleNamespace:
    """Run the command; returncode, stdout and stderr as of a process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = sample.main([str(word) for word in arguments])
        except SystemExit as leaving:  # argparse
            code = leaving.code
        finally:
            if torch.distributed.is_initialized():  # an error leaves the group as it is, and the process
                torch.distributed.destroy_process_group()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def weights_file(path: Path, diffusion: dict | None = None, seed: int = 0, **keywords: object) -> Path:
    """A weights file of the smallest network: 8x8 grey, three classes, 12 timesteps. Its weights are random."""
    own = {"in_channels": 1, "num_classes": 3, "width": 4, "channel_mults": [1, 2], "image_size": 8, "embedding_dim": 8}
    own |= keywords
    torch.manual_seed(seed)
    network = build_model("unet_conditional", **own)
    save_weights(path, network.state_dict(), "unet_conditional", own, {"timesteps": 12, **(diffusion or {})})
    return path
