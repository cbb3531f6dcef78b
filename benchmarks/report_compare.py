"""``python -m benchmarks.report --compare OLD NEW``: every number that two reports have in common, and which became worse."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.output import grid
from benchmarks.report_files import PREDICTED, SUITE, Result, read_json, read_result
from benchmarks.report_text import commit, number, span
from ddpm_dist.errors import BAD_USAGE, FAILED, OK, UserError

WORSE_BY = 0.02
ENOUGH_TURNS = 5
SURELY = 1.6  # from 1 on two medians differ in 95 of 100 cases; a report has many numbers, and turns on a shared machine are not independent
# What has to be alike for two runs of a benchmark to have measured the same thing.
SAME = (
    "device", "world_size", "batch_per_rank", "batch", "batches", "parameters", "image_size", "size", "network", "processes", "ranks",
    "averages", "engine", "measured", "bytes_per_rank", "timesteps", "num", "config.data.image_size", "config.model.name",
    "config.data.source",
)  # fmt: skip
# What names an entry of a list, so that entries are paired by what they are and not by where they stand.
NAMES = (
    "name", "system", "sampler", "captured", "mode", "nodes", "ranks", "global_batch", "batch", "guidance", "bytes", "samples", "kind",
    "point", "variant", "tokens", "heads", "head_dim", "channels", "dtype",
)  # fmt: skip
HIGHER = ("images_per_sec", "ratio", "tflops", "mfu", "mfu_nominal", "efficiency", "recognized", "diversity")
LOWER = (
    "_s", "ms", "seconds", "_frac", "cpu_s_per_1000", "frechet", "peak_memory_gb", "peak_bytes", "saved_bytes", "bytes_per_rank",
    "peak_memory_mb_per_image", "peak_mb_per_image", "to_best", "to_fused", "to_as_they_are",
)  # fmt: skip
# Loops, loaders and samplers of others stand in a report to be compared with: when they become slower, nothing of ours did.
OTHERS = ("reference", "diffusers", "full copy", "Python loop")
# Parts of a step that are next to nothing vary by factors; the step that they are in is judged.
PARTS = ("wait_s", "data_wait_frac", "input_alone_s", "exposed_s", "exposed_frac", "save_copy_s", "data_frac", "logging_frac",
         "logging_ms", "account_ms", "log_ms", "mlflow_ms")  # fmt: skip
DETAILS = ("environment", "config", "code", "calculated", "step_percentiles")


@dataclass(frozen=True)
class Measure:
    """One number of a report. ``low`` .. ``high`` are the extremes of its turns, None where the report does not have them.

    notch: half the width of the interval that holds the median (McGill, Tukey and Larsen 1978, "Variations of box plots": 1.57 times the
    interquartile range over the root of the number of turns); None where single turns are not known, or fewer than five.
    """

    value: float
    low: float | None = None
    high: float | None = None
    notch: float | None = None


def measures(data: Any, path: str = "") -> Iterator[tuple[str, Measure]]:
    """(name, number) of everything measured in a report, such as ("ddpm_dist.images_per_sec", ...)."""
    if isinstance(data, list):
        seen: Counter[str] = Counter()
        for each in data:
            if isinstance(each, dict):
                own = [
                    f"{key}={each[key]}" if key != "name" else str(each[key])
                    for key in NAMES
                    if each.get(key) is not None
                ]
                label = f"{path}[{', '.join(own)}]"
                seen[label] += 1
                yield from measures(each, label if seen[label] == 1 else f"{label}#{seen[label]}")
        return
    if all(_is_number(data.get(key)) for key in ("median", "lowest", "highest")):
        yield path, Measure(data["median"], data["lowest"], data["highest"])
        return
    for key, value in data.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, (dict, list)):
            if key not in DETAILS and not key.endswith("_turns"):
                yield from measures(value, where)
        elif (
            _is_number(value)
            and key not in NAMES
            and not key.endswith(("lowest", "highest"))
            and not key.startswith(("lowest", "highest"))
        ):
            yield where, Measure(value, *_turns(data, key))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _turns(data: dict[str, Any], key: str) -> tuple[float | None, float | None, float | None]:
    """Lowest and highest turn of a number, in one of the ways in which reports have them, and the notch."""
    turns = data.get(f"{key}_turns")
    if isinstance(turns, list) and turns and all(map(_is_number, turns)):
        notch = None
        if len(turns) >= ENOUGH_TURNS:
            first, _, third = statistics.quantiles(turns, n=4, method="inclusive")
            notch = 1.57 * (third - first) / len(turns) ** 0.5
        return min(turns), max(turns), notch
    forms = [(f"{key}_lowest", f"{key}_highest"), (f"lowest_{key}", f"highest_{key}")]
    if key == "images_per_sec":  # an entry that has them once means its rate
        forms.append(("lowest", "highest"))
    for names in forms:
        low, high = (data.get(name) for name in names)
        if _is_number(low) and _is_number(high):
            return low, high, None
    return None, None, None


def better(name: str) -> int:
    """1: more is better; -1: less is better; 0: neither can be said, or it is not ours."""
    where, _, last = name.rpartition(".")
    others = any(other in where for other in OTHERS) or (where.startswith("entries[") and "ddpm_dist" not in where)
    if others or last in PARTS or last.startswith("torch_"):
        return 0
    if last in LOWER:  # also what begins with to_
        return -1
    if last.startswith("to_") or last in HIGHER or last.endswith("images_per_sec"):
        return 1
    return -1 if last.endswith(LOWER) or "_to_" in last or last.endswith("_in_steps") else 0


def verdict(name: str, old: Measure, new: Measure) -> str:
    """One word or two on what became of a number; "REGRESSION" makes the command fail."""
    change = new.value - old.value
    sign = better(name)
    if not sign or not old.value:
        return ""
    if None in (old.low, new.low):
        return "no spread measured"
    apart = new.high < old.low or new.low > old.high
    if old.notch is not None and new.notch is not None:  # many turns say more than their extremes
        apart = apart or abs(change) > SURELY * (old.notch + new.notch)
    if not apart or abs(change / old.value) <= WORSE_BY:
        return "within the noise"
    return "better" if change * sign > 0 else "REGRESSION"


def refuse_different(old: Result, new: Result) -> None:
    """UserError where the two did not measure the same thing on the same hardware."""

    def refuse(what: str, one: Any, other: Any) -> None:
        raise UserError(
            f"{old.path} and {new.path} cannot be compared: {what} is {one} in the first and {other} in the second"
        )

    if old.benchmark != new.benchmark:
        refuse("the benchmark", old.benchmark, new.benchmark)
    for name in ("cpu", "cores", "gpus"):
        one, other = (getattr(each.environment.hardware, name) for each in (old, new))
        if one != other:
            refuse(f"hardware.{name}", one, other)
    if old.environment.threads != new.environment.threads:
        refuse("the number of threads", old.environment.threads, new.environment.threads)
    for name in SAME:
        one, other = (_at(each.data, name) for each in (old, new))
        if one != other and None not in (one, other) and not isinstance(one, dict):
            refuse(name, one, other)


def _at(data: dict[str, Any], name: str) -> Any:
    first, _, rest = name.partition(".")
    value = data.get(first)
    return value.get(rest) if rest and isinstance(value, dict) else value


def compare_results(old: Result, new: Result) -> bool:
    """Print one comparison. Whether a regression is in it."""
    refuse_different(old, new)
    print(
        f"{old.benchmark}: {old.path} (commit {commit(old.environment.commit)}) -> {new.path} (commit {commit(new.environment.commit)})"
    )
    for title, one, other in (
        ("versions", _versions(old), _versions(new)),
        ("settings", _settings(old.data), _settings(new.data)),
    ):
        changed = [f"{key} {one[key]} -> {other[key]}" for key in one if key in other and one[key] != other[key]]
        if changed:
            print(f"  other {title}: {', '.join(changed)}")
    before, after = dict(measures(old.data)), dict(measures(new.data))
    rows, regression = [["  number", "old", "turns", "new", "turns", "change", ""]], False
    for name, first in before.items():
        second = after.get(name)
        if second is None or (not better(name) and first.value == second.value):
            continue  # not in both, or a setting that is alike
        word = verdict(name, first, second)
        regression |= word == "REGRESSION"
        change = f"{second.value / first.value - 1:+.1%}" if first.value else "-"
        rows.append(
            [f"  {name}", _words(first.value), _range(first), _words(second.value), _range(second), change, word]
        )
    print(grid(rows) if len(rows) > 1 else "  no number in common")
    only = [len(before.keys() - after.keys()), len(after.keys() - before.keys())]
    if any(only):
        print(f"  only in the first: {only[0]} number(s), only in the second: {only[1]}")
    return regression


def _versions(result: Result) -> dict[str, str | None]:
    return {"driver": result.environment.hardware.driver, **result.environment.versions}


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in data.items() if isinstance(value, (str, bool))}, **data.get("config", {})}


def _words(value: float) -> str:
    return f"-{number(-value)}" if value < 0 else number(value)


def _range(measure: Measure) -> str:
    return "-" if measure.low is None else span(measure.low, measure.high)


def _files(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in sorted(folder.glob("*.json")) if path.name != SUITE}
    return {name: path for name, path in found.items() if not _predicted(path)}


def _predicted(path: Path) -> bool:
    try:
        return read_json(path).get("benchmark") == PREDICTED
    except UserError:
        return False  # named when it is read


def compare(old: Path, new: Path) -> int:
    """Two files, or the files of the same name of two folders. 1 for a regression, 2 where something could not be compared."""
    for path in (old, new):
        if not path.exists():
            raise UserError(f"--compare {path}: no such file or folder")
    if old.is_dir() != new.is_dir():
        raise UserError(f"--compare {old} {new}: name two files or two folders")
    if not old.is_dir():
        return FAILED if compare_results(read_result(old), read_result(new)) else OK
    before, after = _files(old), _files(new)
    both = [name for name in before if name in after]
    if not both:
        raise UserError(f"--compare {old} {new}: no report of the same name in both")
    for folder, names in ((old, before.keys() - after.keys()), (new, after.keys() - before.keys())):
        if names:
            print(f"only in {folder}: {', '.join(sorted(names))}", file=sys.stderr)
    regressions, troubles = [], 0
    for name in both:
        try:
            if compare_results(read_result(before[name]), read_result(after[name])):
                regressions.append(name)
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            troubles += 1
    print(f"regressions in: {', '.join(regressions)}" if regressions else "no regression beyond the noise")
    return BAD_USAGE if troubles else FAILED if regressions else OK
