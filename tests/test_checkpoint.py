"""Checkpoints: any split to any split, nothing trusted unread, nothing lost when a save fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment, lines, train
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_dist.checkpoint import CheckpointStore, Piece, files, open_checkpoint, published, reaches
from ddpm_dist.checkpoint.format import Damaged, Reader, check_files, manifest_text, read_manifest, write_pieces
from ddpm_dist.engines.partition import partition
from ddpm_dist.errors import UserError

SHAPES = {"a": torch.Size([5, 3]), "b": torch.Size([]), "c": torch.Size([7]), "d": torch.Size([2, 3, 4, 5])}


@given(sizes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=8), world=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_partition_covers_every_row_once_and_is_balanced(sizes, world):
    shapes = {f"t{i}": torch.Size(size) for i, size in enumerate(sizes)}
    shares = partition(shapes, world)
    assert len(shares) == world
    owned = {name: [] for name in shapes}
    counts = []
    for share in shares:
        count = 0
        for rows in share:
            owned[rows.name].extend(range(rows.first, rows.last))
            start, stop = rows.flat_range(shapes[rows.name])
            count += stop - start
        counts.append(count)
    for name, shape in shapes.items():
        assert owned[name] == list(range(shape[0] if len(shape) else 1))
    largest_row = max(shape.numel() // (shape[0] if len(shape) else 1) for shape in shapes.values())
    total = sum(shape.numel() for shape in shapes.values())
    assert max(counts) <= total / world + largest_row


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], world: int, step: int = 1) -> None:
    folder.mkdir(parents=True)
    shares = partition({name: tensor.shape for name, tensor in tensors.items()}, world)
    facts, tables = {}, []
    for rank, share in enumerate(shares):
        pieces = []
        for rows in share:
            tensor = tensors[rows.name]
            pieces.append(Piece(rows.name, tuple(tensor.shape), rows.flat_range(tensor.shape)[0], rows.of(tensor)))
        name = f"rank_{rank:05d}.safetensors"
        facts[name], table = write_pieces(folder / name, pieces)
        tables.append(table)
    facts["state.json"] = files.write(folder / "state.json", [b'{"step": 1}'])
    files.write(folder / "manifest.json", [manifest_text(step, facts, tables)])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_split_reads_back_in_any_other(tmp_path, world):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["d"] = tensors["d"].contiguous(memory_format=torch.channels_last)
    write_checkpoint(tmp_path / "step_00000001", tensors, world)
    reader = open_checkpoint(tmp_path / "step_00000001")
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor)
        flat = tensor.contiguous().flatten()
        for start in range(flat.numel()):
            for stop in range(start + 1, flat.numel() + 1, 3):
                assert torch.equal(reader.read(name, start, stop), flat[start:stop])


def test_files_are_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    write_checkpoint(tmp_path / "step_00000001", tensors, 1)
    loaded = load_file(tmp_path / "step_00000001/rank_00000.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_pieces_that_do_not_cover_a_tensor_are_never_published():
    row = {"tensor": "a", "dtype": "F32", "shape": [4], "file": "f", "key": "a"}
    with pytest.raises(ValueError, match="element 2"):
        manifest_text(1, {}, [[{**row, "start": 0, "stop": 2}, {**row, "start": 3, "stop": 4}]])
    with pytest.raises(ValueError, match="end at element 3 of 4"):
        manifest_text(1, {}, [[{**row, "start": 0, "stop": 3}]])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "step_00000001"
    write_checkpoint(folder, {name: torch.randn(shape) for name, shape in SHAPES.items()}, 2)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises((Damaged, UserError)) as error:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        Reader(folder, manifest)
    return str(error.value)


def test_200_flipped_bits_are_refused_by_file_name(tmp_path, good):
    rng = random.Random(0)
    names = sorted(path.name for path in good.iterdir())
    for trial in range(200):
        folder = tmp_path / str(trial)
        shutil.copytree(good, folder)
        victim = folder / names[trial % len(names)]
        data = bytearray(victim.read_bytes())
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
        # White space between JSON tokens carries nothing; a flip that only changes it may pass.
        victim.write_bytes(data)
        if victim.name == "manifest.json" and _same_json(victim, good / victim.name):
            continue
        assert victim.name in refusal(folder)
        shutil.rmtree(folder)


def _same_json(a: Path, b: Path) -> bool:
    try:
        return json.loads(a.read_bytes()) == json.loads(b.read_bytes())
    except ValueError:
        return False


def test_missing_truncated_extra_and_swapped_files_are_refused(tmp_path, good):
    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(good, folder)
        change(folder)
        return refusal(folder)

    first, second = "rank_00000.safetensors", "rank_00001.safetensors"
    assert f"{first}: missing" in broken("missing", lambda f: (f / first).unlink())
    assert "manifest.json" in broken("bare", lambda f: (f / "manifest.json").unlink())
    assert "should be" in broken("short", lambda f: os.truncate(f / first, 100))
    assert "extra.bin: not part" in broken("extra", lambda f: (f / "extra.bin").write_bytes(b"x"))
    assert "manifest.json" in broken("torn", lambda f: os.truncate(f / "manifest.json", 50))
    assert "rank_0000" in broken("swapped", lambda f: _swap(f / first, f / second))
    assert "not a plain file" in broken("link", lambda f: _link(f / first))


def _swap(a: Path, b: Path) -> None:
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


def _link(path: Path) -> None:
    outside = path.parent.with_suffix(".outside")
    path.rename(outside)
    path.symlink_to(outside)


def test_a_newer_format_version_is_refused_but_not_called_damaged(tmp_path, good, alone, monkeypatch):
    from ddpm_dist.checkpoint import format as module

    folder = tmp_path / "checkpoints/step_00000001"
    shutil.copytree(good, folder)
    monkeypatch.setattr(module, "VERSION", 0)
    with pytest.raises(UserError, match="version 1.*knows version 0.*newer"):
        CheckpointStore(tmp_path / "checkpoints", alone, 1, None, 1).newest()
    assert folder.exists(), "a checkpoint that is too new must not be set aside"


def save(store: CheckpointStore, step: int, value: float = 1.0) -> str | None:
    store.save(step, [Piece("model/w", (3,), 0, torch.full((3,), value))], {"step": step})
    return store.wait()


def test_retention(tmp_path, alone):
    store = CheckpointStore(tmp_path, alone, keep_last=2, keep_every=40, global_batch=10)
    for step in range(1, 13):
        assert save(store, step) is None
    # 40 images are reached at steps 4, 8, 12
    assert [step for step, _ in published(tmp_path)] == [12, 11, 8, 4]
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("step_0") or "." in path.name]


def test_an_interval_fires_at_the_first_step_that_reaches_it():
    fired = [step for step in range(1, 11) if reaches(step, 12, 30)]
    assert fired == [3, 5, 8, 10]  # 36, 60, 96 and 120 images
    assert not reaches(3, 12, None)


def test_a_damaged_newest_is_set_aside_and_the_one_before_used(tmp_path, alone, capsys):
    store = CheckpointStore(tmp_path, alone, 5, None, 1)
    for step in (1, 2, 3):
        save(store, step, value=step)
    for step in (2, 3):
        victim = tmp_path / f"step_{step:08d}/rank_00000.safetensors"
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    reader = store.newest()
    assert reader.step == 1 and reader.tensor("model/w").tolist() == [1, 1, 1]
    said = capsys.readouterr().err
    assert "step_00000003" in said and "rank_00000.safetensors" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001",
        "step_00000002.corrupt",
        "step_00000003.corrupt",
    ]
    assert save(store, 3) is None  # the number is free again


def test_a_copy_under_a_higher_number_is_no_checkpoint_of_that_step(tmp_path, alone):
    store = CheckpointStore(tmp_path, alone, keep_last=1, keep_every=None, global_batch=1)
    save(store, 5, value=5)
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000099")
    assert save(store, 6) is None
    assert (tmp_path / "step_00000006").exists(), "retention took the checkpoint that was just saved"
    assert store.newest().step == 6
    assert (tmp_path / "step_00000099.corrupt").exists()


def test_links_and_stray_files_do_not_stop_a_run(tmp_path, alone):
    root = tmp_path / "checkpoints"
    store = CheckpointStore(root, alone, keep_last=1, keep_every=None, global_batch=1)
    save(store, 1)
    shutil.move(root / "step_00000001", tmp_path / "bigger_disk")
    (root / "step_00000001").symlink_to(tmp_path / "bigger_disk")
    (root / "step_00000007.incomplete").write_text("stray")
    assert store.newest().step == 1
    assert save(store, 2) is None
    assert [path.name for path in root.iterdir() if path.name.startswith("step_00000001")] == []
    assert (tmp_path / "bigger_disk/manifest.json").exists(), "what a link points to is not ours to remove"
    store.tidy()
    assert sorted(path.name for path in root.iterdir()) == ["step_00000002"]


def test_a_piece_outside_the_checkpoint_is_refused(tmp_path, good):
    from ddpm_dist.checkpoint.format import _seal

    folder = tmp_path / good.name
    shutil.copytree(good, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in (
        lambda m: next(iter(m["tensors"].values()))["pieces"][0].__setitem__(0, "../outside.safetensors"),
        lambda m: m.pop("files"),
        lambda m: m.__setitem__("step", "x"),
        lambda m: m.__setitem__("tensors", [1]),
    ):
        body = json.loads(json.dumps(manifest["manifest"]))
        change(body)
        (folder / "manifest.json").write_text(json.dumps({"manifest": body, "sha256": _seal(body)}))
        assert "manifest.json" in refusal(folder)


def test_when_none_is_intact_the_run_does_not_start_over(tmp_path, alone):
    store = CheckpointStore(tmp_path, alone, 5, None, 1)
    save(store, 1)
    (tmp_path / "step_00000001/state.json").write_text("{}")
    for _ in range(2):  # also the second time, when it is already set aside
        with pytest.raises(UserError, match="no intact checkpoint"):
            store.newest()


def test_training_on_a_full_disk_ends_with_the_older_checkpoints_whole(tmp_path):
    """A real limit of the system on file sizes: the first save fits, the later ones do not."""
    run = tmp_path / "run"
    assert train(run, "train.images=24", "ema.half_lives=[100]").returncode == 0
    before = {path.name: path.read_bytes() for path in (run / "checkpoints/step_00000002").iterdir()}
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, signal, sys\n"
        "from ddpm_dist import train\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    from conftest import TINY

    (tmp_path / "empty.yaml").write_text("{}\n")
    arguments = ["--config", str(tmp_path / "empty.yaml"), f"run.dir={run}", *TINY, "data.source=synthetic"]
    arguments += ["train.images=72", "ema.half_lives=[100]", "checkpoint.every=24", "optim.decay_images=24"]
    done = subprocess.run([sys.executable, str(script), *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "File too large" in done.stderr and "Older checkpoints are whole" in done.stderr
    assert "next save tries again" in done.stderr
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert {path.name: path.read_bytes() for path in (run / "checkpoints/step_00000002").iterdir()} == before
    again = train(run, "train.images=72", "ema.half_lives=[100]", "optim.decay_images=24")
    assert again.returncode == 0 and "continuing at step 2" in again.stdout
    assert [record["step"] for record in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_corrupt_checkpoint_is_passed_over_by_training_and_refused_when_named(tmp_path):
    from conftest import run_module

    run = tmp_path / "run"
    assert train(run, "train.images=60", "checkpoint.every=24", "train.audit=true").returncode == 0
    before = lines(run / "audit.jsonl")
    newest = run / "checkpoints/step_00000005"
    os.truncate(newest / "rank_00000.safetensors", 1000)
    named = run_module("ddpm_dist.sample", newest, "--num", "2", "--out", tmp_path / "x.png")
    assert named.returncode == 2 and "rank_00000.safetensors" in named.stderr and not (tmp_path / "x.png").exists()
    unnamed = run_module("ddpm_dist.sample", run, "--num", "2", "--out", tmp_path / "x.png")
    assert unnamed.returncode == 0 and "step 4" in unnamed.stdout
    again = train(run, "train.images=60", "checkpoint.every=24", "train.audit=true")
    assert again.returncode == 0 and "continuing at step 4" in again.stdout
    assert "step_00000005.corrupt" in again.stderr
    assert lines(run / "audit.jsonl") == before
