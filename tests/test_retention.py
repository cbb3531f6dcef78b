"""What is kept: only intact checkpoints count, the newest is decided by number, and nothing unusable is ever published."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddpm_dist.checkpoint import CheckpointStore, Ownership, Piece, files, open_checkpoint, published, reaches
from ddpm_dist.errors import UserError

GLOBAL_BATCH = 10


def pieces(value: float, poisoned: str = "", poison: float = float("nan")) -> list[Piece]:
    names = ("model/w", "optim.exp_avg/w", "optim.step/w", "ema.0/w")
    tensors = {name: torch.full((3,), value) for name in names}
    if poisoned:
        tensors[poisoned][1] = poison
    return [Piece(name, (3,), 0, tensor) for name, tensor in tensors.items()]


def save(store: CheckpointStore, step: int, value: float | None = None) -> str | None:
    store.save(step, pieces(float(step) if value is None else value), {"step": step})
    return store.wait()


def damage(folder: Path, how: str) -> None:
    file = folder / "rank_00000.safetensors"
    if how == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif how == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "remove a file":
        (folder / "state.json").unlink()
    else:
        (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-30])


class Run:
    """A run directory and, beside it, what has to be true of it."""

    def __init__(self, folder: Path, runtime, keep_last: int, keep_every: int | None) -> None:
        self.folder, self.runtime, self.keep_last, self.keep_every = folder, runtime, keep_last, keep_every
        self.root, self.owner = folder / "checkpoints", None
        self.intact: dict[int, float] = {}  # step -> value, of everything that must be there and good
        self.damaged: set[int] = set()
        self.step, self.saves = 0, 0
        self.start()

    def start(self) -> None:
        if self.owner is not None:
            self.owner.release()
        self.owner = Ownership(self.folder)
        self.store = CheckpointStore(
            self.root, self.runtime, self.keep_last, self.keep_every, GLOBAL_BATCH, self.owner.workplace.work
        )
        self.store.tidy()

    def save(self) -> None:
        self.step, self.saves = self.step + 1, self.saves + 1
        assert save(self.store, self.step, value=self.saves) is None
        self.intact[self.step] = self.saves
        newest = sorted(self.intact, reverse=True)[: self.keep_last]
        every = [step for step in self.intact if reaches(step, GLOBAL_BATCH, self.keep_every)]
        self.intact = {step: value for step, value in self.intact.items() if step in newest or step in every}

    def save_poisoned(self, name: str, poison: float) -> None:
        self.step += 1
        self.store.save(self.step, pieces(1.0, name, poison), {"step": self.step})
        failure = self.store.wait()
        assert f"rank 0: {name} is not finite" in failure

    def damage(self, position: int, how: str) -> None:
        there = published(self.root)
        if there:
            step, folder = there[position % len(there)]
            if step in self.intact:
                damage(folder, how)
                del self.intact[step]
                self.damaged.add(step)

    def restart(self) -> bool:
        """False when the run cannot go on."""
        self.start()
        if not self.intact:
            if self.damaged:
                with pytest.raises(UserError, match="no intact checkpoint"):
                    self.store.newest()
                return False
            assert self.store.newest() is None
            self.step = 0
            return True
        reader = self.store.newest()
        self.step = max(self.intact)
        assert reader.step == self.step
        assert reader.tensor("model/w").tolist() == [self.intact[self.step]] * 3
        return True

    def check(self) -> None:
        there = dict(published(self.root))
        for step, value in self.intact.items():
            assert open_checkpoint(there[step]).tensor("ema.0/w").tolist() == [value] * 3
        extra = set(there) - set(self.intact)
        assert extra <= self.damaged, "retention left something that it should have removed"
        aside = {int(path.name[5:13]) for path in self.root.glob("step_*.corrupt*")}
        assert self.damaged <= extra | aside, "retention removed what it could not vouch for"
        left = {path.name for path in self.owner.workplace.work.iterdir()}
        assert not left, f"left over: {left}"


operations = st.one_of(
    st.just(("save",)),
    st.just(("save",)),
    st.tuples(st.just("damage"), st.integers(0, 3), st.sampled_from(["flip", "truncate", "remove a file", "manifest"])),
    st.tuples(
        st.just("save_poisoned"),
        st.sampled_from(["model/w", "optim.exp_avg/w", "ema.0/w"]),
        st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    ),
    st.just(("restart",)),
)


@given(
    sequence=st.lists(operations, max_size=14),
    keep_last=st.integers(1, 3),
    keep_every=st.sampled_from([None, 20, 30, 50]),
)
@example(
    sequence=[("save",), ("save",), ("damage", 0, "flip"), ("save",), ("damage", 0, "flip"), ("restart",)],
    keep_last=2, keep_every=None,
)  # fmt: skip
@example(
    sequence=[("save",), ("save",), ("restart",), ("damage", 0, "flip"), ("save",), ("damage", 0, "truncate"), ("restart",)],
    keep_last=2, keep_every=None,
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_retention_never_removes_the_last_good_one(alone, sequence, keep_last, keep_every):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), alone, keep_last, keep_every)
        for name, *arguments in sequence:
            if getattr(run, name)(*arguments) is False:
                break
            run.check()
        else:
            run.restart()
        run.owner.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_kind_of_float_is_checked_and_integers_are_not(tmp_path, alone, dtype):
    store = CheckpointStore(tmp_path, alone, 1, None, 1)
    good = torch.full((4,), 3, dtype=dtype)
    counts = [
        Piece("optim.step/w", (2,), 0, torch.tensor([1, 2])),
        Piece("empty", (0,), 0, torch.empty(0, dtype=dtype)),
    ]
    store.save(1, [Piece("model/w", (4,), 0, good), *counts], {})
    assert store.wait() is None
    for poison in (float("nan"), float("inf"), float("-inf")):
        for position in (0, 3):
            bad = good.clone()
            bad[position] = poison
            store.save(2, [*counts, Piece("model/w", (4,), 0, bad)], {})
            assert "model/w is not finite" in store.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_checkpoint_is_hashed_once_per_process_and_the_one_just_written_never(tmp_path, alone, monkeypatch):
    hashed, plain = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.parent.name) or plain(path))
    store = CheckpointStore(tmp_path, alone, 3, None, 1)
    for step in range(1, 6):
        save(store, step)
    assert hashed == []
    again = CheckpointStore(tmp_path, alone, 3, None, 1)  # another process, which cannot know what this one wrote
    save(again, 6)
    assert sorted(set(hashed)) == ["step_00000003", "step_00000004", "step_00000005"]
    hashed.clear()
    save(again, 7)
    save(again, 8)
    assert hashed == []
    damage(tmp_path / "step_00000007", "flip")
    save(again, 9)
    assert set(hashed) == {"step_00000007"}
    assert [step for step, _ in published(tmp_path)] == [9, 8, 7, 6], "6 has to stand in for the damaged 7"


def test_what_keep_every_protects_is_not_read(tmp_path, alone, monkeypatch):
    store = CheckpointStore(tmp_path, alone, 1, 10, 10)
    for step in range(1, 9):
        save(store, step)
    assert len(published(tmp_path)) == 8
    hashed, plain = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path) or plain(path))
    save(CheckpointStore(tmp_path, alone, 1, 10, 10), 9)
    assert hashed == []


def test_a_checkpoint_that_is_damaged_is_named_once_and_left_for_the_next_start(tmp_path, alone, capsys):
    store = CheckpointStore(tmp_path, alone, 1, None, 1)
    save(store, 1)
    damage(tmp_path / "step_00000001", "truncate")
    save(store, 2)
    save(store, 3)
    said = capsys.readouterr().err
    assert said.count("step_00000001 does not count for checkpoint.keep_last") == 1
    assert said.count("rank_00000.safetensors") == 1
    assert [step for step, _ in published(tmp_path)] == [3, 1]


@given(
    steps=st.lists(st.integers(1, 10**9), min_size=1, max_size=5, unique=True),
    times=st.lists(st.integers(0, 2**33), min_size=10, max_size=10),
)
@settings(max_examples=40, deadline=None)
def test_which_one_is_newest_depends_on_its_number_not_on_clocks(alone, steps, times):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = CheckpointStore(root, alone, 10, None, 1)
        for step in steps:  # in any order
            assert save(store, step) is None
        assert [step for step, _ in published(root)] == sorted(steps, reverse=True)
        for position, (_, path) in enumerate(published(root)):
            for file in path.iterdir():
                os.utime(file, (times[2 * position + 1],) * 2)
            os.utime(path, (times[2 * position],) * 2)
        assert store.newest().step == max(steps)
        # Retention goes by number, too: the oldest numbers leave, whenever they were written.
        last = max(steps) + 1
        assert save(CheckpointStore(root, alone, 2, None, 1), last) is None
        assert [step for step, _ in published(root)] == sorted([*steps, last], reverse=True)[:2]
