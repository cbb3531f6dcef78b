"""Stop signals at the edges of a process: while it starts up, and when it has saved and leaves."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT, environment


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_signal_during_the_slow_imports_is_kept():
    done = run(
        "import os, signal\n"
        "from ddpm_dist import signals\n"
        "signals.catch_stop_signals()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        "assert signals.stop_requested() and signals.received() == signal.SIGUSR1\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "assert signals.received() == signal.SIGUSR1\n"
        "os.kill(os.getpid(), signal.SIGTERM)  # what SLURM sends says more than what our scripts send after it\n"
        "assert signals.received() == signal.SIGTERM\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_signal_during_the_teardown_does_not_change_the_exit_code():
    """Python clears modules after it has given signals back to the system."""
    done = run(
        "import os, signal\n"
        "from ddpm_dist import errors, signals\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, me=os.getpid()):\n"
        "        for number in (signal.SIGUSR1, signal.SIGTERM):\n"
        "            kill(me, number)\n"
        "late = Late()\n"
        "signals.catch_stop_signals()\n"
        "errors.leave(75)\n"
    )
    assert done.returncode == 75, done
