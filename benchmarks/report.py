"""What do the measurements say? Turns the JSON files of the benchmarks into tables and plots, and compares two of them.

    python -m benchmarks.report                     # benchmarks/REPORT.md, its plots, and the tables of README.md
    python -m benchmarks.report --check             # are they up to date? exit code 1 if not; writes nothing
    python -m benchmarks.report --compare OLD NEW   # two reports of one benchmark, or two folders; exit code 1 for a regression

A folder in benchmarks/results is one machine. Files that are damaged, foreign or of an older version are named and left out (with
--check: exit code 2). A regression is a number that became worse by more than 2 %, with the ranges (lowest .. highest turn) of the
two runs apart. Another machine or another benchmark cannot be compared (exit code 2).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report_plots
from benchmarks.report_files import Folder, read_all
from benchmarks.report_overview import overview
from benchmarks.report_readme import replaced, section
from benchmarks.report_schema import SCHEMAS
from benchmarks.report_tables import SECTIONS
from benchmarks.report_text import NOT_YET, Page, plain
from ddpm_dist.errors import BAD_USAGE, FAILED, OK, UserError, exit_codes, in_words

HEAD = """# Benchmarks

Written by `python -m benchmarks.report` from the JSON files of the benchmarks; changes made here are lost. Every table names the files
that it was made of, with commit and command. Numbers are medians; lowest and highest are over the turns of the same run, in which
everything that is compared took turns. "+changes" after a commit: files differed from it.
"""


def report(folders: list[Folder], plots: dict[Path, dict[str, Path]], page: Page) -> str:
    """The whole of REPORT.md. ``plots``: for the path of each folder, the pictures that are there."""
    lines = [HEAD, "## Overview", "", *overview(folders)]
    for folder in folders:
        lines += ["", f"## {plain(folder.title)}", "", *_machine(folder)]
        missing = []
        for benchmark, heading, tables, plot in SECTIONS:
            if not folder.of(benchmark):
                missing.append(heading.partition(":")[0].lower())
                continue
            lines += ["", f"### {heading}", "", *tables(folder, page)]
            if plot in plots[folder.path]:
                lines += ["", "!" + page.link(plots[folder.path][plot], heading.partition(":")[0])]
        others = [result for result in folder.results if result.benchmark not in SCHEMAS]
        if others:
            lines += ["", "### Without a table here", *page.sources(others, folder)]
        if missing:
            lines += ["", f"On this machine {NOT_YET}: {', '.join(missing)}."]
    if not any(folder.on_gpu for folder in folders):
        lines += ["", "## GPU", "", f"{NOT_YET.capitalize()}. `bash benchmarks/gpu_suite.sh` measures it."]
    return "\n".join(lines) + "\n"


def _machine(folder: Folder) -> list[str]:
    hardware = folder.results[0].environment.hardware
    cores = sorted({result.environment.hardware.cores for result in folder.results})
    bf16 = "with" if hardware.cpu_bf16 else "without"
    lines = [
        f"- CPU: {plain(hardware.cpu)}, {' or '.join(map(str, cores))} cores used, {bf16} bf16 arithmetic, {hardware.memory_gb:g} GB"
    ]
    if folder.on_gpu:
        lines.append(f"- GPU: {plain(folder.title)}")
    versions = [
        *([f"driver {folder.driver}"] if folder.driver else []),
        *(f"{name} {value}" for name, value in folder.versions.items()),
    ]
    return [*lines, f"- {plain(', '.join(versions))}"]


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name} {path}: cannot be read: {in_words(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} {path}: not a text file") from None


def _write(path: Path, text: str) -> bool:
    """Aside and renamed; a file that is right already is not touched. Whether it was written."""
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") == text:
        return False
    aside = path.with_name(path.name + ".incomplete")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
    return True


def update(results: Path, out: Path, readme: Path) -> int:
    """Write report, plots and README. Everything is read and made before anything is written."""
    folders, problems = read_all(results)
    text = _read(readme, "--readme")
    changed = replaced(text, readme, section(folders, Page(readme), out))
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist")
    for problem in problems:
        print(f"warning: left out: {problem}", file=sys.stderr)
    try:
        plots = {}
        for folder in folders:
            plots[folder.path], trouble = report_plots.draw(folder)
            if trouble:
                print(f"warning: {trouble}", file=sys.stderr)
        for path, content in ((out, report(folders, plots, Page(out))), (readme, changed)):
            print(f"{path}: {'written' if _write(path, content) else 'was up to date'}")
    except OSError as error:
        raise UserError(f"cannot write the report: {in_words(error)}") from None
    return OK


def check(results: Path, out: Path, readme: Path) -> int:
    """Say what is not up to date; write nothing."""
    folders, problems = read_all(results)
    wrong, plots = [], {}
    for folder in folders:
        plots[folder.path], stale = report_plots.up_to_date(folder)
        wrong += stale
    text = _read(readme, "--readme")
    if replaced(text, readme, section(folders, Page(readme), out)) != text:
        wrong.append(f"{readme}: its tables are not those of {results}")
    if not out.exists():
        wrong.append(f"{out} does not exist")
    elif _read(out, "--out") != report(folders, plots, Page(out)):
        wrong.append(f"{out} is not up to date")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    for each in wrong:
        print(f"{each}; run python -m benchmarks.report", file=sys.stderr)
    if not problems and not wrong:
        print("up to date")
    return BAD_USAGE if problems else FAILED if wrong else OK


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.report``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        help="a folder for each machine (default: %(default)s)",
    )
    add("--out", type=Path, default=Path("benchmarks/REPORT.md"), help="default: %(default)s")
    add("--readme", type=Path, default=Path("README.md"), help="its tables are replaced (default: %(default)s)")
    add("--check", action="store_true", help="only say whether everything is up to date")
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="two JSON files of one benchmark, or two folders of them",
    )
    args = parser.parse_args(argv)
    if args.compare:
        if args.check:
            raise UserError("--check and --compare are two questions; ask one at a time")
        from benchmarks.report_compare import compare

        return compare(*args.compare)
    return (check if args.check else update)(args.results, args.out, args.readme)


if __name__ == "__main__":
    sys.exit(main())
