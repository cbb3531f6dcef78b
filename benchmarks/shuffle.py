"""How well do blocks of K shards shuffle, compared with a full permutation?

    python -m benchmarks.shuffle --plot shuffle.png --json shuffle.json      # half a minute: the package's own orders on a made-up set
    python -m benchmarks.shuffle --lanes 1 8 --batch 256

A set of --shards shards with --samples samples each, sorted by class as sets come that were packed folder by folder: --classes classes,
one behind the other. For every K and number of lanes, and for a full permutation (reference) and a second one (what chance does):

- neighbours: places that lie between two samples that are neighbours in the source, as a share of the mean of a full permutation. It is
  about K / S in blocks: they keep the epoch's coarse order of shards, which is a new one in every epoch.
- consecutive: samples that are shown one after the other, and how far apart they lie in the source. This is what a batch sees.
- KS: largest difference between the cumulated distribution of these distances and that of the full permutation (Kolmogorov-Smirnov), 0 to 1.
- classes in a batch: how many different ones, and the entropy of the labels in bits.
- chi square per degree of freedom: of the labels in a batch, against all classes alike; about 1 when batches are drawn at random.

Everything is a function of the seed, so the numbers are the same on every machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from benchmarks.output import check_target, publish
from ddpm_dist.data.block_order import BlockOrder
from ddpm_dist.data.order import SampleOrder
from ddpm_dist.errors import UserError, exit_codes

BLOCK_SHARDS = (1, 2, 4, 8, 16, 64, 256)
FULL, CHANCE = "full permutation", "another full permutation"


def describe(ids: np.ndarray, classes: int, batch: int) -> dict[str, Any]:
    """What an epoch's order (int64 (N,), a permutation) looks like; the distances still as arrays."""
    samples = len(ids)
    places = np.empty_like(ids)
    places[ids] = np.arange(samples)
    labels = ids * classes // samples
    batches = labels[: samples // batch * batch].reshape(-1, batch)
    rows = np.arange(len(batches))[:, None] * classes + batches
    counts = np.bincount(rows.reshape(-1), minlength=len(batches) * classes).reshape(len(batches), classes)
    share = counts / batch
    entropy = (share * -np.log2(np.where(share > 0, share, 1))).sum(1) + 0.0  # no negative zero
    expected = np.bincount(labels, minlength=classes) * (batch / samples)
    chi_square = ((counts - expected) ** 2 / expected).sum(1) / max(1, classes - 1)
    return {
        "neighbours": np.sort(np.abs(np.diff(places))), "consecutive": np.sort(np.abs(np.diff(ids))),
        "classes_in_batch": float((counts > 0).sum(1).mean()), "entropy_bits": float(entropy.mean()),
        "entropy_bits_lowest": float(entropy.min()), "chi_square_per_degree": float(chi_square.mean()),
    }  # fmt: skip


def compared(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The same as plain numbers, in relation to the reference."""
    result = {key: value for key, value in found.items() if isinstance(value, float)}
    for name in ("neighbours", "consecutive"):
        own, other = found[name], reference[name]
        result[f"{name}_mean_ratio"] = float(own.mean() / other.mean())
        result[f"{name}_median_ratio"] = float(np.median(own) / np.median(other))
        result[f"{name}_ks"] = kolmogorov_smirnov(own, other)
    result["entropy_ratio"] = found["entropy_bits"] / reference["entropy_bits"] if reference["entropy_bits"] else 1.0
    return result


def kolmogorov_smirnov(one: np.ndarray, other: np.ndarray) -> float:
    """Largest distance between the cumulated distributions of two sorted samples."""
    values = np.concatenate([one, other])
    gaps = np.searchsorted(one, values, "right") / len(one) - np.searchsorted(other, values, "right") / len(other)
    return float(np.abs(gaps).max())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report: an entry for every K and number of lanes, and two for full permutations."""
    samples = args.shards * args.samples
    positions = np.arange(samples)
    reference = describe(SampleOrder(samples, args.seed).locate(positions)[1], args.classes, args.batch)
    entries = []
    for lanes in args.lanes:
        for block_shards in args.block_shards:
            order = BlockOrder(np.arange(1, args.shards + 1) * args.samples, args.seed, block_shards, lanes, args.batch)
            epochs, ids = order.locate(positions)
            if epochs.any() or len(np.unique(ids)) != samples:
                raise RuntimeError(f"K = {block_shards}, {lanes} lanes: an epoch does not show every sample once")
            found = compared(describe(ids, args.classes, args.batch), reference)
            entries.append({"name": f"blocks of {block_shards}", "block_shards": block_shards, "lanes": lanes, **found})
            print(f"K = {block_shards}, {lanes} lane(s)", file=sys.stderr, flush=True)
    for name, own in ((FULL, reference), (CHANCE, None)):
        if own is None:
            own = describe(SampleOrder(samples, args.seed + 1).locate(positions)[1], args.classes, args.batch)
        entries.append({"name": name, "block_shards": None, "lanes": None, **compared(own, reference)})
    about = ("shards", "samples", "classes", "batch", "seed")
    return {
        "benchmark": "shuffle", "environment": environment(), **{key: getattr(args, key) for key in about}, "entries": entries,
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['shards']:,} shards of {report['samples']:,} samples, sorted by class ({report['classes']} classes); batches of "
        f"{report['batch']}. Distances: mean as a share of the full permutation's, and the Kolmogorov-Smirnov distance to it (0: the same).",
        "",
        "| order | lanes | neighbours: mean | KS | consecutive: mean | KS | classes in a batch | entropy, bits (lowest) | chi square |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in report["entries"]:
        lines.append(
            f"| {each['name']} | {each['lanes'] or '-'} | {each['neighbours_mean_ratio']:.4f} | {each['neighbours_ks']:.3f} | "
            f"{each['consecutive_mean_ratio']:.3f} | {each['consecutive_ks']:.3f} | {each['classes_in_batch']:.1f} | "
            f"{each['entropy_bits']:.2f} ({each['entropy_bits_lowest']:.2f}) | {each['chi_square_per_degree']:.2f} |"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Two panels against K: distances and class mix. Colours of Okabe and Ito (2008), which colour-blind readers can tell apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    full = next(each for each in report["entries"] if each["name"] == FULL)
    all_lanes = sorted({each["lanes"] for each in report["entries"] if each["lanes"]})
    styles = dict(
        zip(all_lanes, [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")], strict=False)
    )
    with plt.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 110}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.8), layout="constrained")
        for lanes, (colour, marker) in styles.items():
            rows = [each for each in report["entries"] if each["lanes"] == lanes]
            x, label = [each["block_shards"] for each in rows], f"{lanes} lane{'s' * (lanes != 1)}"
            for key, dashes, what in (
                ("consecutive_ks", "-", "consecutive samples"),
                ("neighbours_ks", ":", "neighbours"),
            ):
                left.plot(
                    x, [each[key] for each in rows], dashes, color=colour, marker=marker, label=f"{what}, {label}"
                )
            right.plot(x, [each["classes_in_batch"] for each in rows], color=colour, marker=marker, label=label)
        left.set(
            xscale="log", xlabel="K, shards in a block", ylabel="KS distance to a full permutation", ylim=(0, 1.02)
        )
        right.axhline(full["classes_in_batch"], color="#666666", linestyle="--", label="full permutation")
        right.set(
            xscale="log",
            xlabel="K, shards in a block",
            ylabel=f"classes in a batch of {report['batch']}, of {report['classes']}",
        )
        for axes in (left, right):
            axes.set_xticks(sorted({each["block_shards"] for each in report["entries"] if each["block_shards"]}))
            axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axes.minorticks_off()
            axes.legend(fontsize=8)
        figure.savefig(path, format="png", metadata={"Software": None})
        plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shuffle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=int, default=1024)
    add("--samples", type=int, default=500, help="samples of a shard (default 500)")
    add("--classes", type=int, default=100)
    add("--batch", type=int, default=256, help="global batch (default 256)")
    add("--block-shards", type=int, nargs="+", default=list(BLOCK_SHARDS), metavar="K")
    add("--lanes", type=int, nargs="+", default=[1, 8], metavar="L", help="at most four numbers (default: 1 8)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the report to this file")
    add("--markdown", type=Path, help="write the table to this file")
    add("--plot", type=Path, help="write the picture (PNG) to this file")
    args = parser.parse_args(argv)
    for name, value, least in (
        ("shards", args.shards, 2), ("samples", args.samples, 2), ("classes", args.classes, 1), ("batch", args.batch, 1),
        ("block-shards", min(args.block_shards), 1), ("lanes", min(args.lanes), 1), ("seed", args.seed, 0),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    samples = args.shards * args.samples
    if samples > 100_000_000:
        raise UserError(f"--shards x --samples is {samples:,}: above 100,000,000 the full permutation takes gigabytes")
    if max(args.batch, args.classes) > samples:
        raise UserError(f"--batch and --classes must not be above the {samples:,} samples")
    if len(set(args.lanes)) > 4:
        raise UserError("--lanes takes at most four different numbers")
    if wrong := [lanes for lanes in args.lanes if args.batch % lanes]:
        raise UserError(f"--lanes {wrong[0]} does not divide --batch {args.batch}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.shuffle``."""
    args = parse(argv)
    for path in (args.json, args.markdown, args.plot):
        check_target(path)
    report = measure(args)
    publish(report, markdown(report), args.json, args.markdown)
    if args.plot:
        draw(report, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
