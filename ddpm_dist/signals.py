"""Stop signals: they set a flag, and the ranks agree about it at the next step boundary (runtime.StopRequest)."""

from __future__ import annotations

import signal
import socket
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_received = 0  # of the stop signals that arrived, the one with the highest number
_arrived: socket.socket | None = None  # the numbers of all signals, as they came


def catch_stop_signals() -> None:
    """From now on SIGTERM, SIGINT and SIGUSR1 only set a flag (main thread only). Call it early: start-up takes a while."""
    global _arrived
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)
    # Python runs _on_signal when the main thread has time, not while it waits for another rank. A byte is written at once.
    _arrived, told = socket.socketpair()
    _arrived.setblocking(False)
    told.setblocking(False)
    signal.set_wakeup_fd(told.detach(), warn_on_full_buffer=False)


def stop_requested() -> bool:
    """Whether this process has been sent a stop signal, even if its main thread does not know yet. From any thread."""
    if _received or _arrived is None:
        return _received != 0
    try:
        return any(number in STOP_SIGNALS for number in _arrived.recv(4096, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def _on_signal(number: int, frame: Any) -> None:
    global _received
    # What SLURM ends comes as SIGTERM, with a SIGUSR1 of our scripts right behind it; Python may see them in either order.
    _received = max(_received, number)


def received() -> int:
    """The number of the stop signal that arrived, 0 for none; of several SIGTERM before SIGUSR1 before SIGINT."""
    return _received
