"""What the tests of the pack command share: running it, and things to pack."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ddpm_dist.pack import pack


def run(*words, **options):
    command = [sys.executable, "-m", "ddpm_dist.pack", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def picture(path, colour="red", size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("pack") / "shapes"
    pack("shapes", out, num=50, size=24, samples_per_shard=20, workers=1)
    return out
