"""What a run writes about its steps while it trains: metrics.jsonl, MLflow, a progress display, audit.jsonl."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from ddpm_dist.audit import Audit
from ddpm_dist.checkpoint import Workplace
from ddpm_dist.checkpoint.format import Piece
from ddpm_dist.config import Config
from ddpm_dist.data.pipeline import Loader
from ddpm_dist.errors import RunFailed, UserError, in_words
from ddpm_dist.flops import peak_flops, training_flops
from ddpm_dist.rendezvous import slurm_job
from ddpm_dist.runtime import Runtime
from ddpm_dist.step import StepResult, learning_rate
from ddpm_dist.tracking import Tracker, cut_back
from ddpm_dist.tracking.progress import Progress


class Records:
    """Sums up what the steps report on the device and writes it out at every log step; rank 0 writes, the others have no files.

    epoch_size: samples in the data, None without an end (synthetic). ``sums`` belongs into every checkpoint.
    """

    def __init__(self, config: Config, runtime: Runtime, global_batch: int, epoch_size: int | None) -> None:
        self._config, self._runtime, self._global_batch = config, runtime, global_batch
        self._epoch_size = epoch_size
        # On the device: sum of finite losses and steps since the last log line, skipped steps in all and in a row.
        self.sums = torch.zeros(4, dtype=torch.float64, device=runtime.device)
        self.tracker: Tracker | None = None
        self._progress: Progress | None = None
        self._audit: Audit | None = None
        self._peak = self._flops = 0.0

    def open(self, step: int, last_step: int, run_id: str | None, workplace: Workplace) -> None:
        """Cut the records back to completed step ``step`` and open them. Collective.

        run_id: the MLflow run that the checkpoint remembers.
        """
        self._last_step = last_step
        self._runtime.together(lambda: self._cut(step, run_id, workplace))
        if self._runtime.is_main:
            self._progress = Progress(last_step * self._global_batch, step * self._global_batch, enabled=True)
        if self._config.train.audit:
            self._audit = Audit(self._config.run.folder / "audit.jsonl", self._runtime, self._global_batch)

    def _cut(self, step: int, run_id: str | None, workplace: Workplace) -> None:
        if not self._runtime.is_main:
            return
        config, folder = self._config, self._config.run.folder
        try:
            workplace.write_text(folder / "config.yaml", config.to_yaml())
            cut_back(folder / "audit.jsonl", step, workplace)
            self.tracker = Tracker(
                folder,
                config.tracking,
                config.run.name,
                config.to_dict(),
                step,
                run_id=run_id,
                tags=slurm_job(os.environ),
                workplace=workplace,
            )
        except OSError as error:
            raise UserError(
                f"run directory {folder} cannot be written: {in_words(error)}; make room or set run.dir"
            ) from None

    def account(self, result: StepResult) -> None:
        """Add a step's result to the sums, without waiting for the device."""
        done = 1.0 - result.skipped
        loss = torch.where(result.skipped > 0, 0.0, result.loss)
        self.sums[0] += loss
        self.sums[1] += done
        self.sums[2] += result.skipped
        self.sums[3] = (self.sums[3] + 1) * result.skipped

    @property
    def audit(self) -> Audit | None:
        """Takes down what the step under way sees; None unless train.audit."""
        return self._audit

    def write_audit(self, step: int, pieces: Callable[[], list[Piece]]) -> None:
        """The audit line of completed step ``step``, if there is an audit. Collective. pieces: gives this rank's state."""
        if self._audit is not None:
            every = self._config.train.audit_params_every
            self._audit.write(step, pieces() if every and step % every == 0 else None)

    def begin_interval(self, step: int, loader: Loader) -> None:
        """From now on, after ``step`` completed steps, time counts for the next log line."""
        if not self._peak:
            self._peak = peak_flops(self._runtime.device) * self._runtime.world_size
            self._flops = (
                training_flops(self._config.model.name, self._config.network_keywords()) if self._peak else 0.0
            )
        self._start, self._start_step = time.monotonic(), step
        self._start_wait, self._paused = loader.seconds_waited, 0.0

    def pause(self, seconds: float) -> None:
        """Time that was not training (previews): not counted into images per second."""
        self._paused += seconds

    def log_step_before(self, step: int) -> int | None:
        """The log step before completed step ``step``, 0 where there is none; None if ``step`` is no log step itself."""
        every = self._config.train.log_every
        if step % every and step != self._last_step:
            return None
        return (step - 1) // every * every

    def log(
        self, step: int, result: StepResult, loader: Loader, more: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Write the record of completed step ``step`` if it is a log step or the last one. more: what else belongs into it.

        Reads the sums back from the device then. Raises RunFailed after train.max_skipped_steps non-finite steps in a row.
        """
        train = self._config.train
        last = step == self._last_step
        if step % min(train.log_every, train.max_skipped_steps) and not last:
            return
        loss_sum, steps, skipped, in_a_row, grad_norm = [*self.sums.tolist(), float(result.grad_norm)]
        if in_a_row >= train.max_skipped_steps:
            raise RunFailed(
                f"the loss or its gradient was not finite for {int(in_a_row)} steps in a row, last at step {step}: "
                "lower optim.lr, set train.grad_clip, or use train.precision=bf16 or fp32; the newest checkpoint is intact"
            )
        if step % train.log_every and not last:
            return
        seconds = max(time.monotonic() - self._start - self._paused, 1e-9)
        seen = step * self._global_batch
        rate = (step - self._start_step) * self._global_batch / seconds
        record = {
            "step": step,
            "images_seen": seen,
            "epoch": seen / self._epoch_size if self._epoch_size else None,
            "loss": loss_sum / steps if steps else None,
            "lr": learning_rate(self._config.optim, seen - self._global_batch, self._global_batch),
            "grad_norm": grad_norm,
            "skipped_steps": int(skipped),
            "images_per_sec": rate,
            "data_wait_frac": min(1.0, (loader.seconds_waited - self._start_wait) / seconds),
            "mfu": rate * self._flops / self._peak if self._peak else None,
            "gpu_mem_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
            **more,
            "time": time.time(),
        }
        if self.tracker is not None:
            self.tracker.log(record)
            self._progress.update(record)
        self.sums[:2] = 0
        self.begin_interval(step, loader)

    def close(self, status: str, abandon: bool) -> None:
        """End the records: "FINISHED", "FAILED" or "KILLED". abandon: they belong to another process now."""
        if self._progress is not None:
            self._progress.close()
        if self.tracker is not None:
            self.tracker.abandon() if abandon else self.tracker.close(status)
        if self._audit is not None:
            self._audit.close()
