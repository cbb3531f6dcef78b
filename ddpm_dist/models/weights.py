"""Weight files: one network in safetensors, with what is needed to build it and to sample from it in the metadata.

Metadata (all values are strings): ``format`` "ddpm_dist.model", ``version`` "1", ``model`` JSON {name, keywords},
``diffusion`` JSON {timesteps, t_min, schedule, prediction, loss, range, ...}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.errors import UserError
from ddpm_dist.models.registry import build_model

FORMAT, VERSION = "ddpm_dist.model", "1"
_Shapes = dict[str, tuple[int, ...]]


def save_weights(
    path: str | Path, network_state: Mapping[str, Tensor], model_name: str, keywords: dict[str, Any], diffusion: dict
) -> None:
    """Write a state dict as a weight file, aside and renamed: ``path`` is complete or not there.

    Args:
        path: the file; an existing one is replaced.
        network_state: tensors by the names of ``build_model(model_name, **keywords)``, on any device; floating point
            ones are stored as float32.
        diffusion: JSON-serialisable description of the process the network was trained for.

    Raises:
        UserError: names or shapes that are not the network's, values that are not finite, an unwritable path.
    """
    from safetensors.torch import save_file

    path = Path(path)
    check_shapes(_shapes(network_state), network_shapes(model_name, keywords), str(path))
    tensors = {}
    for name, value in network_state.items():
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).contiguous()
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{path} not written: {name} holds values that are not finite (NaN or infinite)")
        tensors[name] = value
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": json.dumps({"name": model_name, "keywords": keywords}),
        "diffusion": json.dumps(diffusion),
    }
    aside = path.with_name(path.name + ".incomplete")
    try:
        save_file(tensors, aside, metadata)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except Exception as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}") from error


def load_weights(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a weight file and fill it: float32, on the CPU, in evaluation mode.

    Returns the network and the description of its diffusion process. Raises UserError for a file that is missing,
    damaged, of another kind or version, or that does not fit the network it names.
    """
    tensors, metadata = _read(path)
    try:
        model, diffusion = json.loads(metadata["model"]), json.loads(metadata["diffusion"])
        name, keywords = str(model["name"]), dict(model["keywords"])
        if not isinstance(diffusion, dict):
            raise TypeError("diffusion is not a JSON object")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata is damaged ({error}); export the file again") from None
    check_shapes(_shapes(tensors), network_shapes(name, keywords), str(path))
    network = build_model(name, **keywords)
    network.load_state_dict(tensors)
    return network.eval(), diffusion


def initialise_from(path: str | Path, network: nn.Module) -> None:
    """Copy the weights of a weight file into ``network``. Raises UserError when they do not fit."""
    tensors, _ = _read(path)
    check_shapes(_shapes(tensors), _shapes(network.state_dict()), str(path))
    network.load_state_dict(tensors)


def network_shapes(name: str, keywords: dict[str, Any]) -> _Shapes:
    """Names and shapes of a network's state dict, found without allocating it."""
    with torch.device("meta"):
        return _shapes(build_model(name, **keywords).state_dict())


def shape_differences(found: _Shapes, wanted: _Shapes) -> list[str]:
    """The first differences between the names and shapes of a file and of a network, one line each."""
    missing = [f"{name}: missing, the network has {list(wanted[name])}" for name in wanted if name not in found]
    unknown = [
        f"{name}: {list(found[name])} in the file, unknown to the network" for name in found if name not in wanted
    ]
    differing = [
        f"{name}: {list(found[name])} in the file, {list(wanted[name])} in the network"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    shown = [*differing[:3], *missing[:3], *unknown[:3]]
    count = len(missing) + len(unknown) + len(differing)
    return [*shown, *([f"and {count - len(shown)} more"] if count > len(shown) else [])]


def check_shapes(found: _Shapes, wanted: _Shapes, where: str) -> None:
    """Raise UserError with the first differences between two lists of names and shapes."""
    lines = shape_differences(found, wanted)
    if lines:
        raise UserError(
            f"{where}: these are not the weights of this network ({len(found)} tensors, the network has {len(wanted)}):"
            "\n  "
            + "\n  ".join(lines)
            + "\ncheck the network's name and keywords, or give the file that belongs to them"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> _Shapes:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == FORMAT and metadata.get("version") == VERSION:
                return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); convert other files with python -m ddpm_dist.convert"
        ) from None
    if metadata.get("format") == FORMAT:
        raise UserError(
            f"{path} has weight format version {metadata.get('version')}, this program reads {VERSION}: update it"
        )
    raise UserError(f"{path} is a safetensors file, but not a weight file of this program (see ddpm_dist.convert)")
