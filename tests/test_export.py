"""Export: a checkpoint of any engine and world size becomes one file that loads, samples and starts runs anywhere."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import weakref

import export_runs
import numpy as np
import pytest
import torch
from conftest import ROOT, environment, lines, run_module, train
from export_runs import OPTIONS
from safetensors import safe_open
from safetensors.torch import load_file

from ddpm_dist import export
from ddpm_dist.audit import _digest_by_name
from ddpm_dist.checkpoint import open_checkpoint
from ddpm_dist.errors import UserError

made, shards, run, exported = export_runs.made, export_runs.shards, export_runs.run, export_runs.exported  # fixtures


# -- what is in the file -----------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_run_bit_for_bit(run, tmp_path):
    """Against the digests that the training itself wrote of its parameters and averages, on two ranks."""
    audit = lines(run / "audit.jsonl")[-1]
    found = {}
    for which in ("none", "0", "1", "2", "3"):
        out = tmp_path / f"{which}.safetensors"
        assert export.main([str(run), "--ema", which, "--out", str(out)]) == 0
        found[which] = load_file(out)
    plain = [(f"model/{name}", 0, value) for name, value in found["none"].items()]
    assert _digest_by_name(plain) == audit["params"]
    averages = [(f"ema.{k}/{name}", 0, value) for k in "0123" for name, value in found[k].items()]
    assert _digest_by_name(averages) == audit["ema"]
    reader = open_checkpoint(run / "checkpoints/step_00000030")
    assert export.main([str(run), "--ema", "1", "--step", "30", "--out", str(tmp_path / "30.safetensors")]) == 0
    assert export.main([str(reader.folder), "--ema", "1", "--out", str(tmp_path / "same.safetensors")]) == 0
    older = load_file(tmp_path / "30.safetensors")
    assert all(torch.equal(older[name], reader.tensor(f"ema.1/{name}")) for name in older)
    assert (tmp_path / "30.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    assert not all(torch.equal(older[name], found["1"][name]) for name in older)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 7 + [".safetensors"] * 7  # nothing else


def test_the_json_beside_it_says_what_it_is(run, exported):
    says = json.loads(exported.with_suffix(".json").read_text())
    assert says["file"] == exported.name and says["bytes"] == exported.stat().st_size
    assert says["sha256"] == hashlib.sha256(exported.read_bytes()).hexdigest()
    assert says["model"]["name"] == "unet_conditional" and says["model"]["keywords"]["num_classes"] == 2
    assert says["diffusion"]["timesteps"] == 20 and says["diffusion"]["range"] == [-1.0, 1.0]
    assert says["classes"] == ["frog", "horse"] and says["sampling"]["guidance"] == 2.0
    origin = says["origin"]
    assert (origin["step"], origin["images_seen"]) == (40, 480)
    assert origin["average"] == {"number": 0, "kind": "half_life", "half_life": 100.0}
    assert origin["data_fingerprint"] == open_checkpoint(run / "checkpoints/step_00000040").state["data_fingerprint"]
    with safe_open(exported, framework="pt") as file:
        inside = {key: json.loads(value) for key, value in file.metadata().items() if key not in ("format", "version")}
    assert {key: says[key] for key in inside} == inside


def test_the_lines_of_the_readme_load_and_sample_it(exported):
    blocks = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        if "load(" in block
    ]
    assert len(blocks) == 1
    code = re.sub(r'load\("[^"]+"\)', f'load("{exported}")', blocks[0]).replace("[6, 6, 3]", "[0, 0, 1]")
    code += (
        "\nimport torch.distributed\nprint(tuple(images.shape), torch.distributed.is_initialized(), network.classes)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0 and result.stdout == "(3, 3, 16, 16) False ['frog', 'horse']\n", result.stderr


def test_it_samples_like_the_run_with_its_names_and_defaults(run, exported, tmp_path):
    def images(source, name, *arguments):
        out = tmp_path / f"{name}.npz"
        result = run_module("ddpm_dist.sample", source, "--num", "4", "--out", out, *arguments)
        assert result.returncode == 0, result.stderr
        with np.load(out) as arrays:
            return arrays["images"], arrays["labels"].tolist()

    pictures, labels = images(exported, "file", "--classes", "horse,0")
    assert labels == [1, 0, 1, 0]
    same, _ = images(run, "run", "--classes", "horse,frog")
    assert np.array_equal(pictures, same)
    other, _ = images(
        exported, "other", "--classes", "horse,0", "--guidance", "3"
    )  # what is used when nothing is known
    assert not np.array_equal(pictures, other)


@pytest.mark.parametrize(
    ("key", "value"),
    [("classes", ["frog"]), ("classes", "frog"), ("classes", [1, 2]), ("sampling", {"guidance": "much"}), ("sampling", [1]),
     ("sampling", {"steps": 0}), ("sampling", {"variance": "wild"}), ("model", {"name": "unet_conditional"})],
)  # fmt: skip
def test_a_hostile_description_is_refused(exported, tmp_path, key, value):
    from safetensors.torch import save_file

    from ddpm_dist.sample_source import open_source

    with safe_open(exported, framework="pt") as file:
        metadata = {**file.metadata(), key: json.dumps(value)}
    save_file(load_file(exported), tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match="x.safetensors|cannot be sampled"):
        open_source(tmp_path / "x.safetensors", 0)


def test_one_tensor_is_in_memory_at_a_time_and_no_process_group_is_joined(run, tmp_path, monkeypatch):
    alive, most, read = weakref.WeakSet(), [0], []
    original = export.Reader.tensor

    def tensor(reader, name):
        value = original(reader, name)
        alive.add(value)
        read.append(name)
        most[0] = max(most[0], len(alive))
        return value

    def forbidden(*arguments, **keywords):
        raise AssertionError("a process group was asked for")

    monkeypatch.setattr(export.Reader, "tensor", tensor)
    monkeypatch.setattr(torch.distributed, "init_process_group", forbidden)
    monkeypatch.setattr(torch.distributed, "new_group", forbidden)
    assert export.main([str(run), "--out", str(tmp_path / "m.safetensors")]) == 0
    count = len(load_file(tmp_path / "m.safetensors"))
    assert len(read) == count > 30 and most[0] <= 2, (len(read), most)
    read.clear()
    assert export.main([str(run), "--ema-sigma-rel", "0.08", "--out", str(tmp_path / "s.safetensors")]) == 0
    assert len(read) == 40 * count and most[0] <= 2, (len(read), most)


BATCH_NORM = """
import sys
import torch
from ddpm_dist import export, train
from ddpm_dist.models import registry

class Normed(torch.nn.Module):
    in_channels, image_size, num_classes = 1, 16, None
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
    def forward(self, x, t, y=None):
        return self.b(self.norm(self.a(x)))

def _normed(in_channels=1, image_size=16, num_classes=None):
    return Normed()

registry._NETWORKS["normed"] = registry._Network(_normed, lambda shapes: {})

if sys.argv[1] == "train":
    sys.exit(train.main(sys.argv[2:]))
assert export.main(sys.argv[2:4] + ["--out", sys.argv[4]]) == 0
import ddpm_dist
network = ddpm_dist.load(sys.argv[4])
print(int(network.norm.num_batches_tracked), float(network.norm.running_var.sum()))
"""


def test_buffers_travel(tmp_path):
    (tmp_path / "normed.py").write_text(BATCH_NORM)
    (tmp_path / "empty.yaml").write_text("{}\n")

    def python(*arguments):
        command = [sys.executable, tmp_path / "normed.py", *arguments]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[-2:]

    python(
        "train", "--config", tmp_path / "empty.yaml", f"run.dir={tmp_path / 'run'}", "model.name=normed", "data.image_size=16",
        "data.channels=1", "data.source=synthetic", "train.global_batch=4", "train.images=24", "tracking.mlflow=false",
        "ema.snapshot_every=8",
    )  # fmt: skip
    reader = open_checkpoint(tmp_path / "run/checkpoints/step_00000006")
    batches, variance = python("export", tmp_path / "run", "--ema=0", tmp_path / "m.safetensors")
    assert int(batches) == 6 and float(variance) == float(reader.tensor("buffer/norm.running_var").sum()) != 4.0
    stored = load_file(tmp_path / "m.safetensors")
    assert stored["norm.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(stored["a.weight"], reader.tensor("ema.0/a.weight"))
    batches, _ = python("export", tmp_path / "run", "--step=4", tmp_path / "snapshot.safetensors")
    assert int(batches) == 4, "a snapshot has its own"


# -- starting a run from it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "engine"),
    [(0, ()), (2, ()), pytest.param(2, ("engine.name=deepspeed", "engine.zero_stage=3"), marks=pytest.mark.slow)],
)
def test_a_run_starts_from_it(exported, shards, tmp_path, ranks, engine):
    """With a learning rate that changes nothing the parameters after the first step are those of the file."""
    still = (*engine, "optim.lr=1e-30", "train.images=12", "train.audit=true", "train.audit_params_every=1")
    result = train(
        tmp_path / "run",
        *OPTIONS,
        *still,
        f"train.init_from={exported}",
        shards=shards,
        ranks=ranks,
    )
    assert result.returncode == 0, result.stderr
    tensors = load_file(exported)
    (line,) = lines(tmp_path / "run/audit.jsonl")
    assert line["params"] == _digest_by_name([(f"model/{name}", 0, value) for name, value in tensors.items()])
    both = [(f"ema.{k}/{name}", 0, value) for k in (0, 1) for name, value in tensors.items()]
    assert line["ema"] == _digest_by_name(both), "the averages start there, too"


def test_the_weights_of_another_network_are_refused_with_the_differences(exported, shards, tmp_path):
    options = (*OPTIONS, f"train.init_from={exported}", "model.width=8", "model.channel_mults=[1,2,2]")
    result = train(tmp_path / "run", *options, shards=shards)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for words in (
        exported.name,
        "inc.double_conv.0.weight: [4, 3, 3, 3] in the file, [8, 3, 3, 3] in the network",
        "missing",
        "more",
    ):
        assert words in result.stderr, result.stderr
    assert not (tmp_path / "run").exists(), "nothing is touched"
