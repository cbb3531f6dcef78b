"""``python -m ddpm_dist.convert ckpt.pt --model unet_conditional --out weights.safetensors``

Turn a state dict that another program saved with ``torch.save`` into a weight file of ours, with the diffusion process of
that program (see originals.py). Only tensors are read from the file (``weights_only=True``): nothing in it is executed.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.config import Diffusion
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.models import checks, infer_keywords, model_keywords, recognise, save_weights
from ddpm_dist.models.weights import check_shapes, empty_state, network_shapes
from ddpm_dist.originals import ORIGINALS, TABLES, schedule_of_tables
from ddpm_dist.sample_source import schedule_of

PREFIXES = ("module.", "_orig_mod.", "ema_model.", "nn_model.")


def read_state_dict(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a ``torch.save`` file by their clean names.

    A dict around the state dict (``{"state_dict": ...}``, ``{"ema": ...}``) is opened, ``key`` chooses where it holds
    several, and the prefixes ``module.``, ``_orig_mod.``, ``ema_model.`` and ``nn_model.`` are removed, also several. The
    schedule tables of ``originals.TABLES`` may stand beside prefixed names; they are among the result.

    Raises UserError for a file that cannot be read, holds more than tensors and plain values, or holds no tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of the message advises to trust the file
        raise UserError(
            f"{path} is no state dict, or holds more than tensors{f' ({held[1]})' if held else ''}, which is not read "
            "because it could run code: save the network's state_dict() alone"
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
        raise UserError(
            f"{path} is damaged or no torch.save file ({type(error).__name__}: {str(error).strip()[:200]})"
        ) from None
    try:
        tensors = _strip_prefixes(_open_wrapper(content, key, str(path)))
    except RecursionError:
        raise UserError(f"{path}: a dict that contains itself is no state dict") from None
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
            kind = "without data" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise UserError(f"{path}: {name} is no weight ({kind}): weights are dense tensors of real numbers")
    return tensors


def _open_wrapper(content: Any, key: str | None, path: str) -> dict[str, Tensor]:
    """The one dict of tensors in ``content``, or the one under ``key``."""
    if key is not None:
        named = _named(content, key)
        if named is None:
            raise UserError(f"{path} has no dict named {key!r}; {_holds(content)}")
        content = named
    if isinstance(content, Mapping):
        inner = {name: value for name, value in content.items() if _is_state_dict(value)}
        if _is_state_dict(content) and not inner:
            return {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if len(inner) == 1:
            return _open_wrapper(next(iter(inner.values())), None, path)
        if inner:
            raise UserError(f"{path} holds several state dicts: choose one with --key {' | '.join(map(str, inner))}")
    raise UserError(f"{path} holds no state dict; {_holds(content)}: give the file that the network was saved to")


def _named(content: Any, key: str) -> Mapping | None:
    """The first dict with that name, the outermost one; None if there is none."""
    level = [content]
    while level := [value for value in level if isinstance(value, Mapping)]:
        for value in level:
            if isinstance(value.get(key), Mapping):
                return value[key]
        level = [inner for value in level for inner in value.values()]
        if len(level) > 1_000_000:
            raise RecursionError
    return None


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
        beside = {name: value for name, value in state.items() if not name.startswith(prefix)}
        # What stands beside the prefixed names may be a counter (torch.optim.swa_utils keeps "n_averaged") or a table.
        if under and all(value.dim() == 0 or name in TABLES for name, value in beside.items()):
            return _strip_prefixes({**under, **{name: value for name, value in beside.items() if name in TABLES}})
    return state


def convert(
    source: str | Path,
    model: str,
    out: str | Path,
    key: str | None = None,
    force: bool = False,
    process: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert a file; returns the network's keywords (those given, and those that follow from the shapes) and its diffusion process.

    process: keys of the section ``diffusion`` that are not those of the original program, for example {"timesteps": 250}.

    Raises UserError when ``out`` exists (unless ``force``), when the tensors are not those of the network (naming the
    network they belong to, if it is one of ours), or when one of them holds a value that is not finite.
    """
    out = Path(out)
    known = model_keywords(model)
    if not Path(source).is_file():
        raise UserError(f"{source}: there is no such file")
    if model not in ORIGINALS:
        raise UserError(f"--model {model}: no other program's weights fit this network, only {', '.join(ORIGINALS)}")
    if out.exists() and (not force or os.path.samefile(source, out)):
        raise UserError(f"{out} exists: choose another --out, or replace it with --force (never the source file)")
    if not out.parent.is_dir():
        raise UserError(f"{out}: its folder {out.parent} does not exist")
    state = read_state_dict(source, key)
    tables = {name: state.pop(name) for name in TABLES if name in state}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if model == "unet" and "label_emb.weight" in found:
        raise UserError(f"{source} holds a network with labels (label_emb.weight): use --model unet_conditional")
    read, own = infer_keywords(model, found), ORIGINALS[model].keywords
    data = {key: value for key, value in read.items() if key in ("in_channels", "num_classes")}
    keywords = _closest(model, found, {**own, **read, **keywords}, {**own, **keywords}, {**own, **data, **keywords})
    original = ORIGINALS["context_unet" if tables else model]  # whose program writes such tables
    diffusion = dict(original.diffusion)
    if tables:
        diffusion = _with_tables(diffusion, tables, str(source))
    if "timesteps" in known:  # the network divides t by the last timestep
        checks.check_counts(timesteps=keywords.setdefault("timesteps", diffusion["timesteps"] - 1))
        if tables and keywords["timesteps"] != diffusion["timesteps"] - 1:
            raise UserError(
                f"{source} holds schedule tables for {diffusion['timesteps'] - 1} timesteps, not "
                f"{keywords['timesteps']}: leave timesteps out"
            )
        diffusion["timesteps"] = keywords["timesteps"] + 1
    for name in process or {}:
        if name not in (*Diffusion.model_fields, "range"):
            raise UserError(f"diffusion.{name}: there is no such key, only {', '.join(Diffusion.model_fields)}, range")
        if name == "timesteps" and name in known:
            raise UserError(
                f"{model} knows its number of timesteps: say timesteps=N for t = 0 .. N, not diffusion.timesteps"
            )
    diffusion |= process or {}
    try:
        schedule_of(diffusion)
    except UserError as error:
        raise UserError(f"{source}: {str(error).removesuffix('; convert or export it again')}") from None
    save_weights(out, _fitted(state, model, keywords, str(source)), model, keywords, diffusion, original.sampling)
    return keywords, diffusion


def _closest(model: str, found: dict[str, tuple[int, ...]], *choices: dict[str, Any]) -> dict[str, Any]:
    """Of several sets of keywords those with which the network differs least from the shapes ``found``.

    One wrong tensor may be the one that the keywords were read off; then all the others seem to be wrong. Raises UserError
    where no network can be built.
    """
    built, reason = [], None
    for keywords in choices:
        try:
            wanted = network_shapes(model, keywords)
        except UserError as error:
            reason = reason or error
            continue
        wrong = sum(found.get(name) != wanted.get(name) for name in found.keys() | wanted.keys())
        if not wrong:
            return keywords
        built.append((wrong, keywords))
    if not built:
        raise reason
    return min(reversed(built), key=lambda pair: pair[0])[1]  # as good as the usual ones: then those


def _with_tables(diffusion: dict[str, Any], tables: dict[str, Tensor], source: str) -> dict[str, Any]:
    """The process with the schedule that the tables hold in place of its own."""
    own = ("timesteps", "schedule", "beta_start", "beta_end")
    return {**schedule_of_tables(tables, source), **{key: value for key, value in diffusion.items() if key not in own}}


def _fitted(state: dict[str, Tensor], model: str, keywords: dict[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors, where they are those of the network (counters as integers, as it has them).

    Raises UserError with the first differences, and with the name of the network that the tensors do belong to.
    """
    found = {name: tuple(value.shape) for name, value in state.items()}
    wanted = empty_state(model, keywords)
    try:
        check_shapes(found, {name: tuple(value.shape) for name, value in wanted.items()}, source)
    except UserError as error:
        others = [name for name in recognise(found) if name != model]
        if not others:
            raise
        raise UserError(f"{error}\nthese are the weights of {others[0]}: use --model {others[0]}") from None
    fitted = {}
    for name, tensor in state.items():
        counter = not wanted[name].is_floating_point()
        if tensor.is_floating_point() and counter and bool(torch.isfinite(tensor).all()):
            tensor = tensor.round().to(wanted[name].dtype)  # an average of everything makes fractions of counters
        if tensor.is_floating_point() == counter:
            raise UserError(f"{source}: {name} holds {tensor.dtype}, the network has {wanted[name].dtype}")
        fitted[name] = tensor
    return fitted


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={f'[{len(value)} numbers]' if name == 'betas' and value else value}" for name, value in values.items()
    )


def _parse_keyword(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return name, json.loads(value)
    except ValueError:
        if equals and name.startswith("diffusion."):
            return name, value  # a word, such as cosine
        raise UserError(f"{text!r} is not a keyword of the network: write for example image_size=96") from None


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m ddpm_dist.convert``."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_dist.convert", description=" ".join(__doc__.split("\n\n")[1].split())
    )
    parser.add_argument("source", help="the file that torch.save wrote")
    parser.add_argument(
        "keywords",
        nargs="*",
        help="what the shapes cannot tell, e.g. image_size=96; of the process, diffusion.timesteps=250",
    )
    parser.add_argument(
        "--model", default="unet_conditional", help=f"one of {', '.join(ORIGINALS)} (default: unet_conditional)"
    )
    parser.add_argument("--out", required=True, help="the weight file to write")
    parser.add_argument("--key", help="which state dict, where the file holds several")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_intermixed_args(argv)
    given = dict(_parse_keyword(text) for text in args.keywords)
    process = {
        name.removeprefix("diffusion."): given.pop(name) for name in list(given) if name.startswith("diffusion.")
    }
    keywords, diffusion = convert(args.source, args.model, args.out, args.key, args.force, process, **given)
    print(f"{args.out}: {args.model} ({_listed(keywords)})")
    print(f"trained with {_listed(diffusion)}; if that is not so, add what differs, such as diffusion.timesteps=250")
    return 0


if __name__ == "__main__":
    sys.exit(main())
