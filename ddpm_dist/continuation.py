"""Whether a run may go on from a checkpoint: the same configuration, network and data, but for what a resume may change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ddpm_dist.checkpoint import Reader
from ddpm_dist.checkpoint.find import CHECKPOINTS
from ddpm_dist.config import Config, flatten
from ddpm_dist.errors import UserError
from ddpm_dist.exit_file import read_exit
from ddpm_dist.models.weights import check_shapes, network_shapes, shape_differences

# What a resumed run may change; everything else defines the run (design, "Configuration keys").
CHANGEABLE = (
    "run.name", "run.dir", "data.shards", "data.decoder", "data.cache", "data.cache_gb", "data.cache_dir", "data.cache_dir_gb", "data.hw_decoder_load", "data.threads", "data.prefetch", "data.readers",
     "data.allow_pipe",
    "data.fetch_patience", "data.on_bad", "data.full_shuffle", "train.images", "train.micro_batch",
    "train.log_every", "train.audit", "train.audit_params_every", "train.max_skipped_steps", "train.hang_seconds",
    "train.cuda_graph", "train.attention", "engine", "checkpoint", "sampling", "validation",
    "tracking", "ema.snapshot_every",
)  # fmt: skip
# Keys that checkpoints of an earlier version do not have, with what they meant then.
ADDED_LATER = {
    "ema.sigma_rels": [], "train.reduction": "all_reduce", "diffusion.betas": None, "diffusion.min_snr_gamma": None,
    "diffusion.noise": "gaussian", "diffusion.zero_terminal_snr": False,
    "data.color_jitter": [0.0, 0.0, 0.0, 0.0], "data.order": "full", "data.block_shards": 16, "data.lanes": 1, "data.mix": None, "data.balance": "none",
}  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What stands between two resolved configs, ``path: old -> new``, leaving out what a resumed run may change.

    data.shards may move because the data fingerprint is compared, data.decoder because the resolved one is.
    """
    flat_old, flat_new = flatten(old), flatten(new)
    lines = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        if key == "train.micro_batch" and flat_new.get("train.reduction") == "tree":
            pass  # a leaf of the tree
        elif any(key == name or key.startswith(name + ".") for name in CHANGEABLE):
            continue
        before, after = flat_old.get(key, ADDED_LATER.get(key, "(not set)")), flat_new.get(key, "(not set)")
        if before != after:
            lines.append(f"{key}: {before} in the checkpoint, {after} now")
    return lines


def check_same_run(reader: Reader, config: Config) -> None:
    """Compare what the checkpoint was saved with to ``config``. Raises UserError that lists every difference."""
    state, folder = reader.state, config.run.folder
    kinds = {"config": dict, "data_fingerprint": str | None, "scaler": dict, "sums": list, "data_changes": list}
    state.setdefault("data_changes", [])  # version 0.1 had none
    wrong = [key for key, kind in kinds.items() if key not in state or not isinstance(state[key], kind)]
    if wrong or len(state["sums"]) != 4:
        raise UserError(
            f"{reader.folder}/state.json: {', '.join(wrong) or 'sums'} is missing or of another kind: not written by this program"
        )
    stored = {name.removeprefix("model/"): reader.shape(name) for name in reader.names("model/")}
    stored |= {name.removeprefix("buffer/"): reader.shape(name) for name in reader.names("buffer/")}
    wanted = network_shapes(config.model.name, config.network_keywords())
    if lines := differences(state["config"], config.to_dict()):
        raise UserError(
            f"{folder} holds a run with another configuration (checkpoint {reader.folder.name}):\n  "
            + "\n  ".join(lines)
            + "".join(f"\n  {line}" for line in shape_differences(stored, wanted))
            + "\nset these back to continue it, or choose another run.name to start a new run"
        )
    check_shapes(stored, wanted, str(reader.folder))


def check_nothing_lost(folder: Path) -> None:
    """Raise UserError when a run directory without a checkpoint speaks of one: it was removed, or is not where it should be.

    Starting over would cut back the records and remove the snapshots, all that is left of the run. A run that was killed before
    its first checkpoint does start over.
    """
    checkpoints = folder / CHECKPOINTS
    if any(checkpoints.glob("step_*.corrupt*")):
        return  # whoever looks for the newest one says it
    step = _saved_step(folder)
    if step:
        where = f" (a link to {os.readlink(checkpoints)})" if checkpoints.is_symlink() else ""
        raise UserError(
            f"{checkpoints}{where} holds no checkpoint, but the records of {folder} say that the run was saved (it came to step {step}). "
            "Restore the folder, or mount what it leads to; to start over remove the run directory or choose another run.name"
        )


def _saved_step(folder: Path) -> int:
    """A step that a run has come to and must have saved before it, 0 if the records do not say so."""
    said = read_exit(folder / "exit.json")
    if said.get("code") in (0, 75) and isinstance(said.get("step"), int) and said["step"] > 0:
        return said["step"]  # it leaves with these codes only when it has saved
    if said.get("code") == 2:
        return 0  # perhaps because nothing could be saved
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        every, batch = int(config["checkpoint"]["every"]), int(config["train"]["global_batch"])
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 100_000))
            last = json.loads(file.read().splitlines()[-1])["step"]
        # The second save begins when the first one is published; a step that is recorded behind it shows that it began.
        return last if (last - 1) * batch >= 2 * every else 0
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError):
        return 0


def check_same_data(
    reader: Reader, config: Config, fingerprint: str | None, accept: bool, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The changes of data in the life of this run, for its checkpoints: those the checkpoint lists and the one now.

    fingerprint: of the data now, None for synthetic. accept: the user wants the run to continue on other data. Raises
    UserError where the data is another and ``accept`` is not set (or cannot be, between shards and synthetic data).
    """
    changes = list(reader.state.get("data_changes", []))
    before, shards = reader.state["data_fingerprint"], config.data.shards
    if before == fingerprint:
        return changes
    if accept and before is not None and fingerprint is not None:
        say(
            f"note: the data under {shards} has changed (fingerprint {fingerprint[:12]}, was {before[:12]}); "
            f"accepted from step {reader.step} on and recorded in the checkpoints (data_changes)"
        )
        return [*changes, {"step": reader.step, "from": before, "to": fingerprint}]
    raise UserError(
        f"the data under {shards} is not what {config.run.folder} was trained on (fingerprint "
        f"{str(fingerprint)[:12]}, was {str(before)[:12]}): samples were added, removed, changed or reordered; give the original "
        "shards, choose another run.name to start a new run, or continue on the new data with --accept-data-change"
    )
