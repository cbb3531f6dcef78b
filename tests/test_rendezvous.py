"""Where the ranks meet and which GPU each has: ports, node lists, steps and shells, without SLURM."""

from __future__ import annotations

import os
import subprocess

import launched
import pytest
from conftest import environment

from ddpm_dist import rendezvous
from ddpm_dist.errors import UserError

probe = launched.probe  # fixture


def test_a_shell_is_no_launcher(probe):
    """Ranks that people describe by hand, with nohup or not, do not die with their shell."""
    described = environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    done = subprocess.run(["bash", "-c", f"{probe}; true"], env=described, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "0", "None", "127.0.0.1", "1"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("n[1-2]", "n1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("rack[2,4]node[07-09],x", "rack2node07"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert rendezvous.first_host(nodes) == first


def test_jobs_and_steps_have_ports_of_their_own():
    ports = [
        rendezvous.port({"SLURM_JOB_ID": str(job), **({} if step is None else {"SLURM_STEP_ID": str(step)})})
        for job in range(9_999_950, 10_000_050)
        for step in (None, *range(96))
    ]
    assert len(set(ports)) == len(ports) and min(ports) >= 20_000 and max(ports) < 32_768


def test_a_batch_script_is_no_step_where_its_slurmstepd_cannot_be_seen():
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert not rendezvous.is_step(batch)
    assert rendezvous.is_step({**batch, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"})


def test_tasks_per_node():
    assert rendezvous.expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert rendezvous.expand_counts("16") == [16]


def test_a_first_node_without_an_address_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no scontrol either
    step = {"SLURM_STEP_NODELIST": "nowhere[1-2].invalid", "SLURM_STEP_NUM_NODES": "2"}
    with pytest.raises(UserError, match="'nowhere1.invalid' of rank 0.*set MASTER_ADDR"):
        rendezvous.address_of_first(step)
    assert rendezvous.address_of_first({**step, "SLURM_STEP_NUM_NODES": "1"}) == "127.0.0.1"


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    from ddpm_dist.runtime import device_index

    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="local rank 1 has no GPU: 1 visible"):
        device_index(1, 1)
    for name, value in (("STEP_ID", "0"), ("PROCID", "1"), ("STEP_NUM_TASKS", "4"), ("GPUS_ON_NODE", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert device_index(3, 1) == 0  # --gpus-per-task=1: this task sees its own only
    with pytest.raises(UserError, match="local rank 4 has no GPU"):
        device_index(4, 4)  # all see all, and there are too few
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="local rank 1 has no GPU"):
        device_index(1, 1)
