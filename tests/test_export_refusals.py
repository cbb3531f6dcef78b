"""Export that goes wrong: sources and targets that are none, damaged checkpoints, and a kill or a full disk at any operation."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import export_runs
import torch
from export_runs import damage, refused
from forked import Family, strike_at
from safetensors.torch import load_file

from ddpm_dist import export
from ddpm_dist.checkpoint import files, open_checkpoint

made, run, exported = export_runs.made, export_runs.run, export_runs.exported  # fixtures


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- bad input ---------------------------------------------------------------------------------------------------------


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
