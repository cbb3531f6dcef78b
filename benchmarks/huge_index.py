"""Seconds and memory until the first batches of a set of 5 billion images in 500,000 shards are located, on a made-up index.

    python -m benchmarks.huge_index                       # under a minute; about 150 MB of disk, and 140 GB of holes
    python -m benchmarks.huge_index --samples 1_000_000_000 --lanes 8 --steps 20

index.npy is a sparse file: only the blocks of records that the first steps read are written, with their hashes. The list of the shards
with their names, sizes and hashes is complete. A fresh process, as one rank would, opens the index with ``Index.load``, makes the order
and reads the records of its first steps; its peak memory includes Python and torch. Locating a batch is compared with a full permutation
of 1,000,000 samples. No image is read: there are none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from benchmarks.output import check_target, publish
from ddpm_dist.data import large_index
from ddpm_dist.data.block_order import BlockOrder
from ddpm_dist.data.index_file import FORMAT, LARGE_VERSION, SAMPLE_DTYPE, file_sha256
from ddpm_dist.data.order import SampleOrder
from ddpm_dist.errors import UserError, exit_codes

STRIDE, SIZE, SIDE = 4096, 3000, 64  # bytes from one image to the next in a shard, of an image; pixels
CLASSES = 1000


def shard_ends(samples: int, shards: int) -> np.ndarray:
    """(S,) int64: shards whose sizes differ by up to a tenth, with the asked sum."""
    sizes = np.full(shards, samples // shards)
    sizes[: samples % shards] += 1
    swing = samples // shards // 10
    change = np.arange(shards // 2) % (2 * swing + 1) - swing
    sizes[: 2 * len(change)] += np.stack([change, -change], axis=1).reshape(-1)
    return np.cumsum(sizes)


def records(ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """What the index says of these samples."""
    shard = np.searchsorted(ends, ids, side="right")
    first = np.concatenate([[0], ends])[shard]
    rows = np.zeros(len(ids), dtype=SAMPLE_DTYPE)
    rows["offset"] = 512 + (ids - first) * STRIDE
    rows["size"], rows["height"], rows["width"], rows["label"] = SIZE, SIDE, SIDE, ids % CLASSES
    rows["checksum"] = ids
    return rows


def write(folder: Path, ends: np.ndarray, needed: np.ndarray) -> int:
    """Write the index with these samples' blocks of records; returns how many blocks were written."""
    samples, block = int(ends[-1]), large_index.BLOCK
    hashes = np.zeros(-(-samples // block), dtype="V32")
    blocks = np.unique(needed // block)
    with open(folder / "index.npy", "xb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        file.truncate(begin + samples * SAMPLE_DTYPE.itemsize)
        for number in blocks.tolist():
            rows = records(np.arange(number * block, min(samples, (number + 1) * block)), ends)
            file.seek(begin + number * block * SAMPLE_DTYPE.itemsize)
            file.write(rows.data)
            hashes[number] = np.void(hashlib.sha256(rows.data).digest())
            if number:  # the record before it is looked at, too
                file.seek(begin + (number * block - 1) * SAMPLE_DTYPE.itemsize)
                file.write(records(np.array([number * block - 1]), ends).data)
    names = [f"part-{number // 1000:04d}/images-{number:07d}.tar" for number in range(len(ends))]
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    table = np.zeros(len(ends), dtype=large_index.SHARD_DTYPE)
    table["end"] = ends
    table["bytes"] = (np.diff(ends, prepend=0) + 1) * STRIDE
    table["name_end"] = np.cumsum([len(name) + 1 for name in names])
    table["sha256"] = np.frombuffer(np.random.default_rng(0).bytes(32 * len(ends)), dtype="V32")
    np.save(folder / "shards.npy", table, allow_pickle=False)
    np.save(folder / "blocks.npy", hashes, allow_pickle=False)
    head = {
        "format": FORMAT, "version": LARGE_VERSION, "samples": samples, "shards": len(ends), "classes": [str(i) for i in range(CLASSES)],
        "channels": 3, "image_format": "jpg", "root": "s3://made-up/set", "block": block,
        "ranges": {"label": [0, CLASSES - 1], "height": [SIDE, SIDE], "width": [SIDE, SIDE]},
        "sha256": {name: file_sha256(folder / name) for name in large_index.TABLES},
    }  # fmt: skip
    head["fingerprint"] = large_index.fingerprint(head)
    (folder / "index.json").write_text(json.dumps(head))
    return len(blocks)


def slots(args: argparse.Namespace) -> np.ndarray:
    """Slots of rank 0."""
    return np.arange(args.batch // args.ranks)


def positions(args: argparse.Namespace, step: int) -> np.ndarray:
    return step * args.batch + slots(args)


def rank(folder: str, words: dict[str, Any]) -> dict[str, float]:
    """What one rank does at its start; runs in a process of its own."""
    import time

    from ddpm_dist.data.choose_order import shard_ends
    from ddpm_dist.data.shards import Index

    args = argparse.Namespace(**words)
    before, start = _resident("VmHWM"), time.perf_counter()
    index = Index.load(folder)
    opened, opened_bytes = time.perf_counter(), _resident("VmHWM")
    order = BlockOrder(shard_ends(index), args.seed, args.block_shards, args.lanes, args.batch)
    order.locate(positions(args, 0))
    located = time.perf_counter()
    ends = order.ends
    for step in range(args.steps):
        ids = order.locate(positions(args, step))[1]
        if not np.array_equal(index.rows(ids), records(ids, ends)):
            raise RuntimeError(f"step {step}: the index holds other records than were written")
        index.shard_of(ids)
        if step == 0:
            first = time.perf_counter()
    begun = time.perf_counter()
    ahead = order.shards_ahead(args.steps, slots(args), 64)
    [index.location(int(shard)) for shard in ahead]
    looked = time.perf_counter()
    peak, full = _resident("VmHWM"), SampleOrder(1_000_000, args.seed)
    seconds = {}
    for each in (full, order):
        each.locate(positions(args, 0))
        turns = []
        for step in range(100):
            begin = time.perf_counter()
            each.locate(positions(args, step % args.steps))
            turns.append(time.perf_counter() - begin)
        seconds[each] = statistics.median(turns)
    return {
        "samples": len(index), "shards": len(index.shards), "open_seconds": opened - start, "order_seconds": located - opened,
        "first_batch_seconds": first - start, "steps_seconds": begun - start, "shards_ahead_seconds": looked - begun,
        "locate_us": 1e6 * seconds[order], "locate_to_full": seconds[order] / seconds[full], "before_bytes": before, "open_bytes": opened_bytes, "peak_bytes": peak,
    }  # fmt: skip


def _resident(which: str) -> int:
    """Bytes: VmHWM is the most that this process had in memory so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    words = {key: value for key, value in vars(args).items() if isinstance(value, int)}
    ends = shard_ends(args.samples, args.shards)
    order = BlockOrder(ends, args.seed, args.block_shards, args.lanes, args.batch)
    needed = np.concatenate([order.locate(positions(args, step))[1] for step in range(args.steps)])
    with tempfile.TemporaryDirectory(prefix="huge_index_", dir=args.scratch) as folder:
        written = write(Path(folder), ends, needed)
        table = (Path(folder) / "index.npy").stat()
        code = f"import json; from benchmarks import huge_index as h; print(json.dumps(h.rank({folder!r}, {words!r})))"
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"opening the made-up index failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return {
        "benchmark": "huge_index", "environment": environment(), **words, **found, "blocks_written": written,
        "table_bytes": table.st_size, "table_disk_bytes": table.st_blocks * 512,
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    return "\n".join([
        f"{report['samples']:,} samples in {report['shards']:,} shards; K = {report['block_shards']}, {report['lanes']} lane(s), global "
        f"batch {report['batch']} on {report['ranks']} rank(s); table of {report['table_bytes'] / 1e9:.0f} GB",
        "",
        "| one rank | |",
        "|---|---:|",
        f"| Index.load | {report['open_seconds']:.2f} s |",
        f"| permuting the shards and the first blocks | {report['order_seconds']:.2f} s |",
        f"| from nothing to the records of the first batch | {report['first_batch_seconds']:.2f} s |",
        f"| the same for {report['steps']} steps | {report['steps_seconds']:.2f} s |",
        f"| naming the next 64 shards | {1e3 * report['shards_ahead_seconds']:.1f} ms |",
        f"| locating a batch of {report['batch'] // report['ranks']} later | {report['locate_us']:.0f} us, {report['locate_to_full']:.1f} times that of a full permutation |",
        f"| memory before (Python, torch) | {report['before_bytes'] / 1e6:.0f} MB |",
        f"| peak memory | {report['peak_bytes'] / 1e6:.0f} MB |",
    ])  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.huge_index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--samples", type=int, default=5_000_000_000)
    add("--shards", type=int, default=500_000)
    add("--block-shards", type=int, default=16)
    add("--lanes", type=int, default=1)
    add("--batch", type=int, default=1024, help="global batch (default 1024)")
    add("--ranks", type=int, default=1, help="what is measured is rank 0 of so many (default 1)")
    add("--steps", type=int, default=10)
    add("--seed", type=int, default=0)
    add("--scratch", type=Path, help="folder for the index (default: the system's)")
    add("--json", type=Path, help="write the report to this file")
    add("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args(argv)
    for name in ("shards", "block_shards", "lanes", "batch", "ranks", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.samples < 20 * args.shards:
        raise UserError(f"--samples {args.samples:,}: needs 20 or more in each of {args.shards:,} shards")
    if args.batch % args.ranks or args.batch % args.lanes:
        raise UserError(f"--batch {args.batch} must be divisible by --ranks {args.ranks} and --lanes {args.lanes}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.huge_index``."""
    args = parse(argv)
    check_target(args.json)
    check_target(args.markdown, "--markdown")
    report = measure(args)
    publish(report, markdown(report), args.json, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
