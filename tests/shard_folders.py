"""A packed folder for the tests of the index, copies of it that may be damaged, and ways to damage its table."""

import json

import numpy as np
import pytest

from ddpm_dist.data.shards import Shard, write_index
from ddpm_dist.pack import pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "shapes"
    pack("shapes", out, num=25, size=16, samples_per_shard=10, workers=1)
    return out


@pytest.fixture
def copy(packed, tmp_path):
    """A copy of the packed folder that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in packed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_table(folder, change):
    """Change records of index.npy and make index.json fit, so that only the check under test can object."""
    samples = np.load(folder / "index.npy")
    head = json.loads((folder / "index.json").read_text())
    change(samples)
    for name in ("index.npy", "index.json"):
        (folder / name).unlink()
    shards = [Shard(**entry) for entry in head["shards"]]
    write_index(folder, shards, samples, head["classes"], head["channels"], head["image_format"])
