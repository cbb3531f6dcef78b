"""Promise 25: checkpoints of every released format version keep loading. One small run of each version is kept in tests/golden.

How version 1 was made: ``python tests/test_golden.py tests/golden/version_1`` at the time it was current.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import environment, lines, run_module
from test_engines import ENGINES

GOLDEN = Path(__file__).parent / "golden"
# No settings that may get other defaults: everything that matters is said.
SETTINGS = [
    "data.source=synthetic", "data.image_size=8", "data.channels=1", "data.num_classes=3", "data.range=[-1, 1]",
    "model.name=unet_conditional", "model.width=4", "model.channel_mults=[1,2]", "model.attention_levels=[]",
    "model.embedding_dim=8", "diffusion.timesteps=20", "train.global_batch=12", "train.log_every=1", "train.audit=true",
    "train.audit_params_every=1", "tracking.mlflow=false", "ema.half_lives=[100]", "ema.sigma_rels=[0.1]", "ema.warmup=12",
    "optim.lr=1e-3", "optim.warmup=24", "optim.schedule=cosine", "optim.decay_images=96", "train.grad_clip=1.0", "run.seed=3",
]  # fmt: skip


def versions() -> list[Path]:
    return sorted(GOLDEN.glob("version_*"))


def continue_run(run: Path, *overrides: str, ranks: int = 0):
    config = run.parent / "empty.yaml"
    config.write_text("{}\n")
    images = ("train.images=72", *overrides)
    return run_module("ddpm_dist.train", "--config", config, f"run.dir={run}", *SETTINGS, *images, ranks=ranks)


@pytest.mark.parametrize("version", versions(), ids=lambda path: path.name)
@pytest.mark.parametrize("engine, ranks", [("ddp", 0), ("ddp", 2), ("zero3", 2)])
def test_a_run_of_an_older_version_goes_on(tmp_path, version, engine, ranks):
    shutil.copytree(version / "run", tmp_path / "run")
    result = continue_run(tmp_path / "run", *ENGINES[engine], ranks=ranks)
    assert result.returncode == 0 and "continuing at step 3" in result.stdout, result.stderr
    expected = json.loads((version / "expected.json").read_text())
    found = lines(tmp_path / "run/audit.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for line, wanted in zip(found[3:], expected, strict=True):
        assert line["slots"] == wanted["slots"]
        # Another processor may round otherwise; a lost moment, average or schedule changes far more.
        assert float.fromhex(line["loss"]) == pytest.approx(float.fromhex(wanted["loss"]), rel=1e-5)


def test_there_is_a_golden_checkpoint_of_the_current_version():
    from ddpm_dist.checkpoint.format import VERSION

    kept = {}
    for version in versions():
        for manifest in version.glob("run/checkpoints/step_*/manifest.json"):
            kept[version.name] = json.loads(manifest.read_text())["manifest"]["version"]
    assert kept[f"version_{VERSION}"] == VERSION


def test_the_averages_and_weights_of_an_older_version_can_be_sampled(tmp_path):
    for version in versions():
        for ema in ("0", "1", "none"):
            out = tmp_path / f"{version.name}_{ema}.png"
            result = run_module(
                "ddpm_dist.sample", version / "run", "-n", "3", "--ema", ema, "--steps", "3", "--out", out
            )
            assert result.returncode == 0 and out.exists(), result.stderr


def make(folder: Path) -> None:
    """Three steps, their checkpoint, and what the next three steps look like."""
    folder.mkdir(parents=True)
    assert continue_run(folder / "run", "train.images=36").returncode == 0
    shutil.copytree(folder / "run", folder / "on")
    assert continue_run(folder / "on").returncode == 0
    keep = [{"slots": line["slots"], "loss": line["loss"]} for line in lines(folder / "on/audit.jsonl")[3:]]
    (folder / "expected.json").write_text(json.dumps(keep, indent=1) + "\n")
    shutil.rmtree(folder / "on")
    (folder / "empty.yaml").unlink()
    for name in ("lock", "exit.json"):
        (folder / "run" / name).unlink(missing_ok=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    print(environment()["PYTHONPATH"].split(":")[0])
