"""data.on_bad: a sample that is damaged in mid-run is named; skip puts the same other one in its place on every rank and after a resume."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import lines, train

from ddpm_dist.config import Data
from ddpm_dist.data.bad_samples import BadSamples
from ddpm_dist.data.index_file import checksum, write_index
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import shard_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import BadSample, RunFailed
from ddpm_dist.pack import pack
from ddpm_dist.runtime import Runtime

FLIPPED, GARBAGE = (11, 12), (30, 47)  # bytes that are not those of the index; bytes of the index that are no image


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "shapes"
    pack("shapes", folder, size=16, num=48, samples_per_shard=16, workers=1, image_format="png")
    return folder


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "shapes"
    shutil.copytree(whole, folder)
    index = Index.load(folder)
    table, shards = np.array(index.samples), list(index.shards)
    for sample in (*FLIPPED, *GARBAGE):
        path = folder / shards[sample // 16].name
        data, begin, size = bytearray(path.read_bytes()), int(table["offset"][sample]), int(table["size"][sample])
        if sample in FLIPPED:
            data[begin + size // 2] ^= 1
        else:
            data[begin + size // 2 : begin + size] = bytes(size - size // 2)
            table["checksum"][sample] = checksum(bytes(data[begin : begin + size]))
        path.write_bytes(data)
    for name in ("index.json", "index.npy"):
        (folder / name).unlink()
    write_index(folder, shards, table, index.classes, index.channels, index.image_format)
    return folder


def batches(folder, number=0, world=1, steps=range(8), **settings):
    index, told = Index.load(folder), []
    data = Data(image_size=16, num_classes=10, flip=True, **settings)
    rank = Runtime(number, world, number, torch.device("cpu"), None)
    found = shard_batches(index, data, plan_batches(12, None, world), rank, 3, steps, "cpu", told=told.append)
    return list(found), told


def stand_in(ids: np.ndarray) -> np.ndarray:
    return np.array([{11: 13, 12: 13, 30: 31, 47: 0}.get(int(sample), int(sample)) for sample in ids])


def test_the_one_behind_it_stands_in(whole, damaged):
    good, _ = batches(whole)
    found, told = batches(damaged, on_bad="skip")
    assert len(found) == len(good) == 8  # two epochs
    pixels = {}
    for batch in batches(whole, steps=range(40))[0]:  # each image as it is and mirrored
        for sample, image in zip(batch.ids.tolist(), batch.pixels.numpy(), strict=True):
            pixels.setdefault(sample, set()).add(image.tobytes())
    for a, b in zip(good, found, strict=True):
        assert (a.step, a.slots.tolist()) == (b.step, b.slots.tolist())
        assert b.ids.tolist() == stand_in(a.ids).tolist()
        assert b.replaced == int((a.ids != stand_in(a.ids)).sum())
        same = a.ids == b.ids
        assert np.array_equal(a.pixels.numpy()[same], b.pixels.numpy()[same])
        for sample, image in zip(b.ids.tolist(), b.pixels.numpy(), strict=True):
            assert image.tobytes() in pixels[sample]
        labels = Index.load(whole).samples["label"]
        assert b.labels.tolist() == labels[b.ids].tolist()
    assert len(told) == 4 and sum(batch.replaced for batch in found) == 8
    assert sum("do not match the index" in text for text in told) == 2
    assert sum("cannot be decoded" in text for text in told) == 2


@pytest.mark.parametrize("world", [2, 3])
def test_every_split_and_start_sees_the_same(damaged, world):
    one = {batch.step: batch for batch in batches(damaged, on_bad="skip")[0]}
    for number in range(world):
        for steps in (range(8), range(5, 8)):
            for batch in batches(damaged, number, world, steps, on_bad="skip")[0]:
                whole = one[batch.step]
                place = [whole.slots.tolist().index(slot) for slot in batch.slots.tolist()]
                assert batch.ids.tolist() == whole.ids[place].tolist()
                assert np.array_equal(batch.pixels.numpy(), whole.pixels.numpy()[place])


def test_stop_names_it(damaged):
    with pytest.raises(BadSample) as caught:
        batches(damaged)
    index = Index.load(damaged)
    assert caught.value.sample in (*FLIPPED, *GARBAGE)
    assert index.describe(caught.value.sample) in str(caught.value)


def test_a_run_counts_them_on_all_ranks(tmp_path, damaged):
    words = ("train.audit=true", "train.images=96", "data.channels=3", "data.on_bad=skip")
    for name, ranks in (("one", 0), ("two", 2)):
        done = train(tmp_path / name, *words, shards=damaged, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "left out: " in done.stdout + done.stderr
    one, two = ([line["slots"] for line in lines(tmp_path / name / "audit.jsonl")] for name in ("one", "two"))
    assert one == two
    for name in ("one", "two"):
        counts = [line["replaced_samples"] for line in lines(tmp_path / name / "metrics.jsonl")]
        assert counts == sorted(counts) and counts[-1] == 8
    done = train(tmp_path / "one", *words[1:3], "train.audit=true", "train.images=120", shards=damaged)
    assert done.returncode == 2 and ".tar:" in done.stderr  # stop is the default, also for a run that skipped before


def test_when_most_are_bad_something_else_is_wrong():
    told = []
    bad = BadSamples(10, told.append)
    for sample in range(5):
        bad.add(BadSample(f"number {sample}", sample))
    ids, count = bad.replace(np.array([4, 9, 0, 7]))
    assert ids.tolist() == [5, 9, 5, 7] and count == 2
    with pytest.raises(RunFailed, match="6 of 10 samples"):
        bad.add(BadSample("number 9", 9))


@pytest.mark.parametrize("world", [1, 3])
def test_balanced_classes_stay_balanced(whole, damaged, world):
    """The stand-in has the same class, on every rank and from every start."""
    index = Index.load(damaged)
    labels, bad = index.samples["label"], {*FLIPPED, *GARBAGE}
    good = {batch.step: batch for batch in batches(whole, steps=range(40), balance="class")[0]}
    replaced = 0
    for number in range(world):
        for steps in (range(40), range(25, 40)):
            for batch in batches(damaged, number, world, steps, on_bad="skip", balance="class")[0]:
                place = [good[batch.step].slots.tolist().index(slot) for slot in batch.slots.tolist()]
                wanted = good[batch.step].ids[place]
                for asked, shown, label in zip(wanted.tolist(), batch.ids.tolist(), batch.labels.tolist(), strict=True):
                    of_class = np.flatnonzero(labels == labels[asked]).tolist()
                    behind = of_class[of_class.index(asked) :] + of_class
                    assert shown == next(sample for sample in behind if sample not in bad) and label == labels[asked]
                replaced += batch.replaced
                assert batch.replaced == int((wanted != batch.ids).sum())
    assert replaced > 20


def test_a_class_without_a_good_sample_ends_the_run(tmp_path, damaged):
    bad = BadSamples(6, lambda text: None, np.array([0, 1, 0, 1, 2, 0]), ["a", "1", "c"])
    for sample in (0, 3):
        bad.add(BadSample("it", sample))
    assert bad.replace(np.array([0, 3, 5, 4]))[0].tolist() == [2, 1, 5, 4]
    bad.add(BadSample("it", 4))
    with pytest.raises(RunFailed, match=r"none of the 1 samples of class 2 \(c\) can be used") as caught:
        bad.replace(np.array([4]))
    assert caught.value.one_rank

    folder = tmp_path / "shapes"
    shutil.copytree(damaged, folder)
    index = Index.load(folder)
    label = int(index.samples["label"][20])
    for sample in np.flatnonzero(index.samples["label"] == label).tolist():
        path, row = folder / index.shards[sample // 16].name, index.samples[sample]
        data = bytearray(path.read_bytes())
        data[int(row["offset"]) + int(row["size"]) // 2] ^= 1
        path.write_bytes(data)
    words = ("train.images=240", "data.channels=3", "data.on_bad=skip", "data.balance=class")
    done = train(tmp_path / "run", *words, shards=folder)
    assert done.returncode == 1 and f"samples of class {label} ({index.classes[label]}) can be used" in done.stderr


def test_it_does_not_go_with_a_cache(tmp_path, whole):
    done = train(tmp_path / "run", "data.channels=3", "data.on_bad=skip", "data.cache=host", shards=whole)
    assert done.returncode == 2 and "does not go with data.on_bad=skip" in done.stderr
