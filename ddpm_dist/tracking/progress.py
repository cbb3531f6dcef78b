"""How far the run is: a bar on a terminal, one status line per log step otherwise."""

from __future__ import annotations

import math
import sys


def warn(message: str) -> None:
    """Print ``warning: message`` on stderr without tearing a progress bar that is being drawn."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None and getattr(tqdm.tqdm, "_instances", None):
        tqdm.tqdm.write(f"warning: {message}", file=sys.stderr)
    else:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a short text: ``42s``, ``7m12s``, ``3h05m``, ``2d04h``; ``?`` if not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def rate(images_per_sec: float) -> str:
    """Images per second with three significant digits or more: ``0.853``, ``42.6``, ``812``, ``11,204``."""
    if images_per_sec >= 100:
        return f"{images_per_sec:,.0f}"
    return f"{images_per_sec:#.3g}"


class Progress:
    """Shows the log records of a run to whoever watches it.

    On a terminal (stderr) a bar, otherwise one line on stdout per ``update``, so that a SLURM log stays readable.

    Args:
        total_images: the budget of the run.
        images: images already seen (a resumed run starts here).
        enabled: False shows nothing; only rank 0 should show something.
    """

    def __init__(self, total_images: int, images: int, enabled: bool) -> None:
        self.total = total_images
        self._rate: float | None = None  # smoothed images per second
        self._enabled = enabled
        self._bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_images,
                initial=images,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
                dynamic_ncols=True,
                mininterval=0,
            )

    def update(self, record: dict) -> None:
        """Show one log record: fields of metrics.jsonl, of which only ``step`` and ``images_seen`` must be there."""
        if not self._enabled:
            return
        speed = record.get("images_per_sec")
        if _is_number(speed):
            # Smoothed, so that one slow interval (a checkpoint, a preview) does not make the remaining time jump.
            self._rate = speed if self._rate is None else 0.7 * self._rate + 0.3 * speed
        if self._bar is None:
            print(self.line(record), flush=True)
        else:
            self._bar.n = record["images_seen"]
            self._bar.set_description_str(self.line(record), refresh=False)
            self._bar.refresh()

    def line(self, record: dict) -> str:
        """The status line of a record."""
        images = record["images_seen"]
        share = f" ({100 * images / self.total:.0f} %)" if self.total else ""
        parts = [f"step {record['step']:,}", f"images {images:,}/{self.total:,}{share}"]
        if "loss" in record:
            loss = record["loss"]
            parts.append(f"loss {loss:.4f}" if _is_number(loss) else "loss not finite")
        if _is_number(record.get("lr")):
            parts.append(f"lr {record['lr']:.1e}")
        if _is_number(record.get("images_per_sec")):
            parts.append(f"{rate(record['images_per_sec'])} img/s")
        if _is_number(record.get("data_wait_frac")):
            parts.append(f"wait {100 * record['data_wait_frac']:.1f} %")
        if _is_number(record.get("mfu")):
            parts.append(f"MFU {100 * record['mfu']:.0f} %")
        if record.get("skipped_steps"):
            parts.append(f"skipped {record['skipped_steps']:,}")
        if self._rate:
            parts.append(f"ETA {duration(max(0, self.total - images) / self._rate)}")
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the bar as it is and free the line below it. May be called twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._enabled = False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
