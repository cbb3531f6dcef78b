"""Orders beyond the full permutation in real runs: blocks with lanes, mixes, balanced classes; the same run on every number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import lines, train

from ddpm_dist.data.shards import Index
from ddpm_dist.pack import pack

AUDIT = ("train.audit=true", "train.images=144", "data.channels=3")
BLOCKS = ("data.order=blocks", "data.block_shards=2", "data.lanes=2")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of shapes in shards of 8: 40 and 24 images."""
    folder = tmp_path_factory.mktemp("order")
    for name, num, seed in (("first", 40, 0), ("second", 24, 1)):
        pack("shapes", folder / name, size=16, num=num, samples_per_shard=8, workers=1, seed=seed)
    return folder / "first", folder / "second"


def run(folder, *words, ranks=0, shards=None, code=0):
    done = train(folder, *AUDIT, *words, shards=shards, ranks=ranks)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def seen(folder) -> list[list]:
    return [line["slots"] for line in lines(folder / "audit.jsonl")]


def ids(folder) -> list[int]:
    return [slot["id"] for slots in seen(folder) for slot in slots]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory, sets):
    folder = tmp_path_factory.mktemp("blocks") / "run"
    said = run(folder, *BLOCKS, shards=sets[0])
    assert "order: blocks of 2 shards, 2 lane(s)" in said
    return folder


def test_blocks_are_the_same_run_on_any_ranks_and_after_a_resume(tmp_path, sets, blocks):
    run(tmp_path / "run", *BLOCKS, "train.images=48", "optim.decay_images=144", shards=sets[0], ranks=2)
    run(tmp_path / "run", *BLOCKS, "optim.decay_images=144", shards=sets[0], ranks=3)
    assert seen(tmp_path / "run") == seen(blocks)
    whole = ids(blocks)
    assert len(whole) == 144 and set(Counter(whole[:120]).values()) == {
        3
    }  # three epochs, in which all are seen once each


def test_another_order_is_refused_at_a_resume(sets, blocks):
    assert "data.order: blocks in the checkpoint, full now" in run(blocks, "train.images=180", shards=sets[0], code=2)
    said = run(blocks, *BLOCKS[:2], "train.images=180", shards=sets[0], code=2)
    assert "data.lanes: 2 in the checkpoint, 1 now" in said


def test_a_mix_has_its_shares_and_the_right_labels(tmp_path, sets):
    mix = "data.source=shards", f"data.mix=[{{shards: {sets[0]}, weight: 3}}, {{shards: {sets[1]}}}]"
    mix = (*mix, "train.label_dropout=0")
    run(tmp_path / "one", *mix)
    run(tmp_path / "two", *mix, ranks=2)
    assert seen(tmp_path / "one") == seen(tmp_path / "two")
    found = ids(tmp_path / "one")
    share = sum(sample < 40 for sample in found) / len(found)
    assert 0.6 < share < 0.9 and max(found) < 64
    first, second = (Index.load(each).samples["label"] for each in sets)
    for slots in seen(tmp_path / "one"):
        for slot in slots:
            sample = slot["id"]
            wanted = first[sample] if sample < 40 else second[sample - 40]
            assert slot["label"] == wanted


def test_every_class_equally_often(tmp_path, sets):
    run(tmp_path / "run", "data.balance=class", "train.label_dropout=0", shards=sets[0])
    counts = Counter(slot["label"] for slots in seen(tmp_path / "run") for slot in slots)
    assert (
        len(counts) == 10 and min(counts.values()) >= 8 and max(counts.values()) <= 21
    )  # dealt in periods of a thousand


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.lanes=5",), "data.lanes=5 does not divide"),
        (("data.balance=class", "data.order=blocks"), "needs the full permutation"),
        (("data.mix=[{shards: /nowhere}]",), "both set"),
        (("data.order=random",), "data.order"),
        (("data.mix=[]",), "data.mix"),
    ],
)
def test_what_does_not_go_together(tmp_path, sets, words, said):
    assert said in run(tmp_path / "run", *words, shards=sets[0], code=2)


def test_sets_that_cannot_be_mixed(tmp_path, sets, digit_shards):
    said = run(
        tmp_path / "run", "data.source=shards", f"data.mix=[{{shards: {sets[0]}}}, {{shards: {digit_shards}}}]", code=2
    )
    assert "data.mix: " in said and "need the same" in said
    said = run(
        tmp_path / "run", "data.source=shards", f"data.mix=[{{shards: {sets[0]}}}, {{shards: {sets[0]}}}]", code=2
    )
    assert "twice" in said
