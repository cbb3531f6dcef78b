"""The whole training step as one CUDA graph: what makes small batches per GPU quick, where launching kernels takes longer than running them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = (
    3  # real steps before a capture: compiled networks compile, cuDNN and cuBLAS choose their algorithms and make room
)


class StepGraph:
    """Calls ``body`` on tensors that stay where they are; on CUDA it is captured once and replayed from then on.

    body(pixels, labels, draws, rate, on_device, weights) -> (result, part): a training step as a function of tensors on the device, whose
    results are dataclasses of tensors. ``weights`` (a list of numbers) may only be asked which of them are 1: each answer has a graph.
    Everywhere but on CUDA the body runs as it is, on the same fixed tensors. capture: what makes a graph of a function (:class:`CUDACapture`);
    None on CUDA is that, elsewhere no graph.

    The first ``WARM_UPS`` steps are launched one by one on the stream that is captured later. They are steps like all others, so nothing is
    computed twice and nothing has to be taken back.
    """

    def __init__(self, body: Callable[..., tuple[Any, Any]], device: torch.device, capture: Any = None) -> None:
        self._body, self._device = body, device
        self._capture = CUDACapture(device) if capture is None and device.type == "cuda" else capture
        self._inputs: list[Tensor] = []
        self._graphs: dict[tuple[bool, ...], tuple[Callable[[], None], Any]] = {}
        self._warm: dict[tuple[bool, ...], int] = {}

    @property
    def captured(self) -> int:
        """How many graphs there are so far."""
        return len(self._graphs)

    def __call__(
        self, pixels: Tensor, labels: Tensor, draws: Tensor, rate: float, weights: list[float]
    ) -> tuple[Any, Any]:
        """One step. The result is a copy; the part holds the step's own tensors, which the next step overwrites."""
        numbers = torch.tensor([rate, *weights], dtype=torch.float32)
        if self._device.type == "cuda":
            numbers = numbers.pin_memory()  # a copy from elsewhere would wait
        given = [pixels, labels, draws, numbers]
        if not self._inputs:
            self._inputs = [torch.empty_like(tensor, device=self._device) for tensor in given]
        for own, new in zip(self._inputs, given, strict=True):
            own.copy_(new, non_blocking=True)
        *tensors, numbers = self._inputs
        kind = tuple(weight == 1.0 for weight in weights)
        result, part = self._run(kind, lambda: self._body(*tensors, numbers[0], numbers[1:], weights))
        copies = torch.stack([getattr(result, field.name) for field in dataclasses.fields(result)])
        return type(result)(*copies.unbind()), part

    def _run(self, kind: tuple[bool, ...], body: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        if self._capture is None:
            return body()
        if kind not in self._graphs:
            self._warm[kind] = self._warm.get(kind, 0) + 1
            if self._warm[kind] <= WARM_UPS:
                return self._capture.warm_up(body)
            self._graphs[kind] = self._capture(body)
        replay, outputs = self._graphs[kind]
        replay()
        return outputs


class CUDACapture:
    """Makes CUDA graphs of functions, all on one stream and from one pool of memory: no two of them are in use at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._device = torch.cuda.Stream(device), device
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Launch ``function`` on the stream that is captured later, in order with the current one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function()
        current.wait_stream(self._stream)
        return outputs

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, the outputs that every replay overwrites). Nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load data and write checkpoints, go on in the meantime.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs
