"""Nodes that differ are found at the start: said once, by rank 0, with the node's name, and nothing is touched."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
from conftest import TINY

from ddpm_dist import alike, train

HOST = socket.gethostname()


def rank(number: int, port: int, folder: Path, here: Path, config: str, torch_version: str | None) -> None:
    """Rank ``number`` of two, each on a node of its own that works in ``here``; what it says goes into a file."""
    words = os.open(folder / f"{number}.said", os.O_CREAT | os.O_WRONLY)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(here)
    if torch_version is not None:
        software = alike._software()
        alike._software = lambda: {**software, "torch": torch_version}
    overrides = [f"run.dir={folder / 'run'}", "data.shards=digits", "train.images=12", *TINY]
    os._exit(train.main(["--config", config, *overrides]))


@pytest.fixture
def start(family, tmp_path, digit_shards):
    """Start two ranks that differ as told; gives what was said, after both have left with code 2 and no run directory."""

    def run(other_config: bool = False, other_data: bool = False, torch_version: str | None = None) -> str:
        nodes = [tmp_path / "n1", tmp_path / "n2"]
        for number, node in enumerate(nodes):
            node.mkdir()
            shutil.copytree(digit_shards, node / "digits")
            if not (other_config and number):
                (node / "mine.yaml").write_text("{}\n")
        if other_data:
            from ddpm_dist.pack import pack

            shutil.rmtree(nodes[1] / "digits")
            pack("digits", nodes[1] / "digits", samples_per_shard=400)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [
            family.start(rank, number, port, tmp_path, nodes[number], "mine.yaml", torch_version if number else None)
            for number in range(2)
        ]
        assert family.codes(*ranks, seconds=120) == [2, 2], [p.read_text() for p in tmp_path.glob("*.said")]
        assert not (tmp_path / "run").exists()
        assert "error" not in (tmp_path / "1.said").read_text()
        said = (tmp_path / "0.said").read_text()
        assert said.count("error:") == 1 and "Traceback" not in said
        return said

    return run


def test_a_config_that_is_missing_on_one_node(start):
    said = start(other_config=True)
    assert f"rank 1 on {HOST}: config file mine.yaml does not exist" in said


def test_other_data_on_one_node(start):
    said = start(other_data=True)
    assert f"rank 1 on {HOST}: data: " in said and f"differ from that of rank 0 ({HOST})" in said


def test_other_packages_on_one_node(start):
    said = start(torch_version="2.0.1")
    assert f"rank 1 on {HOST}: torch: 2.0.1, there " in said
