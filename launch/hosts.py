"""Starts one training on several hosts, or on this one, and watches over it until the last rank has left. Used by the scripts here.

    python launch/hosts.py torchrun HOST1,HOST2 [launcher options --] [train arguments]
    python launch/hosts.py deepspeed --hostfile FILE [launcher options --] [train arguments]

Every host gets a host.py over ssh, whose input and output stay connected with this process. Nothing starts before all hosts are ready;
a stop request reaches all ranks; when one host fails the others are ended; when this process dies every host notices and ends its ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from host import READY

from ddpm_dist import rendezvous
from ddpm_dist.errors import BAD_USAGE, FAILED, OK, REQUEUE, UserError, exit_codes

RSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
READY_SECONDS = 90.0  # for all hosts to say that they can start; a shared file system may be slow to give Python away
CLOSE_SECONDS = 5.0  # for a remote shell after the end
LEAVE_SECONDS = 60.0  # for the others when one host has ended badly: they find it out themselves, or are still saving
KILL_SECONDS = 15.0  # for a host to end its ranks
LOCAL = ("localhost", "127.0.0.1")
PORTS = range(rendezvous.FIRST_PORT, rendezvous.FIRST_PORT + rendezvous.PORTS)

# What goes with the job to every host; more by name in DDPM_DIST_PASS. The rest of the environment is each host's own.
PASSED = re.compile(
    r"(NCCL|GLOO|TORCH|UCX|CUDA|OMP|MKL|DS|DDPM_DIST|MLFLOW)_\w+|PYTHON\w+|PROCESSES_PER_NODE|PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX"
)
NOT_PASSED = ("DDPM_DIST_RSH", "DDPM_DIST_EXIT_JSON")


@dataclass(frozen=True)
class Host:
    """name: as ssh takes it, with or without USER@. slots: ranks there; None: one per GPU, or one."""

    name: str
    slots: int | None = None

    @property
    def address(self) -> str:
        return self.name.rpartition("@")[2]

    @property
    def is_local(self) -> bool:
        return self.name in (*LOCAL, socket.gethostname())


def read_hosts(text: str) -> list[Host]:
    """The lines of a hostfile: NAME [slots=N], # begins a comment. Raises UserError."""
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.partition("#")[0].split()):
            continue
        match = re.fullmatch(r"(\w[\w.@-]*)(?: slots=([1-9]\d*))?", " ".join(words))
        if match is None:
            raise UserError(f"line {number} of the hosts, {line.strip()!r}, is not NAME or NAME slots=N")
        hosts.append(Host(match[1], int(match[2]) if match[2] else None))
    names = [host.name for host in hosts]
    if not hosts:
        raise UserError(
            "no host is given: HOST1,HOST2,... or --hostfile FILE with a line NAME or NAME slots=N for each"
        )
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{', '.join(sorted(twice))} is there twice: one line per host, NAME slots=N for N ranks")
    return hosts


def parse(words: list[str]) -> tuple[str, list[Host], list[str], list[str]]:
    """(launcher, hosts, its options, arguments of the training)."""
    launcher, *rest = words
    if not rest or rest[0] in ("-h", "--help"):
        raise UserError("give the hosts first: HOST1,HOST2,... or --hostfile FILE, then what ddpm_dist.train takes")
    if rest[0] == "--hostfile":
        if len(rest) < 2:
            raise UserError("--hostfile: which file?")
        try:
            text = Path(rest[1]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the hostfile {rest[1]} cannot be read: {error}") from None
        rest = rest[2:]
    else:
        text, rest = rest[0].replace(",", "\n"), rest[1:]
    hosts = read_hosts(text)
    if launcher == "deepspeed" and (without := [host.name for host in hosts if host.slots is None]):
        raise UserError(f"{', '.join(without)}: deepspeed has to know how many ranks: NAME slots=N")
    options = rest[: rest.index("--")] if "--" in rest else []
    for name, text in [("PROCESSES_PER_NODE", os.environ.get("PROCESSES_PER_NODE", "1")), *counts(options)]:
        if not re.fullmatch(r"[1-9]\d{0,3}|auto|gpu|cpu", text):
            raise UserError(f"{name}={text} is not a number of ranks")
    return launcher, hosts, options, rest[len(options) + ("--" in rest) :]


def counts(options: list[str]) -> list[tuple[str, str]]:
    return re.findall(r"(--nproc[-_]per[-_]node)[= ](\S+)", " ".join(options))


def meeting_point(hosts: list[Host]) -> tuple[str, int]:
    """Address and port where the ranks meet, on the first host: MASTER_ADDR and MASTER_PORT, or its name and a port."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if port and not (port.isdecimal() and 0 < int(port) < 65_536):
        raise UserError(f"MASTER_PORT={port} is not a port: unset it or give a number in 1..65535")
    if not address and all(host.is_local for host in hosts):
        address = "127.0.0.1"
    if not address and hosts[0].name in LOCAL:
        raise UserError(
            f"the other hosts do not find {hosts[0].name}: call the first host by its name, or set MASTER_ADDR"
        )
    chosen = random.SystemRandom().sample(PORTS, 50)
    free = (number for number in chosen if not hosts[0].is_local or rendezvous.is_free(number))
    return address or hosts[0].address, int(port) if port else next(free, chosen[0])


class Link:
    """The host.py of one host, through a remote shell; its lines are printed with the host's name before them."""

    def __init__(self, host: Host, job: dict, mark: bool) -> None:
        self.host, self.ready, self._mark = host, threading.Event(), f"[{host.name}] " if mark else ""
        home = Path(__file__).resolve().parent
        words = ["env", f"PYTHONPATH={home.parent}", sys.executable, "-u", str(home / "host.py")]
        if not host.is_local:
            words = [*remote_shell(), host.name, shlex.join(words)]
        seen = job["wait"]
        try:
            # A session of its own: Ctrl-C at the terminal is for this process, which makes one stop request of it.
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE if seen else None,
                stderr=subprocess.STDOUT if seen else None, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{words[0]} cannot be started: {error.strerror}") from None
        self._reader = threading.Thread(target=self._read, daemon=True) if seen else None
        if self._reader is not None:
            self._reader.start()
        self.tell(json.dumps(job | {"name": host.name}))

    def _read(self) -> None:
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            if text == READY:
                self.ready.set()
            else:
                with contextlib.suppress(OSError):  # nobody reads it: the ranks must not be held up by that
                    print(self._mark + text, flush=True)

    def tell(self, order: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(order.encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """End it: without input it leaves before the start; later it ends its ranks first."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # a remote shell that hangs
            self.process.kill()
            self.process.wait()
        if self._reader is not None:
            self._reader.join(timeout=5)


def remote_shell() -> list[str]:
    """ssh with its options, or what DDPM_DIST_RSH says. Raises UserError."""
    text = os.environ.get("DDPM_DIST_RSH") or RSH
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"DDPM_DIST_RSH={text} is not a command: {error}") from None


class Signals:
    """INT, TERM and USR1 ask the ranks to stop; QUIT (Ctrl-\\) ends them."""

    def __init__(self) -> None:
        self.stop: str | None = None
        self.end = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT):
            signal.signal(number, self._received)

    def _received(self, number: int, frame: object) -> None:
        if number == signal.SIGQUIT:
            self.end = True
        else:
            self.stop = self.stop or signal.Signals(number).name


@exit_codes
def main() -> int:
    launcher, hosts, options, arguments = parse(sys.argv[1:])
    address, port = meeting_point(hosts)
    patience = leave_seconds()
    names = os.environ.get("DDPM_DIST_PASS", "").split()
    passed = {
        name: text for name, text in os.environ.items()
        if (PASSED.fullmatch(name) and name not in NOT_PASSED) or name in names
    }  # fmt: skip
    alone = len(hosts) == 1 and hosts[0].is_local  # its output is a terminal's where this one's is
    job = {
        "launcher": launcher, "hosts": [(host.name, host.slots) for host in hosts], "address": address, "port": port,
        "options": options, "arguments": arguments, "needs": ["deepspeed"] if launcher == "deepspeed" else [],
        "folder": os.getcwd(), "environment": passed, "wait": not alone,
    }  # fmt: skip
    signals, links = Signals(), []
    try:
        for index, host in enumerate(hosts):
            links.append(Link(host, job | {"index": index}, mark=len(hosts) > 1))
        if not alone and not all_ready(links, signals):
            print("stopped before anything was started", file=sys.stderr, flush=True)
            return REQUEUE
        for link in links:
            link.tell("go")
        return watch(links, signals, patience)
    finally:
        for link in links:
            link.close()


def all_ready(links: list[Link], signals: Signals) -> bool:
    """Wait for every host. False: stopped by a signal. Raises UserError if one cannot take part."""
    until = time.monotonic() + READY_SECONDS
    while not all(link.ready.is_set() for link in links):
        if signals.stop or signals.end:
            return False
        if ended := [link for link in links if link.process.poll() is not None and not link.ready.is_set()]:
            time.sleep(1)  # what else is wrong is said together
            raise UserError(f"nothing was started: {'; '.join(map(why_not, ended))}")
        if time.monotonic() > until:
            silent = ", ".join(link.host.name for link in links if not link.ready.is_set())
            for link in links:
                link.process.kill()
            raise UserError(f"nothing was started: no answer from {silent} after {READY_SECONDS:g} s")
        time.sleep(0.05)
    return True


def why_not(link: Link) -> str:
    code, name = link.process.returncode, link.host.name
    if code == BAD_USAGE:
        return f"{name} cannot take part (see above)"
    if code == 255:
        return f"{name} cannot be reached; 'ssh {name} true' has to work without a password (DDPM_DIST_RSH: another command)"
    return f"{name} ended with code {code}: {sys.executable} and {Path(__file__).parent} have to be there under the same path"


def leave_seconds() -> float:
    text = os.environ.get("DDPM_DIST_LEAVE_SECONDS", str(LEAVE_SECONDS))
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text):
        raise UserError(f"DDPM_DIST_LEAVE_SECONDS={text} is not a number of seconds")
    return float(text)


def watch(links: list[Link], signals: Signals, patience: float) -> int:
    """Until all have left: hand stop requests on, end the others ``patience`` seconds after one has failed.

    Returns the code of the whole.
    """
    told = False
    deadline = None
    while running := [link for link in links if link.process.poll() is None]:
        now = time.monotonic()
        if signals.stop and not told:
            told = True
            print(f"{signals.stop}: the ranks save and leave (Ctrl-\\ ends them at once)", file=sys.stderr, flush=True)
            for link in running:
                link.tell("stop")
        failed = [link for link in links if link.process.returncode not in (None, OK)]
        if failed and deadline is None:
            deadline = now + patience
        if signals.end or (deadline is not None and now > deadline):
            if failed and not signals.end:
                codes = ", ".join(f"{link.host.name} ended with code {link.process.returncode}" for link in failed)
                print(f"{codes}; ending {', '.join(link.host.name for link in running)}", file=sys.stderr, flush=True)
            end(running)
            break
        time.sleep(0.05)
    codes = [link.process.returncode for link in links]
    if codes[0] in (OK, BAD_USAGE, REQUEUE):  # rank 0's word
        return codes[0]
    return BAD_USAGE if BAD_USAGE in codes else FAILED


def end(links: list[Link]) -> None:
    for link in links:
        link.tell("end")
    until = time.monotonic() + KILL_SECONDS
    for link in links:
        try:
            link.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"warning: {link.host.name} does not answer; ranks may be left there", file=sys.stderr, flush=True)
            link.process.kill()
            link.process.wait()


if __name__ == "__main__":
    sys.exit(main())
