"""How good are generated images? A classifier trained on the real ones judges: ``python -m ddpm_dist.evaluate``.

Three numbers belong together, because each alone can be fooled: the share that is recognised as the class asked for
(fooled by one good image per class), the Fréchet distance in the classifier's features (sees washed-out, noisy and
repeated images) and the diversity within the classes (sees repeated images).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_dist.classifier import predict, split, train_classifier
from ddpm_dist.errors import UserError, exit_codes, in_words

PAIRS = 2_000  # random pairs per class for the diversity


@dataclass(frozen=True)
class Report:
    """What a ``Judge`` found. Shares are in 0..1."""

    real_images: int  # real images read; 4/5 trained the classifier
    generated_images: int
    held_out_accuracy: float  # of the classifier, on real images it did not see
    recognized: float  # share of the generated images that the classifier sees as their label
    recognized_per_class: dict[str, float]  # classes without generated images are left out
    generated_per_class: dict[str, int]
    frechet: float  # generated against real half A
    frechet_real: float  # real half B against real half A, with as many images: the floor
    frechet_images: int  # images on either side of both distances
    diversity: float  # mean feature distance within a class, relative to the real images': 1 as varied, 0 identical
    distinct: float  # number of different generated images, as a share of all of them


class Judge:
    """A classifier trained on real images, which then judges any number of generated sets.

    Args:
        images: real, (M, C, H, W) uint8.
        labels: (M,) integers, 0..K-1.
        classes: K names; None: numbers up to the largest label.
        seed: of the split, the classifier and the real halves.

    Raises:
        UserError: unlabelled images, labels outside the classes, too few images.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str] | None = None, seed: int = 0) -> None:
        self.names = classes or [str(index) for index in range(int(labels.max(initial=0)) + 1)]
        self._check(images, labels, "real images")
        self.images, self.labels, self.seed = images, labels, seed
        train, held_out = split(len(images), seed)
        self.net = train_classifier(images[train], labels[train], len(self.names), seed)
        seen, self.features = predict(self.net, images)
        self.accuracy = float(np.mean(seen[held_out] == labels[held_out]))

    def report(self, images: np.ndarray, labels: np.ndarray) -> Report:
        """Judge generated images.

        Args:
            images: (N, C, H, W) uint8 of the real images' size.
            labels: (N,) integers, the class asked for, 0..K-1.

        Raises:
            UserError: unlabelled images, labels outside the classes, another shape, too few images.
        """
        self._check(images, labels, "generated images")
        if images.shape[1:] != self.images.shape[1:]:
            raise UserError(
                f"generated images are {_shape(images)}, real ones {_shape(self.images)}: give the shards that the "
                "model was trained on"
            )
        seen, features = predict(self.net, images)
        right = seen == labels
        counts = np.bincount(labels, minlength=len(self.names))
        hits = np.bincount(labels[right], minlength=len(self.names))
        random = np.random.Generator(np.random.Philox(self.seed + 2))
        order = random.permutation(len(self.images))
        number = min(len(images), len(order) // 2)
        half_a, half_b = self.features[order[:number]], self.features[order[number : 2 * number]]
        chosen = random.permutation(len(images))[:number]
        return Report(
            real_images=len(self.images),
            generated_images=len(images),
            held_out_accuracy=self.accuracy,
            recognized=float(right.mean()),
            recognized_per_class={self.names[c]: float(hits[c] / counts[c]) for c in np.flatnonzero(counts)},
            generated_per_class={self.names[c]: int(counts[c]) for c in np.flatnonzero(counts)},
            frechet=frechet_distance(features[chosen], half_a),
            frechet_real=frechet_distance(half_b, half_a),
            frechet_images=number,
            diversity=diversity(features, labels, self.features, self.labels),
            distinct=len({image.tobytes() for image in images}) / len(images),
        )

    def _check(self, images: np.ndarray, labels: np.ndarray, what: str) -> None:
        if len(images) < 20:
            raise UserError(f"{len(images)} {what}: at least 20 are needed")
        if (labels < 0).any():
            unlabelled = int((labels < 0).sum())
            raise UserError(f"{unlabelled} of the {what} have no label (-1); the classifier needs every label")
        if labels.max() >= len(self.names):
            raise UserError(
                f"{what}: label {labels.max()} is outside the {len(self.names)} classes (0 to {len(self.names) - 1})"
            )


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features.

    |m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with means m and covariances S: Heusel et al., "GANs Trained by a
    Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017, equation 6. Depends on the number of
    samples, so compare only distances from equally many.

    Args:
        a, b: (N, D) and (M, D) features, N and M at least 2; computed in float64.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    # S_a S_b has the eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2), so no complex square root is needed.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    distance = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


def diversity(features: np.ndarray, labels: np.ndarray, real_features: np.ndarray, real_labels: np.ndarray) -> float:
    """Mean distance of two images of a class in feature space, divided by that of the real ones, averaged over classes.

    1: as varied as the real images; 0: one image per class. Classes with fewer than two images on either side are left
    out; NaN if none remains.
    """
    ratios = []
    for label in np.unique(labels):
        mine, real = features[labels == label], real_features[real_labels == label]
        if len(mine) > 1 and len(real) > 1 and (width := _spread(real)) > 0:
            ratios.append(_spread(mine) / width)
    return float(np.mean(ratios)) if ratios else float("nan")


def _spread(features: np.ndarray) -> float:
    """Mean distance of PAIRS random pairs of different rows."""
    random = np.random.Generator(np.random.Philox(len(features)))
    first = random.integers(0, len(features), PAIRS)
    second = (first + random.integers(1, len(features), PAIRS)) % len(features)
    return float(np.linalg.norm(features[first] - features[second], axis=1).mean())


def load_generated(path: Path, number: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first ``number`` images of a file written by ``python -m ddpm_dist.sample --out X.npz`` (None: all).

    Returns:
        images (N, C, H, W) uint8 and labels (N,) int64.

    Raises:
        UserError: no such file, not such a file, wrong shapes or types.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; python -m ddpm_dist.sample RUN --num 500 --out {path} makes it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not an npz file with the arrays 'images' and 'labels' ({error}); "
            "make one with python -m ddpm_dist.sample RUN --num 500 --out X.npz"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"{path}: images must be uint8 (N, 1 or 3, H, W), not {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: {len(images)} images need as many integer labels, not {labels.dtype} {labels.shape}")
    if number is not None and not 0 < number <= len(images):
        raise UserError(f"{path}: {number} images asked for (--num), but it holds {len(images)}")
    return images[:number], labels[:number].astype(np.int64)


def load_real(
    folder: Path, size: tuple[int, int], limit: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """Labelled images of a shard folder, decoded and, where their size differs, resized (Lanczos).

    Args:
        folder: holds the shards and their index.
        size: (height, width) wanted.
        limit: read a random choice of so many; None: all.
        seed: of that choice.

    Returns:
        images (M, C, H, W) uint8, labels (M,) int64 and the class names, if there are any.

    Raises:
        UserError: no usable index, unlabelled images, an image that cannot be read.
    """
    from ddpm_dist.data.shards import Index

    index = Index.load(folder)
    index.check_files()
    count = len(index)
    ids = np.arange(count)
    if limit is not None and limit < count:
        ids = np.sort(np.random.Generator(np.random.Philox(seed)).permutation(count)[:limit])
    labels = index.rows(ids)["label"].astype(np.int64)
    if (labels < 0).any():
        raise UserError(f"{folder}: {int((labels < 0).sum())} image(s) without label; a classifier needs labelled ones")
    images = np.empty((len(ids), index.channels, *size), np.uint8)
    for place, sample in enumerate(ids):
        try:
            picture = Image.open(io.BytesIO(index.read(int(sample)))).convert("L" if index.channels == 1 else "RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{folder}: image {index.key_of(int(sample))} cannot be decoded ({error})") from error
        if picture.size != size[::-1]:
            picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
        images[place] = np.asarray(picture).reshape(*size, index.channels).transpose(2, 0, 1)
    return images, labels, index.classes


def table(report: Report) -> str:
    """The report as a few aligned lines of text."""
    classes = report.recognized_per_class
    worst = min(classes, key=classes.get)
    rows = [
        ("", "generated", "real"),
        ("images", f"{report.generated_images:,}", f"{report.real_images:,}"),
        ("recognized as their class", f"{100 * report.recognized:.1f} %", f"{100 * report.held_out_accuracy:.1f} %"),
        (f"  worst class ({worst})", f"{100 * classes[worst]:.1f} %", ""),
        (f"Fréchet distance (n = {report.frechet_images})", f"{report.frechet:.3f}", f"{report.frechet_real:.3f}"),
        ("diversity within a class", f"{report.diversity:.2f}", "1.00"),
        ("distinct images", f"{100 * report.distinct:.1f} %", ""),
    ]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}".rstrip() for a, b, c in rows]
    lines += [
        "",
        "recognized per class: " + "  ".join(f"{name} {100 * share:.0f} %" for name, share in classes.items()),
        "real: held-out images for the recognition, the distance between two halves for the Fréchet distance",
    ]
    return "\n".join(lines)


def _shape(images: np.ndarray) -> str:
    _, channels, height, width = images.shape
    return f"{height}x{width} with {channels} channel(s)"


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_dist.evaluate", description="Judge generated images by a classifier of the real ones."
    )
    parser.add_argument("images", type=Path, metavar="IMAGES.npz", help="from python -m ddpm_dist.sample --out X.npz")
    parser.add_argument("--shards", type=Path, required=True, help="folder of the real images")
    parser.add_argument("--num", type=int, help="judge only the first NUM generated images")
    parser.add_argument("--max-real", type=int, default=20_000, help="use at most so many real images (default 20,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers to this file")
    options = parser.parse_args(argv)
    if options.json is not None:
        _check_writable(options.json)
    images, labels = load_generated(options.images, options.num)
    real_images, real_labels, classes = load_real(options.shards, images.shape[2:], options.max_real, options.seed)
    report = Judge(real_images, real_labels, classes, options.seed).report(images, labels)
    print(table(report))
    if options.json is not None:
        aside = options.json.with_name(options.json.name + ".incomplete")
        numbers = {key: None if value != value else value for key, value in asdict(report).items()}  # JSON has no NaN
        aside.write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
        os.replace(aside, options.json)
    return 0


def _check_writable(path: Path) -> None:
    """Find out before the work whether a file can be written. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise UserError(f"--json {path}: this is a folder")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {in_words(error)}") from None


if __name__ == "__main__":
    sys.exit(main())
