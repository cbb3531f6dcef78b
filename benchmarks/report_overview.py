"""The first table of report and README: one line for each promise about speed, one column for each machine."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.report_files import Folder, Result
from benchmarks.report_tables import workload
from benchmarks.report_text import NOT_YET, many, number, percent, plain, span
from benchmarks.scaling_table import markdown


def beside_reference(folder: Folder) -> Result | None:
    """The training result with the reference loop in it, of the largest batch."""
    return max(
        (result for result in folder.of("train_throughput") if result.found.reference is not None),
        key=lambda result: result.found.batch_per_rank,
        default=None,
    )


def _fastest(folder: Folder) -> str | None:
    found = max(
        (r.found for r in folder.of("train_throughput")), key=lambda f: f.ddpm_dist.images_per_sec, default=None
    )
    if found is None:
        return None
    ranks = f"{found.world_size} ranks, " if found.world_size > 1 else ""
    where = f"{workload(found.config)}, {ranks}batch {found.batch_per_rank}, {found.config['train.precision']}"
    return f"{number(found.ddpm_dist.images_per_sec)} ({where})"


def _to_reference(folder: Folder) -> str | None:
    result = beside_reference(folder)
    if result is None:
        return None
    found = result.found
    return f"{found.ratio:.2f} ({span(found.ratio_lowest, found.ratio_highest)}, batch {found.batch_per_rank})"


def _mfu(folder: Folder) -> str | None:
    found = max(
        (r.found for r in folder.of("train_throughput") if r.found.ddpm_dist.mfu),
        key=lambda f: f.ddpm_dist.mfu,
        default=None,
    )
    if found is None:
        return None
    peak = f"{number(found.peak_tflops_per_device)} TFLOP/s, {plain(found.peak_source)}"
    return f"{percent(found.ddpm_dist.mfu)} ({peak})"


def _ladder(folder: Folder) -> str | None:
    for result in folder.of("ladder"):
        ran = [rung for rung in result.found.rungs if rung.problem is None]
        if len(ran) > 1 and ran[-1].to_first:
            return f"{ran[-1].to_first:.2f} (batch {result.found.batch})"
    return None


def _loader(folder: Folder) -> str | None:
    entries = [
        (each.images_per_sec, each.name, result.found.size)
        for result in folder.of("loader") for each in result.found.entries
        if each.problem is None and each.name.startswith("ddpm_dist")
    ]  # fmt: skip
    if not entries:
        return None
    rate, name, size = max(entries)
    return f"{number(rate)} ({plain(name)}, {size}x{size})"


def _sampling(sampler: str, ratio: bool) -> Callable[[Folder], str | None]:
    def cell(folder: Folder) -> str | None:
        own = [
            each for result in folder.of("sampling") for each in result.found.entries
            if each.system == "ddpm_dist" and each.sampler == sampler and each.guidance != 1 and each.problem is None
            and (each.to_reference or not ratio)
        ]  # fmt: skip
        if not own:
            return None
        best = max(own, key=lambda each: each.images_per_sec)
        where = f"batch {best.batch}, guidance {best.guidance:g}{', captured' if best.captured else ''}"
        if not ratio:
            return f"{number(best.images_per_sec)} ({where})"
        return f"{best.to_reference.median:.2f} ({span(best.to_reference.lowest, best.to_reference.highest)}, {where})"

    return cell


def _ema(folder: Folder) -> str | None:
    for result in folder.of("ema"):
        name, way = next(iter(result.found.ways.items()))
        return f"{way.update_ms:.3g} ms ({many(result.found.averages, 'average')}, {plain(name)})"
    return None


def _stall(folder: Folder) -> str | None:
    for result in folder.of("checkpoint"):
        found = result.found
        return f"{found.stall_in_steps:.2f} steps of {found.step_s:.3g} s (batch {found.batch_per_rank})"
    return None


PROMISES: list[tuple[str, Callable[[Folder], str | None]]] = [
    ("training, images/s", _fastest),
    ("training, to the reference loop in the same run", _to_reference),
    ("training, MFU", _mfu),
    ("last rung of the ladder that ran, to the reference loop", _ladder),
    ("our loader, images/s", _loader),
    ("`ddpm` sampling, to the original loop step for step", _sampling("ddpm", ratio=True)),
    ("`dpmpp_2m --steps 20` sampling, images/s", _sampling("dpmpp_2m:20", ratio=False)),
    ("update of the averages", _ema),
    ("training held up by a save", _stall),
]


def overview(folders: list[Folder]) -> list[str]:
    """Markdown table. Without a folder of a GPU there is a column for it that says so; what a machine has not run says so too."""
    rows = [("", *(plain(folder.title) for folder in folders))]
    rows += [(label, *(cell(folder) or NOT_YET for folder in folders)) for label, cell in PROMISES]
    if not any(folder.on_gpu for folder in folders):
        rows = [(*row, NOT_YET if index else "GPU") for index, row in enumerate(rows)]
    return markdown(rows)
