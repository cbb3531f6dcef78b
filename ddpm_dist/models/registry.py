"""The table of networks: what builds each, whose signature is its list of keywords and defaults."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddpm_dist.errors import UserError
from ddpm_dist.models import adm_unet, basic_unet, checks, context_unet, film_unet, unet2d, unet_conditional

Shapes = Mapping[str, tuple[int, ...]]


def _unet_conditional(
    in_channels: int = 3,
    num_classes: int | None = None,
    width: int = 64,
    channel_mults: Sequence[int] = (1, 2, 4, 4),
    attention_levels: Sequence[int] | None = None,
    image_size: int = 64,
    embedding_dim: int = 256,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """UNet with attention; ``width * channel_mults[l]`` channels at level l (0 = full resolution).

    attention_levels: levels with attention, None = all. num_classes: None = no label embedding. image_size: divisible
    by 2^(len(channel_mults) - 1). embedding_dim: width of the time embedding. dropout: only 0.
    """
    if dropout:
        raise UserError(f"model.dropout={dropout} is not supported by this network: leave model.dropout out")
    return unet_conditional.UnetConditional(
        in_channels, num_classes, width, channel_mults, attention_levels, image_size, embedding_dim, heads
    )


def _unet(num_classes: None = None, **keywords: Any) -> nn.Module:
    """``unet_conditional`` without labels."""
    checks.refuse_labels("unet", num_classes, ["unet_conditional"])
    return _unet_conditional(num_classes=None, **keywords)


_unet.__signature__ = inspect.signature(_unet_conditional)


@dataclass(frozen=True)
class _Network:
    build: Callable[..., nn.Module]
    # Keywords that can be read off the shapes of a state dict; {} where they are those of something else.
    from_shapes: Callable[[Shapes], dict[str, Any]]


_NETWORKS = {
    "unet_conditional": _Network(_unet_conditional, unet_conditional.keywords_from_shapes),
    "unet": _Network(_unet, unet_conditional.keywords_from_shapes),
    "film_unet": _Network(film_unet.FilmUnet, film_unet.keywords_from_shapes),
    "basic_unet": _Network(basic_unet.BasicUnet, basic_unet.keywords_from_shapes),
    "context_unet": _Network(context_unet.ContextUnet, context_unet.keywords_from_shapes),
    "unet2d": _Network(unet2d.unet2d, unet2d.keywords_from_shapes),
    "adm_unet": _Network(adm_unet.AdmUnet, adm_unet.keywords_from_shapes),
}


def build_model(name: str, **keywords: Any) -> nn.Module:
    """Build the network ``name`` with its default initialisation, float32, in training mode, on the default device.

    Raises UserError for an unknown name or keyword (naming the closest valid one) and for values that do not fit.
    """
    known = model_keywords(name)
    for keyword in keywords:
        if keyword not in known:
            raise UserError(f"unknown keyword {keyword!r} for network {name!r}: {_closest(keyword, known)}")
    return _NETWORKS[name].build(**keywords)


def model_names() -> list[str]:
    """The names that :func:`build_model` knows."""
    return list(_NETWORKS)


def model_keywords(name: str) -> dict[str, Any]:
    """The keywords of network ``name`` with their defaults. Raises UserError for an unknown name."""
    if name not in _NETWORKS:
        raise UserError(f"unknown network {name!r}: {_closest(name, _NETWORKS)}")
    return {key: value.default for key, value in inspect.signature(_NETWORKS[name].build).parameters.items()}


def infer_keywords(name: str, shapes: Shapes) -> dict[str, Any]:
    """Keywords of network ``name`` that follow from the shapes of a state dict; {} where nothing can be told."""
    model_keywords(name)
    if any(0 in shape for shape in shapes.values()):  # of no network
        return {}
    return _NETWORKS[name].from_shapes(shapes)


def recognise(shapes: Shapes) -> list[str]:
    """The names of the networks whose state dict has exactly these names and shapes, with whatever keywords."""
    return [name for name in _NETWORKS if _is_of(name, shapes)]


def _is_of(name: str, shapes: Shapes) -> bool:
    known = model_keywords(name)
    # What leaves no trace in the shapes must not stand in the way.
    silent = {key: value for key, value in {"image_size": 4096, "heads": 1, "head_channels": 1}.items() if key in known}
    keywords = infer_keywords(name, shapes)
    try:
        with torch.device("meta"):
            state = build_model(name, **{**silent, **keywords}).state_dict() if keywords else {}
    except UserError:  # of another network, or of one whose package is not installed
        return False
    return bool(state) and {key: tuple(value.shape) for key, value in state.items()} == dict(shapes)


def _closest(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(valid), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid ones: {', '.join(sorted(valid))}"
