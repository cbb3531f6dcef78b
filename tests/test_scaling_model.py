"""The model of scaling: formulas against brute force, data against the real order, fitting against numbers whose truth is known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import scaling_data, scaling_fit, scaling_predict
from benchmarks import scaling_model as model
from benchmarks.scaling_hardware import PROFILES, Site, Workload
from benchmarks.scaling_model import Link
from ddpm_dist.data.order import SampleOrder

RESULTS = ROOT / "benchmarks" / "results" / "2_cores_Xeon_no_bf16"
LINK, SLOW = Link(10e9, 5e-6), Link(1e9, 20e-6)


# ---- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_a_ring_played_through_takes_what_the_formula_says(ranks):
    values = np.arange(ranks * 6.0).reshape(ranks, 6) + 1
    held = [np.array_split(row.copy(), ranks) for row in values]
    seconds = 0.0
    for phase in ("add", "copy"):
        for round_ in range(ranks - 1):
            shift = 0 if phase == "add" else 1
            chunks = [(rank + shift - round_) % ranks for rank in range(ranks)]
            sent = [held[rank][chunk].copy() for rank, chunk in enumerate(chunks)]
            for rank, (chunk, data) in enumerate(zip(chunks, sent, strict=True)):
                there = held[(rank + 1) % ranks]
                there[chunk] = there[chunk] + data if phase == "add" else data
            seconds += 1e6 / ranks / LINK.bandwidth + LINK.latency  # as if all six numbers were a million bytes
    assert all(np.array_equal(np.concatenate(parts), values.sum(0)) for parts in held)
    assert model.ring_all_reduce(1e6, ranks, LINK) == pytest.approx(seconds, abs=1e-18)


def test_limits_of_the_all_reduce():
    assert model.ring_all_reduce(1e9, 1, LINK) == model.tree_all_reduce(1e9, 1, LINK) == 0
    assert model.ring_all_reduce(1e9, 10_000, replace(LINK, latency=0)) == pytest.approx(2e9 / 10e9, rel=1e-3)
    assert model.all_reduce(1e9, 1, 8, LINK, SLOW) == model.ring_all_reduce(1e9, 8, LINK)
    assert model.all_reduce(1e9, 4, 1, LINK, SLOW) == min(
        model.ring_all_reduce(1e9, 4, SLOW), model.tree_all_reduce(1e9, 4, SLOW)
    )
    # Latency alone: a ring pays it 2 (W - 1) times, trees 2 log2 W times.
    assert model.ring_all_reduce(0, 512, LINK) / model.tree_all_reduce(0, 512, LINK) == pytest.approx(511 / 9)
    # Halves of the ring: the all-gather of a sharded optimizer.
    assert 2 * model.gather_seconds(1e9, 1, 8, LINK, SLOW) == model.ring_all_reduce(1e9, 8, LINK)


def test_more_nodes_bytes_and_slower_links_never_make_it_faster():
    times = [model.all_reduce(1e8, nodes, 8, LINK, SLOW) for nodes in (1, 2, 4, 8, 64, 512)]
    assert times == sorted(times) and times[0] < times[-1]
    assert model.all_reduce(2e8, 8, 8, LINK, SLOW) > model.all_reduce(1e8, 8, 8, LINK, SLOW)
    assert model.all_reduce(1e8, 8, 8, LINK, LINK) < model.all_reduce(1e8, 8, 8, LINK, SLOW)


def test_what_is_exposed_lies_between_the_last_bucket_and_everything():
    sent = model.gradient_exchange(1e8, 25e6, 2, 8, LINK, SLOW)
    assert sent.last == pytest.approx(sent.total / 4)
    assert model.exposed(sent, compute=1e3, overlap=0.0) == sent.total
    assert model.exposed(sent, compute=1e3, overlap=0.5) == sent.last
    waiting = [model.exposed(sent, compute, 0.5) for compute in (0.0, 0.01, 0.05, 0.1, 1.0)]
    assert waiting == sorted(waiting, reverse=True)


def test_sharding_saves_what_it_says():
    whole = model.update_seconds(1e9, 2, 1, 1e12, sharded_optimizer=False)
    assert whole == pytest.approx((28 + 64) * 1e9 / 1e12)
    assert model.update_seconds(1e9, 2, 8, 1e12, True) == pytest.approx(whole / 8)
    assert model.update_seconds(1e9, 2, 8, 1e12, False) == pytest.approx((28 + 64 / 8) * 1e9 / 1e12)


@pytest.mark.parametrize("ranks", [1, 8, 512])
def test_slowest_rank_against_simulation(ranks):
    numbers = np.random.default_rng(0).normal(1, 0.02, (20_000, ranks)).max(1)
    assert model.slowest_of(ranks, 0.02) == pytest.approx(numbers.mean(), rel=1e-3)


def test_intervals_that_daly_published():
    """The captions of figures 3 to 5 of Daly 2006: a save of 5 minutes, MTBF of 24 h, 6 h and 15 min."""
    for mtbf, minutes in ((24 * 60, 117), (6 * 60, 57), (15, 9.1)):
        assert model.daly_interval(5, mtbf) == pytest.approx(minutes, rel=0.006)
    assert model.daly_interval(1e-6, 1e6) == pytest.approx(model.young_interval(1e-6, 1e6), rel=1e-4)
    assert model.daly_interval(5, 2) == 2 and model.best_interval(1e-6, 10, publish=30) == 30


def simulated(intervals, save: float, restart: float, mtbf: float, publish: float) -> np.ndarray:
    """Useful share of the time, from failures drawn at random. After a failure: a restart, then intervals of work with a save behind
    each; a save counts ``publish`` seconds after it is over; a failure loses everything since the last one that counts.
    """
    lives = np.random.default_rng(1).exponential(mtbf, 500_000)
    return np.array([
        (np.floor(np.maximum(0, lives - restart - publish) / (interval + save)) * interval).sum() / lives.sum()
        for interval in intervals
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("save", "restart", "mtbf", "publish"), [(300, 600, 86_400, 0), (60, 300, 7_200, 0), (60, 300, 7_200, 120)]
)
def test_failures_at_random_have_dalys_optimum(save, restart, mtbf, publish):
    """Within 5 % of the interval, and the useful share there within 0.2 % of the best."""
    daly = model.daly_interval(save, mtbf)
    intervals = daly * np.geomspace(0.5, 2, 41)
    useful = simulated(intervals, save, restart, mtbf, publish)
    formula = [model.useful_fraction(interval, save, restart, mtbf, publish) for interval in intervals]
    assert useful == pytest.approx(np.array(formula), rel=0.01)
    curve = np.polyfit(np.log(intervals / daly), useful, 4)
    fine = np.linspace(-0.6, 0.6, 2401)
    best = fine[np.argmax(np.polyval(curve, fine))]
    assert abs(best) < 0.05
    assert useful[20] > useful.max() - 0.002
    assert useful[0] < useful[20] > useful[-1]


def test_predictions_are_monotonic_and_say_what_binds():
    site, work = Site(), Workload()
    for hardware in PROFILES.values():
        for mode in ("weak", "strong"):
            rows = scaling_predict.scale(hardware, site, work, mode, input_rate=1e9)
            efficiencies = [row["efficiency"] for row in rows]
            assert efficiencies[0] == 1 and efficiencies == sorted(efficiencies, reverse=True)
            assert all(row["images_per_sec_with_failures"] < row["images_per_sec"] for row in rows)
    assert {row["bound_by"] for row in scaling_predict.scale(PROFILES["h100"], site, work, "weak", 100.0)} == {"input"}
    assert scaling_predict.scale(PROFILES["h100_ethernet"], site, work, "strong", 1e9)[-1]["bound_by"] == "exchange"
    saves = [scaling_predict.checkpoints(site, work, gpus) for gpus in scaling_predict.GPUS]
    assert [s["interval_s"] for s in saves] == sorted((s["interval_s"] for s in saves), reverse=True)
    assert all(s["useful"] >= max(s["useful_half"], s["useful_double"], s["useful_hourly"]) for s in saves)


# ---- data -----------------------------------------------------------------------------------------------------------


def test_shards_of_a_batch_and_open_files_against_the_real_order():
    samples, per_shard, batch, kept = 40_000, 100, 256, 128
    order, shards = SampleOrder(samples, seed=3), samples // per_shard
    ids = order.locate(np.arange(samples))[1] // per_shard
    seen = np.mean([len(set(ids[start : start + batch])) for start in range(0, samples - batch, batch)])
    assert scaling_data.distinct_shards(batch, shards) == pytest.approx(seen, rel=0.01)
    files, opened = OrderedDict(), 0  # least recently used goes, as in data/shards.py
    for shard in ids:
        if files.pop(shard, None) is None:
            opened += 1
        files[shard] = True
        if len(files) > kept:
            files.popitem(last=False)
    assert scaling_data.open_share(shards, kept) == pytest.approx(opened / samples, rel=0.01)
    assert scaling_data.open_share(kept, kept) == 0 and scaling_data.distinct_shards(5, 1) == 1


def test_order_and_index_are_measured_on_the_real_code():
    order, index = scaling_data.measure_order(200_000), scaling_data.measure_index(50_000)
    assert (
        order["seconds"] > 0 and 16 <= order["peak_bytes"] < 60
    )  # random words and their order, 8 bytes each, at least
    assert index["seconds"] > 0 and index["head_bytes_per_shard"] > 100
    sizes = [{"samples": n, "seconds": scaling_data.order_seconds(n, 3e-9)} for n in (1e5, 1e6)]
    assert scaling_data.fit_order(sizes) == pytest.approx(3e-9)


# ---- fitting --------------------------------------------------------------------------------------------------------

TRUTH = scaling_fit.Calibration(0.2, 0.05, Link(0.6e9, 1e-3), Link(0.1e9, 4e-3), 0.3, 20_000_000, 2)


def timed(entry: dict, truth: scaling_fit.Calibration) -> dict:
    """``entry`` with the seconds that ``truth`` gives it, the median a tenth above the fastest."""
    times = (
        {"seconds": truth.all_reduce(entry)} if "bytes" in entry
        else {"step_s": truth.step(entry), "without_exchange_s": truth.compute(entry)}
    )  # fmt: skip
    for key, value in times.items():
        entry |= {key: 1.1 * value, f"{key}_fastest": value}
    return entry


def made_up(places=((1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (8, 4))) -> dict:
    """A report of what ``TRUTH`` would measure; (ranks, nodes)."""
    points = []
    for mode in ("strong", "weak"):
        for ranks, nodes in places:
            batch = 24 // ranks if mode == "strong" else 2
            point = {
                "mode": mode,
                "ranks": ranks,
                "nodes": nodes,
                "batch_per_rank": batch,
                "global_batch": batch * ranks,
            }
            point |= {"input_alone_s": 0.01}
            points.append(timed(point, TRUTH))
    reduced = [
        {"ranks": ranks, "nodes": nodes, "bytes": size}
        for ranks, nodes in places
        if ranks > 1
        for size in (4096, 1e6, 8e7)
    ]
    for entry in reduced:
        timed(entry, TRUTH)
    return {
        "environment": {"hardware": {"cores": 2}}, "device": "cpu", "parameters": TRUTH.parameters, "points": points,
        "all_reduce": reduced,
    }  # fmt: skip


def test_fit_finds_what_made_the_numbers_and_predicts_the_rest():
    report = made_up()
    four = next(point for point in report["points"] if (point["ranks"], point["nodes"]) == (4, 1))
    assert four["without_exchange_s_fastest"] == pytest.approx(2 * (0.2 + 6 * 0.05))  # four ranks on two cores
    found = scaling_fit.fit(report)
    assert (found.fixed, found.per_image, found.overlap) == pytest.approx((0.2, 0.05, 0.3), rel=1e-6)
    assert (found.inside.bandwidth, found.inside.latency) == pytest.approx((0.6e9, 1e-3), rel=1e-6)
    assert (found.between.bandwidth, found.between.latency) == pytest.approx((0.1e9, 4e-3), rel=1e-3)
    said = scaling_fit.errors(report, found)
    assert said["summary"]["step, predicted"]["points"] == 8 and said["summary"]["step, fitted"]["points"] == 4
    assert all(entry["largest"] < 1e-3 for entry in said["summary"].values())
    assert all(entry["median_to_medians"] == pytest.approx(1 - 1 / 1.1, abs=1e-3) for entry in said["summary"].values())
    for point in report["points"]:
        if point["ranks"] == 4 and point["nodes"] == 1:
            point["step_s_fastest"] *= 2
    said = scaling_fit.errors(
        report, scaling_fit.fit(report)
    )  # points that were not fitted change their own error only
    assert said["summary"]["step, predicted"]["largest"] == pytest.approx(0.5, abs=1e-3)
    assert said["summary"]["step, fitted"]["largest"] < 1e-3
    with pytest.raises(ValueError, match="nothing to fit on"):
        scaling_fit.fit(made_up(places=((1, 1), (4, 2))))


def test_a_measured_cluster_is_carried_on():
    data = json.loads((RESULTS / "scaling_data.json").read_text())
    report = made_up(places=((8, 1), (16, 2), (32, 4)))
    report["device"], report["environment"]["hardware"]["gpus"] = "cuda", ["H300"]
    for entry in (*report["points"], *report["all_reduce"]):  # GPUs share no cores
        timed(entry, replace(TRUTH, cores=None))
    found = scaling_predict.predict(report, data, Site(variation=0), Workload())
    assert found["errors"]["summary"]["step, predicted"]["largest"] < 0.01
    profile = found["profiles"]["fitted"]
    assert profile["name"] == "H300, fitted"
    assert profile["images_per_sec_of_one"] == pytest.approx(128 / (0.2 + 128 * 0.05), rel=0.01)
    assert "H300, fitted" in scaling_predict.scale_table(found, "weak")


def test_predictions_need_no_torch():
    code = "import sys, benchmarks.scaling_predict as p; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
