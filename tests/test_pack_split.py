"""Images held out for validation: by content alone, in no folder twice, the same for workers and parts; duplicates."""

import pytest
from packing import contents, picture
from PIL import Image

from ddpm_dist.data import shapes
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import main, pack, pack_part
from ddpm_dist.parts import Part

OPTIONS = {"num": 400, "size": 8, "samples_per_shard": 100, "workers": 1, "split_validation": 0.1}


def samples_of(folder):
    """Label and key by image bytes."""
    index = Index.load(folder)
    index.verify()
    return {index.read(k): (int(index.samples["label"][k]), index.key_of(k)) for k in range(len(index))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    return pack("shapes", out, **OPTIONS)


def test_the_share_is_met_and_every_image_is_in_one_folder(alone, tmp_path):
    train, held = (samples_of(index.folder) for index in (alone.index, alone.validation))
    assert alone.validation.folder == alone.index.folder.with_name("out-validation")
    assert not set(train) & set(held) and abs(len(held) - 40) < 4 * (400 * 0.1 * 0.9) ** 0.5
    assert alone.index.classes == alone.validation.classes == shapes.SHAPES
    whole = samples_of(pack("shapes", tmp_path / "whole", **OPTIONS | {"split_validation": None}).index.folder)
    assert train | held == whole
    more = pack("shapes", tmp_path / "more", **OPTIONS | {"split_validation": 0.2})
    assert set(held) < set(samples_of(more.validation.folder)), "a larger share adds images, and moves none back"


@pytest.mark.slow  # starts processes
def test_two_workers_write_the_same(alone, tmp_path):
    two = pack("shapes", tmp_path / "two", **OPTIONS | {"workers": 2})
    for a, b in ((two.index, alone.index), (two.validation, alone.validation)):
        assert contents(a.folder) == contents(b.folder)


def test_sides_are_the_same_whatever_else_is_packed(alone, tmp_path):
    few = pack("shapes", tmp_path / "few", **OPTIONS | {"num": 150})
    assert set(samples_of(few.validation.folder)) < set(samples_of(alone.validation.folder))


def test_parts_give_the_same_two_sets(alone, tmp_path, capsys):
    out = tmp_path / "out"
    for number in (2, 0, 1):
        recorded, kept = pack_part("shapes", out, Part(number, 3), **OPTIONS)
        assert not kept
    assert pack_part("shapes", out, Part(1, 3), **OPTIONS)[1], "kept"
    with pytest.raises(UserError, match="split_validation: 0.2 here, 0.1 there"):
        pack_part("shapes", out, Part(1, 3), **OPTIONS | {"split_validation": 0.2})
    assert main(["--merge", "--out", str(out)]) == 0
    held = out.with_name("out-validation")
    for merged, index in ((out, alone.index), (held, alone.validation)):
        assert samples_of(merged) == samples_of(index.folder)
        order = [found.samples["checksum"].tolist() for found in (Index.load(merged), index)]
        assert order[0] == order[1], "the same order; shards may end elsewhere"
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{held}: {len(alone.validation)} samples held out") for line in lines)
    assert lines[-1].endswith(f"validation.shards={held}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-validation"]


def test_duplicates_are_named_and_stay_together(tmp_path):
    root = tmp_path / "root"
    for k in range(40):
        picture(root / f"{k:02d}.png", (k // 2, 9, 9))
    packed = pack("folder", tmp_path / "out", root=root, image_format="png", workers=1, split_validation=0.3)
    held, train = (Index.load(index.folder) for index in (packed.validation, packed.index))
    assert not set(samples_of(held.folder)) & set(samples_of(train.folder))
    counts = [len(held) // 2, len(train) // 2]
    assert sum(counts) == 20 and all(counts)
    first = train.key_of(0)
    assert packed.notes[0] == (
        f"{counts[1]} images in {train.folder} are the same as an earlier one, byte for byte "
        f"({train.key_of(1)} as {first}, {train.key_of(3)} as {train.key_of(2)}, {train.key_of(5)} as {train.key_of(4)}, ...)"
    )
    assert packed.notes[1].startswith(f"{counts[0]} images in {held.folder} are the same")


def test_what_cannot_be_split_leaves_nothing(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    Image.new("L", (8, 8), 3).save(root / "a.png")
    for share, message in ((0, "must lie between 0 and 1"), (1.5, "must lie between"), (1e-9, "no image was held out"),
                           (1 - 1e-9, "all images were held out")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            pack("folder", tmp_path / "out", root=root, workers=1, split_validation=share)
    taken = tmp_path / "out-validation"
    taken.mkdir()
    (taken / "x").write_text("mine")
    with pytest.raises(UserError, match="out-validation is not empty"):
        pack("folder", tmp_path / "out", root=root, workers=1, split_validation=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-validation", "root"]
