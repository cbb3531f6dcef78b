"""The training run: set up, loop over steps, leave behind what a resume needs."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from ddpm_dist import attention_backends, compile_cache
from ddpm_dist.alike import check_alike
from ddpm_dist.checkpoint import CheckpointStore, Ownership, Reader, Workplace, published, reaches
from ddpm_dist.checkpoint.format import Damaged, Piece
from ddpm_dist.checkpoint.snapshots import Snapshots
from ddpm_dist.config import Config
from ddpm_dist.continuation import check_nothing_lost, check_same_data, check_same_run
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import Loader
from ddpm_dist.engines import check_engine
from ddpm_dist.errors import OK, REQUEUE, RunFailed, UserError, in_words
from ddpm_dist.models import build_model
from ddpm_dist.models.weights import initialise_from
from ddpm_dist.previews import preview
from ddpm_dist.records import Records
from ddpm_dist.rendezvous import slurm_job
from ddpm_dist.run_data import RunData
from ddpm_dist.runtime import Runtime, StopRequest, keep_freed_memory, use_fast_matmuls
from ddpm_dist.step import TrainStep
from ddpm_dist.validation import Validation
from ddpm_dist.watch import Watch


class Trainer:
    """A run in a run directory: :meth:`prepare`, then :meth:`run`, whose exit code says whether to start it again."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime, self.folder = config, runtime, config.run.folder
        self.owner: Ownership | None = None  # on rank 0
        self.workplace: Workplace | None = None  # on every rank: where it makes files of the run directory
        self.reason, self.completed = "", 0
        self.start_step: int | None = None  # where this start continues
        self.watch: Watch | None = None
        self.records: Records | None = None
        self.snapshots: Snapshots | None = None

    def prepare(self, fresh: bool = False, accept_data_change: bool = False) -> None:
        """Everything that can be wrong is found here, before anything is written or trained. Raises UserError.

        fresh: the run directory must be empty. accept_data_change: continue although the data is not what the run has been
        trained on so far; the checkpoints record it.
        """
        config, runtime = self.config, self.runtime
        self.plan = runtime.together(
            lambda: plan_batches(config.train.global_batch, config.train.micro_batch, runtime.world_size)
        )
        runtime.together(lambda: check_engine(config, self.plan, runtime))
        self.data = RunData(config, runtime, self.plan.micro_batch)
        check_alike(runtime, config, self.data.fingerprint)
        use_fast_matmuls(runtime.device)
        keep_freed_memory(runtime.device)
        torch.backends.cudnn.benchmark = not config.train.audit
        if config.train.audit and runtime.device.type == "cuda":
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(config.run.seed)
        network = build_model(config.model.name, **config.network_keywords())
        if config.train.attention != "measured":
            attention_backends.pin(network, config, self.plan.micro_batch, runtime)

        new = runtime.broadcast(not published(self.folder / "checkpoints") if runtime.is_main else None)
        runtime.together(lambda: check_nothing_lost(self.folder) if new and runtime.is_main else None)
        if new and config.train.init_from:  # before the folder is owned: weights that do not fit leave nothing behind
            runtime.together(lambda: self._initialise(network))

        runtime.together(lambda: self._own_folder(fresh))
        self.workplace = runtime.broadcast(self.owner.workplace if self.owner is not None else None)

        self.store = CheckpointStore(
            self.folder / "checkpoints", runtime, config.checkpoint.keep_last, config.checkpoint.keep_every,
            config.train.global_batch, self.workplace.work,
        )  # fmt: skip
        self.store.tidy()
        reader = self.store.newest()
        state = reader.state if reader is not None else {}
        self.data_changes: list[dict[str, Any]] = []
        self._fix_what_the_start_decides(state)
        runtime.together(lambda: self.data.choose_decoder(state.get("decoder")))
        if reader is not None:
            runtime.together(lambda: self._check_same_run(reader, accept_data_change))

        self.attention: dict[str, str] = {}
        if config.train.attention == "measured":
            recorded = state.get("attention")
            self.attention = attention_backends.pin(network, config, self.plan.micro_batch, runtime, recorded)
        self._no_compile_cache = compile_cache.keep_beside(self.folder) if config.train.compile else None
        self.step_fn = TrainStep(config, runtime, self.plan, network)
        self.validation = runtime.together(self._open_validation)
        self.records = Records(config, runtime, self.plan.global_batch, self.data.samples)
        if reader is not None:
            runtime.together(lambda: self._load(reader, state))
        self.start_step = self.completed
        self.mlflow_run_id = state.get("mlflow_run_id")
        self.total_steps = -(-config.train.images // config.train.global_batch)

    def _open_validation(self) -> Validation | None:
        if self.config.validation.shards is None:
            return None
        found = Validation(self.config, self.runtime, self.data.index)
        if found.warning:
            self._say(f"warning: {found.warning}")
        return found

    def _initialise(self, network: torch.nn.Module) -> None:
        config = self.config
        says = initialise_from(config.train.init_from, network, config.model.name, config.network_keywords())
        here = {**config.diffusion.model_dump(mode="json"), "range": config.data.range}
        for key in sorted(here.keys() & says.diffusion.keys()):
            if says.diffusion[key] != here[key]:
                self._say(
                    f"note: {config.train.init_from} was trained with {key}={says.diffusion[key]}, this run has {here[key]}"
                )

    def _own_folder(self, fresh: bool) -> None:
        if not self.runtime.is_main:
            return
        self.owner = Ownership(self.folder)
        place = self.owner.workplace
        found = [path.name for path in self.folder.iterdir() if path.name != "checkpoints"]
        found += [
            f"checkpoints/{path.name}" for path in (self.folder / "checkpoints").iterdir() if path != place.generation
        ]
        if fresh and found:
            raise UserError(
                f"--fresh: run directory {self.folder} is not empty ({', '.join(sorted(found)[:5])}): choose another run.name, or "
                "leave --fresh out to continue that run"
            )
        self.workplace = place
        try:
            place.remove(self.folder / "exit.json")  # it speaks of the exit before this start
            for name in ("metrics.jsonl", "audit.jsonl"):
                place.renew(self.folder / name)
        except OSError as error:
            raise UserError(
                f"run directory {self.folder} cannot be written: {in_words(error)}; make room or set run.dir"
            ) from None

    def _fix_what_the_start_decides(self, state: dict[str, Any]) -> None:
        optim = self.config.optim
        if optim.decay_images is None:
            optim.decay_images = (
                state.get("config", {}).get("optim", {}).get("decay_images") or self.config.train.images
            )

    def _check_same_run(self, reader: Reader, accept_data_change: bool) -> None:
        check_same_run(reader, self.config)
        self.data_changes = check_same_data(reader, self.config, self.data.fingerprint, accept_data_change, self._say)

    def _load(self, reader: Reader, state: dict[str, Any]) -> None:
        try:
            self.step_fn.engine.load(reader, state["scaler"])
            self.step_fn.ema.load(reader)
        except (Damaged, KeyError, RuntimeError) as error:  # whole, but not written by this program
            raise UserError(f"checkpoint {reader.folder} does not fit its own configuration: {error}") from None
        self.completed = reader.step
        self.records.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))  # the same on every rank
        self.store.saved_step = reader.step

    def run(self, last_words: Callable[[str], None] = lambda text: None) -> int:
        """Train to the budget or until asked to stop. Returns 0 (done) or 75 (stopped, start me again).

        last_words: called with the reason, on one rank, when this process is about to be ended because a rank hangs.
        """
        config, runtime, records = self.config, self.runtime, self.records
        self.snapshots = Snapshots(
            self.folder, runtime, config.ema.snapshot_every, self.plan.global_batch, self.workplace.work
        )
        self.snapshots.begin(self.completed, self._averages)
        if self.completed >= self.total_steps:
            self.snapshots.wait()
            self._say(
                f"{self.folder}: done, {self.completed * self.plan.global_batch:,} images trained of "
                f"{config.train.images:,}; a larger train.images continues it"
            )
            return self._leave(OK, "done")
        self._open_records()
        loader, begun = self.open_loader(), time.monotonic()
        self.watch = watch = Watch(
            runtime, config.train.hang_seconds, lambda: f"step {self.completed + 1}, {loader.doing}", last_words
        )
        stop = StopRequest(runtime)
        reason, failure = None, None
        try:
            while self.completed < self.total_steps and reason is None:
                # The first step compiles.
                with watch.patience() if self.completed == self.start_step else contextlib.nullcontext():
                    result = self.step_fn(self.completed, loader, records.audit)
                self.completed += 1
                if (
                    self.completed == self.start_step + 1
                ):  # a sign of life, long before the first record where steps are slow
                    self._say(f"the first step took {time.monotonic() - begun:.1f} s")
                records.account(result)
                records.write_audit(self.completed, self._pieces)
                with watch.patience():
                    more = self._validate()
                more |= self._replaced(loader)
                records.log(self.completed, result, loader, more)
                with watch.patience():
                    self._preview()
                    if reaches(self.completed, self.plan.global_batch, config.checkpoint.every):
                        self._save()
                    self.snapshots.after_step(self.completed, self._averages)
                watch.step()
                reason = stop.poll(self.owner is not None and self.owner.lost)
            with watch.patience():
                failure = self._save_last()
        except BaseException:
            self._close("FAILED")
            raise
        finally:
            self.data.close()  # the loader may be waiting for a shard
            loader.close()
            with contextlib.suppress(RuntimeError):  # of a peer that is gone
                stop.finish()
        if failure is not None:
            watch.stop()
            self._close("FAILED")
            raise UserError(
                f"the last checkpoint (step {self.completed}) could not be written to {self.store.root}: {failure}. Older "
                "checkpoints are whole; remove the cause (on a full disk make room or lower checkpoint.keep_last) and run the "
                "same command again"
            )
        watch.stop()
        if reason is not None and self.completed < self.total_steps:
            self._close("KILLED")
            self._say(f"stopped by {reason} after step {self.completed}; the same command continues the run")
            return self._leave(REQUEUE, reason)
        self._close("FINISHED")
        return self._leave(OK, "done")

    def _save_last(self) -> OSError | None:
        """The checkpoint of the last step, published; what went wrong with its files."""
        self.snapshots.wait()
        self.store.wait()
        self.runtime.together(self._check_owner)
        if self.store.saved_step != self.completed:
            self._save()
        failure = self.store.wait()
        self.runtime.together(self._check_owner)
        return failure

    def taken_over(self) -> str | None:
        """Who owns the run directory now, in words, if this job did and does not any more."""
        return self.workplace.taken_over() if self.workplace is not None else None

    def _check_owner(self) -> None:
        words = self.taken_over()
        if words is not None:
            raise RunFailed(words)

    # -- what a step leaves behind -------------------------------------------------------------------------------------

    def _replaced(self, loader: Loader) -> dict[str, float]:
        """With data.on_bad=skip, at log steps: how many images of this start stood in for bad ones, on all ranks together."""
        if self.config.data.on_bad != "skip" or self.records.log_step_before(self.completed) is None:
            return {}
        gathered = self.runtime.gather(loader.replaced)
        return {} if gathered is None else {"replaced_samples": sum(gathered)}

    def _validate(self) -> dict[str, float]:
        """The validation loss for the record of this log step, where one is due since the log step before; else nothing."""
        before = self.records.log_step_before(self.completed)
        every = self.config.validation.every or self.config.checkpoint.every
        if self.validation is None or before is None or every is None:
            return {}
        batch = self.plan.global_batch
        if self.completed * batch // every == before * batch // every and self.completed < self.total_steps:
            return {}
        start, step = time.monotonic(), self.step_fn
        loss = self.validation.loss({**step.ema.gather(0), **step.engine.buffers}, step.schedule)
        self.records.pause(time.monotonic() - start)
        return {} if loss is None else {"validation_loss": loss if math.isfinite(loss) else None}

    def _preview(self) -> None:
        sampling = self.config.sampling
        if not reaches(self.completed, self.plan.global_batch, sampling.every):
            return
        start = time.monotonic()
        path = self.folder / "samples" / f"step_{self.completed:08d}.png"
        step = self.step_fn
        weights = {**step.ema.gather(0), **step.engine.buffers}
        preview(self.config, self.runtime, weights, step.schedule, path, self.workplace)
        if self.records.tracker is not None:
            self.records.tracker.picture(path, self.completed)
        self.records.pause(time.monotonic() - start)

    def _pieces(self) -> list:
        return [*self.step_fn.engine.pieces(), *self.step_fn.ema.pieces()]

    def _facts(self) -> dict[str, Any]:
        """What every checkpoint and snapshot says of itself."""
        return {
            "step": self.completed,
            "images_seen": self.completed * self.plan.global_batch,
            "config": self.config.to_dict(),
            "model": {"name": self.config.model.name, "keywords": self.config.network_keywords()},
            "data_fingerprint": self.data.fingerprint,
            "classes": self.data.classes,
        }

    def _averages(self) -> tuple[list[Piece], dict[str, Any]]:
        """What a snapshot holds: the averages, and the buffers that a network made from them needs."""
        step = self.step_fn
        buffers = [piece for piece in step.engine.pieces() if piece.tensor.startswith("buffer/")]
        return [*step.ema.pieces(), *buffers], self._facts()

    def _save(self) -> None:
        if self.snapshots is not None:
            self.snapshots.wait()  # a checkpoint never comes before the snapshots of the steps before it
        tracker = self.records.tracker
        state = {
            **self._facts(),
            "decoder": self.data.decoder,
            "attention": self.attention,
            "scaler": self.step_fn.engine.scaler_state(),
            "sums": self.records.sums.tolist(),
            "mlflow_run_id": tracker.run_id if tracker is not None else None,
            "world_size": self.runtime.world_size,
            "engine": self.config.engine.model_dump(mode="json"),
            "data_changes": self.data_changes,
        }
        self.store.save(self.completed, self._pieces(), state)

    def _open_records(self) -> None:
        config, plan = self.config, self.plan
        self.records.open(self.completed, self.total_steps, self.mlflow_run_id, self.workplace)
        if job := slurm_job(os.environ):
            self._say(
                f"SLURM job {job['slurm.job_id']}, restart {job['slurm.restart_count']}, on {job['slurm.nodes'] or 'this node'}"
            )
        start = f"continuing at step {self.completed:,}" if self.completed else "starting"
        parameters = sum(shape.numel() for shape in self.step_fn.engine.shapes.values())
        ranks = self.runtime.world_size
        self._say(
            f"{config.run.name}: {start} with {parameters:,} parameters on {ranks} {self.runtime.device.type} rank(s); global "
            f"batch {plan.global_batch} = {plan.micro_batch} per rank x {ranks} ranks x {plan.accumulation} accumulation"
        )
        if config.train.cuda_graph and self.runtime.device.type != "cuda":
            self._say("note: train.cuda_graph=true has no effect without a GPU")
        for line in self.data.notes():
            self._say(line)
        if config.train.compile:
            self._say("torch.compile: the first step may take minutes (train.compile=false in a new run leaves it out)")
            if self._no_compile_cache:
                self._say(f"warning: what it makes is not kept beside the runs: {self._no_compile_cache}")
        if config.optim.schedule != "constant" and config.train.images > config.optim.decay_images + plan.global_batch:
            self._say(
                f"note: optim.schedule={config.optim.schedule} ends at {config.optim.decay_images:,} images (fixed at the "
                f"first start); up to train.images={config.train.images:,} the learning rate stays 0. For a longer "
                "schedule start a new run under another run.name"
            )
        # Asked after the files are open: whoever takes over later puts others in their place.
        self.runtime.together(self._check_owner)

    def open_loader(self) -> Loader:
        """The loader from the next step on; time counts for the next log line from now. Collective."""
        loader = self.data.loader(self.plan, range(self.completed, self.total_steps), self._say)
        self.records.begin_interval(self.completed, loader)
        return loader

    def _close(self, status: str) -> None:
        self.records.close(status, abandon=self.taken_over() is not None)

    def _leave(self, code: int, reason: str) -> int:
        self.reason = reason
        return code

    def close(self) -> None:
        """Give the run directory back."""
        if self.watch is not None:
            self.watch.stop()
        if self.owner is not None:
            self.owner.release()
            self.owner = None

    def _say(self, text: str) -> None:
        if self.runtime.is_main:
            print(text, flush=True)
