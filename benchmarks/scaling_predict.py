"""Predicted images/sec, efficiency, checkpoint interval and data handling for 8 to 4,096 GPUs and up to 5 billion images.

    python -m benchmarks.scaling --json scaling.json
    python -m benchmarks.scaling_data --json scaling_data.json
    python -m benchmarks.scaling_predict --measured scaling.json --data scaling_data.json --json scaling_model.json --plots docs

Nothing is run: the model of ``benchmarks.scaling_model`` is fitted to the first report, its error on the measured points is stated, and the
profiles of ``benchmarks.scaling_hardware`` are predicted. ``--images-per-sec`` replaces the assumed speed of one GPU by a measured one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import scaling_fit
from benchmarks import scaling_model as model
from benchmarks.output import check_target, write_report
from benchmarks.scaling_data import distinct_shards, fit_order, open_share, order_seconds
from benchmarks.scaling_hardware import PROFILES, Hardware, Site, Workload
from benchmarks.scaling_table import markdown
from ddpm_dist.errors import UserError, exit_codes

LABEL = "predicted, not measured"
GPUS = tuple(8 * 2**k for k in range(10))  # 8 .. 4,096
IMAGES = (50_000, 10_000_000, 100_000_000, 1_000_000_000, 5_000_000_000)
BATCH = 128  # weak scaling: images per GPU
GLOBAL_BATCH = 8_192  # strong scaling
# Only its state matters here, not its speed.
LARGE = Workload(name="1 B parameters", parameters=1_000_000_000)


def step(hardware: Hardware, site: Site, work: Workload, gpus: int, batch: float, input_rate: float) -> model.Step:
    """A step of ``gpus`` with ``batch`` images each; ``input_rate``: images/s that one rank's loader delivers."""
    nodes = max(1, gpus // hardware.per_node)
    per_node = min(gpus, hardware.per_node)
    compute = hardware.compute(batch, work.flop_per_image) * model.slowest_of(gpus, site.variation)
    sent = model.gradient_exchange(
        4.0 * work.parameters, work.bucket, nodes, per_node, hardware.inside, hardware.between
    )
    update = model.update_seconds(work.parameters, work.averages, gpus, hardware.memory_bandwidth, False)
    return model.Step(
        compute, batch / input_rate, model.exposed(sent, compute, work.overlap) if gpus > 1 else 0.0, update
    )


def checkpoints(site: Site, work: Workload, gpus: int, per_node: int = 8) -> dict[str, float]:
    """What a save costs, the best interval and the useful share of the time, for a job of ``gpus``."""
    nodes, size = max(1, gpus // per_node), model.state_bytes(work.parameters, work.averages)
    save = site.save_overhead + size / gpus / site.copy_to_host
    publish = model.write_seconds(size, nodes, gpus, site.per_node, site.file_system, site.files_per_second)
    mtbf = site.node_mtbf / nodes
    interval = model.best_interval(save, mtbf, publish)

    def useful(seconds: float) -> float:
        return model.useful_fraction(seconds, save, site.restart, mtbf, publish)

    return {
        "gpus": gpus, "state_bytes": size, "save_s": save, "publish_s": publish, "mtbf_s": mtbf,
        "young_s": model.young_interval(save, mtbf), "daly_s": model.daly_interval(save, mtbf), "interval_s": interval,
        "useful": useful(interval), "useful_hourly": useful(3600.0), "useful_half": useful(interval / 2),
        "useful_double": useful(2 * interval),
    }  # fmt: skip


def scale(hardware: Hardware, site: Site, work: Workload, mode: str, input_rate: float) -> list[dict[str, Any]]:
    """One row for every number of GPUs: step, images/s without and with failures, efficiency relative to one node."""
    rows: list[dict[str, Any]] = []
    for gpus in GPUS:
        batch = BATCH if mode == "weak" else GLOBAL_BATCH / gpus
        if batch < 8:  # below, the host's launches decide, which this model does not know
            break
        now = step(hardware, site, work, gpus, batch, input_rate)
        rate, saved = gpus * batch / now.seconds, checkpoints(site, work, gpus, hardware.per_node)
        rows.append({
            "gpus": gpus, "batch_per_gpu": batch, "step_s": now.seconds, **asdict(now), "bound_by": now.bound_by,
            "images_per_sec": rate, "images_per_sec_with_failures": rate * saved["useful"],
            "checkpoint_every_images": rate * saved["interval_s"],
        })  # fmt: skip
        rows[-1]["efficiency"] = rate / rows[0]["images_per_sec"] * rows[0]["gpus"] / gpus
    return rows


def data_sizes(data: dict[str, Any], site: Site, work: Workload, ranks_per_node: int = 8) -> list[dict[str, Any]]:
    """What ``IMAGES`` images mean for index, order and open files, from the constants of the code and what was measured."""
    code, coefficient, rows = data["code"], fit_order(data["order"]), []
    kept_bytes = 2 * 8  # per sample and rank: SampleOrder keeps the permutations of two epochs
    peak = max(entry["peak_bytes"] for entry in data["order"])
    index = data["index"]
    for images in IMAGES:
        shards = max(1, -(-images // code["samples_per_shard"]))
        share = open_share(shards, code["max_open_files"])
        rows.append({
            "images": images, "shards": shards, "index_bytes": code["record_bytes"] * images,
            "head_bytes": index["head_bytes_per_shard"] * shards,
            "head_fits": index["head_bytes_per_shard"] * shards <= code["max_json_bytes"],
            "tar_bytes": images * work.bytes_per_image,
            "index_load_s": index["seconds"] / index["samples"] * images,
            "order_s": order_seconds(images, coefficient),
            # From the third epoch on an order is made while two are kept.
            "order_peak_bytes_per_node": (peak + kept_bytes) * images * ranks_per_node,
            "order_kept_bytes_per_node": kept_bytes * images * ranks_per_node,
            "distinct_shards_of_1024": distinct_shards(1024, shards), "open_share": share,
            "images_per_sec_by_opens": site.opens_per_second / share if share else None,
        })  # fmt: skip
    return rows


def predict(
    measured: dict[str, Any], data: dict[str, Any], site: Site, work: Workload, rates: float | None = None,
    again: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The whole report. ``rates``: measured images/s of one GPU, instead of those that follow from the assumed MFU. ``again``: a second
    measurement of the same, which nothing is fitted to.
    """
    found = scaling_fit.fit(measured)
    input_rate = site.cores_per_loader / data["loader"]["cpu_seconds_per_image"]
    profiles, assumed = {}, dict(PROFILES)
    if rates is not None:
        for key, hardware in assumed.items():
            assumed[key] = replace(hardware, mfu=rates * work.flop_per_image / hardware.flops)
    if measured["device"] == "cuda":  # what was measured, carried on to more nodes
        assumed["fitted"] = fitted_hardware(found, measured, work)
        work = replace(work, parameters=found.parameters, overlap=found.overlap)
    for key, hardware in assumed.items():
        profiles[key] = {
            "name": hardware.name, "assumed_mfu": hardware.mfu, "images_per_sec_of_one": BATCH / hardware.compute(BATCH, work.flop_per_image),
            **{mode: scale(hardware, site, work, mode, input_rate) for mode in ("weak", "strong")},
        }  # fmt: skip
    return {
        "benchmark": "scaling_model", "label": LABEL, "measured_environment": measured["environment"],
        "calibration": {**asdict(found), "fitted_ranks": scaling_fit.fitted_ranks(measured)},
        "errors": scaling_fit.errors(measured, found),
        "errors_again": scaling_fit.errors(again, found)["summary"] if again else {},
        "site": asdict(site), "workload": asdict(work), "input_rate_per_rank": input_rate, "profiles": profiles,
        "checkpoints": {w.name: [checkpoints(site, w, gpus) for gpus in GPUS] for w in (work, LARGE)},
        "data": data_sizes(data, site, work), "order_coefficient": fit_order(data["order"]),
    }  # fmt: skip


def fitted_hardware(found: scaling_fit.Calibration, measured: dict[str, Any], work: Workload) -> Hardware:
    """The measured machine. Where one node only was measured, the network between nodes is that of the profile h100."""
    base = PROFILES["h100"]
    per_node = max(-(-point["ranks"] // point["nodes"]) for point in measured["points"])
    return Hardware(
        f"{measured['environment']['hardware']['gpus'][0]}, fitted", base.flops, work.flop_per_image / found.per_image / base.flops,
        base.memory_bandwidth, found.inside, found.between or base.between, per_node, found.fixed,
    )  # fmt: skip


# ---- tables ---------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A length of time with two or three digits."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def memory(size: float) -> str:
    """Bytes with a decimal unit."""
    for unit, scale_ in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale_:
            return f"{size / scale_:.3g} {unit}"
    return f"{size:.0f} B"


def error_table(report: dict[str, Any]) -> str:
    rows = [("error of the model", "points", "median", "largest", "median, to the median turns")]
    again = {f"measured again: {name}": entry for name, entry in report["errors_again"].items()}
    for name, entry in {**report["errors"]["summary"], **again}.items():
        figures = (entry["median"], entry["largest"], entry["median_to_medians"])
        rows.append((name, str(entry["points"]), *(f"{figure:.0%}" for figure in figures)))
    return "\n".join(markdown(rows))


def step_table(report: dict[str, Any]) -> str:
    """Every measured step beside the model's."""
    rows = [("step", "", "fastest turn", "median turn", "model", "error")]
    for row in report["errors"]["rows"]:
        if row["kind"] == "step":
            seconds = (f"{1e3 * row[key]:.0f} ms" for key in ("fastest_s", "median_s", "predicted_s"))
            rows.append((row["point"], "fitted" if row["fitted"] else "predicted", *seconds, f"{row['error']:+.0%}"))
    return "\n".join(markdown(rows))


def scale_table(report: dict[str, Any], mode: str) -> str:
    shown = [key for key in ("h100", "a100", "h100_ethernet", "fitted") if key in report["profiles"]]
    rows = [("GPUs", *(f"{report['profiles'][key]['name']}" for key in shown))]
    for number, row in enumerate(report["profiles"]["h100"][mode]):  # the same numbers of GPUs in every profile
        cells = []
        for key in shown:
            found = report["profiles"][key][mode][number]
            cells.append(f"{found['images_per_sec']:,.0f} ({found['efficiency']:.0%}, {found['bound_by']})")
        rows.append((f"{row['gpus']:,}", *cells))
    return "\n".join(markdown(rows))


def checkpoint_table(report: dict[str, Any], name: str) -> str:
    rows = [
        (
            "GPUs",
            "a failure every",
            "save holds up",
            "published after",
            "Young",
            "Daly",
            "useful",
            "useful, hourly saves",
        )
    ]
    for entry in report["checkpoints"][name]:
        rows.append((
            f"{entry['gpus']:,}", duration(entry["mtbf_s"]), duration(entry["save_s"]), duration(entry["publish_s"]),
            duration(entry["young_s"]), duration(entry["daly_s"]), f"{entry['useful']:.2%}", f"{entry['useful_hourly']:.2%}",
        ))  # fmt: skip
    return "\n".join(markdown(rows))


def data_table(report: dict[str, Any]) -> str:
    rows = [(
        "images", "shards", "index.npy", "index.json", "loading it", "order of an epoch", "memory for orders, 8 ranks",
        "shards in a batch of 1,024", "reads that open a file", "images/s by opens",
    )]  # fmt: skip
    for entry in report["data"]:
        by_opens = entry["images_per_sec_by_opens"]
        rows.append((
            f"{entry['images']:,}", f"{entry['shards']:,}", memory(entry["index_bytes"]), memory(entry["head_bytes"]),
            duration(entry["index_load_s"]), duration(entry["order_s"]),
            f"{memory(entry['order_kept_bytes_per_node'])}, peak {memory(entry['order_peak_bytes_per_node'])}",
            f"{entry['distinct_shards_of_1024']:.0f}", f"{entry['open_share']:.0%}", f"{by_opens:,.0f}" if by_opens else "no limit",
        ))  # fmt: skip
    return "\n".join(markdown(rows))


def tables(report: dict[str, Any]) -> dict[str, str]:
    """All tables by title."""
    work = report["workload"]["name"]
    return {
        "Steps, measured and modelled": step_table(report),
        "Error of the model": error_table(report),
        f"Weak scaling, {BATCH} images per GPU, images/s ({LABEL})": scale_table(report, "weak"),
        f"Strong scaling, {GLOBAL_BATCH:,} images per step, images/s ({LABEL})": scale_table(report, "strong"),
        f"Checkpoints of the {work} ({LABEL})": checkpoint_table(report, work),
        f"Checkpoints of a network of {LARGE.name} ({LABEL})": checkpoint_table(report, LARGE.name),
        f"Data ({LABEL})": data_table(report),
    }


def read(path: Path, benchmark: str) -> dict[str, Any]:
    """UserError when the file is not a report of ``benchmark``."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(report, dict) or report.get("benchmark") != benchmark:
        raise UserError(f"{path}: not a report of benchmarks.{benchmark}")
    return report


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.scaling_predict``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling_predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measured", type=Path, required=True, help="report of benchmarks.scaling")
    parser.add_argument("--again", type=Path, help="a second report of the same, only to state the error on it")
    parser.add_argument("--data", type=Path, required=True, help="report of benchmarks.scaling_data")
    parser.add_argument(
        "--images-per-sec", type=float, help="measured speed of one GPU (default: from the assumed MFU)"
    )
    parser.add_argument("--node-mtbf-days", type=float, help="days between failures of one node")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--plots", type=Path, help="draw scaling_*.png into this folder")
    args = parser.parse_args(argv)
    check_target(args.json)
    for name in ("images_per_sec", "node_mtbf_days"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.plots and not args.plots.is_dir():
        raise UserError(f"--plots {args.plots}: no such folder")
    measured, data = read(args.measured, "scaling"), read(args.data, "scaling_data")
    site = Site() if args.node_mtbf_days is None else Site(node_mtbf=86_400 * args.node_mtbf_days)
    try:
        again = read(args.again, "scaling") if args.again else None
        report = predict(measured, data, site, Workload(), args.images_per_sec, again)
    except ValueError as error:
        raise UserError(f"{args.measured}: {error}") from None
    for title, text in tables(report).items():
        print(f"{title}\n\n{text}\n")
    write_report(args.json, report)
    if args.plots:
        from benchmarks.scaling_plots import draw

        draw(args.plots, measured, report, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
