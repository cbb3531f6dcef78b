"""One task's share of work that several tasks do, such as those of a SLURM array job: I/N, with I from 0 to N-1."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ddpm_dist.errors import UserError


@dataclass(frozen=True)
class Part:
    """Part ``number`` (from 0) of ``count``."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, total: int) -> range:
        """This part's neighbouring positions of 0..total-1. All shares in order are range(total); sizes differ by at most 1."""
        return range(total * self.number // self.count, total * (self.number + 1) // self.count)


def parse_part(text: str) -> Part:
    """What --part says, "I/N". Raises UserError unless 0 <= I < N."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"--part {text}: must be I/N with I from 0 to N-1, for example 0/16 .. 15/16")
    return Part(int(found[1]), int(found[2]))
