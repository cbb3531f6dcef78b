"""The report of the benchmarks: made of the JSON files alone, the same every time, and clear about what is missing or damaged."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import ROOT
from PIL import Image
from report_copies import (
    MACHINE,
    README,
    kernels,
    ladder,
    loader,
    on_gpu,
    place,
    real,
    training,
    tree,
    words,
    write,
)

from benchmarks import report


@pytest.fixture
def folder(tmp_path):
    return place(tmp_path)


def test_of_the_repository_is_up_to_date(capsys, monkeypatch):
    """REPORT.md, the plots and the README's tables are those of the results in the repository."""
    monkeypatch.chdir(ROOT)
    code = report.main(["--check"])
    assert code == 0, capsys.readouterr().err


def test_numbers_are_those_of_the_files(folder, capsys):
    assert report.main(words(folder)) == 0
    assert "warning" not in capsys.readouterr().err
    text, readme = (folder / "REPORT.md").read_text(), (folder / "README.md").read_text()
    for path in (folder / "results" / MACHINE).glob("*.json"):
        data = json.loads(path.read_text())
        if data["benchmark"] == "scaling_model":
            assert path.name not in text  # predicted
            continue
        assert f"[{path.name}](results/{MACHINE}/{path.name}): commit {data['environment']['commit'][:9]}" in text
        assert f"`{data['environment']['command']}`" in text
    data = real("train_throughput")
    for value in (data["ratio"], data["ddpm_dist"]["images_per_sec"], data["reference"]["images_per_sec_lowest"]):
        assert f"{value:.3g}" in text and f"{value:.3g}" in readme
    ways, engines = real("ema")["ways"], real("engines")["engines"]
    assert (
        f"{ways['full copy']['update_ms']:.1f} ms" in readme
        and f"{ways['Python loop']['times_sharded']:.1f}x" in readme
    )
    assert f"{engines['ZeRO-3']['to_ddp']:.2f}" in readme and "995,519,323" in text
    assert f"{real('checkpoint')['stall_to_torch_save']:.2f} x torch.save" in readme
    best = next(e for e in real("sampling")["entries"] if e["sampler"] == "dpmpp_2m:20" and e["system"] == "ddpm_dist")
    assert f"**{best['to_reference']['median']:.0f}** ({best['to_reference']['lowest']:.0f} .. " in readme
    assert readme.startswith("# A project\n\n## Speed\n\n<!-- benchmarks:begin -->\n") and "old 1.23" not in readme
    assert readme.endswith("<!-- benchmarks:end -->\n\n## More\n")


def test_a_changed_number_changes_report_and_readme(folder):
    assert report.main(words(folder)) == 0
    data = real("ema")
    data["ways"]["Python loop"]["update_ms"] = 777.7
    write(folder / "results" / MACHINE / "ema.json", data)
    before = tree(folder)
    assert report.main([*words(folder), "--check"]) == 1
    assert tree(folder) == before
    assert report.main(words(folder)) == 0
    assert all("777.7 ms" in (folder / name).read_text() for name in ("REPORT.md", "README.md"))


def test_second_run_changes_nothing(folder, capsys):
    write(folder / "results" / MACHINE / "ladder.json", ladder(1.0, 2.0))
    assert report.main([*words(folder), "--check"]) == 1
    assert report.main(words(folder)) == 0
    before = tree(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert report.main(words(folder)) == 0 and tree(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    capsys.readouterr()
    assert report.main([*words(folder), "--check"]) == 0
    assert capsys.readouterr().out == "up to date\n"


def test_plots(folder):
    results = folder / "results" / MACHINE
    for name, data in (
        ("train_8", training(8, 4.0)), ("ladder", ladder(1.0, 2.0, None, 1.9)), ("kernels", kernels()),
        ("loader", loader(**{"ddpm_dist cpu": 15_000.0, "webdataset": None})),
    ):  # fmt: skip
        write(results / f"{name}.json", data)
    assert report.main(words(folder)) == 0
    text = (folder / "REPORT.md").read_text()
    for name in ("throughput", "ladder", "roofline", "scaling"):
        assert f"](results/{MACHINE}/plots/{name}.png)" in text
        with Image.open(results / "plots" / f"{name}.png") as picture:
            assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert "out of memory" in text and "switch \\| 1" in text and "not installed" in text
    assert "15,000" in (folder / "README.md").read_text()
    # A number that is drawn makes the plot another one; what has nothing behind it any more goes away.
    old = (results / "plots" / "ladder.png").read_bytes()
    write(results / "ladder.json", ladder(1.0, 2.5, None, 1.9))
    (results / "kernels.json").unlink()
    assert report.main([*words(folder), "--check"]) == 1
    assert report.main(words(folder)) == 0
    assert (results / "plots" / "ladder.png").read_bytes() != old
    assert not (results / "plots" / "roofline.png").exists()
    assert "roofline.png" not in (folder / "REPORT.md").read_text()
    (results / "plots" / "scaling.png").write_bytes(old[:100])  # a damaged picture is drawn again
    assert report.main([*words(folder), "--check"]) == 1
    assert report.main(words(folder)) == 0 and report.main([*words(folder), "--check"]) == 0


def test_without_matplotlib_there_are_tables(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(words(folder)) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    text = (folder / "REPORT.md").read_text()
    assert "scaling.json" in text and "scaling.png" not in text
    assert not (folder / "results" / MACHINE / "plots").exists()


def test_gpu_column(folder):
    assert report.main(words(folder)) == 0
    for name in ("REPORT.md", "README.md"):
        header = next(line for line in (folder / name).read_text().splitlines() if line.startswith("|"))
        assert [cell.strip() for cell in header.strip("|").split("|")] == [
            "",
            "2 cores of Intel(R) Xeon(R) Processor",
            "GPU",
        ]
    readme = (folder / "README.md").read_text()
    lines = [line for line in readme.split("Medians")[0].splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 6 and all(line.rstrip("| ").endswith("not yet measured") for line in lines if "---" not in line)
    assert "GPU numbers: not yet measured" in readme
    write(folder / "results" / "Test_GPU" / "train_b256.json", on_gpu(training(256, 4321.0)))
    assert report.main(words(folder)) == 0
    text, readme = ((folder / name).read_text() for name in ("REPORT.md", "README.md"))
    assert "GPU numbers" not in readme and "## GPU\n" not in text
    assert "4,321" in readme and "driver 570.1" in text and text.index("## Test GPU") < text.index("## 2 cores of")
    row = next(line for line in readme.splitlines() if line.startswith("| update of the averages"))
    update = f"{real('ema')['ways']['sharded over 8']['update_ms']:.3g} ms"
    assert "not yet measured" in row and update in row  # measured on the CPU only
    assert "batch 256" in readme and "sampling 64x64" in readme  # the GPU's training, the CPU's sampling


@pytest.mark.parametrize(
    "text",
    ["# no markers\n", README.replace("begin", "start"), README + README, "<!-- benchmarks:end --><!-- benchmarks:begin -->"],
)  # fmt: skip
def test_readme_without_its_markers(folder, capsys, text):
    (folder / "README.md").write_text(text)
    before = tree(folder)
    for more in ([], ["--check"]):
        assert report.main([*words(folder), *more]) == 2
        assert "needs one line <!-- benchmarks:begin --> and after it one line" in capsys.readouterr().err
    assert tree(folder) == before


@pytest.mark.parametrize("option", ["--results", "--out", "--readme"])
def test_paths_that_are_not_there(folder, capsys, option):
    before = tree(folder)
    assert report.main([*words(folder), option, str(folder / "nowhere" / "else")]) == 2
    assert option in capsys.readouterr().err and tree(folder) == before
