"""Loss curves: what is read, what is drawn, and the command."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import run_module
from PIL import Image

from ddpm_dist.curve import main
from ddpm_dist.tracking.loss_curve import read_curve, save_loss_curve, smooth

BLUE, ORANGE = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)


def write(folder, losses, rates=None):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": n, "images_seen": 64 * n, "loss": loss} for n, loss in enumerate(losses, 1)]
    for row, rate in zip(rows, rates if rates is not None else [], strict=False):
        row["lr"] = rate
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def drawn(picture, color):
    """Rows and columns in which a line of that colour is."""
    return np.argwhere(np.abs(picture - color).sum(axis=2) < 40)


def test_lines_without_a_loss_are_left_out(tmp_path):
    folder = write(tmp_path / "run", [1 / n for n in range(1, 200)])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[50], lines[60], lines[70] = '{"step": 51, "images_seen": 3264, "loss": null}', '{"step": 61}', "[]"
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 200, "ima')
    curve = read_curve(folder / "metrics.jsonl")
    assert len(curve.losses) == 196 and curve.images[50] == 64 * 52
    assert np.isnan(curve.rates).all() and 1 / 199 < curve.final < 1 / 189
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no line with a loss"):
        read_curve(folder / "metrics.jsonl")


def test_a_second_panel_shows_a_learning_rate_that_changes(tmp_path):
    losses = np.linspace(1.0, 0.8, 100)
    for name, rates in (
        ("constant", [1e-3] * 100),
        ("none", None),
        ("cosine", np.cos(np.linspace(0, 1.5, 100)) * 1e-3),
    ):
        curve = read_curve(write(tmp_path / name, losses, rates) / "metrics.jsonl")
        save_loss_curve({name: curve}, tmp_path / f"{name}.png")
    constant, cosine = pixels(tmp_path / "constant.png"), pixels(tmp_path / "cosine.png")
    assert constant.shape == pixels(tmp_path / "none.png").shape == (480, 900, 3) and cosine.shape == (660, 900, 3)
    lower = drawn(cosine[450:], BLUE)
    assert len(lower) > 300 and lower[lower[:, 1] < 200, 0].mean() < lower[lower[:, 1] > 700, 0].mean() - 50, "it falls"


def test_the_axis_is_logarithmic_where_that_fits(tmp_path):
    """A power law is a curve on a linear axis; an exponential fall is a straight line on a logarithmic one."""
    curve = read_curve(write(tmp_path / "run", np.exp(-np.linspace(0, 5, 300))) / "metrics.jsonl")

    def bend(scale):
        save_loss_curve({"run": curve}, tmp_path / "x.png", scale)
        line = drawn(pixels(tmp_path / "x.png")[100:], BLUE)  # below the legend
        left, right = line[:, 1].min() + 5, line[:, 1].max() - 5
        rows = [line[np.abs(line[:, 1] - column) < 3, 0].mean() for column in (left, (left + right) // 2, right)]
        return abs(rows[1] - (rows[0] + rows[2]) / 2)

    assert bend("log") < 3 and bend("auto") < 3 and bend("linear") > 40
    save_loss_curve({"run": curve}, tmp_path / "log.png", "log")
    flat = read_curve(write(tmp_path / "flat", np.linspace(1, 0.5, 300)) / "metrics.jsonl")
    for scale in ("auto", "linear", "log"):
        save_loss_curve({"run": flat}, tmp_path / f"{scale}.png", scale)
    assert np.array_equal(pixels(tmp_path / "auto.png"), pixels(tmp_path / "linear.png"))
    assert not np.array_equal(pixels(tmp_path / "auto.png"), pixels(tmp_path / "log.png"))


def test_the_command_compares_runs(tmp_path, capsys):
    write(tmp_path / "a" / "run", np.linspace(1, 0.5, 100))
    write(tmp_path / "b" / "run", np.linspace(1, 0.7, 100))
    words = [
        str(tmp_path / "a" / "run"),
        str(tmp_path / "b" / "run" / "metrics.jsonl"),
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "a/run: loss 0.51" in said and "b/run: loss 0.70" in said and "6,400 images" in said
    picture = pixels(tmp_path / "x.png")
    assert len(drawn(picture, BLUE)) > 500 and len(drawn(picture, ORANGE)) > 500
    assert drawn(picture, BLUE)[:, 0].max() > drawn(picture, ORANGE)[:, 0].max(), "the lower loss is lower"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("FOLDER/none", "does not exist: give a run directory"),
        ("FOLDER/empty", "metrics.jsonl does not exist"),
        ("FOLDER/run/metrics.jsonl FOLDER/run", "the same run twice"),
        ("FOLDER/run --out FOLDER/x.gif", "ends in .png"),
        ("FOLDER/run --out FOLDER/file/x.png", "cannot be written"),
        ("FOLDER/without", "no line with a loss"),
    ],
)
def test_bad_input(tmp_path, capsys, words, told):
    write(tmp_path / "run", [1.0, 0.5])
    write(tmp_path / "without", [])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(os.listdir(tmp_path))
    argv = words.replace("FOLDER", str(tmp_path)).split()
    assert main([*argv, *([] if "--out" in argv else ["--out", str(tmp_path / "x.png")])]) == 2
    assert told in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == before


def test_it_is_a_command(tmp_path):
    write(tmp_path / "run", [1.0, 0.5])
    result = run_module("ddpm_dist.curve", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 0 and "loss.png" in result.stdout, result.stderr
    assert Image.open(tmp_path / "loss.png").size == (900, 480)


def test_smoothing_keeps_power_laws_and_removes_noise():
    values = 0.5 ** np.linspace(0, 10, 300)
    assert smooth(values, 15) == pytest.approx(values)
    noisy = values * np.exp(np.random.default_rng(0).normal(0, 0.3, 300))
    assert np.abs(np.log(smooth(noisy, 15) / values))[60:280].mean() < 0.1
    steep = 1 / np.arange(1, 301)
    assert smooth(steep, 15) == pytest.approx(steep, rel=0.05)
    assert list(smooth([2.0], 5)) == [2.0]
