"""The README's section on speed: short tables and what they mean, all made of the JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report_files import Folder, Result
from benchmarks.report_overview import beside_reference, overview
from benchmarks.report_tables import arithmetic, ema_rows, workload
from benchmarks.report_text import NOT_YET, Page, gigabytes, many, number, plain, span
from benchmarks.scaling_table import markdown
from ddpm_dist.errors import UserError

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SAMPLERS = ("ddpm", "ddim:50", "dpmpp_2m:20")  # of those in the report
NOISY = 1.2  # highest to lowest rate of the same thing, from which on a reader is told


def _training(folder: Folder, page: Page) -> list[str]:
    result = beside_reference(folder)
    if result is None:
        return []
    found = result.found
    rows = [(
        f"training step, {workload(found.config)}, batch {found.batch_per_rank}", "images/s", "lowest .. highest", "peak memory",
    )]  # fmt: skip
    for name, loop in (
        (f"ddpm_dist, {arithmetic(found.config)}", found.ddpm_dist),
        ("reference loop", found.reference),
    ):
        memory = f"{loop.peak_memory_gb:.2f} GB" if loop.peak_memory_gb else "-"
        low, high = loop.images_per_sec_lowest, loop.images_per_sec_highest
        rows.append((name, number(loop.images_per_sec), span(low, high), memory))
    rows.append((
        f"ratio, median of {found.turns} interleaved turns", f"**{found.ratio:.2f}**", span(found.ratio_lowest, found.ratio_highest), "",
    ))  # fmt: skip
    spread = max(
        loop.images_per_sec_highest / loop.images_per_sec_lowest for loop in (found.ddpm_dist, found.reference)
    )
    noise = (
        f" The turns differ by a factor of up to {spread:.1f}: the ratio, taken within each turn, is what counts."
        if spread > NOISY
        else ""
    )
    return [
        "Measured in one run, interleaved with a loop written the way the original single-GPU program is (fp32, full attention weights,",
        "per-parameter EMA, ImageFolder and DataLoader):",
        "",
        *markdown(rows),
        "",
        f"{_from(folder, page, result)}.{noise}",
    ]


def _sampling_table(folder: Folder, page: Page) -> list[str]:
    for result in folder.of("sampling"):
        entries = [each for each in result.found.entries if each.guidance != 1]
        original = [each for each in entries if each.system == "reference"]
        if original:
            break
    else:
        return []
    found, guidance = result.found, original[0].guidance
    entries = [each for each in entries if each.guidance == guidance]
    batches = sorted({each.batch for each in entries})
    header = [f"sampling {found.image_size}x{found.image_size}, guidance {guidance:g}, {found.precision}"]
    for batch in batches:
        header += [f"batch {batch}: images/s", "to the original"]
    rows = [tuple(header)]

    def row(label: str, chosen: list[Any]) -> None:
        cells = [label]
        for batch in batches:
            each = next((one for one in chosen if one.batch == batch), None)
            if each is None or each.problem is not None:
                cells += [plain(each.problem) if each else "-", "-"]
                continue
            ratio = each.to_reference
            cells += [
                number(each.images_per_sec),
                f"**{number(ratio.median)}** ({span(ratio.lowest, ratio.highest)})" if ratio else "",
            ]
        rows.append(tuple(cells))

    row(f"original loop, {original[0].evaluations} steps", [each for each in entries if each.system == "reference"])
    for sampler in SAMPLERS:
        own = [each for each in entries if each.system == "ddpm_dist" and each.sampler == sampler]
        for captured in sorted({each.captured for each in own}, reverse=True):
            name, _, steps = sampler.partition(":")
            label = f"`{name} --steps {steps}`" if steps else f"`{name}`, {own[0].evaluations} steps"
            row(label + (", captured" if captured else ""), [each for each in own if each.captured == captured])
    return [*markdown(rows), "", f"{_from(folder, page, result)}; all samplers, and diffusers, are in the report."]


def _engines(folder: Folder, page: Page) -> list[str]:
    measured = next((result for result in folder.of("engines") if result.found.measured), None)
    if measured is None:
        return []
    large = next((result for result in folder.of("engines") if not result.found.measured), None)
    found, header = measured.found, ["", "images/s", "to DDP", "state held", "peak memory", "state saved"]
    size = f"{large.found.parameters / 1e9:.2g} B" if large else ""
    rows = [tuple([*header, *([f"{size}: held", f"{size}: saved"] if large else [])])]
    for name, engine in found.engines.items():
        cells = [name, number(engine.images_per_sec), f"{engine.to_ddp:.2f}"]
        cells += [gigabytes(value) for value in (engine.calculated.held, engine.peak_bytes, engine.saved_bytes)]
        if large:
            state = large.found.engines[name].calculated if name in large.found.engines else None
            cells += [gigabytes(state.held), gigabytes(state.saved)] if state else ["-", "-"]
        rows.append(tuple(cells))
    lines = [
        f"Engines, {found.parameters:,} parameters on {found.processes} ranks, {found.precision}, batch {found.batch_per_rank} per rank"
        + (
            f", and by calculation the state that a rank of {large.found.processes} holds for {size} parameters, without activations:"
            if large
            else ":"
        ),
        "",
        *markdown(rows),
        "",
        f"{_from(folder, page, measured)}" + (f"; calculated: {page.source(large, folder)}." if large else "."),
    ]
    if all(engine.to_ddp <= 1 for engine in found.engines.values()):
        lines.append(
            "DDP was the fastest here: for a network of this size it is the engine to use; ZeRO is for what does not fit."
        )
    if not folder.on_gpu:
        lines.append(
            "(Peak memory on a CPU is the resident set, communication buckets and the Python packages included.)"
        )
    return lines


def _averages(folder: Folder, page: Page) -> list[str]:
    for result in folder.of("ema"):
        found = result.found
        header, *rows = ema_rows(result)
        head = (f"{many(found.averages, 'average')} of {found.parameters:,} parameters", *header[1:])
        return [*markdown([head, *rows]), "", f"{_from(folder, page, result)}."]
    return []


def _checkpoints(folder: Folder, page: Page) -> list[str]:
    for result in folder.of("checkpoint"):
        found = result.found
        rows = [
            (f"{many(found.world_size, 'rank')}, {gigabytes(found.bytes_per_rank)} of state each", f"in steps of {found.step_s:.2f} s", "to plain torch"),
            ("training held up by a save, in all", f"{found.stall_in_steps:.2f}", f"{found.stall_to_torch_save:.2f} x torch.save"),
            ("of it before the next step starts (the copy)", f"{found.save_copy_s / found.step_s:.2f}", ""),
            ("resume: check every hash and load", f"{found.resume_in_steps:.2f}", f"{found.resume_to_torch_load:.2f} x torch.load"),
        ]  # fmt: skip
        lines = [*markdown(rows), "", f"{_from(folder, page, result)}."]
        if not folder.on_gpu:
            cores = result.environment.hardware.cores
            lines.append(f"The saving thread and the training share {many(cores, 'core')} here.")
        return lines
    return []


def _from(folder: Folder, page: Page, result: Result) -> str:
    torch = result.environment.versions.get("torch", "of an unknown version")
    return f"{plain(folder.title)}, torch {torch}, {page.source(result, folder)}"


def section(folders: list[Folder], page: Page, report: Path) -> str:
    """What stands between the markers. Each table is of the first machine that has it, those with GPUs first."""
    lines = [
        "<!-- Written by python -m benchmarks.report from the files in benchmarks/results; changes made here are lost. -->",
        "",
        *overview(folders),
        "",
        f"Medians, with the lowest and highest turn. Everything that was measured: {page.link(report, 'report')}.",
    ]
    for table in (_training, _sampling_table, _engines, _averages, _checkpoints):
        found = next(filter(None, (table(folder, page) for folder in folders)), [])
        lines += ["", *found] if found else []
    if not any(folder.on_gpu for folder in folders):
        lines += [
            "",
            f"GPU numbers: {NOT_YET}. `benchmarks/gpu_suite.sh` makes them; none are printed here before a GPU has run it.",
        ]
    return "\n".join(lines) + "\n"


def replaced(text: str, path: Path, body: str) -> str:
    """The README with ``body`` between its markers. UserError where there is not one pair of them."""
    counts = text.count(BEGIN), text.count(END)
    if counts != (1, 1) or text.index(BEGIN) > text.index(END):
        raise UserError(
            f"{path}: needs one line {BEGIN} and after it one line {END}, around what the report writes; found {counts[0]} and "
            f"{counts[1]}{' in the wrong order' if counts == (1, 1) else ''}"
        )
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{body}{END}{rest.split(END)[1]}"
