"""channels_last is kept: weights, gradients, every activation with a picture's shape and its gradient, in a real training step."""

from __future__ import annotations

import pytest
from graphed import made
from torch import Tensor, nn

FLAGSHIP = ["data.image_size=16", "data.channels=3", "model.width=8", "model.channel_mults=[1,2,4]", "train.channels_last=true",
            "model.attention_levels=null", "train.global_batch=3"]  # fmt: skip
ADM = ["data.image_size=16", "data.channels=3", "model.name=adm_unet", "model.width=32", "model.channel_mults=[1,2]",
       "model.attention_levels=[1]", "train.channels_last=true", "train.global_batch=3"]  # fmt: skip


def is_last(tensor: Tensor) -> bool:
    """A pixel's channels lie side by side, and so do the pixels of a row: also in a slice of channels, what a concatenation hands back."""
    _, channels, height, width = tensor.shape
    _, of_channel, of_row, of_pixel = tensor.stride()
    return of_channel == 1 and (width == 1 or of_pixel >= channels) and (height == 1 or of_row == width * of_pixel)


def watched(network: nn.Module) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """Hooks on every module; they note (name, which, shape, channels_last) of what has more than one channel and more than one pixel.

    With one channel or one pixel both formats are the same bytes.
    """
    seen: list[tuple[str, str, tuple[int, ...], bool]] = []

    def note(name: str, which: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.shape[2] * tensor.shape[3] > 1:
            seen.append((name, which, tuple(tensor.shape), is_last(tensor) and not tensor.is_contiguous()))

    def hook(name: str):
        def forward(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            note(name, "activation", output)
            if output.requires_grad:
                output.register_hook(lambda gradient: note(name, "gradient", gradient))

        return forward

    for name, module in network.named_modules():
        module.register_forward_hook(hook(name))
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", [FLAGSHIP, ADM], ids=["unet_conditional", "adm_unet"])
def test_activations_and_gradients_stay_channels_last(overrides, precision):
    step, batches = made(False, *overrides, f"train.precision={precision}")
    network = step._network
    seen = watched(network)
    gradients: dict[str, bool] = {}
    for name, parameter in network.named_parameters():
        if parameter.dim() == 4 and parameter.shape[1] > 1 and parameter.shape[2] > 1:
            assert is_last(parameter), name
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, is_last(p.grad))
            )
    step(0, batches)
    wrong = [entry for entry in seen if not entry[3]]
    assert not wrong and {which for _, which, *_ in seen} == {"activation", "gradient"}
    assert len(seen) > 60 and len(gradients) > 10 and all(gradients.values())
    for piece in step.engine.pieces():
        if (
            piece.tensor.startswith("optim.exp_avg/")
            and piece.data.dim() == 4
            and piece.data.shape[1] > 1
            and piece.data.shape[2] > 1
        ):
            assert is_last(piece.data), piece.tensor


def test_without_the_switch_nothing_is_channels_last():
    step, batches = made(False, *FLAGSHIP, "train.channels_last=false")
    seen = watched(step._network)
    step(0, batches)
    assert len(seen) > 60 and not any(last for *_, last in seen)


def test_a_layer_that_changes_the_layout_is_noticed(monkeypatch):
    from ddpm_dist.models import blocks

    original = blocks.upsample2x
    monkeypatch.setattr(blocks, "upsample2x", lambda x: original(x).contiguous())
    step, batches = made(False, *FLAGSHIP)
    seen = watched(step._network)
    step(0, batches)
    # The concatenation with a channels_last skip brings the layout back; its gradient shows the detour.
    assert any(not last for *_, last in seen)
