"""The tables of ``benchmarks/REPORT.md``, one function for each benchmark: the results of one machine to lines of Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.loader_tables import section_lines
from benchmarks.report_files import Folder, Result
from benchmarks.report_schema import Part
from benchmarks.report_tables_step import activations, arithmetic, kernels, startup, training, workload
from benchmarks.report_text import Page, gigabytes, many, number, percent, plain, span, with_span
from benchmarks.sampling_table import markdown as sampling_markdown
from benchmarks.scaling_table import markdown
from benchmarks.scaling_table import table as scaling_markdown


def ladder(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("ladder"):
        rows = [("switch", "images/s", "lowest .. highest", "to the one before", "to the first", "peak memory")]
        for rung in result.found.rungs:
            label = plain(rung.name)
            if rung.problem is not None:
                rows.append((label, plain(rung.problem), *["-"] * 4))
                continue
            ratios = [f"{ratio:.2f}" if ratio else "-" for ratio in (rung.to_before, rung.to_first)]
            memory = f"{rung.peak_memory_gb:.2f} GB" if rung.peak_memory_gb else "-"
            rows.append((label, number(rung.images_per_sec), span(rung.lowest, rung.highest), *ratios, memory))
        more = result.found.model_extra or {}
        known = {"network", "image_size"} <= more.keys()
        network = f", {plain(more['network'])} at {more['image_size']}x{more['image_size']}" if known else ""
        lines += ["", f"Batch {result.found.batch}{network}.", "", *markdown(rows), ""]
        lines += [f"- {plain(rung.name)}: {plain(rung.what)}" for rung in result.found.rungs]
        for what, parts in (("attention", result.found.attention), ("upsampling", result.found.upsampling)):
            lines += ["", *_parts(what, parts)] if parts else []
        lines += page.sources([result], folder)
    return lines[1:]


def _parts(what: str, parts: list[Part]) -> list[str]:
    """A row for each shape, a column for each variant, the fastest in bold."""
    variants = list(dict.fromkeys(part.variant for part in parts))
    rows: dict[str, dict[str, str]] = {}
    for part in parts:
        about = ", ".join(f"{key} {_listed(value)}" for key, value in (part.model_extra or {}).items())
        cell = f"{number(part.ms)} ms" if part.problem is None else part.problem.partition(":")[0]
        rows.setdefault(plain(about), {})[part.variant] = f"**{cell}**" if part.fastest else plain(cell)
    header = (f"{what}, forward and backward", *map(plain, variants))
    return markdown([header, *((about, *(cells.get(name, "-") for name in variants)) for about, cells in rows.items())])


def _listed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def loader(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("loader"):
        rows = [(
            "loader", "images/s", "lowest .. highest", "CPU seconds per 1,000 images", "to DALI's own reader", "to webdataset",
        )]  # fmt: skip
        for each in result.found.entries:
            if each.problem is not None:
                rows.append((plain(each.name), plain(each.problem), *["-"] * 4))
                continue
            cpu = "-" if each.cpu_s_per_1000 is None else f"{each.cpu_s_per_1000:.3g}"
            ratios = ["-" if one is None else with_span(one) for one in (each.to_dali, each.to_webdataset)]
            rows.append((plain(each.name), number(each.images_per_sec), span(each.lowest, each.highest), cpu, *ratios))
        more = result.found.model_extra or {}
        cores = f", {many(result.found.cores, 'core')} for each loader"
        limits = ["", f"{plain(more['limits'])}."] if more.get("limits") else []
        head = f"JPEGs of {result.found.size}x{result.found.size} pixels{cores}."
        loaders = ["", head, "", *markdown(rows), *limits] if result.found.entries else []
        sections = section_lines(result.data)
        lines += [*loaders, *([""] if sections else []), *sections, *page.sources([result], folder)]
    return lines[1:]


def sampling(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("sampling"):
        lines += ["", *sampling_markdown(result.data).splitlines(), *page.sources([result], folder)]
    return lines[1:]


def quality(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("sampler_quality"):
        found = result.found
        rows = [("sampler", "network calls", "recognized", "worst class", "Frechet", "diversity", "seconds")]
        for each in found.found:
            score = each.scores
            rows.append((
                plain(each.sampler), str(each.network_calls), percent(score.recognized),
                percent(min(score.recognized_per_class.values())), f"{score.frechet:.2f}", f"{score.diversity:.2f}",
                f"{each.seconds:.1f}",
            ))  # fmt: skip
        real = found.found[-1].scores
        rows.append(("real images", "", percent(real.held_out_accuracy), "", f"{real.frechet_real:.2f}", "1.00", ""))
        head = f"Run {plain(found.run)}, {found.num:,} images for each sampler, guidance {found.guidance:g}."
        lines += ["", head, "", *markdown(rows), *page.sources([result], folder)]
    return lines[1:]


def ema_rows(result: Result) -> list[tuple[str, ...]]:
    """Also for the README."""
    rows = [("way", "update", "to sharded", "memory per rank")]
    for name, way in result.found.ways.items():
        rows.append(
            (plain(name), f"{way.update_ms:.1f} ms", f"{way.times_sharded:.1f}x", gigabytes(way.bytes_per_rank))
        )
    return rows


def ema(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("ema"):
        found = result.found
        head = f"{many(found.averages, 'average')} of {found.parameters:,} parameters, sharded over {many(found.ranks, 'rank')}, {found.device}."
        lines += ["", head, "", *markdown(ema_rows(result)), *page.sources([result], folder)]
    return lines[1:]


def checkpoint(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("checkpoint"):
        found = result.found
        rows = [("", "seconds", "in steps", "to plain torch")]
        for label, seconds, ratio in (
            ("step", found.step_s, None), ("save: training held up, in all", found.save_stall_s, found.stall_to_torch_save),
            ("of it before the next step starts (the copy)", found.save_copy_s, None),
            ("save: published after", found.save_until_published_s, None), ("torch.save", found.torch_save_s, 1.0),
            ("resume: check every hash and load", found.resume_s, found.resume_to_torch_load),
            ("torch.load", found.torch_load_s, 1.0),
        ):  # fmt: skip
            rows.append((
                label, f"{seconds:.3f}", f"{seconds / found.step_s:.2f}", "-" if ratio is None else f"{ratio:.2f}",
            ))  # fmt: skip
        head = (
            f"{many(found.world_size, 'rank')}, {plain(found.engine)}, {gigabytes(found.bytes_per_rank)} of state per rank, batch "
            f"{found.batch_per_rank} per rank, {found.turns} turns, {found.device}."
        )
        lines += ["", head, "", *markdown(rows), *page.sources([result], folder)]
    return lines[1:]


def engines(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("engines"):
        found, measured = result.found, result.found.measured
        header = ("per rank", "images/s", "to DDP", "peak memory", "state saved", "state held (calculated)")
        rows = [header if measured else ("per rank", "state held (calculated)", "state saved (calculated)")]
        for name, engine in found.engines.items():
            held, saved = gigabytes(engine.calculated.held), gigabytes(engine.calculated.saved)
            if measured:
                ratio = f"{engine.to_ddp:.2f}"
                if engine.to_ddp_turns and name != "DDP":
                    ratio += f" ({span(min(engine.to_ddp_turns), max(engine.to_ddp_turns))})"
                rows.append((
                    name, number(engine.images_per_sec), ratio, gigabytes(engine.peak_bytes), gigabytes(engine.saved_bytes), held,
                ))  # fmt: skip
            else:
                rows.append((name, held, saved))
        head = (
            f"{found.parameters:,} parameters, {many(found.processes, 'rank')}, {many(found.averages, 'average')}, {found.precision}, batch "
            f"{found.batch_per_rank} per rank, "
            + (f"{found.turns} turns." if measured else "calculated, nothing was run.")
        )
        lines += ["", head, "", *markdown(rows), *page.sources([result], folder)]
    return lines[1:]


def scaling(folder: Folder, page: Page) -> list[str]:
    lines = []
    for result in folder.of("scaling"):
        lines += ["", *scaling_markdown(result.data).splitlines(), *page.sources([result], folder)]
    return lines[1:]


__all__ = ["SECTIONS", "arithmetic", "ema_rows", "workload"]

# In the order of the report: benchmark, heading, tables, and the plot that follows (see report_plots).
SECTIONS: list[tuple[str, str, Callable[[Folder, Page], list[str]], str | None]] = [
    ("train_throughput", "Training throughput", training, "throughput"),
    ("ladder", "Ladder: from the reference loop to ours, one switch at a time", ladder, "ladder"),
    ("kernels", "Roofline", kernels, "roofline"),
    ("activations", "Memory of a step", activations, None),
    ("startup", "Start of a run", startup, None),
    ("loader", "Loader", loader, None),
    ("sampling", "Sampling", sampling, None),
    ("sampler_quality", "Quality of the samplers", quality, None),
    ("ema", "Averages of the weights (EMA)", ema, None),
    ("checkpoint", "Checkpoints", checkpoint, None),
    ("engines", "Engines", engines, None),
    ("scaling", "Scaling over the ranks", scaling, "scaling"),
]
