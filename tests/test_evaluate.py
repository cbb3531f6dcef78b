"""The judge of generated digits: real ones pass, and every way to cheat that we know of is seen."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpm_dist.classifier import predict, split, train_classifier
from ddpm_dist.errors import UserError
from ddpm_dist.evaluate import Judge, diversity, frechet_distance, load_generated, load_real, main
from ddpm_dist.pack import main as pack

CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "shards"
    assert pack(["digits", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def digits(shards):
    """All real digits and their labels, in a random order."""
    images, labels, classes = load_real(shards, (16, 16))
    assert images.shape == (1797, 1, 16, 16) and classes == CLASSES
    order = np.random.default_rng(7).permutation(len(images))
    return images[order], labels[order]


@pytest.fixture(scope="module")
def judge(digits):
    """Knows all real digits but 500, which tests use as perfect "generated" ones."""
    images, labels = digits
    return Judge(images[500:], labels[500:], CLASSES)


@pytest.fixture(scope="module")
def unseen(digits):
    images, labels = digits
    return images[:500], labels[:500]


def save(path, images, labels):
    np.savez(path, images=images, labels=labels)
    return path


def test_the_classifier_knows_held_out_real_digits(judge, unseen):
    images, labels = unseen
    assert judge.accuracy >= 0.98
    assert (predict(judge.net, images)[0] == labels).mean() >= 0.98


def test_real_digits_as_generated_ones_score_like_real_digits(judge, unseen):
    report = judge.report(*unseen)
    assert report.recognized > judge.accuracy - 0.015
    assert min(report.recognized_per_class.values()) > 0.9
    assert report.frechet < 2 * report.frechet_real
    assert report.frechet_images == 500
    assert 0.9 < report.diversity < 1.1
    assert report.distinct == 1
    assert sum(report.generated_per_class.values()) == 500


def test_noise_is_not_recognized_and_far_away(judge):
    noise = np.random.default_rng(0).integers(0, 256, (500, 1, 16, 16), np.uint8)
    report = judge.report(noise, np.arange(500) % 10)
    assert report.recognized < 0.3
    assert report.frechet > 20 * report.frechet_real


def test_one_good_digit_per_class_repeated_is_recognized_but_seen_through(judge, unseen):
    images, labels = unseen
    right = predict(judge.net, images)[0] == labels
    one = np.array([np.flatnonzero(right & (labels == digit))[0] for digit in range(10)])
    asked = np.arange(500) % 10
    report = judge.report(images[one][asked], asked)
    assert report.recognized == 1
    assert report.frechet > 8 * report.frechet_real
    assert report.diversity < 0.01
    assert report.distinct == 10 / 500


@pytest.mark.parametrize("contrast", [0.5, 0.7])
def test_washed_out_digits_are_far_away(judge, unseen, contrast):
    images, labels = unseen
    report = judge.report((contrast * images).astype(np.uint8), labels)
    assert report.frechet > 4 * report.frechet_real


def test_digits_of_the_wrong_class_are_not_recognized_though_they_are_perfect_digits(judge, unseen):
    images, labels = unseen
    report = judge.report(images, (labels + 1) % 10)
    assert report.recognized < 0.05
    assert report.frechet < 2 * report.frechet_real


def test_training_twice_gives_the_same_classifier_and_leaves_the_random_state_alone(digits):
    import torch

    images, labels = digits
    state = torch.get_rng_state()
    first, second = (train_classifier(images, labels, 10, seed=3, passes=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(predict(first, images)[1], predict(second, images)[1])
    other = train_classifier(images, labels, 10, seed=4, passes=1)
    assert not np.array_equal(predict(first, images)[1], predict(other, images)[1])


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 28, 28), (3, 8, 8), (3, 40, 24)])
def test_the_classifier_takes_images_of_other_sizes(shape):
    images = np.zeros((64, *shape), np.uint8)
    labels = np.arange(64) % 2
    images[labels == 1, :, : shape[1] // 2] = 200  # bright above
    net = train_classifier(images, labels, 2, passes=20)
    assert (predict(net, images)[0] == labels).all()


def test_the_split_is_fixed_disjoint_and_complete():
    train, held_out = split(101)
    assert len(held_out) == 20 and sorted([*train, *held_out]) == [*range(101)]
    assert np.array_equal(split(101)[1], held_out)
    assert not np.array_equal(split(101, seed=1)[1], held_out)


def exact(random, mean, covariance, number=400):
    """Samples whose sample mean and covariance are exactly those given."""
    x = random.normal(size=(number, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_equals_the_formula_with_a_general_matrix_square_root():
    from scipy.linalg import sqrtm

    random = np.random.default_rng(1)
    means = random.normal(size=(2, 5))
    first, second = (m @ m.T + 0.1 * np.eye(5) for m in random.normal(size=(2, 5, 5)))  # they do not commute
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(first + second - 2 * sqrtm(first @ second).real)
    found = frechet_distance(exact(random, means[0], first), exact(random, means[1], second))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_equal_sets_is_zero_and_of_singular_ones_finite():
    a = np.random.default_rng(2).normal(size=(50, 6))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    a[:, 3] = 0  # a feature that never fires
    assert frechet_distance(a, a + 2) == pytest.approx(24, rel=1e-9)


def test_diversity_of_half_the_spread_is_one_half():
    random = np.random.default_rng(3)
    labels = np.arange(200) % 2
    real = random.normal(size=(200, 4)) + 10 * labels[:, None]
    center = np.array([real[labels == c].mean(axis=0) for c in (0, 1)])[labels]
    assert diversity(center + 0.5 * (real - center), labels, real, labels) == pytest.approx(0.5)
    simplex, one_class = (
        np.eye(50),
        np.zeros(50, int),
    )  # all distances are equal, so few images must not look less varied
    assert diversity(simplex[:2], one_class[:2], simplex, one_class) == pytest.approx(1)
    assert np.isnan(diversity(real[:2], labels[:2], real, labels))


# --- files and the command line


def test_the_command_prints_a_table_and_writes_json(shards, unseen, tmp_path, capsys):
    file = save(tmp_path / "x.npz", *unseen)
    out = tmp_path / "new" / "report.json"
    arguments = [str(file), "--shards", str(shards), "--num", "400", "--max-real", "700", "--json", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["generated_images"] == 400 and found["real_images"] == 700 and found["frechet_images"] == 350
    assert f"{100 * found['recognized']:.1f} %" in shown and f"{found['frechet_real']:.3f}" in shown
    assert set(found["recognized_per_class"]) == set(CLASSES)


def test_real_images_are_resized_to_the_generated_size(shards, digits):
    large, labels, _ = load_real(shards, (32, 24), limit=50, seed=1)
    assert large.shape == (50, 1, 32, 24)
    again, _, _ = load_real(shards, (32, 24), limit=50, seed=1)
    assert np.array_equal(large, again)
    assert large.std() > 50  # digits, not grey


def test_colour_images_keep_their_channels(tmp_path):
    for name, colour in (("blue", (10, 20, 250)), ("red", (250, 20, 10))):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "source" / name / f"{number}.png")
    arguments = ["folder", "--root", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--format", "png"]
    assert pack([*arguments, "--size", "8"]) == 0
    images, labels, classes = load_real(tmp_path / "out", (8, 8))
    assert classes == ["blue", "red"]
    assert (images[labels == 0] == np.array([10, 20, 250])[None, :, None, None]).all()


def test_unlabelled_real_images_are_refused(tmp_path, unseen):
    (tmp_path / "source").mkdir()
    for number in range(3):
        Image.new("L", (16, 16), 10 * number).save(tmp_path / "source" / f"{number}.png")
    arguments = ["folder", "--root", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--size", "16"]
    assert pack(arguments) == 0
    with pytest.raises(UserError, match="3 image.* without label"):
        load_real(tmp_path / "out", (16, 16))


def test_generated_images_that_cannot_be_judged_are_refused(judge, unseen):
    images, labels = unseen
    with pytest.raises(UserError, match="2 of the generated images have no label"):
        judge.report(images, np.where(np.arange(500) < 2, -1, labels))
    with pytest.raises(UserError, match="label 10 is outside the 10 classes"):
        judge.report(images, np.where(np.arange(500) < 2, 10, labels))
    with pytest.raises(UserError, match="16x16 with 3 channel.*16x16 with 1 channel"):
        judge.report(images.repeat(3, axis=1), labels)
    with pytest.raises(UserError, match="at least 20"):
        judge.report(images[:5], labels[:5])


def test_files_that_hold_no_generated_images_are_refused(tmp_path, unseen):
    images, labels = unseen
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match="x.npz: no such file.*ddpm_dist.sample"):
        load_generated(path)
    for content in (b"", b"not an archive", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="x.npz: not an npz file"):
            load_generated(path)
    np.savez(path, pictures=images)
    with pytest.raises(UserError, match="'images' and 'labels'"):
        load_generated(path)
    np.savez(path, images=np.array([{}], dtype=object), labels=labels)  # would need pickle
    with pytest.raises(UserError, match="not an npz file"):
        load_generated(path)
    np.save(tmp_path / "y.npy", images)
    with pytest.raises(UserError, match="y.npy: not an npz file"):
        load_generated(tmp_path / "y.npy")
    with pytest.raises(UserError, match="must be uint8"):
        load_generated(save(path, images.astype(np.float32), labels))
    with pytest.raises(UserError, match="as many integer labels"):
        load_generated(save(path, images, labels[:-1]))
    with pytest.raises(UserError, match="501 images asked for"):
        load_generated(save(path, images, labels), 501)


def test_bad_input_ends_the_command_with_code_2(tmp_path, unseen, capsys):
    assert main([str(tmp_path / "none.npz"), "--shards", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
    file = save(tmp_path / "x.npz", *unseen)
    assert main([str(file), "--shards", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
