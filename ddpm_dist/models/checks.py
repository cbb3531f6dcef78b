"""Checks of keywords, images and labels that the networks share. All raise UserError with what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.errors import UserError


def check_counts(**values: Any) -> None:
    """Every value must be a positive whole number."""
    for name, value in values.items():
        if not _is_count(value):
            raise UserError(f"model.{name} must be a positive whole number, not {value!r}")


def check_mults(channel_mults: Any) -> None:
    """channel_mults must be a list of positive whole numbers with at least one entry."""
    if not isinstance(channel_mults, list | tuple) or not channel_mults or not all(map(_is_count, channel_mults)):
        raise UserError(f"model.channel_mults must be a list of positive whole numbers, not {channel_mults!r}")


def check_halvings(image_size: int, halvings: int, reason: str) -> None:
    """image_size must be divisible by 2^halvings; ``reason`` names what needs them."""
    divisor = 2**halvings
    if image_size % divisor:
        below = image_size - image_size % divisor
        nearest = f"{below} or {below + divisor}" if below else str(divisor)
        raise UserError(f"image size {image_size} is not divisible by {divisor}, as {reason} need: use {nearest}")


def check_pyramid(
    in_channels: Any, width: Any, channel_mults: Any, image_size: Any, num_classes: Any | None = None
) -> None:
    """For a network with ``width * channel_mults[l]`` channels at level l, where a level halves the image of the one above."""
    checked = {"in_channels": in_channels, "width": width, "image_size": image_size}
    check_counts(**checked, **({} if num_classes is None else {"num_classes": num_classes}))
    check_mults(channel_mults)
    halvings = len(channel_mults) - 1
    check_halvings(image_size, halvings, f"the {halvings} halvings of model.channel_mults={list(channel_mults)}")


def check_levels(attention_levels: Any, levels: int, none: str | None = None) -> None:
    """attention_levels must be a list of levels 0 .. levels; ``none`` says what null means where it is allowed."""
    if attention_levels is None and none is not None:
        return
    if not isinstance(attention_levels, list | tuple) or not all(
        type(level) is int and 0 <= level <= levels for level in attention_levels
    ):
        or_null = f" or null for {none}" if none is not None else ""
        raise UserError(
            f"model.attention_levels must be a list of levels 0 .. {levels} (0 = full resolution, as many levels as "
            f"model.channel_mults has entries){or_null}, not {attention_levels!r}"
        )


def check_dropout(dropout: Any) -> None:
    """dropout must be a probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"model.dropout must be a number in [0, 1), not {dropout!r}")


def refuse_labels(network: str, num_classes: Any, instead: Sequence[str]) -> None:
    """For a network without labels: num_classes must be None; ``instead`` names networks that have labels."""
    if num_classes is not None:
        raise UserError(
            f'the network "{network}" has no labels, but num_classes={num_classes}: train it without them '
            f"(data.num_classes=null), or use {' or '.join(instead)}"
        )


def check_image(x: Tensor, divisor: int) -> None:
    """The sides of ``x`` (B, C, H, W) must be divisible by ``divisor``."""
    if x.shape[-1] % divisor or x.shape[-2] % divisor:
        raise UserError(f"images of {x.shape[-2]}x{x.shape[-1]} pixels are not divisible by {divisor}")


def check_labels(y: Tensor, num_classes: int) -> None:
    """Labels (B,) must be below num_classes. Looked at on the CPU only: on a GPU it would cost a wait."""
    if y.device.type != "cpu" or torch.compiler.is_compiling() or y.numel() == 0:
        return
    if int(y.max()) >= num_classes:
        raise UserError(
            f"label {int(y.max())} is outside 0 .. {num_classes - 1}: the network has {num_classes} classes (-1 stands "
            "for a dropped label)"
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
