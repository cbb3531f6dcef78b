"""The tables of ``benchmarks/REPORT.md`` on the training step: throughput, kernels, memory and the start of a run."""

from __future__ import annotations

from typing import Any

from benchmarks.report_files import Folder, Result
from benchmarks.report_text import Page, many, number, percent, plain, share, span
from benchmarks.scaling_table import markdown

COUNTS = {
    "launches_per_step": "launches",
    "kernels_per_step": "kernels on the device",
    "aten_ops_per_step": "aten operations",
}


def workload(config: dict[str, Any]) -> str:
    """ "flagship, 64x64" for the network of cifar64.yaml as it is, else the network and what is set of it."""
    chosen = [f"{key.removeprefix('model.')}={config[key]}" for key in config if key.startswith("model.")]
    name = "flagship" if chosen == ["name=unet_conditional"] else " ".join([config["model.name"], *chosen[1:]])
    return f"{plain(name)}, {config['data.image_size']}x{config['data.image_size']}"


def arithmetic(config: dict[str, Any]) -> str:
    """Such as "bf16, channels_last, compile"."""
    chosen = [name for name in ("channels_last", "compile", "cuda_graph") if config.get(f"train.{name}")]
    return ", ".join([config["train.precision"], *chosen])


def training(folder: Folder, page: Page) -> list[str]:
    rows = [(
        "network", "batch per rank", "ranks", "loop", "images/s", "lowest .. highest", "step", "waiting for data", "peak memory",
        "per image", "TFLOP/s", "MFU", "MFU of the data sheet", "to the reference",
    )]  # fmt: skip
    results = sorted(folder.of("train_throughput"), key=lambda r: (r.found.batch_per_rank, r.found.world_size))
    for found in (result.found for result in results):
        for name, loop in (
            (f"ddpm_dist, {arithmetic(found.config)}", found.ddpm_dist),
            ("the same, compute only", found.compute_only),
            ("reference, fp32", found.reference),
        ):
            if loop is None:
                continue
            ours = loop is found.ddpm_dist
            ratio = f"{found.ratio:.2f} ({span(found.ratio_lowest, found.ratio_highest)})" if found.ratio else "-"
            memory, each = loop.peak_memory_gb, loop.peak_memory_mb_per_image
            rows.append((
                workload(found.config), str(found.batch_per_rank), str(found.world_size), name, number(loop.images_per_sec),
                span(loop.images_per_sec_lowest, loop.images_per_sec_highest), f"{loop.step_ms:.1f} ms",
                percent(loop.data_wait_frac) if loop is not found.compute_only else "-", f"{memory:.2f} GB" if memory else "-",
                f"{number(each)} MB" if each else "-", f"{loop.tflops:.3g}", percent(loop.mfu) if loop.mfu else "-",
                percent(loop.mfu_nominal) if loop.mfu_nominal else "-", ratio if ours else "",
            ))  # fmt: skip
    lines = [*markdown(rows), *_inside(results), ""]
    for result in results:
        found = result.found
        reason = f"; without the reference: {plain(found.reference_skipped)}" if found.reference_skipped else ""
        nominal = found.nominal_tflops_per_device
        sheet = f", by the data sheet {number(nominal)} TFLOP/s" if nominal else ""
        lines.append(
            f"- {page.source(result, folder)}; {found.turns} turns, {plain(found.config['data.source'])} data, "
            f"{found.training_gflop_per_image:.2f} GFLOP per training image, MFU of {number(found.peak_tflops_per_device)} "
            f"TFLOP/s ({plain(found.peak_source)}){sheet}, memory: {plain(found.memory)}{reason}"
        )
    return lines


def _inside(results: list[Result]) -> list[str]:
    """What a step is made of, for the reports that say so."""
    rows = [(
        "inside a step of ddpm_dist", "batch per rank", "ranks", "data costs", "averages", "records", "single steps", "5 .. 95 %", "99 %",
        "in a step",
    )]  # fmt: skip
    for found in (result.found for result in results):
        if found.data_frac is None:
            continue
        steps = found.ddpm_dist.step_percentiles or {}
        cells = {
            name: f"{steps[f'{name}_ms']:.1f} ms" if f"{name}_ms" in steps else "-"
            for name in ("p5", "p50", "p95", "p99")
        }
        counts = [
            f"{getattr(found, key):,} {words}" for key, words in COUNTS.items() if getattr(found, key) is not None
        ]
        rows.append((
            workload(found.config), str(found.batch_per_rank), str(found.world_size), share(found.data_frac, found.data_frac_turns),
            share(found.ema_frac, found.ema_frac_turns), share(found.logging_frac, found.logging_frac_turns),
            f"{cells['p50']} (median of {steps.get('steps', 0):g})",
            f"{cells['p5']} .. {cells['p95']}" if "p5_ms" in steps else "-", cells["p99"], ", ".join(counts) or "-",
        ))  # fmt: skip
    return ["", *markdown(rows)] if len(rows) > 1 else []


def kernels(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("kernels"):
        found = result.found
        rows = [("kernel", "FLOP per byte", "TFLOP/s", "of its roof")]
        for kernel in found.kernels:
            roof = min(found.peak_tflops, kernel.flop_per_byte * found.peak_gb_per_sec / 1e3)
            rows.append(
                (plain(kernel.name), number(kernel.flop_per_byte), number(kernel.tflops), percent(kernel.tflops / roof))
            )
        head = f"Roofs of the same run: {number(found.peak_tflops)} TFLOP/s, {number(found.peak_gb_per_sec)} GB/s."
        lines += ["", head, "", *markdown(rows)]
        if found.steps:
            rows = [("the whole step", "time", "to the sum of its kernels, each the best way")]
            rows += [
                (plain(name), f"{number(step.ms)} ms", f"{step.to_best:.2f}") for name, step in found.steps.items()
            ]
            lines += ["", *markdown(rows)]
        lines += page.sources([result], folder)
    return lines[1:]


def activations(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("activations"):
        found, more = result.found, result.found.model_extra or {}
        config = more.get("config") or {}
        where = (
            f"{workload(config)}, {arithmetic(config)}, "
            if {"model.name", "data.image_size", "train.precision"} <= config.keys()
            else ""
        )
        method = f"; {plain(more['method'])}" if more.get("method") else ""
        head = f"{where}batches {', '.join(map(str, found.batches))}, {found.device}{method}."
        rows = [
            ("per image", "MB"), ("kept for the backward pass, the least autograd needs", f"{found.minimum_mb_per_image:.2f}"),
            ("peak of a step", f"{found.peak_mb_per_image:.2f}"), ("peak to the least", f"{found.ratio:.3f}"),
        ]  # fmt: skip
        lines += ["", head, "", *markdown(rows), *page.sources([result], folder)]
    return lines[1:]


def startup(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("startup"):
        found = result.found
        rows = [
            (
                "start",
                "to the end of the first step",
                "lowest .. highest",
                "the first step alone",
                "whole command",
                "files compiled",
            )
        ]
        for kind, start in found.starts.items():
            turns = start.until_first_step_s_turns
            rows.append((
                {"first": "first, nothing is compiled", "second": "second, with the kept cache"}[kind], f"{start.until_first_step_s:.1f} s",
                f"{min(turns):.1f} .. {max(turns):.1f} s", f"{start.first_step_s:.1f} s", f"{start.total_s:.1f} s",
                f"{start.files_compiled:g}",
            ))  # fmt: skip
        turns = found.second_to_first_turns
        head = (
            f"{plain(found.network)} at {found.image_size}x{found.image_size}, {found.precision}, {many(found.processes, 'rank')}, batch "
            f"{found.batch_per_rank} per rank, {found.turns} turns, {found.device}."
        )
        tail = f"The second start takes {found.second_to_first:.2f} ({span(min(turns), max(turns))}) of the first."
        lines += ["", head, "", *markdown(rows), "", tail, *page.sources([result], folder)]
    return lines[1:]
