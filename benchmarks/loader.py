"""How many images per second does one CPU core feed, and at what cost, with our loader and with the usual ones?

    python -m benchmarks.loader                                  # 64x64, one core
    python -m benchmarks.loader --size 256 --json loader_256.json
    python -m benchmarks.loader --shards shards/mine --cores 4   # your own JPEGs; all of one size
    python -m benchmarks.loader --only indexing --only check     # parts of it; --no-data: the loaders alone

One size per run. Without --shards the images are those of ``ddpm_dist.pack shapes`` (JPEG, quality 95, no colour subsampling), packed
into a temporary folder. All contestants read the same JPEGs from the page cache and deliver batches of uint8 pixels and integer
labels; nothing is cut, resized or mirrored:

- ddpm_dist: the trainer's own loader. Every epoch is a permutation of all samples, the checksum of every sample is compared, DALI
  decodes. cpu: decoded on the host each time; cache host: decoded once, kept in memory; mixed and cache gpu need a GPU.
- DALI readers.webdataset: shuffles in a buffer of 1,000 samples; no checksums. DALI decodes.
- webdataset + DataLoader: shuffles shards, and samples in a buffer of 1,000; no checksums. Pillow decodes.
- torchvision ImageFolder + DataLoader: one file per image, a permutation per epoch; no checksums. Pillow decodes.

Each has a process of its own (and its DataLoader workers), pinned to the same core or cores; DALI has as many threads as cores, a
DataLoader as many workers (or --workers). They take turns, every second turn the other way round, and who is not at it rests with full
buffers; a turn begins with batches that are not timed, more than the buffers hold. CPU seconds are those of all threads and processes
of a contestant; cores used (CPU seconds per second) well below --cores means that other programs had a share, and then the CPU seconds
say more than the images per second. Ratios are medians over the turns of the ratio within a turn. Before it is timed, each has to deliver one epoch: as many
different images as there are, with the labels and brightness that Pillow finds. One that does not is reported as wrong, not as fast,
and the exit code is 1.

Then, in as many turns of a quarter of the length, on one core:

- indexing: ``ddpm_dist.index`` over the shards, in MB per CPU second, beside reading and hashing the same bytes.
- check: ``ddpm_dist.index --check`` (every image decoded), in CPU time, beside decoding the same images by DALI and by Pillow, from memory.
- streaming: shards behind an HTTP server on loopback. Files through a warm shard cache and the trainer's loader on it, each beside the
  same on local shards; and from an empty cache the time to the first batch, and how many shards the server had sent by then, once with
  a limit for each connection and once with one for all connections together.
- formats: the same pixels in every format that ``ddpm_dist.pack`` writes, through our loader.

The last two use a smaller set, 2,500 images at 64x64. A target that was missed is said in the table and does not change the exit code.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.loader_contestants import CONTESTANTS, DALI, NEED_GPU, OURS, WEBDATASET, Spec, expected
from benchmarks.loader_limits import sentence
from benchmarks.loader_process import Contestant, take_turns
from benchmarks.loader_sections import SECTIONS, measure_sections
from benchmarks.loader_tables import section_lines
from benchmarks.loader_turns import ratio
from benchmarks.output import check_target, publish
from benchmarks.reference import unpack_shards
from benchmarks.report_text import number, plain, span
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.pack import pack

TARGET = 14_000  # images/s of 64x64 from one core: what the fastest GPU can train on
RATIOS = {"to_dali": DALI, "to_webdataset": WEBDATASET}


def images(args: argparse.Namespace, scratch: Path) -> Index:
    """The JPEGs of this run. UserError for shards that hold anything but RGB JPEGs of one square size, all labelled."""
    if args.shards is None:
        _say(f"packing {args.images:,} images of {args.size}x{args.size}")
        per_shard = max(1, -(-args.images // max(8, args.cores, args.workers)))
        options = {"size": args.size, "num": args.images, "image_format": "jpg", "samples_per_shard": per_shard}
        return pack("shapes", scratch / "shards", **options).index
    index = Index.load(args.shards)
    index.check_files()
    sides = np.unique(np.concatenate([index.samples["height"], index.samples["width"]]))
    if len(sides) > 1 or index.channels != 3 or index.image_format != "jpg" or index.classes is None:
        found = f"{'RGB' if index.channels == 3 else 'grey'} {index.image_format}, sides {int(sides[0])} to {int(sides[-1])}"
        raise UserError(
            f"--shards {args.shards}: needs labelled RGB JPEGs of one square size, found {found}, "
            f"{'no' if index.classes is None else len(index.classes)} classes; pack with --format jpg --channels 3 --size N"
        )
    if len(index) < args.batch:
        raise UserError(
            f"--shards {args.shards}: {len(index)} images, fewer than one batch of {args.batch}; give --batch"
        )
    if len(index.shards) < args.workers:
        raise UserError(
            f"--shards {args.shards}: {len(index.shards)} shards for {args.workers} workers, and webdataset gives each worker "
            "whole shards: give fewer --workers, or pack with fewer --samples-per-shard"
        )
    return index


def measure(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], bool]:
    """The report, and whether every contestant that could run delivers the right images."""
    cores = sorted(os.sched_getaffinity(0))[-args.cores :]
    index = images(args, scratch)
    size = int(index.samples["height"][0])
    spec = Spec(OURS, str(index.folder), str(scratch / "folder"), size, args.batch, args.workers, args.cores)
    contestants = [Contestant(replace(spec, name=name)) for name in args.loaders]
    limits = _compare(contestants, index, args, scratch, cores) if contestants else {}
    generated = args.shards is None
    found, right = measure_sections(
        args.sections, spec, index, generated, args.turns, args.turn_seconds, scratch, cores[-1], _say
    )
    report = {
        "benchmark": "loader", "environment": environment(), "size": size, "entries": [_entry(each, contestants) for each in contestants],
        "cores": args.cores, "dali_threads": args.cores, "dataloader_workers": args.workers, "batch": args.batch, "turns": args.turns,
        "turn_seconds": args.turn_seconds, "images": len(index), "kb_per_image": float(index.samples["size"].mean()) / 1000,
        "source": "generated shapes" if generated else "given shards", "parts_us": None, "limits": None, **limits, **found,
    }  # fmt: skip
    return report, right and not any(each.failed for each in contestants)


def _compare(
    contestants: list[Contestant], index: Index, args: argparse.Namespace, scratch: Path, cores: list[int]
) -> dict[str, Any]:
    """Check and time all of them; returns what limits ours, see :func:`_limits`."""
    unpack_shards(index.folder, Path(contestants[0].spec.folder))
    np.save(scratch / "expected.npy", expected(index))
    try:
        for each in contestants:
            if each.spec.name in NEED_GPU and not torch.cuda.is_available():
                each.problem = "needs a GPU"
                continue
            each.start(cores)
            each.ask("epoch", expected=str(scratch / "expected.npy"))
            if each.problem is None:
                each.turn(args.turn_seconds / 2)  # warm-up
                each.forget()
            _say(f"{each.spec.name}: {each.problem or 'checked'}")
        take_turns(contestants, args.turns, args.turn_seconds, _say)
        return _limits(contestants, args)
    finally:
        for each in contestants:
            each.close()


def _limits(contestants: list[Contestant], args: argparse.Namespace) -> dict[str, Any]:
    """What limits our pipeline on the CPU: its parts in microseconds of CPU time per image, and the same in words."""
    mine = next((each for each in contestants if each.spec.name == OURS and each.rates), None)
    found = mine and mine.ask("parts", seconds=args.turn_seconds / 2)
    if not found:
        return {}
    return {"parts_us": found, "limits": sentence(found, statistics.median(mine.cpu_s_per_1000))}


def _entry(own: Contestant, contestants: list[Contestant]) -> dict[str, Any]:
    result = {"name": own.spec.name, "problem": own.problem}
    if own.problem is not None:
        return result
    result |= {"images_per_sec": statistics.median(own.rates), "lowest": min(own.rates), "highest": max(own.rates)}
    result |= {"cpu_s_per_1000": statistics.median(own.cpu_s_per_1000), "cores_used": statistics.median(own.cores_used)}
    result |= {"images_per_sec_turns": own.rates, "cpu_s_per_1000_turns": own.cpu_s_per_1000}
    for key, name in RATIOS.items():
        other = next((each for each in contestants if each.spec.name == name and each.problem is None), None)
        if other is not None and other is not own:
            result[key] = ratio(own.rates, other.rates)
            result[f"per_cpu_second_{key}"] = ratio(other.cpu_s_per_1000, own.cpu_s_per_1000)
    return result


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = [_loader_lines(report) if report["entries"] else [], section_lines(report)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _loader_lines(report: dict[str, Any]) -> list[str]:
    size, hardware = report["size"], report["environment"]["hardware"]
    lines = [
        f"{report['images']:,} JPEGs of {size}x{size} ({report['source']}), {report['kb_per_image']:.1f} KB each; {report['cores']} of "
        f"{hardware['cores']} cores {hardware['cpu']}, load average {hardware['load_average']:.1f}; batch {report['batch']}, "
        f"{report['dataloader_workers']} DataLoader worker(s), {report['dali_threads']} DALI thread(s); medians of {report['turns']} "
        f"interleaved turns of {report['turn_seconds']:g} s",
        "",
        "| loader | images/s | lowest .. highest | CPU seconds per 1,000 images | cores used | to DALI's reader | to webdataset |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in report["entries"]:
        cells = [plain(each["name"]), plain(str(each["problem"])), *["-"] * 5]
        if each["problem"] is None:
            cells[1:5] = (
                number(each["images_per_sec"]),
                span(each["lowest"], each["highest"]),
                f"{each['cpu_s_per_1000']:.3g}",
                f"{each['cores_used']:.2f}",
            )
            for column, key in enumerate(RATIOS, 5):
                if ratio := each.get(key):
                    cells[column] = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} .. {ratio['highest']:.2f})"
        lines.append("| " + " | ".join(cells) + " |")
    mine = next((each for each in report["entries"] if each["name"] == OURS and each["problem"] is None), None)
    if report["limits"] and mine:
        lines += ["", f"{OURS}: {report['limits']}."]
        if size == 64:
            per_core = mine["images_per_sec"] / report["cores"]
            lines += [f"Target: {TARGET:,} images/s from one core; {per_core / TARGET:.2f} times that was measured."]
    return lines


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=int, help="side of the generated images (default 64)")
    add("--images", type=int, help="how many are generated (default: 10,000 at 64x64, fewer of larger ones)")
    add(
        "--shards",
        type=Path,
        help="your own packed folder instead; some 10,000 images are plenty, all of them are checked",
    )
    add("--batch", type=int, default=64)
    add("--cores", type=int, default=1, help="CPU cores of every contestant (default 1)")
    add(
        "--workers",
        type=int,
        help="processes of a DataLoader, 0: none beside the main process (default: as many as cores)",
    )
    add("--turns", type=int, default=7, help="measured turns of each, at least 5 (default 7)")
    add("--turn-seconds", type=float, default=2.0, help="least length of a turn (default 2)")
    add(
        "--only",
        action="append",
        choices=[*CONTESTANTS, *SECTIONS],
        metavar="NAME",
        help=f"a loader, or one of {', '.join(SECTIONS)}: leave out all others; may be repeated",
    )
    add("--no-data", action="store_true", help=f"leave out {', '.join(SECTIONS)}")
    add("--json", type=Path, help="write the report to this file")
    add("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args(argv)
    if args.shards is not None and (args.size is not None or args.images is not None):
        raise UserError("--shards brings its own images: leave out --size and --images")
    args.loaders = [name for name in CONTESTANTS if args.only is None or name in args.only]
    args.sections = [name for name in SECTIONS if (not args.no_data if args.only is None else name in args.only)]
    if args.no_data and args.sections:
        raise UserError(f"--no-data leaves out {args.sections[0]}, which --only names: give one of the two")
    args.size = 64 if args.size is None else args.size
    if args.images is None:
        args.images = max(1000, min(10_000, 10_000 * 64**2 // max(1, args.size) ** 2))
    args.workers = args.cores if args.workers is None else args.workers
    for name, value, least in (
        ("size", args.size, 8), ("batch", args.batch, 1), ("images", args.images, args.batch), ("cores", args.cores, 1),
        ("workers", args.workers, 0), ("turns", args.turns, 5),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    if not 0 < args.turn_seconds < 3600:
        raise UserError(f"--turn-seconds must be above 0 and below 3600, not {args.turn_seconds}")
    available = len(os.sched_getaffinity(0))
    if args.cores > available:
        raise UserError(f"--cores {args.cores}: this process may use {available}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.loader``: 1 when a contestant failed or delivered something else than the data set."""
    args = parse(argv)
    check_target(args.json)
    check_target(args.markdown, "--markdown")
    with tempfile.TemporaryDirectory(prefix="loader_") as scratch:
        report, right = measure(args, Path(scratch))
    publish(report, markdown(report), args.json, args.markdown)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
