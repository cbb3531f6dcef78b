"""Reading the JSON files of ``benchmarks/results``: what is whole, and what is left out and why."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.report_base import Environment, Report
from benchmarks.report_schema import SCHEMAS
from ddpm_dist.errors import UserError, in_words

# Written by other commands of ours beside the measurements; they hold no measurement of their own.
SUITE = "suite.json"
PREDICTED = "scaling_model"


@dataclass(frozen=True)
class Result:
    """One file. ``found`` is of the benchmark's class in ``report_schema.SCHEMAS``, or a plain ``Report`` where it has none."""

    path: Path
    found: Any
    data: dict[str, Any]

    @property
    def benchmark(self) -> str:
        return self.found.benchmark

    @property
    def environment(self) -> Environment:
        return self.found.environment

    @property
    def machine(self) -> tuple:
        """What makes two results comparable: processor and GPU models."""
        hardware = self.environment.hardware
        return (hardware.cpu, tuple(sorted(set(hardware.gpus))))


@dataclass(frozen=True)
class Folder:
    """The results of one machine, at least one."""

    path: Path
    results: list[Result]

    def of(self, benchmark: str) -> list[Result]:
        """Those of one benchmark, by file name."""
        return [result for result in self.results if result.benchmark == benchmark]

    @property
    def gpus(self) -> list[str]:
        """Names, as many as the run with the most had."""
        return max((result.environment.hardware.gpus for result in self.results), key=len)

    @property
    def on_gpu(self) -> bool:
        return bool(self.gpus)

    @cached_property
    def title(self) -> str:
        """Such as "8 x NVIDIA H200" or "2 cores of Intel(R) Xeon(R) Processor"."""
        hardware = self.results[0].environment.hardware
        if self.on_gpu:
            return " and ".join(
                name if count == 1 else f"{count} x {name}" for name, count in Counter(self.gpus).items()
            )
        cores = max(result.environment.hardware.cores for result in self.results)
        return f"{cores} core{'s' * (cores != 1)} of {hardware.cpu}"

    @property
    def driver(self) -> str | None:
        """The GPU driver that all results have alike."""
        found = {result.environment.hardware.driver for result in self.results}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def versions(self) -> dict[str, str]:
        """The versions that all results have alike."""
        first = self.results[0].environment.versions
        return {
            name: value
            for name, value in first.items()
            if value and all(result.environment.versions.get(name) == value for result in self.results)
        }


def _not_finite(word: str) -> None:
    raise ValueError(f"{word} is no number that was measured")


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. UserError, naming the file, for one that cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_finite)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {in_words(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: foreign, a JSON object was expected and this is a {type(data).__name__}")
    return data


def read_result(path: Path) -> Result:
    """One report. UserError, naming file and key, for a file that is damaged, foreign or of an older version."""
    data = read_json(path)
    name = data.get("benchmark")
    if not isinstance(name, str):
        raise UserError(f"{path}: foreign, it does not say of which benchmark it is (key benchmark)")
    schema = SCHEMAS.get(name, Report)
    try:
        return Result(path, schema.model_validate(data), data)
    except ValidationError as error:
        raise UserError(f"{path}: not a whole report of {name}: {_reason(error)}") from None


def _reason(error: ValidationError) -> str:
    reasons = [f"{'.'.join(map(str, one['loc'])) or 'as a whole'}: {one['msg']}" for one in error.errors()]
    more = f" (and {len(reasons) - 2} more)" if len(reasons) > 2 else ""
    return "; ".join(reasons[:2]) + more


def read_folder(path: Path) -> tuple[Folder | None, list[str]]:
    """The whole reports of a folder, None if there is none, and why which files were left out."""
    results, problems = [], []
    for file in sorted(path.glob("*.json")):
        if file.name == SUITE:
            continue
        try:
            data = read_json(file)
            if data.get("benchmark") == PREDICTED:
                continue  # docs/scaling.md has it; no prediction stands among measurements
            results.append(read_result(file))
        except UserError as error:
            problems.append(str(error))
    counts = Counter(result.machine for result in results)
    if len(counts) > 1:
        kept = max(counts, key=lambda machine: counts[machine])
        for result in results:
            if result.machine != kept:
                problems.append(
                    f"{result.path}: measured on {_words(result.machine)}, most of {path} on {_words(kept)}; "
                    "move it into a folder of its own"
                )
        results = [result for result in results if result.machine == kept]
    return (Folder(path, results) if results else None), problems


def _words(machine: tuple) -> str:
    cpu, gpus = machine
    return " and ".join([*gpus, cpu])


def read_all(path: Path) -> tuple[list[Folder], list[str]]:
    """Every folder of ``path``, those with GPUs first, and what was left out. UserError where nothing is left."""
    if not path.is_dir():
        raise UserError(f"--results {path}: no such folder; it holds a folder of JSON files for each machine")
    folders, problems = [], []
    for each in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        folder, wrong = read_folder(each)
        problems += wrong
        if folder:
            folders.append(folder)
    if not folders:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"--results {path}: no whole report of a benchmark in its folders{listed}")
    return sorted(folders, key=lambda folder: not folder.on_gpu), problems
