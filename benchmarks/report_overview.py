"""The first table of report and README: one line for each promise about speed, one column for each machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.report_files import Folder, Result
from benchmarks.report_tables import workload
from benchmarks.report_text import NOT_YET, many, number, percent, plain, share, span, with_span
from benchmarks.scaling_table import markdown

SMALL = 16  # images per rank up to which launching kernels takes longer than running them
OUR_LOADER = "ddpm_dist, cpu"


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
    if found.ddpm_dist.mfu_nominal:
        peak += (
            f"; {percent(found.ddpm_dist.mfu_nominal)} of the data sheet's {number(found.nominal_tflops_per_device)}"
        )
    return f"{percent(found.ddpm_dist.mfu)} ({peak})"


def _data_wait(folder: Folder) -> str | None:
    waits = [result.found.ddpm_dist.data_wait_frac for result in folder.of("train_throughput")]
    return f"{percent(max(waits))} (the most of {many(len(waits), 'report')})" if waits else None


def _part(name: str) -> Callable[[Folder], str | None]:
    """What a part takes of the step, at the largest batch."""

    def cell(folder: Folder) -> str | None:
        found = max(
            (r.found for r in folder.of("train_throughput") if getattr(r.found, name) is not None),
            key=lambda f: f.batch_per_rank,
            default=None,
        )
        if found is None:
            return None
        return f"{share(getattr(found, name), getattr(found, f'{name}_turns'))}, batch {found.batch_per_rank}"

    return cell


def _memory(folder: Folder) -> str | None:
    for result in folder.of("activations"):
        found = result.found
        return f"{found.ratio:.2f} ({number(found.peak_mb_per_image)} to {number(found.minimum_mb_per_image)} MB per image)"
    return None


def _kernels(folder: Folder) -> str | None:
    steps = [
        (step.to_best, name)
        for result in folder.of("kernels")
        for name, step in (result.found.steps or {}).items()
        if not name.startswith("reference")
    ]
    return f"{min(steps)[0]:.2f} ({plain(min(steps)[1])})" if steps else None


def _graph(folder: Folder) -> str | None:
    """The rung of the ladder that makes the step one graph, at a batch where launching counts."""
    for result in folder.of("ladder"):
        for rung in result.found.rungs:
            if "graph" in rung.name and rung.to_before and result.found.batch <= SMALL:
                return f"{rung.to_before:.2f} (batch {result.found.batch})"
    return None


def _startup(folder: Folder) -> str | None:
    for result in folder.of("startup"):
        found = result.found
        first, second = (found.starts[kind].until_first_step_s for kind in ("first", "second"))
        return (
            f"{second:.1f} s, the first {first:.1f} s ({plain(found.network)}, {found.image_size}x{found.image_size})"
        )
    return None


def _ladder(folder: Folder) -> str | None:
    for result in folder.of("ladder"):
        ran = [rung for rung in result.found.rungs if rung.problem is None]
        if len(ran) > 1 and ran[-1].to_first:
            return f"{ran[-1].to_first:.2f} (batch {result.found.batch})"
    return None


def _loader(folder: Folder) -> str | None:
    """Per report our loader without a cache and the fastest of ours, which usually gathers what was decoded before."""
    cells = []
    for result in folder.of("loader"):
        own = [each for each in result.found.entries if each.problem is None and each.name.startswith("ddpm_dist")]
        words = [f"{number(each.images_per_sec)} decoded" for each in own if each.name == OUR_LOADER]
        best = max(own, key=lambda each: each.images_per_sec, default=None)
        if best is not None and best.name != OUR_LOADER:
            words.append(f"{number(best.images_per_sec)} ({plain(best.name)})")
        if words:
            side, cores = result.found.size, result.found.cores
            cells.append(f"{', '.join(words)}, {side}x{side}, {many(cores, 'core')}")
    return "; ".join(cells) or None


def _loader_to(key: str) -> Callable[[Folder], str | None]:
    """Our loader on the CPU without a cache, the first of the report, to another one at equal cores."""

    def cell(folder: Folder) -> str | None:
        found = [
            f"{with_span(getattr(each, key))}, {result.found.size}x{result.found.size}"
            for result in folder.of("loader")
            for each in result.found.entries
            if each.name == OUR_LOADER and each.problem is None and getattr(each, key) is not None
        ]
        return "; ".join(found) or None

    return cell


def _loader_section(name: str, what: Callable[[Any], str]) -> Callable[[Folder], str | None]:
    """A section of the loader benchmark, of every size that was measured."""

    def cell(folder: Folder) -> str | None:
        found = [
            f"{what(getattr(result.found, name))}, {result.found.size}x{result.found.size}"
            for result in folder.of("loader")
            if getattr(result.found, name) is not None and getattr(result.found, name).problem is None
        ]
        return "; ".join(found) or None

    return cell


def _speed(found: Any) -> str:
    speed = found.mb_per_cpu_second
    return f"{number(speed.median)} ({span(speed.lowest, speed.highest)})"


def _shards_sent(found: Any) -> str:
    return ", ".join(f"{start.shards_sent.highest:g} ({plain(start.name)})" for start in found.cold)


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


INDEXING, CHECKING = "indexing shards, MB/s of one core", "checking every image, to DALI's decoding alone"
WARM_CACHE = "our loader on a warm shard cache, to local shards"
COLD_START = "cold start of a loader: shards that were sent at the first batch, at most"
PROMISES: list[tuple[str, Callable[[Folder], str | None]]] = [
    ("training, images/s", _fastest),
    ("training, to the reference loop in the same run", _to_reference),
    ("training, MFU", _mfu),
    ("training step, to the sum of its kernels, each the best way", _kernels),
    ("training step as one CUDA graph, to without, small batch", _graph),
    ("training, waiting for data", _data_wait),
    ("training, share of the averages (EMA)", _part("ema_frac")),
    ("training, share of logging and tracking", _part("logging_frac")),
    ("training, peak memory to the least that autograd keeps", _memory),
    ("second start of a compiled run, to its first step", _startup),
    ("last rung of the ladder that ran, to the reference loop", _ladder),
    ("our loader, images/s", _loader),
    ("our loader, to DALI's own reader", _loader_to("to_dali")),
    ("our loader, to webdataset and DataLoader", _loader_to("to_webdataset")),
    (INDEXING, _loader_section("indexing", _speed)),
    (CHECKING, _loader_section("check", lambda found: with_span(found.check_to_dali))),
    (WARM_CACHE, _loader_section("streaming", lambda found: with_span(found.loader.to_local))),
    (COLD_START, _loader_section("streaming", _shards_sent)),
    ("`ddpm` sampling, to the original loop step for step", _sampling("ddpm", ratio=True)),
    ("`dpmpp_2m --steps 20` sampling, images/s", _sampling("dpmpp_2m:20", ratio=False)),
    ("update of the averages", _ema),
    ("training held up by a save", _stall),
]


# Younger than the oldest reports: their lines stand there as soon as one machine has measured them.
YOUNGER = (INDEXING, CHECKING, WARM_CACHE, COLD_START)


def overview(folders: list[Folder]) -> list[str]:
    """Markdown table. Without a folder of a GPU there is a column for it that says so; what a machine has not run says so too."""
    rows = [("", *(plain(folder.title) for folder in folders))]
    for label, cell in PROMISES:
        cells = [cell(folder) for folder in folders]
        if any(cells) or label not in YOUNGER:
            rows.append((label, *(each or NOT_YET for each in cells)))
    if not any(folder.on_gpu for folder in folders):
        rows = [(*row, NOT_YET if index else "GPU") for index, row in enumerate(rows)]
    return markdown(rows)
