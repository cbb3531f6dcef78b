"""Index webdataset shards that were not packed here, wherever they lie, and examine them before training.

    python -m ddpm_dist.index SHARDS... --out DIR              # then: data.shards=DIR
    python -m ddpm_dist.index SHARDS... --check                # decode every image, print every finding; nothing is written
    python -m ddpm_dist.index SHARDS... --out DIR --check --quarantine       # an index without what was found
    python -m ddpm_dist.index --check DIR                      # are the shards still what the index in DIR says?

SHARDS are tar files, folders (every .tar below), patterns such as "train-{000..099}.tar", and URLs (http, https, s3, gs ...). Nothing
is unpacked. The same command again reads only shards that are new or changed.

Every finding is a line "shard:key: reason: more". Exit code: 0 nothing was found, or it was quarantined; 1 something was found (no index
is written then); 2 bad usage; 141 whoever read the output (such as head) left before the work was done.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddpm_dist.data.full_decode import strict_jpeg
from ddpm_dist.data.image_header import MAX_PIXELS
from ddpm_dist.data.known import QUARANTINE, Known
from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.replace import refuse_alien
from ddpm_dist.data.scan_indexed import examine
from ddpm_dist.data.shard_source import expand, shown_names
from ddpm_dist.data.shards import Index
from ddpm_dist.data.tars import Finding, Wanted
from ddpm_dist.errors import FAILED, OK, UserError, exit_codes
from ddpm_dist.index_build import OURS, Result, scan_shards, write
from ddpm_dist.index_labels import find_rule, read_classes
from ddpm_dist.index_report import by_reason, next_command, overview

NOBODY_READS = 128 + signal.SIGPIPE  # what a shell says of a program that ends for that


def build_parser() -> argparse.ArgumentParser:
    """The command line of index."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_dist.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", metavar="SHARDS", nargs="+", help="files, folders, patterns, URLs")
    add(
        "--out",
        metavar="DIR",
        help="folder of the index; an older index there is replaced, unchanged shards are taken from it",
    )
    add("--workers", type=int, metavar="N", help="processes (default: one per CPU)")
    add(
        "--image-key",
        metavar="EXT",
        help="which image, where samples have several: its extension, such as jpg or left.png",
    )
    add("--label", metavar="EXT", help="extension of the label file: cls, txt ... (default: what the first sample has)")
    add("--label-key", metavar="A.B", help="where the label is in the JSON file (--label, default json)")
    add("--classes", metavar="FILE", help="class names, one per line in the order of their numbers (default: sorted)")
    add("--num-classes", type=int, metavar="N", help="labels must be below N (default: below the largest found plus 1)")
    add("--unlabelled", action="store_true", help="do without labels")
    add("--check", action="store_true", help="decode every image; also read shards that did not change")
    add("--quarantine", action="store_true", help="write the index without the samples that have findings")
    add("--sheet", metavar="FILE.png", help="contact sheet: random samples of every class")
    add("--seed", type=int, default=0, metavar="S", help="of the samples on the sheet (default 0)")
    add(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="larger images are findings (default %(default)s)",
    )
    add("--allow-pipe", action="store_true", help="run the commands of pipe: locations")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point: scan, print what was found, write the index."""
    code = NOBODY_READS
    try:
        code = _main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


@exit_codes
def _main(argv: list[str] | None) -> int:
    options = build_parser().parse_args(argv)
    _check_options(options)
    workers = options.workers or len(os.sched_getaffinity(0))
    if (
        options.check
        and not options.out
        and len(options.shards) == 1
        and (Path(options.shards[0]) / "index.json").is_file()
    ):
        return _examine(Path(options.shards[0]), workers, options.max_pixels)
    out = Path(options.out) if options.out else None
    if out is not None:
        refuse_alien(Path(os.path.realpath(out)), OURS)  # first of all: what follows takes long
    locations = expand(options.shards, options.allow_pipe)
    classes = read_classes(options.classes) if options.classes else None
    rule = find_rule(options, locations, classes)
    wanted = Wanted(rule, options.image_key, options.max_pixels)
    described = _described(options, rule, classes)
    known = Known(out, described) if out is not None else None
    if options.check and strict_jpeg() is None:
        print(
            "note: without simplejpeg (pip install simplejpeg) few damaged JPEGs can be told from good ones", flush=True
        )
    result = scan_shards(
        locations, wanted, classes=classes, workers=min(workers, len(locations)), check=options.check, known=known, progress=True,
        spool_folder=next(each for each in Path(os.path.realpath(out)).parents if each.is_dir()) if out is not None else None,
    )  # fmt: skip
    _print_findings(result.findings + result.unreadable, locations)
    for line in overview(result) if len(result.samples) else []:
        print(line)
    found = bool(result.findings)
    if result.unreadable:
        raise UserError(f"{len(result.unreadable)} shards cannot be read (see above): nothing was written")
    left_out = found and not options.quarantine
    if out is not None and not left_out:  # before the sheet: what took long is not lost with it
        fingerprint = write(result, out, described)
        left = f"; {len(result.findings):,} findings are in {out / QUARANTINE}" if found else ""
        print(f"index: {out}, fingerprint {fingerprint}{left}")
    if options.sheet and len(result.samples):
        _sheet(result, options, only_a_note=out is not None)
    if left_out:
        if out is not None:
            print(f"{out} was not written: mend the shards, or give --quarantine to leave out what was found")
        return FAILED
    if out is not None:
        print(f"next: {next_command(result, out)}")
    return OK


def _sheet(result: Result, options: argparse.Namespace, only_a_note: bool) -> None:
    """Draw the contact sheet. Raises UserError where it cannot be drawn, unless that is to be only a note."""
    from ddpm_dist.index_sheet import save_sheet

    names = ", ".join(map(public_name, options.shards))
    try:
        missed = save_sheet(result, Path(options.sheet), options.seed, names)
        print(f"contact sheet: {options.sheet}" + (f" ({missed})" if missed else ""))
    except UserError as error:
        if not only_a_note:
            raise
        print(f"note: no contact sheet: {error}", flush=True)


def _check_options(options: argparse.Namespace) -> None:
    if not options.out and not options.check and not options.sheet:
        raise UserError("say where the index goes (--out DIR), or that the shards are only to be examined (--check)")
    if options.quarantine and not options.out:
        raise UserError("--quarantine writes an index, so it needs --out DIR")
    for name in ("workers", "num_classes", "max_pixels"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if options.seed < 0:
        raise UserError(f"--seed must not be negative, found {options.seed}")
    if options.unlabelled and (options.label or options.label_key or options.classes or options.num_classes):
        raise UserError("--unlabelled goes with none of --label, --label-key, --classes and --num-classes")
    if options.image_key is not None:
        options.image_key = options.image_key.lstrip(".").lower()


def _described(options: argparse.Namespace, rule: Any, classes: list[str] | None) -> dict[str, Any]:
    """How shards are read: what was read otherwise is read again."""
    return {
        "image": options.image_key, "label": [rule.extension, list(rule.key), rule.meaning, rule.limit], "classes": classes,
        "max_pixels": options.max_pixels,
    }  # fmt: skip


def _print_findings(findings: list[Finding], locations: Iterable[str]) -> None:
    """locations: of all shards, which tell which names need a number."""
    names = shown_names(locations) if findings else {}
    for finding in findings:
        text = finding.called(names[finding.shard]) if finding.shard in names else str(finding)
        print(text if text.isprintable() else text.encode("unicode_escape").decode("ascii"))  # a key may hold anything
    if findings:
        print(f"{len(findings):,} findings:")
        print("\n".join(by_reason(findings)))


def _examine(folder: Path, workers: int, max_pixels: int) -> int:
    findings: list[Finding] = []
    size = shards = 0
    for read, found in examine(folder, workers, max_pixels):
        size, shards = size + read, shards + 1
        findings += found
    if findings:
        index = Index.load(folder)
        _print_findings(findings, (index.location(n) for n in range(len(index.shards))))
    print(f"{folder}: {size:,} bytes examined, {len(findings):,} findings")
    return FAILED if findings else OK


if __name__ == "__main__":
    sys.exit(main())
