"""Copies of the repository's reports, changed as a test needs them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from conftest import ROOT

MACHINE = "2_cores_Xeon_no_bf16"
RESULTS = ROOT / "benchmarks" / "results"
README = "# A project\n\n## Speed\n\n<!-- benchmarks:begin -->\nold 1.23\n<!-- benchmarks:end -->\n\n## More\n"
# As they were measured when this test was written, so that it does not depend on what is measured later.
NAMES = ("checkpoint", "ema", "engines", "engines_1B_calculated", "sampling", "scaling", "scaling_again", "scaling_data",
         "scaling_model", "train_throughput")  # fmt: skip


def real(name: str) -> dict[str, Any]:
    """A report of the repository."""
    return json.loads((RESULTS / MACHINE / f"{name}.json").read_text())


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1))
    return path


def place(tmp_path: Path) -> Path:
    """A folder with results, a README with markers, and nothing else."""
    (tmp_path / "results" / MACHINE).mkdir(parents=True)
    for name in NAMES:
        shutil.copy(RESULTS / MACHINE / f"{name}.json", tmp_path / "results" / MACHINE)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def words(folder: Path) -> list[str]:
    """The options of the command for such a folder."""
    return [
        "--results",
        str(folder / "results"),
        "--out",
        str(folder / "REPORT.md"),
        "--readme",
        str(folder / "README.md"),
    ]


def tree(folder: Path) -> dict[str, bytes]:
    """All that lies in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def on_gpu(data: dict[str, Any]) -> dict[str, Any]:
    """The same report as a machine with a GPU would have written it."""
    data = copy.deepcopy(data)
    data["environment"]["hardware"].update(gpus=["Test GPU"], cpu="Another Processor", cores=16, driver="570.1")
    return data


def training(batch: int, rate: float, spread: float = 0.01) -> dict[str, Any]:
    """A report of train_throughput with another batch and rate."""
    data = real("train_throughput")
    data["batch_per_rank"] = batch
    loop = data["ddpm_dist"]
    loop["images_per_sec"], loop["images_per_sec_lowest"] = rate, rate * (1 - spread)
    loop["images_per_sec_highest"] = rate * (1 + spread)
    loop["images_per_sec_turns"] = [rate * (1 - spread), rate, rate * (1 + spread)]
    return data


def ladder(*rates: float | None) -> dict[str, Any]:
    """Rungs "reference", "rung 1" and so on; None: it could not run."""
    rungs: list[dict[str, Any]] = []
    for place, rate in enumerate(rates):
        rung = {"name": f"rung {place}" if place else "reference", "what": f"switch | {place}", "problem": None}
        if rate is None:
            rung |= {
                **dict.fromkeys(("images_per_sec", "lowest", "highest", "to_first", "to_before")),
                "problem": "out of memory",
            }
        else:
            rung |= {
                "images_per_sec": rate,
                "lowest": 0.98 * rate,
                "highest": 1.01 * rate,
                "to_first": rate / rates[0],
                "to_before": None,
            }
        rungs.append(rung)
    return {"benchmark": "ladder", "environment": real("ema")["environment"], "batch": 4, "rungs": rungs}


def loader(**rates: float | None) -> dict[str, Any]:
    entries = [
        {"name": name, "images_per_sec": rate, "lowest": rate and 0.9 * rate, "highest": rate and 1.1 * rate,
         "cpu_s_per_1000": rate and 1000 / rate, "problem": None if rate else "not installed"}
        for name, rate in rates.items()
    ]  # fmt: skip
    return {"benchmark": "loader", "environment": real("ema")["environment"], "size": 64, "entries": entries}


def kernels() -> dict[str, Any]:
    found = [
        {"name": "norm", "flop_per_byte": 2.0, "tflops": 4.0},
        {"name": "conv", "flop_per_byte": 400.0, "tflops": 50.0},
    ]
    return {
        "benchmark": "kernels", "environment": real("ema")["environment"], "peak_tflops": 100.0, "peak_gb_per_sec": 4000.0, "kernels": found,
    }  # fmt: skip
