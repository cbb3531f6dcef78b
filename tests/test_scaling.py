"""The scaling benchmark on real ranks, and the numbers in its docs. The model behind the predictions: test_scaling_model.py."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, TINY, run_module

from benchmarks import scaling, scaling_data, scaling_predict, scaling_table
from benchmarks.scaling_hardware import Site, Workload

RESULTS = ROOT / "benchmarks" / "results" / "2_cores_Xeon_no_bf16"
NETWORK = [word for word in TINY if word.startswith(("data.", "model.", "diffusion.", "ema."))]


# ---- the measured part ----------------------------------------------------------------------------------------------


def test_two_ranks_end_to_end(tmp_path, capsys):
    config, target = tmp_path / "empty.yaml", tmp_path / "report.json"
    config.write_text("{}\n")
    words = ["--config", config, "--ranks", 1, 2, "--turns", 1, "--repeats", 2, "--steps", 2, "--global-batch", 12]
    done = run_module("benchmarks.scaling", *words, "--json", target, *NETWORK)
    assert done.returncode == 0, done.stderr
    report = json.loads(target.read_text())
    assert report["parameters"] == 15_705 and report["config"]["model.width"] == 4
    found = {(point["mode"], point["ranks"]): point for point in report["points"]}
    assert list(found) == [("strong", 1), ("strong", 2), ("weak", 1), ("weak", 2)]
    assert [p["global_batch"] for p in found.values()] == [12, 12, 2, 4]
    for (_mode, ranks), point in found.items():
        assert point["images_per_sec"] > 0 and point["input_alone_s"] > 0 and len(point["step_s_turns"]) == 2
        assert (point["exposed_s"] == 0) == (ranks == 1) and (point["efficiency"] == 1) == (ranks == 1)
    assert {entry["ranks"] for entry in report["all_reduce"]} == {2}
    assert all(line in done.stdout for line in scaling_table.table(report).splitlines())

    joined = tmp_path / "joined.json"
    assert scaling.main(["--table", str(target), str(target), "--json", str(joined)]) == 0
    assert len(json.loads(joined.read_text())["points"][0]["step_s_turns"]) == 4
    report["config"]["optim.lr"] = 1.0
    (tmp_path / "other.json").write_text(json.dumps(report))
    assert scaling.main(["--table", str(target), str(tmp_path / "other.json")]) == 2
    assert "they differ in optim.lr (0.0003, 1.0)" in capsys.readouterr().err


JOB = """
import sys
from pathlib import Path
import torch
from benchmarks import scaling
from ddpm_dist import runtime as runtimes
runtime = runtimes.start()
args = scaling.parse(["--config", sys.argv[1], "--batch", "2", *sys.argv[3:]])
loop = scaling.Loop(scaling.settings(args, "weak", Path(sys.argv[2]), runtime.world_size), runtime)
def alike():
    total = float(sum(p.double().sum() for p in loop.trainer.step_fn.engine.parameters.values()))
    return len(set(runtime.broadcast(runtime.gather(total)))) == 1
said = [alike()]
for exchange in (True, False):
    loop.steps(2, exchange)
    said.append(alike())
loop.close()
if runtime.is_main:
    print("alike", said)
runtimes.finish()
"""


def test_steps_without_exchange_exchange_nothing(tmp_path):
    """Ranks that exchange gradients keep the same weights; those that do not drift apart."""
    (tmp_path / "empty.yaml").write_text("{}\n")
    (tmp_path / "exchange_job.py").write_text(JOB)
    words = [tmp_path / "empty.yaml", tmp_path, "optim.lr=0.01", *NETWORK]
    done = run_module("exchange_job", *words, ranks=2, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "alike [True, True, False]" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "5"], "not divisible by 5 ranks"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["train.global_batch=8"], "set it with --global-batch"),
        (["--table", "README.md"], "cannot be read as JSON"),
        (["--table", str(RESULTS / "ema.json")], "not a report of benchmarks.scaling"),
        (["--json", "no/such/folder/report.json"], "its folder does not exist"),
    ],
)
def test_bad_input(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert scaling.main(words) == 2
    assert message in capsys.readouterr().err


# ---- what the docs say ----------------------------------------------------------------------------------------------


def test_docs_and_reports_say_the_same():
    """Every table of the docs is what the committed reports give, and the predictions are those of the present model."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    measured, second, data, report = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("scaling", "scaling_again", "scaling_data", "scaling_model")
    )
    again = scaling_predict.predict(measured, data, Site(), Workload(), again=second)
    for title, table in scaling_predict.tables(report).items():
        assert table in text, f"docs/scaling.md: the table '{title}' is not that of scaling_model.json"
        assert table == scaling_predict.tables(again)[title], (
            f"scaling_model.json is not what the model says now: {title}"
        )
    assert scaling_table.table(measured) in text
    assert scaling_data.table(data) in text
    assert report["errors_again"] and report["errors"]["summary"]["step, predicted"]["points"] == 4
    for title in ("error of the model", "useful, hourly saves", "images/s by opens"):
        assert title in text  # the tables are not empty
    from ddpm_dist.data import index_file, shards
    from ddpm_dist.pack import DEFAULT_PER_SHARD

    assert data["code"] == {
        "record_bytes": index_file.SAMPLE_DTYPE.itemsize, "max_open_files": shards.MAX_OPEN_FILES,
        "samples_per_shard": DEFAULT_PER_SHARD, "max_json_bytes": index_file.MAX_JSON_BYTES,
    }  # fmt: skip
    assert report["label"] == "predicted, not measured"
