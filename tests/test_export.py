"""Export: a checkpoint of any engine and world size becomes one file that loads, samples and starts runs anywhere."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, lines, run_module, train
from forked import Family, strike_at
from safetensors import safe_open
from safetensors.torch import load_file

from ddpm_dist import export
from ddpm_dist.audit import _digest_by_name
from ddpm_dist.checkpoint import files, open_checkpoint
from ddpm_dist.errors import UserError

OPTIONS = (
    "data.channels=3",
    "data.num_classes=2",
    "train.images=480",
    "checkpoint.every=120",
    "optim.lr=1e-2",
    "run.seed=3",
)
AVERAGES = ("ema.half_lives=[100, 1000]", "ema.sigma_rels=[0.05, 0.10]", "ema.snapshot_every=24")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Twelve pictures of two classes with names."""
    from PIL import Image

    from ddpm_dist.pack import pack

    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(("frog", "horse")):
        (folder / "root" / name).mkdir(parents=True)
        for j in range(6):
            noise = np.random.default_rng(10 * i + j).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "root" / name / f"{j}.png")
    pack("folder", folder / "shards", root=folder / "root", image_format="png", workers=1)
    return folder / "shards"


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards) -> Path:
    """40 steps on two ranks; checkpoints of steps 20, 30 and 40, snapshots of every second step."""
    folder = tmp_path_factory.mktemp("export") / "run"
    audit = ("train.audit=true", "train.audit_params_every=40")
    result = train(folder, *OPTIONS, *AVERAGES, *audit, shards=shards, ranks=2)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def exported(run) -> Path:
    path = run.parent / "model.safetensors"
    assert export.main([str(run), "--out", str(path)]) == 0
    return path


def refused(capsys, *words: str) -> str:
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said
    assert "Traceback" not in said
    return said


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


# -- averages made after the run ---------------------------------------------------------------------------------------


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    square = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return (square / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5


def test_a_reconstructed_average_is_the_one_tracked_directly(run, shards, tmp_path, capsys):
    """A second run that tracks sigma_rel 0.08; averages do not influence training, so everything else is equal."""
    direct = ("ema.half_lives=[]", "ema.sigma_rels=[0.08]", "train.audit=true", "train.audit_params_every=40")
    result = train(tmp_path / "direct", *OPTIONS, *direct, shards=shards, ranks=2)
    assert result.returncode == 0, result.stderr
    assert lines(run / "audit.jsonl")[-1]["params"] == lines(tmp_path / "direct/audit.jsonl")[-1]["params"]
    for step in (30, 40):
        out = tmp_path / f"{step}.safetensors"
        assert export.main([str(run), "--ema-sigma-rel", "0.08", "--step", str(step), "--out", str(out)]) == 0
        assert re.search(r"relative residual of the profile [1-9]\.\de-03", capsys.readouterr().out)
        reader = open_checkpoint(tmp_path / f"direct/checkpoints/step_{step:08d}")
        wanted = {name.removeprefix("ema.0/"): reader.tensor(name) for name in reader.names("ema.0/")}
        made = load_file(out)
        found = difference(made, wanted)
        assert found < 1e-3
        tracked = open_checkpoint(run / f"checkpoints/step_{step:08d}")
        nearest = min(difference({name: tracked.tensor(f"ema.{k}/{name}") for name in made}, wanted) for k in (2, 3))
        assert found < nearest / 500, "not much better than the averages that were tracked"
    average = json.loads((tmp_path / "40.json").read_text())["origin"]["average"]
    assert average["sigma_rel"] == 0.08 and average["reconstructed_from_steps"] == list(range(2, 41, 2))
    assert 1e-3 < average["profile_residual"] < 1e-2


def test_a_snapshot_of_another_run_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert (
        train(tmp_path / "other", "train.images=48", "ema.snapshot_every=24", "ema.sigma_rels=[0.05]").returncode == 0
    )
    shutil.rmtree(tmp_path / "run/snapshots/step_00000004")
    shutil.copytree(tmp_path / "other/snapshots/step_00000004", tmp_path / "run/snapshots/step_00000004")
    assert (
        export.main([str(tmp_path / "run"), "--ema-sigma-rel", "0.08", "--out", str(tmp_path / "m.safetensors")]) == 2
    )
    refused(capsys, "step_00000004", "not of this run")


def test_a_tracked_width_is_taken_as_it_is(run, tmp_path):
    for arguments in (("--ema-sigma-rel", "0.1"), ("--ema", "3")):
        assert export.main([str(run), *arguments, "--out", str(tmp_path / f"{arguments[1]}.safetensors")]) == 0
    assert (tmp_path / "0.1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_a_damaged_snapshot_is_named_and_left_out(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run/snapshots/step_00000010/rank_00001.safetensors")
    out = tmp_path / "m.safetensors"
    assert export.main([str(tmp_path / "run"), "--ema-sigma-rel", "0.08", "--out", str(out)]) == 0
    refused(capsys, "step_00000010", "rank_00001.safetensors", "left out")
    assert 10 not in json.loads(out.with_suffix(".json").read_text())["origin"]["average"]["reconstructed_from_steps"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ema-sigma-rel", "0.27"), ["20 snapshot(s) of 0.05, 0.1", "residual", "at most 0.01"]),
        (("--ema-sigma-rel", "0.08", "--step", "2"), ["1 snapshot(s)", "ema.snapshot_every"]),
        (("--ema-sigma-rel", "0.5"), ["0.5", "0.001 .. 0.2887"]),
        (("--ema-sigma-rel", "nan"), ["nan", "0.001 .. 0.2887"]),
        (("--ema", "4"), ["--ema 4", "0 (half-life 100 images)", "3 (sigma_rel 0.1)", "none (the plain weights)"]),
        (("--ema", "-1"), ["--ema -1"]),
        (("--ema", "none", "--step", "6"), ["snapshots/step_00000006", "0 (half-life"]),
        (("--step", "7"), ["nothing at step 7", "checkpoints: 20, 30, 40", "snapshots of the averages: 2, 4"]),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_with_what_is(run, tmp_path, capsys, arguments, words):
    assert export.main([str(run), *arguments, "--out", str(tmp_path / "m.safetensors")]) == 2
    refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_run_without_power_function_averages_says_how_to_get_them(tmp_path, capsys):
    assert train(tmp_path / "run", "train.images=24", "ema.snapshot_every=12").returncode == 0
    capsys.readouterr()
    assert (
        export.main([str(tmp_path / "run"), "--ema-sigma-rel", "0.08", "--out", str(tmp_path / "m.safetensors")]) == 2
    )
    refused(capsys, "ema.sigma_rels=[0.05,0.10]", "ema.snapshot_every")


# -- bad input ---------------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_sources_that_are_none(exported, run, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    out = str(tmp_path / "m.safetensors")
    for source, words in (
        (tmp_path / "absent", ["absent does not exist"]),
        (tmp_path / "new", ["no checkpoint yet"]),
        (exported, ["is a file"]),
    ):
        assert export.main([str(source), "--out", out]) == 2
        refused(capsys, *words)
    assert export.main([str(run / "checkpoints/step_00000030"), "--step", "30", "--out", out]) == 2
    refused(capsys, "is one checkpoint")


def test_a_damaged_checkpoint_is_passed_over_and_never_used_by_name(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    out = tmp_path / "m.safetensors"
    damage(tmp_path / "run/checkpoints/step_00000040/rank_00000.safetensors")
    before = everything_in(tmp_path / "run")
    for source in ((str(tmp_path / "run/checkpoints/step_00000040"),), (str(tmp_path / "run"), "--step", "40")):
        assert export.main([*source, "--out", str(out)]) == 2
        refused(capsys, "step_00000040", "rank_00000.safetensors", "refused")
        assert not out.exists()
    assert export.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    refused(capsys, "step_00000040", "does not match its sha256", "trying the one before")
    assert json.loads(out.with_suffix(".json").read_text())["origin"]["step"] == 30
    assert everything_in(tmp_path / "run") == before, "a reader changes nothing"
    for step in (20, 30):
        damage(tmp_path / f"run/checkpoints/step_{step:08d}/rank_00001.safetensors")
    assert export.main([str(tmp_path / "run"), "--out", str(out), "--force"]) == 2
    refused(capsys, "no intact checkpoint")


def test_a_checkpoint_that_retention_removes_meanwhile_can_still_be_read(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    weights = export.choose(tmp_path / "run", None, 0, None)
    shutil.rmtree(tmp_path / "run")
    export.write(tmp_path / "m.safetensors", weights)
    stored, reader = load_file(tmp_path / "m.safetensors"), open_checkpoint(run / "checkpoints/step_00000040")
    assert all(torch.equal(value, reader.tensor(f"ema.0/{name}")) for name, value in stored.items())


def test_targets_are_checked_before_the_work(run, tmp_path, capsys):
    for name in ("old.safetensors", "described.json", "file"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    for out, words in (
        ("old.safetensors", ["old.safetensors exists", "--force"]),
        ("described.safetensors", ["described.json exists", "--force"]),
        ("folder.safetensors", ["is a folder"]),
        ("weights.pt", ["must end in .safetensors"]),
        ("file/m.safetensors", ["cannot write into"]),
    ):
        assert export.main([str(run), "--out", str(tmp_path / out)]) == 2
        refused(capsys, *words)
    assert everything_in(tmp_path) == dict.fromkeys(["old.safetensors", "described.json", "file"], b"mine")
    for inside in ("step_00000040/m.safetensors", "m.safetensors"):
        assert export.main([str(run), "--out", str(run / "checkpoints" / inside)]) == 2
        refused(capsys, "belongs to the checkpoints of a run")
    assert export.main([str(run), "--out", str(tmp_path / f"{'m' * 300}.safetensors")]) == 2
    refused(capsys, "cannot write into", "too long")
    assert export.main([str(tmp_path), "--out", str(tmp_path / "new/m.safetensors")]) == 2
    assert not (tmp_path / "new").exists(), "a folder is made when there is something to put into it"
    refused(capsys, "holds no checkpoint")
    assert export.main([str(run), "--out", str(tmp_path / "old.safetensors"), "--force"]) == 0
    assert load_file(tmp_path / "old.safetensors") and json.loads((tmp_path / "old.json").read_text())


# -- interrupted -------------------------------------------------------------------------------------------------------


def export_and_die(run: Path, out: Path, k: int) -> None:
    strike_at(k, signal.SIGKILL)
    os._exit(export.main([str(run), "--ema", "1", "--out", str(out), "--force"]))


def is_pair(out: Path) -> bool:
    says = json.loads(out.with_suffix(".json").read_text())
    return says["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()


def test_killed_or_failing_at_any_operation_it_leaves_no_half_file(run, exported, tmp_path, capsys):
    """Over an older pair: whenever the file is there, it is whole and the JSON beside it is its own."""
    operations = []
    files.before_operation = lambda operation, path: operations.append((operation, path.name))
    try:
        assert export.main([str(run), "--ema", "1", "--out", str(tmp_path / "count.safetensors")]) == 0
        names = [name for name, _ in operations]
        assert names.count("write") > 30 and names.count("fsync") == 2 and names.count("rename") == 2
        last_write = len(names) - names[::-1].index("write")
        points = [0, 1, 20, *range(last_write - 3, len(names) + 2)]  # of the many writes some, of the rest every one
        family, codes = Family(), []
        for k in points:
            failing, killed = tmp_path / f"failing{k}", tmp_path / f"killed{k}"
            for folder in (failing, killed):
                folder.mkdir()
                for old in (exported, exported.with_suffix(".json")):
                    shutil.copy(old, folder)
            older = is_pair(failing / exported.name) and everything_in(failing)
            codes.append(family.codes(family.start(export_and_die, run, killed / exported.name, k))[0])
            if (killed / exported.name).exists():
                assert is_pair(killed / exported.name), k

            count = [0]

            def fail(operation, path, k=k, count=count):
                count[0] += 1
                if count[0] == k + 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

            files.before_operation = fail
            out = failing / exported.name
            code = export.main([str(run), "--ema", "1", "--out", str(out), "--force"])
            assert sorted(path.name for path in failing.iterdir() if path.suffix == ".incomplete") == []
            if code == 2:
                refused(capsys, "No space left on device")
                if k < last_write:
                    assert everything_in(failing) == older, "the older pair was touched before the new one was whole"
            assert not out.exists() or is_pair(out), k
            assert (code == 0) == (k > len(names)), (k, names[k:])
        assert codes[0] == -9 and codes[-2:] == [-9, 0], codes
    finally:
        files.before_operation = None
        family.close()
