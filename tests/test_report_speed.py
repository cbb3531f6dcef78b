"""The report of what a training step is made of: its parts, its memory, its kernels, its loader, and the start of a run."""

from __future__ import annotations

from pathlib import Path

from report_copies import MACHINE, ladder, loader, on_gpu, place, real, training, words, write

from benchmarks import environment as environments
from benchmarks import report
from benchmarks.environment import cudnn_words, driver_in, environment

TARGETS = (
    "training, images/s", "training, to the reference loop", "training, MFU", "training step, to the sum of its kernels",
    "training step as one CUDA graph", "training, waiting for data", "training, share of the averages", "training, share of logging",
    "training, peak memory to the least", "second start", "last rung of the ladder", "our loader, images/s", "our loader, to DALI",
    "our loader, to webdataset",
)  # fmt: skip


def whole_training(batch: int, rate: float) -> dict:
    """As train_throughput writes it now."""
    data = training(batch, rate)
    data["ddpm_dist"] |= {
        "step_percentiles": {"steps": 75, "p5_ms": 80.5, "p50_ms": 91.25, "p95_ms": 99.75}, "peak_memory_mb_per_image": 123.4,
        "mfu_nominal": 0.2718,
    }  # fmt: skip
    data["compute_only"] = {**data["ddpm_dist"], "images_per_sec": rate * 1.001}
    data |= {
        "nominal_tflops_per_device": 989.0, "data_frac": -0.004, "data_frac_turns": [-0.01, -0.004, 0.02], "ema_frac": 0.0061,
        "ema_frac_turns": [0.005, 0.0061, 0.007], "logging_frac": 0.0009, "logging_frac_turns": [0.0008, 0.0009, 0.001], "log_every": 50,
        "launches_per_step": 1234, "kernels_per_step": 2345,
    }  # fmt: skip
    return data


def kernels() -> dict:
    found = [{"name": "conv", "flop_per_byte": 400.0, "tflops": 50.0}]
    steps = {"ours": {"ms": 110.0, "to_best": 1.13}, "reference loop": {"ms": 90.0, "to_best": 0.9}}
    own = {"peak_tflops": 100.0, "peak_gb_per_sec": 4000.0, "kernels": found, "steps": steps}
    return {"benchmark": "kernels", "environment": real("ema")["environment"], **own}


def activations() -> dict:
    about = {
        "device": "cpu",
        "batches": [4, 8],
        "minimum_mb_per_image": 200.0,
        "peak_mb_per_image": 230.0,
        "ratio": 1.15,
    }
    return {
        "benchmark": "activations",
        "environment": real("ema")["environment"],
        **about,
        "largest": [{"module": "x"}],
    }


def startup(first: float, second: float) -> dict:
    starts = {
        kind: {"until_first_step_s": value, "until_first_step_s_turns": [0.9 * value, value, 1.1 * value], "first_step_s": value / 2,
               "total_s": 2 * value, "files_compiled": count}
        for kind, value, count in (("first", first, 48.0), ("second", second, 0.0))
    }  # fmt: skip
    about = {
        "device": "cpu",
        "network": "unet_conditional",
        "image_size": 64,
        "precision": "fp32",
        "processes": 1,
        "batch_per_rank": 4,
        "turns": 3,
    }
    ratio = {"second_to_first": second / first, "second_to_first_turns": [second / first] * 3}
    return {"benchmark": "startup", "environment": real("ema")["environment"], **about, "starts": starts, **ratio}


def cells(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {row}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_every_target_has_a_line_and_no_estimate(tmp_path):
    folder = place(tmp_path)
    assert report.main(words(folder)) == 0
    for name in ("REPORT.md", "README.md"):
        text = (folder / name).read_text()
        assert [cells(text, target)[-1] for target in TARGETS] == ["not yet measured"] * len(TARGETS)


def test_numbers_of_a_step(tmp_path):
    folder = place(tmp_path)
    results = folder / "results" / MACHINE
    timed = loader(**{"ddpm_dist, cpu": 15_000.0})
    timed["entries"][0] |= {
        "to_dali": {"median": 0.97, "lowest": 0.9, "highest": 1.0},
        "to_webdataset": {"median": 3.3, "lowest": 3.1, "highest": 3.6},
    }
    timed |= {"cores": 1, "limits": "66 microseconds of a core per image"}
    steps = ladder(1.0, 2.0)
    steps["rungs"][1] |= {"name": "step graph", "to_before": 2.22}
    for name, data in (
        ("train_8", whole_training(8, 4.0)), ("kernels", kernels()), ("activations", activations()), ("startup", startup(60.0, 12.0)),
        ("loader", timed), ("ladder", steps),
    ):  # fmt: skip
        write(results / f"{name}.json", data)
    assert report.main(words(folder)) == 0
    text = (folder / "REPORT.md").read_text()
    for number in (
        "-0.4 % (-1 % .. 2 %)", "0.61 % (0.5 % .. 0.7 %)", "0.09 % (0.08 % .. 0.1 %)", "91.2 ms (median of 75)", "80.5 ms .. 99.8 ms",
        "1,234 launches, 2,345 kernels on the device", "123 MB", "27 %", "by the data sheet 989 TFLOP/s", "the same, compute only",
        "66 microseconds of a core", "1 core for each loader", "0.97 (0.900 .. 1.00)", "1.150", "60.0 s", "54.0 .. 66.0 s",
    ):  # fmt: skip
        assert number in text, number
    readme = (folder / "README.md").read_text()
    for row, start in (
        ("training step, to the sum", "1.13 (ours)"), ("training step as one", "2.22 (batch 4)"), ("training, share of the averages", "0.61 %"),
        ("training, share of logging", "0.09 %"), ("training, peak memory", "1.15 (230 to 200 MB"), ("second start", "12.0 s, the first 60.0 s"),
        ("our loader, to DALI", "0.97"), ("our loader, to webdataset", "3.30"),
    ):  # fmt: skip
        assert cells(readme, row)[0].startswith(start), row
    assert "27 % of the data sheet's 989" in cells(readme, "training, MFU")[0]


def test_driver_and_libraries_stand_beside_the_numbers(tmp_path):
    folder = place(tmp_path)
    for name, driver in (("train_b256", "570.1"), ("train_b8", "580.2")):
        data = on_gpu(whole_training(256 if driver == "570.1" else 8, 100.0))
        data["environment"]["hardware"]["driver"] = driver
        data["environment"]["versions"] |= {"cudnn": "9.10.2", "nccl": "2.27.5"}
        write(folder / "results" / "GPU" / f"{name}.json", data)
    assert report.main(words(folder)) == 0
    text = (folder / "REPORT.md").read_text()
    assert "cudnn 9.10.2, nccl 2.27.5" in text
    for driver, name in (("570.1", "train_b256"), ("580.2", "train_b8")):  # two of them: beside each report
        assert f"driver {driver}" in next(line for line in text.splitlines() if line.startswith(f"- [{name}.json]"))


def test_what_the_host_took_stands_beside_the_numbers(tmp_path, monkeypatch):
    folder = place(tmp_path)
    for name, batch, share in (("quiet", 256, 0.004), ("busy", 8, 0.18)):
        data = on_gpu(whole_training(batch, 100.0))
        data["environment"]["hardware"]["stolen_share"] = share
        write(folder / "results" / "GPU" / f"{name}.json", data)
    assert report.main(words(folder)) == 0
    lines = (folder / "REPORT.md").read_text().splitlines()
    quiet, busy = (next(line for line in lines if line.startswith(f"- [{name}.json]")) for name in ("quiet", "busy"))
    assert "18% of its time taken by the host" in busy and "taken by the host" not in quiet
    monkeypatch.setattr(environments, "_AT_START", (0, 0))
    found = environments.stolen_share()
    stolen, *_ = [int(Path("/proc/stat").read_text().split()[8])]
    assert found is not None and 0 <= found < 1 and (found > 0) == (stolen > 0)
    monkeypatch.setattr(environments, "_AT_START", None)
    assert environments.stolen_share() is None


def test_compare_knows_what_is_better(tmp_path, capsys):
    def compare(old: dict, new: dict) -> tuple[int, str]:
        paths = [str(write(tmp_path / f"{name}.json", data)) for name, data in (("old", old), ("new", new))]
        code = report.main(["--compare", *paths])
        return code, capsys.readouterr().out

    code, said = compare(startup(60.0, 12.0), startup(60.0, 20.0))
    assert code == 1 and said.count("REGRESSION") >= 1 and "starts.second.until_first_step_s" in said
    assert compare(startup(60.0, 20.0), startup(60.0, 12.0))[0] == 0
    data = real("ema")
    for way in data["ways"].values():
        way["update_ms_turns"] = [0.99 * way["update_ms"], way["update_ms"], 1.01 * way["update_ms"]]
    slower = real("ema")
    for way in slower["ways"].values():
        way["update_ms"] *= 2
        way["update_ms_turns"] = [0.99 * way["update_ms"], way["update_ms"], 1.01 * way["update_ms"]]
    code, said = compare(data, slower)
    assert code == 1 and said.count("REGRESSION") == 1  # the full copy and the loop are others
    assert compare(slower, data)[0] == 0
    other = on_gpu(whole_training(8, 10.0))
    other["environment"]["hardware"]["driver"] = "999.9"
    assert "driver 570.1 -> 999.9" in compare(on_gpu(whole_training(8, 10.0)), other)[1]


def test_versions_of_the_libraries():
    assert (cudnn_words(91002), cudnn_words(8907)) == ("9.10.2", "8.9.7")
    for line in (
        "NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed",
        "NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release",
    ):
        assert driver_in(f"NVRM version: {line}\nGCC version:  gcc version 12.2.0\n") == "570.124.06"
    assert driver_in("GCC version: 12.2.0") is None
    found = environment()
    assert found["hardware"]["gpus"] or not {"cudnn", "nccl"} & found["versions"].keys()
