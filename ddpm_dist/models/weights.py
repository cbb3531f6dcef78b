"""Weight files: one network in safetensors, with what is needed to build it and to sample from it in the metadata.

Metadata (all values are strings): ``format`` "ddpm_dist.model", ``version`` "1", ``model`` JSON {name, keywords},
``diffusion`` JSON {timesteps, t_min, schedule, prediction, loss, range, ...}; and where they are known ``classes`` JSON [name, ...],
``sampling`` JSON {guidance, steps, variance, ...} (defaults for the sampler), ``origin`` JSON (where the weights come from).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.errors import UserError
from ddpm_dist.models.registry import build_model

FORMAT, VERSION = "ddpm_dist.model", "1"
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bfloat16: "BF16", torch.float64: "F64",
           torch.bool: "BOOL", torch.uint8: "U8", torch.float16: "F16"}  # fmt: skip
_Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Description:
    """What a weight file says about its weights: all that is needed to build the network and to sample from it."""

    name: str
    keywords: dict[str, Any]
    diffusion: dict[str, Any]
    classes: list[str] | None = None  # names of the labels
    sampling: dict[str, Any] = field(default_factory=dict)  # the run's defaults; whoever uses them checks them
    origin: dict[str, Any] = field(default_factory=dict)  # run, step, which average ...

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        model = {"name": self.name, "keywords": self.keywords}
        return {"model": model, "diffusion": self.diffusion, "classes": self.classes, "sampling": self.sampling,
                "origin": self.origin}  # fmt: skip

    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file; what is not known is left out."""
        known = {key: json.dumps(value) for key, value in self.to_dict().items() if value is not None}
        return {"format": FORMAT, "version": VERSION, **known}

    @classmethod
    def parse(cls, metadata: Mapping[str, str], path: str | Path) -> Description:
        """The way back of :meth:`metadata`. Raises UserError for a description that does not have the right form."""
        try:
            model, diffusion = json.loads(metadata["model"]), json.loads(metadata["diffusion"])
            classes = json.loads(metadata.get("classes", "null"))
            sampling, origin = (json.loads(metadata.get(key, "{}")) for key in ("sampling", "origin"))
            for key, value in (("diffusion", diffusion), ("sampling", sampling), ("origin", origin)):
                if not isinstance(value, dict):
                    raise TypeError(f"{key} is not a JSON object")
            if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
                raise TypeError("classes is not a list of names")
            name, keywords = str(model["name"]), dict(model["keywords"])
            if classes is not None and len(classes) != keywords.get("num_classes"):
                raise ValueError(f"{len(classes)} names of classes, the network has {keywords.get('num_classes')}")
            return cls(name, keywords, diffusion, classes, sampling, origin)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: its metadata is damaged ({error}); export the file again") from None


def save_weights(
    path: str | Path,
    network_state: Mapping[str, Tensor],
    model_name: str,
    keywords: dict[str, Any],
    diffusion: dict[str, Any],
    sampling: dict[str, Any] | None = None,
) -> None:
    """Write a state dict as a weight file, aside and renamed: ``path`` is complete or not there.

    Args:
        path: the file; an existing one is replaced.
        network_state: tensors by the names of ``build_model(model_name, **keywords)``, on any device; floating point
            ones are stored as float32.
        diffusion: JSON-serialisable description of the process the network was trained for.
        sampling: defaults for the sampler, as in the section ``sampling`` of a configuration.

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
    metadata = Description(model_name, keywords, diffusion, sampling=sampling or {}).metadata()
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
    network, description = load_described(path)
    return network, description.diffusion


def load_described(path: str | Path) -> tuple[nn.Module, Description]:
    """As :func:`load_weights`, with everything that the file says about its weights."""
    tensors, metadata = _read(path)
    description = Description.parse(metadata, path)
    name, keywords = description.name, description.keywords
    check_shapes(_shapes(tensors), network_shapes(name, keywords), str(path))
    network = build_model(name, **keywords)
    network.load_state_dict(tensors)
    return network.eval(), description


def initialise_from(path: str | Path, network: nn.Module, name: str, keywords: dict[str, Any]) -> Description:
    """Copy the weights of a weight file into ``network``, which ``build_model(name, **keywords)`` made.

    Returns what the file says about them. Raises UserError when they do not fit, or hold values that are not finite.
    """
    if Path(path).is_dir():
        raise UserError(
            f"{path} is a folder: train.init_from takes a weights file; python -m ddpm_dist.export {path} --out model.safetensors makes "
            "one from a run"
        )
    tensors, metadata = _read(path)
    description = Description.parse(metadata, path)
    check_shapes(_shapes(tensors), _shapes(network.state_dict()), str(path))
    # What no shape shows: the same tensors would compute something else.
    there, here = {"name": description.name, **description.keywords}, {"name": name, **keywords}
    silent = [key for key in here if key not in ("dropout", "image_size") and there.get(key, here[key]) != here[key]]
    if silent:
        raise UserError(
            f"{path}: these are the weights of another network: "
            + ", ".join(f"model.{key} is {there[key]} in the file, {here[key]} in the configuration" for key in silent)
        )
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{path}: {key} holds values that are not finite (NaN or infinite); training cannot start from it"
            )
    network.load_state_dict(tensors)
    return description


def network_shapes(name: str, keywords: dict[str, Any]) -> _Shapes:
    """Names and shapes of a network's state dict, found without allocating it."""
    return _shapes(empty_state(name, keywords))


def empty_state(name: str, keywords: dict[str, Any]) -> dict[str, Tensor]:
    """A network's state dict on the meta device: names, shapes and dtypes without values."""
    with torch.device("meta"):
        return build_model(name, **keywords).state_dict()


def file_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file whose tensors follow in the order of ``tensors``, each row-major, without gaps.

    Only names, shapes and dtypes of ``tensors`` are looked at (meta tensors will do), so that a file can be written tensor by tensor.
    :func:`file_order` keeps every tensor aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which a weight file holds its tensors: the widest dtypes first."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


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
