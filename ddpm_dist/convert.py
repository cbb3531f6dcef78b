"""``python -m ddpm_dist.convert ckpt.pt --model unet_conditional --out weights.safetensors``

Turn a state dict that another program saved with ``torch.save`` into a weight file of ours. Only tensors are read
from the file (``weights_only=True``): nothing in it is executed.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.models import infer_keywords, save_weights
from ddpm_dist.models.weights import check_shapes, network_shapes

PREFIXES = ("module.", "_orig_mod.", "ema_model.")
# How the original program diffuses. It draws t from 1 .. 999 and never uses index 0.
DIFFUSION = {
    "timesteps": 1000,
    "t_min": 1,
    "schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction": "epsilon",
    "loss": "mse",
    "range": [-1.0, 1.0],
}


def read_state_dict(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a ``torch.save`` file by their clean names.

    A dict around the state dict (``{"state_dict": ...}``, ``{"ema": ...}``) is opened, ``key`` chooses where it holds
    several, and the prefixes ``module.``, ``_orig_mod.`` and ``ema_model.`` are removed.

    Raises UserError for a file that cannot be read, holds more than tensors and plain values, or holds no tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} is no state dict, or holds more than tensors, which is not read because it could run code "
            f"({reason[:200]}): save the network's state_dict() alone"
        ) from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        UnicodeDecodeError,
        NotImplementedError,
    ) as error:
        raise UserError(f"{path} is damaged or no torch.save file: {str(error)[:200]}") from None
    try:
        tensors = _strip_prefixes(_open_wrapper(content, key, str(path)))
    except RecursionError:
        raise UserError(f"{path}: a dict that contains itself is no state dict") from None
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            kind = "without data" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise UserError(f"{path}: {name} is no weight ({kind}): weights are dense floating point tensors")
    return tensors


def _open_wrapper(content: Any, key: str | None, path: str) -> dict[str, Tensor]:
    """The one dict of tensors in ``content``, or the one under ``key``."""
    if key is not None:
        if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
            raise UserError(f"{path} has no dict named {key!r}; {_holds(content)}")
        content = content[key]
    if isinstance(content, Mapping):
        inner = {name: value for name, value in content.items() if _is_state_dict(value)}
        if _is_state_dict(content) and not inner:
            return {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if len(inner) == 1:
            return _open_wrapper(next(iter(inner.values())), None, path)
        if inner:
            raise UserError(f"{path} holds several state dicts: choose one with --key {' | '.join(map(str, inner))}")
    raise UserError(f"{path} holds no state dict; {_holds(content)}: give the file that the network was saved to")


def _is_state_dict(value: Any) -> bool:
    """A mapping from names to tensors, perhaps inside further mappings; counters beside the tensors are allowed."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return any(isinstance(item, Tensor) and item.dim() > 0 or _is_state_dict(item) for item in value.values())


def _holds(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"it holds a dict with the keys {', '.join(repr(name) for name in list(content)[:8]) or '(none)'}"
    return f"it holds a {type(content).__name__}"


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        under = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        # What stands beside the prefixed names may be a counter (torch.optim.swa_utils keeps "n_averaged").
        if under and all(value.dim() == 0 for name, value in state.items() if not name.startswith(prefix)):
            return _strip_prefixes(under)
    return state


def convert(
    source: str | Path, model: str, out: str | Path, key: str | None = None, force: bool = False, **keywords: Any
) -> dict[str, Any]:
    """Convert a file; returns the network's keywords: those given, and those that follow from the shapes.

    Raises UserError when ``out`` exists (unless ``force``), when the tensors are not those of the network, or when
    one of them holds a value that is not finite.
    """
    out = Path(out)
    if out.exists() and (not force or os.path.samefile(source, out)):
        raise UserError(f"{out} exists: choose another --out, or replace it with --force (never the source file)")
    if not out.parent.is_dir():
        raise UserError(f"{out}: its folder {out.parent} does not exist")
    state = read_state_dict(source, key)
    found = {name: tuple(value.shape) for name, value in state.items()}
    if model == "unet" and "label_emb.weight" in found:
        raise UserError(f"{source} holds a network with labels (label_emb.weight): use --model unet_conditional")
    keywords = {**infer_keywords(model, found), **keywords}
    check_shapes(found, network_shapes(model, keywords), str(source))
    save_weights(out, state, model, keywords, DIFFUSION)
    return keywords


def _parse_keyword(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return name, json.loads(value)
    except ValueError:
        raise UserError(f"{text!r} is not a keyword of the network: write for example image_size=96") from None


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m ddpm_dist.convert``."""
    parser = argparse.ArgumentParser(prog="python -m ddpm_dist.convert", description=__doc__.splitlines()[2])
    parser.add_argument("source", help="the file that torch.save wrote")
    parser.add_argument("keywords", nargs="*", help="what the shapes cannot tell, e.g. image_size=96 heads=8")
    parser.add_argument("--model", default="unet_conditional", help="name of the network (default: unet_conditional)")
    parser.add_argument("--out", required=True, help="the weight file to write")
    parser.add_argument("--key", help="which state dict, where the file holds several")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_intermixed_args(argv)
    given = dict(_parse_keyword(text) for text in args.keywords)
    keywords = convert(args.source, args.model, args.out, args.key, args.force, **given)
    described = ", ".join(f"{name}={value}" for name, value in keywords.items())
    print(f"{args.out}: {args.model} ({described})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
