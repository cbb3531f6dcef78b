"""What a run trains on: the opened data, the order and the decoder that it keeps, and the loader that delivers its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ddpm_dist.config import Config
from ddpm_dist.data.cache import bytes_of, choose_place
from ddpm_dist.data.choose_order import kind_of, make_order
from ddpm_dist.data.decoder import resolve_decoder
from ddpm_dist.data.mixed_index import MixedIndex, open_data
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.data.pipeline import Loader, shard_batches, synthetic_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.data.workers import decode_threads, micro_batches_ahead, readers
from ddpm_dist.runtime import Runtime
from ddpm_dist.tracking.progress import warn

PACK_HINT = (
    "Pack one first, for example:\n"
    "  python -m ddpm_dist.pack {source} --out {shards} --size {size}{extra}\n"
    "and start training with data.shards={shards}"
)


class RunData:
    """The data of a run, on every rank. Making one is collective and raises UserError before anything is written.

    Attributes:
        index: None for synthetic data.
        ahead: micro-batches that wait decoded.
        decoder: "cpu" or "mixed", once :meth:`choose_decoder` was called; None for synthetic data.
    """

    def __init__(self, config: Config, runtime: Runtime, micro_batch: int) -> None:
        """micro_batch: images of a rank in one micro-step."""
        self._config, self._runtime = config, runtime
        self.ahead = micro_batches_ahead(config.data, micro_batch)
        self._warnings: list[str] = []
        self.decoder: str | None = None
        self.index: Index | MixedIndex | None = runtime.together(self._open)

    def _open(self) -> Index | MixedIndex | None:
        config, data = self._config, self._config.data
        if data.source != "shards":
            data.order = "full"
            return None
        index = open_data(data, pack_hint(config))
        data.order = kind_of(len(index), data)  # what auto means now is what the run keeps
        order = make_order(index, data, config.run.seed, config.train.global_batch)
        self._warnings = getattr(order, "warnings", [])
        return index

    @property
    def fingerprint(self) -> str | None:
        """sha256 of the data; None for synthetic data."""
        return self.index.fingerprint if self.index is not None else None

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, where there are any."""
        return self.index.classes if self.index is not None else None

    @property
    def samples(self) -> int | None:
        """Samples of an epoch; None: without an end."""
        return len(self.index) if self.index is not None else None

    def choose_decoder(self, recorded: str | None) -> None:
        """The decoder of the checkpoint, or at a first start what the configuration means here. UserError where it cannot run."""
        if self.index is not None:
            self.decoder = resolve_decoder(recorded or self._config.data.decoder, self._runtime.device, self.index)

    def notes(self) -> list[str]:
        """What is said of it at the start, line by line."""
        data = self._config.data
        if self.index is None:
            return []
        lines = [f"warning: {warning}" for warning in self._warnings]
        lines.append(
            f"data: {len(self.index):,} images, decoder {self.decoder}, {decode_threads(data)} thread(s) per rank, {self.ahead} "
            f"micro-batches ahead, {readers(data)} readers where storage is slow"
        )
        if data.order == "blocks":
            lines.append(f"order: blocks of {data.block_shards} shards, {data.lanes} lane(s)")
        return lines

    def loader(self, plan: BatchPlan, steps: range, say: Callable[[str], None]) -> Loader:
        """The loader of this rank for ``steps`` (counted from 0). Collective."""
        config, runtime = self._config, self._runtime
        if self.index is None:
            batches = synthetic_batches(config.data, plan, runtime, config.run.seed, steps)
        else:
            place = self._cache(len(steps) * plan.global_batch, say)
            batches = shard_batches(
                self.index, config.data, plan, runtime, config.run.seed, steps, self.decoder, place, told=warn
            )
        return Loader(batches, runtime.device, self.ahead)

    def _cache(self, images_left: int, say: Callable[[str], None]) -> str:
        """Where the decoded images are kept: "gpu", "host" or "none"."""
        data, runtime, index = self._config.data, self._runtime, self.index
        place = runtime.together(
            lambda: choose_place(index, data, runtime.device, self.decoder, images_left, runtime.world_size)
        )
        if place != "none":
            where = "the GPU" if place == "gpu" else "memory"
            say(f"data: {len(index):,} images decoded once into {where}, {bytes_of(index, data) / 1e9:.2f} GB")
        return place

    def close(self) -> None:
        """End the fetching of shards: whoever waits for one gets a RuntimeError."""
        if self.index is not None:
            self.index.close()


def pack_hint(config: Config) -> str:
    """The pack command that makes the shards this configuration asks for."""
    shards = config.data.shards or f"shards/{config.run.name}"
    name = Path(shards).name
    known = {"digits": "digits", "shapes": "shapes", "cifar": "cifar10", "fashion": "fashion-mnist", "mnist": "mnist",
             "celeba": "celeba"}  # fmt: skip
    source = next((value for key, value in known.items() if name.startswith(key)), "folder")
    extra = {"digits": "", "shapes": " --num 50000", "folder": " --root PATH_TO_IMAGES"}.get(
        source, " --root data --download"
    )
    return PACK_HINT.format(source=source, shards=shards, size=config.data.image_size, extra=extra)
