"""Files of the benchmarks that are damaged, foreign, older or of another machine are named and left out of the report."""

from __future__ import annotations

import json

import pytest
from report_copies import MACHINE, NAMES, ladder, loader, on_gpu, place, real, tree, words, write

from benchmarks import report


def changed(name: str, **keys) -> str:
    """A report with other values; the value ... takes a key away."""
    data = {**real(name), **keys}
    return json.dumps({key: value for key, value in data.items() if value is not ...})


def inside(name: str, *path, value=...) -> str:
    data = real(name)
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(data)


DAMAGE = {
    "cut": (json.dumps(real("train_throughput"))[:700], "not JSON"),
    "empty": ("", "not JSON"),
    "binary": (b"\x89PNG\xff\xfe", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "NaN": (inside("ema", "ways", "full copy", "update_ms", value=float("nan")), "NaN is no number"),
    "list": ("[1, 2]", "a JSON object was expected"),
    "foreign": ('{"loss": 0.3}', "does not say of which benchmark"),
    "no environment": (changed("ema", environment=...), "environment"),
    "old version": (inside("train_throughput", "ddpm_dist", "images_per_sec_lowest"), "ddpm_dist.images_per_sec_lowest"),
    "no commit": (inside("ema", "environment", "commit"), "environment.commit"),
    "text": (inside("ema", "ways", "full copy", "update_ms", value="19.4"), "ways.full copy.update_ms"),
    "zero": (inside("checkpoint", "step_s", value=0), "step_s"),
    "negative": (inside("scaling", "points", 0, "images_per_sec", value=-1.0), "points.0.images_per_sec"),
    "out of order": (inside("train_throughput", "ddpm_dist", "images_per_sec", value=9.0), "not between the lowest"),
    "no entries": (changed("sampling", entries=[]), "entries"),
    "no ratio": (changed("train_throughput", ratio=...), "ratio"),
    "engines": (inside("engines", "engines", "ZeRO-1", "to_ddp"), "engines.ZeRO-1.to_ddp missing"),
    "whole runs": (inside("sampling", "entries", 0, "whole_run_images_per_sec"), "whole_run_images_per_sec"),
    "no reason": (json.dumps({**ladder(1.0, 2.0), "rungs": [{"name": "a", "what": "b"}]}), "no problem that explains it"),
    "loader": (json.dumps({**loader(a=1.0), "size": None}), "size"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_left_out_and_named(tmp_path, capsys, kind):
    folder = place(tmp_path)
    for name in NAMES[1:-1]:  # what is left is what the test needs
        (folder / "results" / MACHINE / f"{name}.json").unlink()
    content, message = DAMAGE[kind]
    bad = folder / "results" / MACHINE / "bad.json"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert report.main(words(folder)) == 0
    says = capsys.readouterr().err
    assert says.count("warning: left out") == 1 and str(bad) in says and message in says
    text = (folder / "REPORT.md").read_text()
    assert "bad.json" not in text and "train_throughput.json" in text and "checkpoint.json" in text
    before = tree(folder)
    assert report.main([*words(folder), "--check"]) == 2
    assert str(bad) in capsys.readouterr().err and tree(folder) == before


def test_nothing_whole(tmp_path, capsys):
    folder = place(tmp_path)
    for path in (folder / "results" / MACHINE).glob("*.json"):
        path.write_text("{")
    before = tree(folder)
    assert report.main(words(folder)) == 2
    assert "no whole report" in capsys.readouterr().err and tree(folder) == before


def test_another_machine_in_the_folder(tmp_path, capsys):
    folder = place(tmp_path)
    stranger = write(folder / "results" / MACHINE / "a_stranger.json", on_gpu(real("train_throughput")))
    assert report.main(words(folder)) == 0
    says = capsys.readouterr().err
    assert str(stranger) in says and "measured on Test GPU and Another Processor" in says
    assert "Test GPU" not in (folder / "REPORT.md").read_text()


def test_what_lies_there_by_right(tmp_path, capsys):
    """The suite's own record and a report that has no table here are no damage; folders that are empty have no section."""
    folder = place(tmp_path)
    write(folder / "results" / MACHINE / "suite.json", {"seconds": 3, "failed": [], "logs": {}})
    write(folder / "results" / MACHINE / "new.json", {"benchmark": "new", "environment": real("ema")["environment"]})
    (folder / "results" / "empty").mkdir()
    assert report.main(words(folder)) == 0
    assert capsys.readouterr().err == ""
    text = (folder / "REPORT.md").read_text()
    assert "Without a table here" in text and "new.json" in text and "suite.json" not in text


def test_text_of_a_file_cannot_break_the_tables(tmp_path):
    folder = place(tmp_path)
    data = loader(**{"ddpm_dist | a\n## heading": 10.0})
    data["environment"]["command"] = "python `x` | y"
    write(folder / "results" / MACHINE / "loader.json", data)
    assert report.main(words(folder)) == 0
    text = (folder / "REPORT.md").read_text()
    assert "ddpm_dist \\| a ## heading" in text and "\n## heading" not in text and "`python 'x' | y`" in text
