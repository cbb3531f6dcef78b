"""The package as people get it: a wheel that works outside the checkout, scripts without surprises, a true README."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, environment, run_module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder appears in the checkout."""
    source = checkout(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def checkout(folder):
    """What git tracks (and what is new but not ignored), copied."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_the_wheel_holds_every_module_the_programs_and_the_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(ROOT)) for path in (ROOT / "ddpm_dist").rglob("*") if path.suffix in (".py", ".cpp")
    }
    assert modules <= names and len([name for name in names if name.endswith(".cpp")]) == 2
    assert {f"ddpm_dist/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "configs/"))]


def test_an_installed_package_trains_and_samples_outside_the_checkout(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    assert subprocess.run(command, capture_output=True, env=environment()).returncode == 0
    assert {path.name for path in (site / "bin").iterdir()} >= {
        "ddpm-train",
        "ddpm-sample",
        "ddpm-pack",
        "ddpm-convert",
    }

    def run(command, *arguments):
        done = subprocess.run(
            [sys.executable, str(site / "bin" / command), *arguments], cwd=work, capture_output=True, text=True,
            env={**environment(), "PYTHONPATH": str(site)}, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "name: digits" in run("ddpm-train", "--config", "digits", "--print-config")
    run("ddpm-pack", "digits", "--out", "shards/digits")
    small = ("model.width=8", "train.images=128", "tracking.mlflow=false", "sampling.every=null")
    run("ddpm-train", "--config", "digits", *small)
    run("ddpm-sample", "runs/digits", "--num", "10", "--steps", "5", "--out", "digits.png")
    assert (work / "digits.png").stat().st_size > 500


def test_every_command_of_the_readme_exists():
    """Modules, options, scripts, configs and files that the README names are there."""
    text = (ROOT / "README.md").read_text()
    helps = {}
    for module, rest in re.findall(r"-m ((?:ddpm_dist|benchmarks)\.\w+)([^\n]*)", text):
        if module not in helps:
            helps[module] = run_module(module, "--help").stdout
            assert "usage:" in helps[module], module
        for option in re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", rest.split("#")[0]):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", helps[module]), f"{module} {option}"
    for path in re.findall(r"(?:launch|benchmarks|docs|configs)/[\w.]+\.(?:sh|md|yaml|png|gif)", text):
        assert (ROOT / path).exists(), path


def test_scripts_are_valid_bash():
    for script in [*ROOT.glob("launch/*.sh"), *ROOT.glob("benchmarks/*.sh"), ROOT / ".ci/run"]:
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, script


def test_launch_scripts_pass_on_the_code_that_torchrun_swallows(tmp_path):
    """train() of launch/environment.sh: bad usage is 2 although torchrun says 1, success is 0."""
    script = 'source launch/environment.sh; PYTHON="$1"; shift; train "$@"'

    def code(*arguments):
        command = ["bash", "-c", script, "bash", sys.executable, str(tmp_path / "run"), "2", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)

    bad = code("--config", "digits", "optim.lrr=1")
    assert bad.returncode == 2 and "did you mean optim.lr?" in bad.stderr
    small = (
        "data.source=synthetic",
        "model.width=8",
        "train.images=128",
        "tracking.mlflow=false",
        "sampling.every=null",
    )
    good = code("--config", "digits", *small)
    assert good.returncode == 0, good.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_quick_start(tmp_path):
    """The first command of the README, whole, on a copy of the checkout; then again."""
    import json
    import time

    copy = checkout(tmp_path / "ddpm_dist")
    values = {**environment(), "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": ""}
    values.pop("OMP_NUM_THREADS")

    def quickstart():
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "launch/quickstart.sh"], cwd=copy, env=values, capture_output=True, text=True, timeout=2000
        )
        print(done.stdout, done.stderr, f"{time.monotonic() - started:.0f} s")
        assert done.returncode == 0
        return done.stdout

    first = quickstart()
    score = json.loads((copy / "runs/digits/score.json").read_text())
    assert score["generated_images"] >= 500 and score["distinct"] == 1, score
    assert score["recognized"] >= 0.95 and score["held_out_accuracy"] >= 0.97, score
    assert score["frechet"] < 4 * score["frechet_real"] and score["diversity"] > 0.8, score
    for word in (
        "images/sec",
        "final loss",
        "recognized as their class",
        "Fréchet distance",
        "mlflow ui",
        "digits.png",
    ):
        assert word in first
    assert (copy / "runs/mlflow.db").exists()
    second = quickstart()
    assert "done, " in second and "recognized as their class" in second and "generating" not in second
