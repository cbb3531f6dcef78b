"""The index of a shard folder: what it says, who can read it, and how large it may get."""

import os
import pickle
import tarfile
import threading
import time

import numpy as np
import pytest
import shard_folders
from shard_folders import edit_table

from ddpm_dist.data.shards import SAMPLE_DTYPE, Index, Shard, checksum, write_index
from ddpm_dist.errors import BadSample
from ddpm_dist.pack import pack

packed, copy = shard_folders.packed, shard_folders.copy  # fixtures


def test_index_lists_every_sample_with_the_bytes_and_labels_that_the_tars_hold(packed):
    index = Index.load(packed)
    index.check_files()
    index.verify()
    assert (len(index), index.channels, index.image_format, index.num_classes) == (25, 3, "jpg", 10)
    assert [shard.samples for shard in index.shards] == [10, 10, 5]
    sample = 0
    for number, shard in enumerate(index.shards):
        with tarfile.open(packed / shard.name) as tar:
            files = {member.name: member for member in tar}
        for key in sorted({name.split(".")[0] for name in files}):
            record, image = index.samples[sample], files[f"{key}.jpg"]
            with open(packed / shard.name, "rb") as file:
                file.seek(image.offset_data)
                data = file.read(image.size)
            assert (record["offset"], record["size"], record["checksum"]) == (
                image.offset_data,
                image.size,
                checksum(data),
            )
            assert index.read(sample) == data
            assert index.key_of(sample) == key
            assert index.describe(sample) == f"{packed / shard.name}:{key}"
            assert index.shard_of(np.array([sample]))[0] == number
            assert record["label"] == sample % 10
            assert (record["height"], record["width"]) == (16, 16)
            sample += 1
    assert sample == 25


def test_record_is_28_bytes_and_the_checksum_is_the_documented_one():
    assert SAMPLE_DTYPE.itemsize == 28
    # python -c "import hashlib; print(hashlib.blake2b(b'abc', digest_size=8).hexdigest())" gives d8bb14d833d59559
    assert checksum(b"abc") == int.from_bytes(bytes.fromhex("d8bb14d833d59559"), "little")


def test_fingerprint_is_the_same_for_a_copy_and_differs_for_other_data(packed, copy, tmp_path):
    assert Index.load(copy).fingerprint == Index.load(packed).fingerprint
    other = pack("shapes", tmp_path / "other", num=25, size=16, samples_per_shard=10, workers=1, seed=1).index
    assert other.fingerprint != Index.load(packed).fingerprint
    edit_table(copy, lambda samples: samples["label"].__setitem__(3, 4))
    assert Index.load(copy).fingerprint != Index.load(packed).fingerprint


def test_index_travels_to_other_processes_and_is_read_by_many_threads(packed):
    index = pickle.loads(pickle.dumps(Index.load(packed)))
    expected = [index.read(k) for k in range(25)]
    wrong = []

    def read():
        wrong.extend(k for k in list(range(25)) * 20 if index.read(k) != expected[k])

    threads = [threading.Thread(target=read) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


def test_more_shards_than_open_files_allowed_are_read(packed, monkeypatch):
    monkeypatch.setattr("ddpm_dist.data.shards.MAX_OPEN_FILES", 1)
    index = Index.load(packed)
    before = len(os.listdir("/proc/self/fd"))
    for sample in [0, 10, 20] * 10:
        assert checksum(index.read(sample)) == index.samples["checksum"][sample]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("count", [3, 25])  # with few and with many, checksums are computed in different ways
def test_of_many_samples_the_first_damaged_one_is_named(copy, count):
    index = Index.load(copy)
    ids = np.random.default_rng(count).permutation(25)[:count]
    assert list(index.read_many(ids)) == [index.read(k) for k in ids]
    for sample in ids[[count - 1, count // 2]]:
        number, row = int(index.shard_of(sample)), index.samples[sample]
        with open(index.location(number), "r+b") as file:
            file.seek(int(row["offset"]) + int(row["size"]) - 1)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([last ^ 16]))
    with pytest.raises(BadSample) as caught:
        index.read_many(ids)
    assert caught.value.sample == ids[count // 2] and index.key_of(int(ids[count // 2])) in str(caught.value)


def test_one_million_samples_take_40_mb_and_load_in_a_second(tmp_path):
    count, per_shard = 1_000_000, 10_000
    samples = np.zeros(count, SAMPLE_DTYPE)
    samples["offset"] = np.tile(np.arange(per_shard) * 2048 + 1536, count // per_shard)
    samples["checksum"] = np.random.default_rng(0).integers(0, 1 << 63, count)
    samples["size"], samples["height"], samples["width"] = 300, 64, 64
    samples["label"] = np.arange(count) % 10
    shards = [Shard(f"s-{k:06d}.tar", per_shard, per_shard * 2048 + 1024, "0" * 64) for k in range(count // per_shard)]
    write_index(tmp_path, shards, samples, [str(k) for k in range(10)], 3, "jpg")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 40e6
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process, so that a busy machine does not count
        index = Index.load(tmp_path)
        times.append(time.process_time() - start)
    assert len(index) == count
    assert min(times) < 1.0
