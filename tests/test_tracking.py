"""metrics.jsonl, cut_back and the progress display; nothing here needs MLflow."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ddpm_dist.errors import UserError
from ddpm_dist.tracking import Progress, Tracker, cut_back
from ddpm_dist.tracking.metrics import read_lines
from ddpm_dist.tracking.progress import duration, rate

REPOSITORY = Path(__file__).resolve().parents[1]
OFF = SimpleNamespace(mlflow=False, uri=None, experiment="e")


def start(run_dir: Path, step: int = 0) -> Tracker:
    return Tracker(run_dir, OFF, "run", {"train": {"images": 10}}, step)


def python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
    command = [sys.executable, *options.pop("flags", []), "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def test_each_record_is_one_json_line_and_is_on_disk_at_once(tmp_path):
    tracker = start(tmp_path)
    tracker.log({"step": 1, "loss": 0.5, "time": 12.0})
    tracker.log({"step": 2, "loss": 0.25, "lr": 1e-3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5, "time": 12.0}
    second = json.loads(lines[1])
    assert second["lr"] == 1e-3 and second["time"] > 1.7e9  # added, seconds since 1970
    assert tracker.run_id is None
    tracker.close("FINISHED")
    tracker.close("FAILED")  # a second close is harmless


def test_values_that_json_cannot_hold_become_null_or_numbers(tmp_path):
    import torch

    tracker = start(tmp_path)
    tracker.log(
        {
            "step": 1,
            "loss": float("nan"),
            "grad_norm": float("inf"),
            "nested": [1.0, float("-inf")],
            "numpy": np.float32(0.5),
            "torch": torch.tensor(float("nan")),
            "numpy_nan": np.float32("nan"),
        }
    )
    tracker.close("FINISHED")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["loss"] is record["grad_norm"] is record["torch"] is record["numpy_nan"] is None
    assert record["nested"] == [1.0, None]
    assert record["numpy"] == 0.5


@pytest.mark.parametrize("step", [None, 1.5, True, "3"])
def test_a_record_without_an_integer_step_is_refused(tmp_path, step):
    with pytest.raises(ValueError, match="integer step"):
        start(tmp_path).log({"step": step, "loss": 1.0})


def test_cut_back_keeps_the_bytes_of_earlier_lines_and_drops_later_and_torn_ones(tmp_path):
    path = tmp_path / "audit.jsonl"
    kept = b'{"step": 1, "loss": "0x1p-1"}\n{"loss":"0x1p-2",  "step":2}\n'
    path.write_bytes(kept + b'{"step": 3}\n{"step": 4}\n{"step": 1, "lo')
    cut_back(path, 2)
    assert path.read_bytes() == kept
    assert os.listdir(tmp_path) == ["audit.jsonl"]


def test_cut_back_drops_a_last_line_without_newline_even_if_it_reads_well(tmp_path):
    path = tmp_path / "metrics.jsonl"  # 12 may be what is left of 1234
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    cut_back(path, 100)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_cut_back_leaves_a_file_alone_that_needs_no_change(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    before = path.stat().st_ino
    cut_back(path, 2)
    assert path.stat().st_ino == before
    cut_back(tmp_path / "missing.jsonl", 2)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_cut_back_says_how_many_damaged_lines_it_dropped(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\0\n[1]\n{"step": 2}\n\xff\xfe\n')
    cut_back(path, 9)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert "3 damaged line(s)" in capsys.readouterr().err


def test_cut_back_that_cannot_write_keeps_the_file_and_says_so(tmp_path):
    path = tmp_path / "metrics.jsonl"
    content = b"".join(b'{"step": %d}\n' % step for step in range(1, 1001))
    path.write_bytes(content)
    code = """
import resource, sys
from ddpm_dist.errors import UserError
from ddpm_dist.tracking import cut_back
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    cut_back(sys.argv[1], 900)
except UserError as error:
    print(error)
    sys.exit(7)
"""
    done = python(code, str(path))
    assert done.returncode == 7, done.stderr
    assert "metrics.jsonl: cannot cut back to step 900" in done.stdout
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_continued_run_goes_on_where_its_checkpoint_was(tmp_path):
    tracker = start(tmp_path)
    for step in range(1, 11):
        tracker.log({"step": step})
    tracker.close("KILLED")
    tracker = start(tmp_path, step=6)
    tracker.log({"step": 7, "again": True})
    tracker.close("FINISHED")
    records = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert records[-1]["again"]


def test_a_full_disk_warns_once_leaves_no_half_line_and_logging_resumes_when_there_is_room(tmp_path):
    code = """
import resource, sys
from types import SimpleNamespace
from ddpm_dist.tracking import Tracker
tracker = Tracker(sys.argv[1], SimpleNamespace(mlflow=False, uri=None, experiment="e"), "n", {}, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(1, 101):
    tracker.log({"step": step, "loss": 0.5, "time": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tracker.log({"step": 101, "loss": 0.5, "time": 1.0})
tracker.close("FINISHED")
"""
    done = python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines]  # every line is whole
    assert steps == [*range(1, len(steps)), 101] and 10 < len(steps) < 50
    assert done.stderr.count("cannot write") == 1
    assert f"{101 - len(steps)} line(s) could not be written" in done.stderr


def test_without_the_package_mlflow_the_run_is_recorded_and_the_remedy_named_once(tmp_path):
    # A folder with everything that is installed, except MLflow.
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith("mlflow"):
            (packages / entry.name).symlink_to(entry)
    code = """
import sys
from types import SimpleNamespace
from ddpm_dist.tracking import Tracker
tracker = Tracker(sys.argv[1], SimpleNamespace(mlflow=True, uri=None, experiment="e"), "n", {}, 0)
tracker.log({"step": 1})
tracker.picture("x.png", 1)
tracker.close("FINISHED")
print(tracker.run_id)
"""
    done = python(code, str(tmp_path), flags=["-S"], env={"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{packages}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"
    assert done.stderr.count("warning") == 1 and "pip install" in done.stderr and "tracking.mlflow=false" in done.stderr
    assert len(list(read_lines(tmp_path / "metrics.jsonl"))) == 1


def test_importing_tracking_does_not_import_mlflow_or_matplotlib():
    code = "import sys, ddpm_dist.tracking.pictures; print({'mlflow', 'matplotlib'} & set(sys.modules))"
    assert python(code).stdout == "set()\n"


def test_metrics_file_that_cannot_be_cut_back_is_a_user_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 5}\n')
    (tmp_path / "metrics.jsonl.incomplete").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl"):
        start(tmp_path, step=2)


RECORD = {
    "step": 1200,
    "images_seen": 153_600,
    "loss": 0.03124,
    "lr": 3e-4,
    "images_per_sec": 812.3,
    "data_wait_frac": 0.004,
}


def test_status_lines_are_readable(capsys):
    progress = Progress(500_000, 0, enabled=True)
    progress.update(RECORD)
    assert capsys.readouterr().out == (
        "step 1,200  images 153,600/500,000 (31 %)  loss 0.0312  lr 3.0e-04  812 img/s  wait 0.4 %  ETA 7m06s\n"
    )
    progress.update({**RECORD, "loss": None, "skipped_steps": 2, "images_per_sec": None})
    line = capsys.readouterr().out
    assert "loss not finite" in line and "skipped 2" in line and "ETA 7m06s" in line
    progress.close()
    progress.update(RECORD)
    assert capsys.readouterr().out == ""


def test_only_rank_0_shows_progress(capsys):
    progress = Progress(500_000, 0, enabled=False)
    progress.update(RECORD)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_and_warnings_do_not_tear_it():
    """A real pseudo-terminal as stderr."""
    code = f"""
from ddpm_dist.tracking import Progress
from ddpm_dist.tracking.progress import warn
progress = Progress(500_000, 100_000, enabled=True)
progress.update({RECORD!r})
warn("something")
progress.update({ {**RECORD, "images_seen": 300_000}!r})
progress.close()
"""
    primary, secondary = os.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 160, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=secondary, timeout=120
    )
    os.close(secondary)
    shown = os.read(primary, 100_000).decode()
    os.close(primary)
    assert done.returncode == 0, shown
    assert done.stdout == b""  # the bar replaces the lines
    assert " 31%|" in shown and " 60%|" in shown and "loss 0.0312" in shown and "ETA" in shown
    assert "\rwarning: something\r\n" in shown  # on a line of its own: the bar was wiped before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (42.4, "42s"), (432, "7m12s"), (11_100, "3h05m"), (187_200, "2d04h"), (float("inf"), "?")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.8534, "0.853"), (42.56, "42.6"), (812.3, "812"), (11_204.2, "11,204")])
def test_rates(value, text):
    assert rate(value) == text
