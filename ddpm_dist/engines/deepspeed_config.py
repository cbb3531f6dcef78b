"""The DeepSpeed configuration that follows from ours, and what a pass-through ``engine.deepspeed`` may add to it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
from typing import Any

import torch

from ddpm_dist.config import Config
from ddpm_dist.config_files import merge
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.errors import UserError
from ddpm_dist.host_memory import free_host_memory
from ddpm_dist.runtime import Runtime

# Options that follow from keys of ours; both would otherwise claim to decide.
OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision and engine.param_dtype",
    "amp": "train.precision",
    "torch_autocast.enabled": "train.precision",
    "torch_autocast.dtype": "train.precision",
    "data_types": "train.precision and engine.param_dtype",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.cpu_offload_use_pin_memory": "engine.offload_optimizer",
    "compile": "train.compile",
    "timers": "tracking",
    "checkpoint": "checkpoint",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "csv_monitor": "tracking",
    "comet": "tracking",
}
# Options that change what a rank holds, or what is computed, in ways that the checkpoint or the promises do not cover.
UNSUPPORTED = {
    "zero_allow_untested_optimizer": "it is always set, the optimizer is ours",
    "zero_force_ds_cpu_optimizer": "the optimizer is ours, also with engine.offload_optimizer",
    "managed_gradient_accumulation": "micro-batches are counted by the trainer",
    "zero_optimization.compute_grad_norm": "the norm is computed on the device by our own guard",
    "zero_optimization.offload_param": "parameters stay on the device",
    "zero_optimization.cpu_offload_param": "parameters stay on the device",
    "zero_optimization.cpu_offload_params": "parameters stay on the device",
    "activation_checkpointing": "the networks are not written for it",
    "aio": "it is for offloading to disks",
    "prescale_gradients": "the loss is scaled for an average",
    "gradient_predivide_factor": "the loss is scaled for an average",
    "seq_parallel_communication_data_type": "only data parallelism is supported",
    "sparse_gradients": "no network here has any",
    "graph_harvesting": "it is gone from DeepSpeed",
    "disable_allgather": "it is gone from DeepSpeed",
    "zero_optimization.round_robin_gradients": "it shuffles the parameters between the ranks",
    "zero_optimization.zero_hpz_partition_size": "it keeps a second partitioning",
    "zero_optimization.zero_quantized_weights": "it changes the numbers",
    "zero_optimization.zero_quantized_nontrainable_weights": "it changes the numbers",
    "zero_optimization.zero_quantized_gradients": "it changes the numbers",
    "zero_optimization.mics_shard_size": "it changes the partitioning",
    "zero_optimization.mics_hierarchical_params_gather": "it changes the partitioning",
    "zero_optimization.zenflow": "it changes the order of updates",
    "zero_optimization.super_offload": "it changes the optimizer",
    "zero_optimization.legacy_stage1": "it is gone from DeepSpeed",
    "gradient_allreduce_op": "the loss is scaled for an average",
    "compression_training": "it changes the network",
    "data_efficiency": "the order of the data is ours",
    "curriculum_learning": "the order of the data is ours",
    "tensor_parallel": "only data parallelism is supported",
    "autotuning": "it restarts the program by itself",
    "elasticity": "every world size that divides the global batch can resume anyway",
    "load_universal_checkpoint": "checkpoints are ours",
}
SECTIONS = ("zero_optimization", "torch_autocast", "flops_profiler", "comms_logger")
# What else DeepSpeed reads at the top level. It ignores every other word silently, so a typing error would do nothing.
PASSED_ON = (
    "zero_optimization", "torch_autocast", "communication_data_type", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "flops_profiler", "comms_logger", "disable_python_gc",
)  # fmt: skip


def check(config: Config, plan: BatchPlan, runtime: Runtime) -> None:
    """Raise UserError when DeepSpeed is missing, an option is refused, or the offloaded state does not fit into host memory."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "engine.name=deepspeed needs the package deepspeed, which is not installed: pip install 'ddpm_dist[deepspeed]' "
            "(from the checkout: pip install -e '.[deepspeed]'), or use engine.name=ddp"
        )
    count = count_parameters(config)
    values = generate(config, plan, count)
    if config.engine.offload_optimizer:
        _check_host_memory(count, runtime)
    import_deepspeed(runtime)
    _let_deepspeed_read(values)


def _let_deepspeed_read(values: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    where, lines = "engine.deepspeed.zero_optimization.", []
    try:
        DeepSpeedZeroConfig(**values["zero_optimization"])
        where = "engine.deepspeed."
        # It would compare the global batch with the ranks, before it knows how many they are.
        DeepSpeedConfig({key: value for key, value in values.items() if key != "train_batch_size"})
    except ValidationError as error:
        lines = [f"{where}{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    except Exception as error:  # whatever it stumbles over came through engine.deepspeed
        lines = [f"{where.rstrip('.')}: {type(error).__name__}: {error}"]
    if lines:
        raise UserError("DeepSpeed refuses its configuration:\n  " + "\n  ".join(lines))


def import_deepspeed(runtime: Runtime) -> Any:
    """The package, quiet, and told which kind of device it runs on before it looks for itself."""
    if runtime.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # On a CPU DeepSpeed compiles an operator for inference as soon as it starts: a minute, a compiler, and shared memory for
    # nothing that training uses.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return deepspeed


def count_parameters(config: Config) -> int:
    """Parameters of the configured network, without allocating it."""
    from ddpm_dist.models import build_model

    with torch.device("meta"):
        network = build_model(config.model.name, **config.network_keywords())
    return sum(parameter.numel() for parameter in network.parameters())


def generate(config: Config, plan: BatchPlan, parameters: int) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize`` of a network with so many parameters.

    UserError for a pass-through option that ours decides.
    """
    engine, stage = config.engine, config.engine.stage
    for path in _paths(engine.deepspeed):
        _refuse(path)
    autocast = {"fp16": "float16", "bf16": "bfloat16"}.get(config.train.precision)
    pure = engine.param_dtype == "bf16"
    # DeepSpeed allocates a bucket in full: 2 GB of the default 500 million numbers would be more than a small network itself.
    bucket = min(500_000_000, parameters + parameters % 2)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage in (1, 2) and not engine.offload_optimizer:
        zero["compute_grad_norm"] = False  # a wait for the device in every step; our guard needs none
    if stage == 3:
        zero["memory_efficient_linear"] = False  # it replaces torch's linear by one that rounds differently
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    ours: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0,  # done by the guard, on the device
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # As under DDP gradients travel in fp32. Lower precision on the wire: list modules in lower_precision_safe_modules.
        "torch_autocast": {
            "enabled": autocast is not None and not pure,
            "dtype": autocast or "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # waits for the device in every step
        "steps_per_print": 2**62,
    }
    if pure:
        ours["torch_autocast"]["enabled"] = False
        ours["bf16"] = {"enabled": True, "check_grad_overflow": False}
        if stage == 1:
            # With an fp32 buffer DeepSpeed takes another optimizer here, one that waits for the device.
            ours["data_types"] = {"grad_accum_dtype": "bf16"}
        else:
            ours["data_types"] = {"grad_accum_dtype": "fp32"}
    return merge(ours, engine.deepspeed)


def _paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        if not isinstance(key, str) or "." in key:
            raise UserError(
                f"engine.deepspeed: {path!r} is no name of an option; write options of a section nested, {{section: {{option: 1}}}}"
            )
        if not prefix and key in SECTIONS and not isinstance(value, dict):
            raise UserError(f"engine.deepspeed.{key} must be a mapping of options (got {value!r:.60})")
        if path == "torch_autocast.lower_precision_safe_modules":
            _check_modules(value)
        found.append(path)
        if isinstance(value, dict):
            found += _paths(value, f"{path}.")
    return found


def _check_modules(names: Any) -> None:
    """DeepSpeed imports each of these classes by its name, and stumbles over one that it does not find."""
    for name in names if isinstance(names, list) else [names]:
        module, _, word = str(name).rpartition(".")
        try:
            found = isinstance(names, list) and hasattr(importlib.import_module(module), word)
        except (ImportError, ValueError):
            found = False
        if not found:
            raise UserError(
                f"engine.deepspeed.torch_autocast.lower_precision_safe_modules: {name!r} is no class that can be imported; give a list "
                "such as [torch.nn.Linear]"
            )


def _refuse(path: str) -> None:
    if path in OWNED:
        raise UserError(f"engine.deepspeed.{path} conflicts with {OWNED[path]}, which decides it: set that one instead")
    if path in UNSUPPORTED:
        raise UserError(f"engine.deepspeed.{path} is not supported: {UNSUPPORTED[path]}; leave it out")
    known = [*PASSED_ON, "torch_autocast.lower_precision_safe_modules"]
    if path not in known and ("." not in path or path.startswith("torch_autocast.")):
        close = difflib.get_close_matches(path, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it knows {', '.join(known)}"
        raise UserError(f"engine.deepspeed.{path}: DeepSpeed has no such option; {hint}")


def _check_host_memory(count: int, runtime: Runtime) -> None:
    """fp32 weights, two moments and a gradient of every parameter live in the memory of the hosts, spread over all ranks."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size))
    # Masters, two moments, gradient, and a staging copy in the parameters' own type.
    needed = count * (4 + 8 + 4 + 4) * local // runtime.world_size
    free = free_host_memory()
    if free is not None and needed > free:
        raise UserError(
            f"engine.offload_optimizer needs about {needed / 2**30:.1f} GiB of host memory on this node for {count:,} parameters "
            f"({local} of {runtime.world_size} ranks are here), {free / 2**30:.1f} GiB are free: use more nodes, a smaller "
            "model, or engine.offload_optimizer=false"
        )
