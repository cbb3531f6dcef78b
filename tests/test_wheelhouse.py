"""launch/wheelhouse.sh: wheels collected with pip, installed into a fresh environment without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "launch/wheelhouse.sh"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHER = "3.13" if HERE != "3.13" else "3.12"


def run(command: list, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
    values = {name: text for name, text in os.environ.items() if name not in hidden} | variables
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=values, capture_output=True, text=True, timeout=300, check=False
    )


def collect(cwd: Path, *words: object) -> subprocess.CompletedProcess:
    return run(["bash", SCRIPT, *words], cwd, VIRTUAL_ENV=sys.prefix)


def without_network() -> list[str]:
    """A prefix that starts a command without network; none where that is not allowed (then a wrong index has to do)."""
    works = shutil.which("unshare") and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    return ["unshare", "-n"] if works else []


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory) -> Path:
    """The project and two small packages, in parts, away from the checkout."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    done = collect(
        folder, "--out", "wheels", "--python", HERE, "--part-size", "100K", "--no-deps", ".", "braceexpand", "tqdm"
    )
    assert done.returncode == 0, done.stderr
    return folder / "wheels"


@pytest.mark.slow
def test_a_wheelhouse_in_parts_installs_without_network(wheelhouse, tmp_path):
    names = sorted(path.name for path in wheelhouse.iterdir())
    parts = [name for name in names if name.startswith("wheelhouse.tar.")]
    assert names == ["SHA256SUMS", "install.sh", *parts] and len(parts) > 2
    assert all((wheelhouse / name).stat().st_size <= 100 * 1024 for name in parts)
    wrong = {"PIP_INDEX_URL": "https://127.0.0.1:9/simple", "PIP_FIND_LINKS": str(tmp_path / "nothing")}
    (tmp_path / "elsewhere").mkdir()
    install = [*without_network(), "bash", wheelhouse / "install.sh", "--into", tmp_path / "elsewhere/environment"]
    done = run(install, tmp_path, **wrong)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["environment"]
    python = tmp_path / "elsewhere/environment/bin/python"
    said = run([python, "-c", "import ddpm_dist, braceexpand, tqdm; print(ddpm_dist.__file__)"], tmp_path)
    assert said.returncode == 0 and str(python.parent.parent) in said.stdout, said.stderr
    listed = run([python, "-m", "pip", "list", "--format=freeze"], tmp_path).stdout
    tested = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("tqdm==")]
    assert tested and tested[0] in listed.splitlines()


def test_a_damaged_part_is_named_and_nothing_is_installed(wheelhouse, tmp_path):
    copy = shutil.copytree(wheelhouse, tmp_path / "copy")
    part = copy / "wheelhouse.tar.0001"
    data = bytearray(part.read_bytes())
    data[5000] ^= 1
    part.write_bytes(data)
    done = run(["bash", SCRIPT, "--install", copy, "--into", tmp_path / "environment"], tmp_path)
    assert done.returncode == 2 and "wheelhouse.tar.0001: FAILED" in done.stdout + done.stderr
    part.unlink()
    done = run(["bash", SCRIPT, "--install", copy, "--into", tmp_path / "environment"], tmp_path)
    assert done.returncode == 2 and "wheelhouse.tar.0001: FAILED open or read" in done.stdout + done.stderr
    assert not (tmp_path / "environment").exists()


def test_what_only_the_other_python_needs_is_collected_and_the_wrong_python_refused(tmp_path):
    """pip download asks the Python that it runs in what a package needs."""
    wheel = tmp_path / "demo-1.0-py3-none-any.whl"
    needs = (
        f'Requires-Dist: braceexpand; python_version == "{OTHER}"\nRequires-Dist: nowhere; python_version < "{HERE}"\n'
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n{needs}\n")
        archive.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("demo-1.0.dist-info/RECORD", "")
    done = collect(tmp_path, "--out", "wheels", "--python", OTHER, wheel)
    assert done.returncode == 0, done.stderr
    assert "braceexpand-0.1.7-py2.py3-none-any.whl" in {path.name for path in (tmp_path / "wheels").iterdir()}
    done = collect(tmp_path, "--install", "wheels")
    assert done.returncode == 2 and f"is for Python {OTHER}, " in done.stderr and f"is {HERE}" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out DIR or --install DIR"),
        (["--out", "full"], "full is not empty"),
        (["--out"], "--out needs a value"),
        (["--out", "new", "--python", "three"], "--python three: such as 3.12"),
        (["--out", "new", "--part-size", "big"], "--part-size big"),
        (["--out", "new", "--fast"], "unknown option --fast"),
        (["--install", "full"], "full is no wheelhouse"),
        (["--install", "full", "--out", "new"], "not both"),
    ],
)
def test_bad_usage(tmp_path, words, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/something").touch()
    done = collect(tmp_path, *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.startswith("error: "), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
