"""The reverse process: one step, written once; replayed as a captured graph on a GPU, run as it is elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist import philox
from ddpm_dist.diffusion import noise as noises
from ddpm_dist.diffusion import samplers
from ddpm_dist.diffusion.guidance import guided
from ddpm_dist.diffusion.schedule import Schedule
from ddpm_dist.diffusion.thresholding import THRESHOLDINGS, threshold

WARM_UPS = (
    3  # steps before a capture: cuDNN and cuBLAS choose their algorithms and make room, compiled networks compile
)


class NotFinite(ValueError):
    """The network answered with NaN or infinity."""


class ReverseProcess:
    """Makes batches of one shape with one sampler; every batch goes through the same buffers and, on CUDA, the same graphs.

    network: called as ``network(x, t, y)``, in eval mode; torch.compile'd or not. Its weights may be changed in place between two
    runs. shape: (B, C, H, W). labelled: whether :meth:`run` gets labels. dtype: of autocast, None for float32.
    capture: None captures on CUDA; False never does. The other keywords are those of ``sample``.

    Everything that a step reads and writes stays where it is: the state (S, B, C, H, W) and the predicted image, labels, indices, the
    seed and a counter of the evaluations, by which the step finds its timestep and coefficients in tables on the device. So a step needs
    nothing from the host. Noise is a function of (seed, timestep, image index), and needs no generator. The state is float64:
    where x is almost pure noise, the image that an epsilon implies is a small difference times 1 / signal, up to 20,000 with
    the cosine schedule, and second-order samplers carry its rounding on. Next to the network this costs nothing.

    Raises ValueError for options that are unknown or do not go together.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        schedule: Schedule,
        shape: Sequence[int],
        *,
        labelled: bool,
        device: torch.device | str,
        sampler: str = "ddpm",
        steps: int | None = None,
        spacing: str = "linspace",
        eta: float = 0.0,
        variance: str | float = "beta",
        thresholding: str = "none",
        percentile: float = 0.995,
        guidance: float = 3.0,
        guidance_interval: Sequence[int] | None = None,
        guidance_rescale: float = 0.0,
        value_range: Sequence[float] = (-1.0, 1.0),
        dtype: torch.dtype | None = None,
        capture: bool | None = None,
    ) -> None:
        check_options(thresholding, percentile, guidance, guidance_interval, guidance_rescale)
        if not value_range[0] < value_range[1]:
            raise ValueError(f"value_range must be the lowest and the highest value, not {list(value_range)}")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be a torch.dtype such as torch.bfloat16, or None, not {dtype!r}")
        self._classes = getattr(network, "num_classes", "unknown")
        if labelled and self._classes is None:
            raise ValueError("the network was made without labels: leave labels out")
        self.schedule, self.shape, self.device = schedule, tuple(shape), torch.device(device)
        self._network, self._dtype = network, dtype
        if self.device.type == "cpu":
            from ddpm_dist.models import attention_cpu

            attention_cpu.use_in(network, dtype or torch.float32)
        self._threshold = lambda x0: threshold(x0, thresholding, value_range, percentile)
        self._range, self._scale, self._rescale = tuple(value_range), guidance, guidance_rescale
        visited, matrices = samplers.table(schedule, sampler, steps, spacing, variance, eta)
        self.timesteps: list[int] = visited.tolist()  # of the evaluations
        low, high = guidance_interval or (0, schedule.timesteps)
        if guidance_interval is not None and high >= schedule.timesteps:
            raise ValueError(f"guidance_interval {low} {high}: the timesteps are 0..{schedule.timesteps - 1}")
        # Outside of the interval the conditional prediction is taken as it is (Kynkaanniemi et al. 2024, arXiv 2404.07724, equation 5).
        self.guided = [labelled and guidance not in (0, 1) and low <= t <= high for t in self.timesteps]

        # Which entries of the matrices are 0 in every step is known here, so that the step leaves them out.
        self._terms = [[j for j, used in enumerate(row) if used] for row in matrices.ne(0).any(0).tolist()]
        self._noisy = bool(matrices[..., -1].any())
        self._matrices = matrices.to(self.device)
        self._visited = visited.to(self.device)
        self._implied = torch.stack(implied_image(schedule, visited)).to(self.device)
        self._state = torch.zeros(matrices.shape[1], *self.shape, dtype=torch.float64, device=self.device)
        self._x0 = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        self._labels = torch.zeros(self.shape[0], dtype=torch.int64, device=self.device) if labelled else None
        self._indices = torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)
        self._seed, self._counter, self._bad = torch.zeros(3, dtype=torch.int64, device=self.device).unbind()
        self._capture = self.device.type == "cuda" if capture is None else capture
        self._graphs: dict[bool, Any] = {}
        self._position = 0

    @property
    def x(self) -> Tensor:
        """The image so far, a new (B, C, H, W) float32 tensor."""
        return self._state[0].float()

    @property
    def x0(self) -> Tensor:
        """The image that the last evaluation went towards, a new (B, C, H, W) float32 tensor."""
        return self._x0.float()

    def __len__(self) -> int:
        """Evaluations of the network in a run."""
        return len(self.timesteps)

    @torch.no_grad()
    def start(self, seed: int, indices: Tensor, labels: Tensor | None = None) -> None:
        """Begin with the noise of images ``indices`` (B,) int64 of ``seed``, to become ``labels`` (B,) int64."""
        if self._capture and not self._graphs:
            for is_guided in sorted(set(self.guided)):
                self._graphs[is_guided] = self._captured(is_guided)
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed {seed!r} is no number of 64 bits: choose one from 0 to {2**64 - 1}")
        self._seed.fill_(seed - (seed >= 2**63) * 2**64)
        self._indices.copy_(indices)
        if self._labels is not None:
            self._labels.copy_(labels)
        self._counter.zero_()
        self._bad.fill_(len(self))
        self._state.zero_()
        # The starting noise has the step number T, which no timestep has.
        self._state[0].copy_(self._noise(self.schedule.timesteps))
        self._position = 0

    @torch.no_grad()
    def step(self) -> None:
        """One evaluation of the network, and what the sampler makes of it."""
        is_guided = self.guided[self._position]
        if self._capture:
            self._graphs[is_guided].replay()
        else:
            self._evaluate(is_guided)
        self._position += 1

    def run(
        self,
        seed: int,
        indices: Tensor,
        labels: Tensor | None = None,
        on_step: Callable[[int, int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """All steps for n <= B images; a new (n, C, H, W) float32 tensor. Raises NotFinite, naming the step.

        on_step(k, t, x, x0) is called after evaluation k, at timestep t, with the new x and the image it went towards.
        """
        count = len(indices)
        if count > self.shape[0]:
            raise ValueError(f"{count} images do not fit into batches of {self.shape[0]}")
        if labels is not None and isinstance(self._classes, int) and count and int(labels.max()) >= self._classes:
            raise ValueError(
                f"label {int(labels.max())}: the network has the classes 0 to {self._classes - 1} (-1: no label)"
            )
        # What stands in for missing images is made, too, and left out at the end: a shape of its own would need a graph of its own.
        fill = torch.zeros(self.shape[0], dtype=torch.int64)
        fill[:count] = torch.arange(count)
        fill = fill.to(indices.device)
        self.start(seed, indices[fill], labels[fill.to(labels.device)] if labels is not None else None)
        for k, t in enumerate(self.timesteps):
            self.step()
            if on_step is not None:
                on_step(k, t, self.x[:count], self.x0[:count])
        bad = int(self._bad)
        if bad == len(self) and not bool(self.x.isfinite().all()):
            raise NotFinite("the images are not finite after the last step: choose another sampler or more steps")
        if bad < len(self):
            raise NotFinite(
                f"the network's answer at timestep {self.timesteps[bad]} (evaluation {bad + 1} of {len(self)}) is not finite: look at the "
                "weights, use float32, or a smaller guidance"
            )
        return self.x[:count]

    def _noise(self, step: int | Tensor) -> Tensor:
        return noises.draw(
            self.schedule.noise, self._seed, philox.SAMPLE_NOISE, step, self._indices, self.shape[1:], self._range
        )

    def _evaluate(self, is_guided: bool) -> None:
        k = self._counter.view(1)
        t = self._visited.index_select(0, k)
        scale = self._scale if is_guided or self._scale == 0 else 1.0
        predict = guided(self._network, self._labels, scale, self._rescale)
        x = self._state[0].float()
        with torch.autocast(self.device.type, self._dtype) if self._dtype else contextlib.nullcontext():
            answer = predict(x, t.expand(self.shape[0]))
        of_x, of_answer = self._implied.index_select(1, k)
        x0 = of_x * self._state[0] + of_answer * answer
        self._bad.copy_(torch.where(x0.isfinite().all(), self._bad, torch.minimum(self._bad, self._counter)))
        self._x0.copy_(self._threshold(x0))
        inputs = [*self._state, self._x0, self._noise(t) if self._noisy else None]
        matrix = self._matrices.index_select(0, k)[0]
        rows = [self._combine(matrix[i], inputs, terms) for i, terms in enumerate(self._terms)]
        for i, row in enumerate(rows):
            self._state[i].copy_(row)
        self._counter.add_(1)

    @staticmethod
    def _combine(row: Tensor, inputs: list[Tensor | None], terms: list[int]) -> Tensor:
        total = row[terms[0]] * inputs[terms[0]]
        for j in terms[1:]:
            total = total + row[j] * inputs[j]  # not addcmul, whose rounding may depend on the place in the tensor
        return total

    def _captured(self, is_guided: bool) -> Any:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._counter.zero_()
                self._evaluate(is_guided)
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._counter.zero_()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # never in use at the same time
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # savers and loaders go on
            self._evaluate(is_guided)
        return graph


def implied_image(schedule: Schedule, visited: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q), each float64 like ``visited``: a network that answers n for x_t implies the image x0 = p x_t + q n.

    epsilon: x0 = (x - spread n) / signal (Ho et al. 2020, equation 15); v: x0 = signal x - spread n (Salimans & Ho 2022, appendix D).
    """
    signal, spread = schedule.signal[visited], schedule.spread[visited]
    if schedule.prediction == "epsilon":
        return 1 / signal, -spread / signal
    if schedule.prediction == "v":
        return signal, -spread
    return torch.zeros_like(signal), torch.ones_like(signal)


def check_options(
    thresholding: str,
    percentile: float,
    guidance: float,
    guidance_interval: Sequence[int] | None,
    guidance_rescale: float,
) -> None:
    """ValueError for options of ``sample`` that no network and no schedule could make good."""
    for name, value in (("percentile", percentile), ("guidance", guidance), ("guidance_rescale", guidance_rescale)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, not {value!r}")
    if thresholding not in THRESHOLDINGS:
        raise ValueError(f"unknown thresholding {thresholding!r}: {', '.join(THRESHOLDINGS)}")
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile must lie above 0 and be at most 1, not {percentile}")
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance must be a number of at least 0, not {guidance}")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must lie in 0..1, not {guidance_rescale}")
    if guidance_interval is not None and not (
        isinstance(guidance_interval, list | tuple)
        and [type(t) for t in guidance_interval] == [int, int]
        and 0 <= guidance_interval[0] <= guidance_interval[1]
    ):
        raise ValueError(f"guidance_interval must be two timesteps, the lower one first, not {guidance_interval!r}")


def device_of(network: nn.Module) -> torch.device:
    """Where the network's parameters are."""
    return next(network.parameters()).device
