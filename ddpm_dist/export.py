"""Write the weights of a run as one file.

    python -m ddpm_dist.export runs/cifar64 --out model.safetensors                        # the first average, newest checkpoint
    python -m ddpm_dist.export runs/cifar64 --ema none --step 12000 --out raw.safetensors  # the plain weights at step 12,000
    python -m ddpm_dist.export runs/cifar64 --ema-sigma-rel 0.08 --out model.safetensors   # an average of that length, put together
                                                                                           # from the snapshots of the run

Beside model.safetensors comes model.json: network, diffusion process, classes, sampling defaults, which average of which step, and the
sha256 of the weights. ddpm_dist.load("model.safetensors"), python -m ddpm_dist.sample model.safetensors and
train.init_from=model.safetensors read the result. One process, one tensor in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddpm_dist
from ddpm_dist.checkpoint import files
from ddpm_dist.checkpoint.find import CHECKPOINTS, SNAPSHOTS, at_step, held_open, is_checkpoint, newest_intact, run_of
from ddpm_dist.checkpoint.format import Damaged, Reader
from ddpm_dist.checkpoint.retention import published
from ddpm_dist.config import Ema
from ddpm_dist.errors import UserError, exit_codes, in_words
from ddpm_dist.models.weights import Description, check_shapes, empty_state, file_header, file_order
from ddpm_dist.reconstruct import reconstruct, sigma_rels_of

FORMAT, VERSION = "ddpm_dist.export", 1
SAMPLING = (
    "sampler", "steps", "spacing", "eta", "variance", "thresholding", "percentile", "guidance", "guidance_interval",
    "guidance_rescale",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Chosen weights of a checkpoint: ``read(name)`` gives a parameter, float32 on the CPU; ``average`` says which they are."""

    reader: Reader
    shapes: dict[str, tuple[int, ...]]  # of the parameters
    read: Callable[[str], Tensor]
    average: dict[str, Any]


def choose(source: Path, step: int | None, ema: int | None, sigma_rel: float | None) -> Weights:
    """Find the weights that the arguments of the command name. Raises UserError that lists what there is."""
    if source.is_file():
        raise UserError(f"{source} is a file: give a run directory or a checkpoint folder")
    if is_checkpoint(source):
        if step is not None:
            raise UserError(f"--step {step}: {source} is one checkpoint; give the run directory, or leave --step out")
        reader = held_open(source)
    else:
        reader = newest_intact(source) if step is None else at_step(source, step)
    _check_state(reader)
    if sigma_rel is None:
        return _stored(reader, ema)
    for number, width in sigma_rels_of(reader):
        if width == sigma_rel:
            return _stored(reader, number)
    made = reconstruct(run_of(source), reader, sigma_rel)
    average = {"kind": "sigma_rel", "sigma_rel": sigma_rel, "reconstructed_from_steps": made.steps,
               "profile_residual": made.residual}  # fmt: skip
    return Weights(reader, _below(reader, f"ema.{made.terms[0][1]}/"), made.read, average)


def _stored(reader: Reader, ema: int | None) -> Weights:
    """Weights as they lie in the checkpoint: average number ``ema``, None = the plain ones."""
    averages = describe_averages(reader.state["config"]["ema"])
    prefix = "model/" if ema is None else f"ema.{ema}/"
    shapes = _below(reader, prefix)
    if not shapes:
        there = [f"{number} ({words(average)})" for number, average in enumerate(averages)]
        there += ["none (the plain weights)"] if reader.names("model/") else []
        raise UserError(f"--ema {'none' if ema is None else ema}: {reader.folder} has {', '.join(there)}")
    average = {"kind": "none"} if ema is None else {"number": ema, **averages[ema]}
    return Weights(reader, shapes, lambda name: reader.tensor(prefix + name), average)


def describe_averages(ema: dict[str, Any]) -> list[dict[str, Any]]:
    """What each numbered average of a configuration's section ema is."""
    lives = [{"kind": "half_life", "half_life": half_life} for half_life in ema["half_lives"]]
    return lives + [{"kind": "sigma_rel", "sigma_rel": width} for width in ema.get("sigma_rels", [])]


def words(average: dict[str, Any]) -> str:
    """An average in words, for people."""
    if average["kind"] == "half_life":
        return f"half-life {average['half_life']:,.0f} images"
    if average["kind"] == "sigma_rel":
        return f"sigma_rel {average['sigma_rel']:g}"
    return "the plain weights"


def _below(reader: Reader, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): reader.shape(name) for name in reader.names(prefix)}


def _check_state(reader: Reader) -> None:
    """UserError for a checkpoint whose state.json lacks what is used here: some other program wrote it."""
    state = reader.state
    try:
        config, model = state["config"], state["model"]
        Ema.model_validate({key: value for key, value in config["ema"].items() if key in Ema.model_fields})
        parts = [config["diffusion"], config["sampling"], model["keywords"]]
        if not (all(isinstance(part, dict) for part in parts) and config["data"]["range"] and model["name"]):
            raise ValueError("an entry is not what it should be")
        if not state["images_seen"] > 0:
            raise ValueError("images_seen is not a number of images")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{reader.folder}/state.json was not written by this program ({type(error).__name__}: {error})"
        ) from None


def describe(weights: Weights) -> Description:
    """What the file will say about its weights."""
    state = weights.reader.state
    config = state["config"]
    origin = {
        "run": config.get("run", {}).get("name"),
        "step": weights.reader.step,
        "images_seen": state["images_seen"],
        "average": weights.average,
        "data_fingerprint": state.get("data_fingerprint"),
        "ddpm_dist": ddpm_dist.__version__,
    }
    keywords, classes = state["model"]["keywords"], state.get("classes")
    if classes is not None and len(classes) != keywords.get("num_classes"):
        classes = None  # an unlabelled run on labelled data
    diffusion = {**config["diffusion"], "range": config["data"]["range"]}
    sampling = {key: config["sampling"][key] for key in SAMPLING if key in config["sampling"]}
    return Description(state["model"]["name"], keywords, diffusion, classes, sampling, origin)


def write(out: Path, weights: Weights, force: bool = False) -> dict[str, Any]:
    """Write ``out`` and the JSON beside it; returns what the JSON says.

    Both are written completely into a folder aside and renamed from there, the JSON first: where ``out`` is, its own JSON is. Raises
    UserError when one of them exists (unless ``force``), when the folder cannot be written, or when a value is not finite.
    """
    check_target(out, force)
    description = describe(weights)
    beside = out.with_suffix(".json")
    aside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{out.name[:100]}.", suffix=".incomplete", dir=out.parent))
        facts = files.write(aside / out.name, _stream(weights, description))
        says = {"format": FORMAT, "version": VERSION, "file": out.name, **facts, **description.to_dict()}
        files.write(aside / beside.name, [(json.dumps(says, indent=1, ensure_ascii=False) + "\n").encode()])
        if out.exists():
            files.remove_tree(out)
        files.rename(aside / beside.name, beside)
        files.rename(aside / out.name, out)
        files.flush_folder(out.parent)
    except Damaged as error:
        raise UserError(f"checkpoint {weights.reader.folder} cannot be used: {error}") from None
    except OSError as error:
        raise UserError(f"{out} cannot be written: {in_words(error)}; make room or choose another --out") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return says


def _stream(weights: Weights, description: Description) -> Iterator[bytes | memoryview]:
    """The bytes of the weight file, one tensor at a time."""
    from tqdm import tqdm

    layout = empty_state(description.name, description.keywords)
    layout = {name: layout[name] for name in file_order(layout)}
    reader, buffers = weights.reader, _below(weights.reader, "buffer/")
    wanted = {name: tuple(value.shape) for name, value in layout.items()}
    check_shapes({**weights.shapes, **buffers}, wanted, str(reader.folder))
    yield file_header(layout, description.metadata())
    for name in tqdm(layout, desc="exporting", unit="tensor", disable=not sys.stderr.isatty()):
        value = reader.tensor(f"buffer/{name}") if name in buffers else weights.read(name)
        if value.dtype != layout[name].dtype:
            raise UserError(f"{reader.folder}: {name} is {value.dtype}, the network has {layout[name].dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{reader.folder}: {name} holds values that are not finite (NaN or infinite)")
        if value.numel():
            yield memoryview(value.contiguous().flatten().view(torch.uint8).numpy())


def check_target(out: Path, force: bool) -> None:
    """Find out before the work whether ``out`` may and can be written. Raises UserError."""
    beside = out.with_suffix(".json")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors (the description beside it is called {beside.name})")
    try:
        for path in (out, beside):
            if path.is_dir():
                raise UserError(f"--out {out}: {path} is a folder")
            if os.path.lexists(path) and not force:
                raise UserError(f"{path} exists: choose another --out, or replace it with --force")
        folder = out.parent.absolute()
        if is_checkpoint(folder) or (folder.name in (CHECKPOINTS, SNAPSHOTS) and published(folder)):
            raise UserError(f"--out {out}: {folder} belongs to the checkpoints of a run; choose another folder")
        while not folder.exists():  # it is made when there is something to put into it
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {out.parent}: {error.strerror}; choose another --out") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="ddpm_dist.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, help="run directory (newest intact checkpoint) or checkpoint folder")
    p.add_argument("--out", type=Path, required=True, help="the file to write, model.safetensors")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--ema", default="0", help="number of the average, or none for the plain weights (default 0)")
    which.add_argument("--ema-sigma-rel", type=float, help="relative width of a power function average, such as 0.08")
    p.add_argument("--step", type=int, help="of which completed step (default: the newest checkpoint)")
    p.add_argument("--force", action="store_true", help="replace existing files")
    return p.parse_args(argv)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m ddpm_dist.export``."""
    a = parse(argv)
    if os.environ.get("RANK", "0") != "0":  # started as several processes: one does it
        return 0
    if a.ema != "none" and not (a.ema.isascii() and a.ema.isdigit() and len(a.ema) < 10):
        raise UserError(f"--ema {a.ema}: must be the number of an average, or none")
    check_target(a.out, a.force)
    weights = choose(a.run, a.step, None if a.ema == "none" else int(a.ema), a.ema_sigma_rel)
    if "profile_residual" in weights.average:
        print(
            f"sigma_rel {a.ema_sigma_rel:g} from {len(weights.average['reconstructed_from_steps'])} snapshots: relative residual of "
            f"the profile {weights.average['profile_residual']:.1e}",
            flush=True,
        )
    says = write(a.out, weights, a.force)
    origin = says["origin"]
    print(
        f"{a.out}: {says['model']['name']}, {words(origin['average'])}, step {origin['step']:,} ({origin['images_seen']:,} images), "
        f"{says['bytes'] / 1e6:.1f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
