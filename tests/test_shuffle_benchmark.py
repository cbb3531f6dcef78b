"""The shuffle benchmark against values that can be worked out, and the index of 5 billion samples that opens in seconds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import huge_index, shuffle
from ddpm_dist.data import large_index
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError

SMALL = ["--shards", "64", "--samples", "50", "--classes", "8", "--batch", "40", "--block-shards", "1", "4", "64"]


def test_what_is_measured_is_right():
    straight = shuffle.describe(np.arange(1000), 10, 50)
    assert set(straight["neighbours"]) == set(straight["consecutive"]) == {1}
    assert straight["classes_in_batch"] == 1 and straight["entropy_bits"] == straight["entropy_bits_lowest"] == 0
    assert straight["chi_square_per_degree"] == pytest.approx(50)  # (50 - 5)^2 / 5 + 9 * 5, over 9
    dealt = shuffle.describe(np.arange(1000).reshape(10, 100).T.reshape(-1), 10, 50)  # one of each class in turn
    assert dealt["classes_in_batch"] == 10 and dealt["entropy_bits"] == pytest.approx(np.log2(10))
    assert dealt["chi_square_per_degree"] == 0
    assert np.unique(dealt["neighbours"]).tolist() == [10, 989] and np.unique(dealt["consecutive"]).tolist() == [
        100,
        899,
    ]
    both = shuffle.compared(straight, dealt)
    assert both["neighbours_ks"] == both["consecutive_ks"] == 1
    assert shuffle.compared(dealt, dealt)["neighbours_ks"] == 0 and shuffle.compared(dealt, dealt)["entropy_ratio"] == 1
    assert shuffle.kolmogorov_smirnov(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6])) == 0.5


def test_larger_blocks_and_more_lanes_shuffle_better(tmp_path, capsys):
    paths = {name: tmp_path / f"shuffle.{name}" for name in ("json", "markdown", "plot")}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    assert shuffle.main([*SMALL, "--lanes", "1", "4", *words]) == 0
    report = json.loads(paths["json"].read_text())
    found = {(each["name"], each["lanes"]): each for each in report["entries"]}
    assert list(found) == [
        *((f"blocks of {k}", lanes) for lanes in (1, 4) for k in (1, 4, 64)), (shuffle.FULL, None), (shuffle.CHANCE, None),
    ]  # fmt: skip
    full, chance = found[shuffle.FULL, None], found[shuffle.CHANCE, None]
    assert (
        full["neighbours_ks"] == full["consecutive_ks"] == 0
        and full["neighbours_mean_ratio"] == full["entropy_ratio"] == 1
    )
    assert max(chance["neighbours_ks"], chance["consecutive_ks"]) < 0.05
    for lanes in (1, 4):
        for key, sign in (
            ("consecutive_ks", -1),
            ("neighbours_ks", -1),
            ("classes_in_batch", 1),
            ("chi_square_per_degree", -1),
        ):
            values = [sign * found[f"blocks of {k}", lanes][key] for k in (1, 4, 64)]
            assert values == sorted(values) and values[-1] > values[0]
    assert found["blocks of 1", 1]["classes_in_batch"] < 2 < found["blocks of 1", 4]["classes_in_batch"] <= 4.5
    one_block = found["blocks of 64", 1]  # all shards: as good as a full permutation
    assert max(one_block["neighbours_ks"], one_block["consecutive_ks"]) < 0.05 and one_block["entropy_ratio"] > 0.99
    assert capsys.readouterr().out == paths["markdown"].read_text()
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shards", "1"], "--shards must be at least 2"),
        (["--block-shards", "4", "0"], "--block-shards must be at least 1"),
        (["--lanes", "3"], "--lanes 3 does not divide --batch 256"),
        (["--lanes", "1", "2", "4", "8", "16"], "at most four"),
        (["--shards", "1000000", "--samples", "1000"], "takes gigabytes"),
        (["--samples", "2", "--shards", "20"], "must not be above the 40 samples"),
        (["--plot", "/nowhere/at/all.png"], "its folder does not exist"),
    ],
)
def test_bad_options(words, said, capsys):
    assert shuffle.main(words) == 2
    assert said in capsys.readouterr().err


def test_five_billion_samples_in_half_a_million_shards(tmp_path):
    """Every rank opens it and reads its first batches within 1 GB of memory; the report says in how many seconds."""
    target = tmp_path / "report.json"
    words = ["--block-shards", "4", "--steps", "3", "--scratch", str(tmp_path), "--json", str(target)]
    assert huge_index.main(words) == 0
    report = json.loads(target.read_text())
    assert report["samples"] == 5_000_000_000 and report["shards"] == 500_000
    assert report["table_bytes"] > 140e9 and report["table_disk_bytes"] < 1e9
    assert report["peak_bytes"] < 1e9 and report["peak_bytes"] - report["before_bytes"] < 400e6
    assert 0 < report["open_seconds"] < report["first_batch_seconds"] <= report["steps_seconds"]
    assert not list(tmp_path.glob("huge_index_*"))


def test_a_damaged_block_of_the_made_up_index_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_dist.data.shards.CHECKED_AT_ONCE", 20)
    ends = huge_index.shard_ends(2_000_000, 1000)
    assert ends[-1] == 2_000_000 and len(set(np.diff(ends).tolist())) > 100
    assert huge_index.write(tmp_path, ends, np.array([5, 1_999_999])) == 2
    index = Index.load(tmp_path)
    ids = np.array([7, 1_999_998, 3])
    assert np.array_equal(index.rows(ids), huge_index.records(ids, ends))
    with pytest.raises(UserError, match=f"records {large_index.BLOCK} to {2 * large_index.BLOCK - 1} are damaged"):
        index.rows(np.array([large_index.BLOCK + 9]))


def test_bad_options_of_the_made_up_index(capsys):
    for words, said in (
        (["--lanes", "3"], "must be divisible"),
        (["--samples", "100"], "20 or more"),
        (["--steps", "0"], "at least 1"),
    ):
        assert huge_index.main(words) == 2
        assert said in capsys.readouterr().err
