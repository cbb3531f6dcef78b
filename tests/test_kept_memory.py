"""A training process on the CPU keeps what a step frees, unless the environment says how memory is to be handled."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from conftest import environment

STEPS = """
import ctypes, resource, sys, torch
from ddpm_dist.runtime import keep_freed_memory
ctypes.CDLL(None).mallopt(-1, 1_000_000)  # give back what is more; by itself glibc does so or not, as its blocks happen to lie
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
def step():
    held = [torch.zeros(6 << 20) for _ in range(8)]  # 24 MB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str, **extra: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, word], capture_output=True, text=True, env=environment(**extra), timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives it back")
def test_memory_is_kept_between_steps():
    plain, kept = faults("plain"), faults("keep")
    # 147,456 of 4 KiB; a kernel that brings many pages at a fault counts some thousands.
    assert plain > 500 and kept < plain / 10
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000") > plain / 2  # the user's word
