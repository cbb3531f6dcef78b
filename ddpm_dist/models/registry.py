"""The table of networks: one function per network, whose signature is its list of keywords and defaults."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ddpm_dist.errors import UserError
from ddpm_dist.models.unet_conditional import UnetConditional, keywords_from_shapes

_NETWORKS: dict[str, Callable[..., nn.Module]] = {}
# Networks whose keywords can be read off the shapes of a state dict.
_FROM_SHAPES: dict[str, Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]] = {}


def _register(name: str, from_shapes: Callable | None = None) -> Callable:
    def add(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        _NETWORKS[name] = function
        if from_shapes is not None:
            _FROM_SHAPES[name] = from_shapes
        return function

    return add


@_register("unet_conditional", keywords_from_shapes)
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
    return UnetConditional(
        in_channels, num_classes, width, channel_mults, attention_levels, image_size, embedding_dim, heads
    )


@_register("unet", keywords_from_shapes)
def _unet(num_classes: None = None, **keywords: Any) -> nn.Module:
    """``unet_conditional`` without labels."""
    if num_classes is not None:
        raise UserError(
            f'the network "unet" has no labels, but num_classes={num_classes}: use "unet_conditional" or leave '
            "num_classes out"
        )
    return _unet_conditional(num_classes=None, **keywords)


_unet.__signature__ = inspect.signature(_unet_conditional)


def build_model(name: str, **keywords: Any) -> nn.Module:
    """Build the network ``name`` with its default initialisation, float32, in training mode, on the default device.

    Raises UserError for an unknown name or keyword (naming the closest valid one) and for values that do not fit.
    """
    known = model_keywords(name)
    for keyword in keywords:
        if keyword not in known:
            raise UserError(f"unknown keyword {keyword!r} for network {name!r}: {_closest(keyword, known)}")
    return _NETWORKS[name](**keywords)


def model_keywords(name: str) -> dict[str, Any]:
    """The keywords of network ``name`` with their defaults. Raises UserError for an unknown name."""
    if name not in _NETWORKS:
        raise UserError(f"unknown network {name!r}: {_closest(name, _NETWORKS)}")
    return {key: value.default for key, value in inspect.signature(_NETWORKS[name]).parameters.items()}


def infer_keywords(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Keywords of network ``name`` that follow from the shapes of a state dict; {} where nothing can be told."""
    model_keywords(name)
    return _FROM_SHAPES[name](shapes) if name in _FROM_SHAPES else {}


def _closest(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(valid), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid ones: {', '.join(sorted(valid))}"
