"""audit.jsonl: digests of everything a step saw and did, so that two runs can be compared line by line."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.checkpoint.format import Piece
from ddpm_dist.data.pipeline import MicroBatch
from ddpm_dist.errors import UserError
from ddpm_dist.runtime import Runtime


class Audit:
    """Collects what the ranks saw in a step and lets rank 0 write one line. Synchronises every step: a tool, not a default."""

    def __init__(self, path: Path, runtime: Runtime, global_batch: int) -> None:
        self._runtime, self._global_batch = runtime, global_batch
        self._rows: list[dict[str, Any]] = []
        self._file = open(path, "a", encoding="utf-8") if runtime.is_main else None

    def add(
        self, batch: MicroBatch, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None, losses: Tensor
    ) -> None:
        """Note a micro-batch. x0 and noise are float32 (B, C, H, W) as they enter the step; labels after dropping."""
        pixels, noises = _digests(x0), _digests(noise)
        labels = labels.tolist() if labels is not None else [-1] * len(pixels)
        values = zip(
            batch.slots.tolist(), batch.ids.tolist(), pixels, labels, t.tolist(), noises, losses.tolist(), strict=True
        )
        for slot, sample, pixel, label, timestep, noise_digest, loss in values:
            self._rows.append({"slot": slot, "loss": loss,
                               "row": {"id": sample, "pixels": pixel, "label": label, "t": timestep,
                                       "noise": noise_digest}})  # fmt: skip

    def write(self, step: int, pieces: list[Piece] | None) -> None:
        """Write the line of completed step ``step`` (counted from 1); collective. ``pieces``: this rank's state, or None."""
        digests = None
        if pieces is not None:
            digests = [(p.tensor, p.start, p.data.detach().cpu().contiguous()) for p in pieces]
        gathered = self._runtime.gather((self._rows, digests))
        self._rows = []
        if gathered is None or self._file is None:
            return
        rows = sorted((row for rank_rows, _ in gathered for row in rank_rows), key=lambda row: row["slot"])
        # Summed in slot order in float64, so that the split over ranks adds no rounding of its own.
        loss = sum(row["loss"] for row in rows) / len(rows)
        line = {"step": step, "images_seen": step * self._global_batch, "slots": [row["row"] for row in rows],
                "loss": float(loss).hex()}  # fmt: skip
        if digests is not None:
            tensors = [entry for _, part in gathered for entry in part]
            for field, prefixes in (("params", ("model/", "buffer/")), ("optim", ("optim.",)), ("ema", ("ema.",))):
                line[field] = _digest_by_name([entry for entry in tensors if entry[0].startswith(prefixes)])
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            found = UserError(
                f"{self._file.name} cannot be written: {error.strerror}; make room or set train.audit=false, then run the same "
                "command again: it continues from the newest checkpoint"
            )
            found.one_rank = True
            raise found from None

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take was reported when it happened
                self._file.close()


def _digests(images: Tensor) -> list[str]:
    """sha256 of each image's little-endian float32 bytes in C, H, W order."""
    array = images.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in array]


def _digest_by_name(entries: list[tuple[str, int, Tensor]]) -> str:
    """One sha256 over all tensors in the order of their names; how they were cut into pieces does not matter."""
    digest, previous = hashlib.sha256(), None
    for name, _, data in sorted(entries, key=lambda entry: entry[:2]):
        if name != previous:
            digest.update(name.encode() + b"\0")
            previous = name
        digest.update(memoryview(data.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
