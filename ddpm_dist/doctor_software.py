"""The doctor's checks of what is installed: versions, whether they fit together and to the driver, GPUs, ranks that talk."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from ddpm_dist.doctor_report import Finding, call, last_line

INSTALL = "source launch/environment.sh && prepare_environment (without network: launch/wheelhouse.sh)"
DALI = {"nvidia-dali-cuda130": 13, "nvidia-dali-cuda120": 12}
# The oldest driver for any version of a CUDA major (CUDA Toolkit release notes, minor version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

TORCH = """
import json, torch
said = {"version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available(), "devices": []}
said["nccl"] = torch.distributed.is_nccl_available() and ".".join(map(str, torch.cuda.nccl.version()))
for index in range(torch.cuda.device_count() if said["available"] else 0):
    one = torch.cuda.get_device_properties(index)
    device = {"name": one.name, "gb": one.total_memory / 1e9, "capability": f"{one.major}.{one.minor}"}
    try:
        device["works"] = torch.ones(8, device=index).sum().item() == 8
        device["free_gb"] = torch.cuda.mem_get_info(index)[0] / 1e9
    except RuntimeError as error:
        device |= {"works": False, "error": str(error).splitlines()[0]}
    said["devices"].append(device)
print(json.dumps(said))
"""


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python() -> Iterator[Finding]:
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < (3, 11):  # noqa: UP036  (it may be started with any Python)
        yield Finding("problem", "python", text, "ddpm_dist needs Python 3.11 or newer: activate such an environment")
    else:
        yield Finding("ok", "python", text)


def packages() -> Iterator[Finding]:
    """DALI has two builds that own the same files; DeepSpeed, MLflow and webdataset are imported late, so they are asked by name."""
    if importlib.util.find_spec("torch") is None:
        yield Finding("problem", "torch", "not installed", INSTALL)
    installed = {name: found for name in DALI if (found := version(name))}
    if len(installed) == 2:
        yield Finding(
            "problem", "DALI", "the builds for CUDA 12 and for CUDA 13 are both installed and overwrite each other",
            "pip uninstall nvidia-dali-cuda120 nvidia-dali-cuda130, then install one of them",
        )  # fmt: skip
    elif not installed:
        yield Finding("problem", "DALI", "not installed; it decodes the images", INSTALL)
    else:
        ((name, found),) = installed.items()
        code, _, errors = call([sys.executable, "-c", "import nvidia.dali"], 60)
        if code == 0:
            yield Finding("ok", "DALI", f"{found} for CUDA {DALI[name]}", values={"cuda": DALI[name]})
        else:
            yield Finding(
                "problem",
                "DALI",
                f"{found} cannot be imported: {last_line(errors)}",
                f"pip install --force-reinstall {name}",
            )
    for about, name, need in (
        ("DeepSpeed", "deepspeed", "engine.name=deepspeed needs it"),
        ("MLflow", "mlflow", "tracking.mlflow=true needs it; metrics.jsonl is written anyway"),
        ("webdataset", "webdataset", "ddpm_dist.pack needs it"),
    ):
        found = version(name)
        if found is None:
            yield Finding("problem", about, f"not installed; {need}", INSTALL)
        elif name == "deepspeed" and not shutil.which("g++"):
            yield Finding(
                "note",
                about,
                f"{found}; no g++",
                "engine.offload_optimizer compiles its optimizer at first use: install g++",
            )
        else:
            yield Finding("ok", about, found)


def pip_check() -> Iterator[Finding]:
    """What pip says of the requirements of everything that is installed."""
    code, output, errors = call([sys.executable, "-m", "pip", "check"], 60)
    if code == 0:
        yield Finding("ok", "versions", "what the packages require of each other is there (pip check)")
    elif broken := [line for line in output.splitlines() if re.match(r"\S+ \S+ (requires|has requirement)", line)]:
        ours = [line for line in broken if line.startswith(("ddpm", "torch", "nvidia"))]
        shown = (ours or broken)[:3]
        yield Finding(
            "problem" if ours else "note",
            "versions",
            "; ".join(shown) + (" ..." if len(broken) > len(shown) else ""),
            INSTALL,
        )
    else:
        yield Finding("note", "versions", f"pip check does not run: {last_line(errors)}")


def gpus(probed: dict[str, Any]) -> Iterator[Finding]:
    """torch, its GPUs and the driver; what torch says is left in ``probed``."""
    driver = asked_driver()
    if importlib.util.find_spec("torch") is None:
        yield from fit(driver, {}, installed_dali())
        return
    code, output, errors = call([sys.executable, "-c", TORCH], 180)
    if code != 0:
        yield Finding(
            "problem", "torch", f"{version('torch')} does not work: {last_line(errors)}", "install it again: " + INSTALL
        )
        return
    probed |= json.loads(last_line(output))
    yield Finding(
        "ok",
        "torch",
        f"{probed['version']}, built for {'CUDA ' + probed['cuda'] if probed['cuda'] else 'CPUs'}",
        values=dict(probed),
    )
    yield from fit(driver, probed, installed_dali())
    if probed["nccl"]:
        yield Finding("ok", "NCCL", probed["nccl"] + ("" if probed["available"] else " (unused without a GPU)"))


def asked_driver() -> str | None:
    """The NVIDIA driver's version; None where there is no nvidia-smi, "" where it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    code, output, _ = call(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 45)
    lines = output.split()
    return lines[0] if code == 0 and lines and lines[0][0].isdigit() else ""


def installed_dali() -> int | None:
    """The CUDA major of the DALI that is installed."""
    return next((cuda for name, cuda in DALI.items() if version(name)), None)


def fit(driver: str | None, torch: dict[str, Any], dali: int | None) -> Iterator[Finding]:
    """GPUs and driver, and whether torch (as the probe describes it, {} if missing) and DALI (CUDA major) can use them."""
    if driver is None:
        yield Finding("note", "GPUs", "none here (no nvidia-smi): everything runs on the CPU, with gloo")
        return
    if driver == "":
        yield Finding(
            "problem",
            "driver",
            "nvidia-smi is there and does not answer as it should",
            "nvidia-smi by hand; reload or reinstall the driver, or reboot",
        )
        return
    yield Finding("ok", "driver", driver)
    major = int(driver.split(".")[0])
    cuda = int(torch["cuda"].split(".")[0]) if torch.get("cuda") else None
    if torch and cuda is None:
        yield Finding(
            "problem", "GPUs", "this torch is built for CPUs only", "install a torch built for CUDA: " + INSTALL
        )
    elif torch and not torch["available"]:
        if (oldest := OLDEST_DRIVER.get(cuda, 0)) > major:
            yield Finding(
                "problem", "GPUs", f"torch is built for CUDA {torch['cuda']}, the driver {driver} is too old for it",
                f"update the driver to {oldest} or newer, or install a torch built for CUDA {best_cuda(major)}",
            )  # fmt: skip
        else:
            yield Finding(
                "problem", "GPUs", "the driver works and torch sees no GPU",
                "CUDA_VISIBLE_DEVICES may hide them; in a container start with --gpus all (Docker) or --nv (Apptainer)",
            )  # fmt: skip
    for index, device in enumerate(torch.get("devices", [])):
        text = f"{index}: {device['name']}, {device['gb']:.0f} GB, capability {device['capability']}"
        if not device["works"]:
            yield Finding(
                "problem",
                "GPUs",
                f"{text}: {device.get('error', 'computes wrong sums')}",
                "a torch built for this GPU, or a reset of it",
            )
        elif device["free_gb"] < 0.8 * device["gb"]:
            yield Finding(
                "note", "GPUs", f"{text}, only {device['free_gb']:.0f} GB free", "nvidia-smi shows who else uses it"
            )
        else:
            yield Finding("ok", "GPUs", text)
    if dali is not None and OLDEST_DRIVER[dali] > major:
        yield Finding(
            "problem", "DALI", f"it is built for CUDA {dali}, the driver {driver} is too old for it",
            f"update the driver to {OLDEST_DRIVER[dali]} or newer, or: pip uninstall nvidia-dali-cuda{dali}0, pip install -e '.[cuda{best_cuda(major)}]'",
        )  # fmt: skip


def best_cuda(driver: int) -> int:
    return max((cuda for cuda, oldest in OLDEST_DRIVER.items() if oldest <= driver), default=11)


def two_ranks(probed: dict[str, Any]) -> Iterator[Finding]:
    """An all-reduce between two processes that torchrun starts: over gloo, and over NCCL where there are two GPUs."""
    if not probed:
        yield Finding("note", "two ranks", "not tried, because torch does not work")
        return
    for backend in ("gloo", "nccl") if len(probed["devices"]) >= 2 else ("gloo",):
        started = time.monotonic()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        code, output, errors = call([*torchrun, "-m", "ddpm_dist.doctor_ranks", backend], 150, OMP_NUM_THREADS="1")
        took = time.monotonic() - started
        if code == 0:
            said = json.loads(last_line(output))
            text = f"all-reduce over {backend}: {said['mb_per_s']:,.0f} MB/s, {said['latency_ms']:.2f} ms; from start to end {took:.0f} s"
            yield Finding("ok", "two ranks", text, values=said)
            continue
        wrong = re.findall(r"^.*(?:Error|error|WARN).*$", errors, re.MULTILINE)
        why = "no answer within 150 s" if code is None else (wrong[0].strip() if wrong else last_line(errors))
        if backend == "gloo":
            remedy = "GLOO_SOCKET_IFNAME=lo (or the network's interface) if the host name leads elsewhere; a firewall between local ports"
        else:
            remedy = "NCCL_DEBUG=INFO shows what it tries; NCCL_P2P_DISABLE=1, NCCL_SHM_DISABLE=1 or a larger /dev/shm tell what it is"
        yield Finding("problem", "two ranks", f"all-reduce over {backend} failed: {why[:300]}", remedy)
