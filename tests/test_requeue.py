"""Which attempts of a job are followed by another one: sequences of exits, as slurm/common.sh would report them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_dist import requeue
from ddpm_dist.errors import UserError
from ddpm_dist.requeue import Attempt, Job

RUNNING = Job("RUNNING")
KILLED = "killed"


def play(folder, *exits, job: Job = RUNNING) -> list[int]:
    """Attempts one after the other until one is refused or not requeued; gives the code of every ``begin`` and ``end``.

    Each is (code, start step, last step), with code "killed" for an attempt that had no ``end`` because its node was lost.
    """
    codes = []
    for restart, (code, start, step) in enumerate(exits):
        codes.append(requeue.begin(folder, restart)[0])
        if codes[-1]:
            return codes
        assert (folder / "exit.json").read_text() == ""
        if start is not None or code not in (None, KILLED):
            said = {"code": None if code == KILLED else code, "reason": "words", "step": step, "start_step": start}
            (folder / "exit.json").write_text(json.dumps(said))
        if code != KILLED:
            codes.append(requeue.end(folder, 0 if code == 0 else 1, Job(job.state, restart))[0])
            if codes[-1] != 75:
                return codes
    return codes


def test_the_history_of_another_job_with_the_same_number_does_not_count(tmp_path):
    assert play(tmp_path, *[(1, 0, 9)] * 4)[-1] == 1  # a crash loop
    assert requeue.begin(tmp_path, 0)[0] == 0  # the first start of a job of another cluster


def test_done_and_bad_input_end_the_job(tmp_path):
    assert play(tmp_path, (75, 0, 10), (0, 10, 20)) == [0, 75, 0, 0]
    assert play(tmp_path, (2, None, None)) == [0, 2]


@pytest.mark.parametrize("crash", [(1, 0, 9), (None, 0, 9), (1, None, None), (None, None, None)])
def test_a_crash_that_repeats_is_requeued_three_times(tmp_path, crash):
    """With an exit.json that says 1 or that it trains, and without any word."""
    # srun ends with 1; without any word and with 0 it would be a job that was done.
    folder = tmp_path
    for restart in range(4):
        assert requeue.begin(folder, restart)[0] == 0
        code, start, step = crash
        if (code, start) != (None, None):
            (folder / "exit.json").write_text(json.dumps({"code": code, "step": step, "start_step": start}))
        code, words = requeue.end(folder, 1, Job("RUNNING", restart))
        assert code == (75 if restart < 3 else 1)
    assert "no progress over 3 restarts" in words
    assert requeue.begin(folder, 4)[0] == 1  # requeued by hand: nothing has changed


def test_crashes_that_get_further_each_time_go_on(tmp_path):
    assert play(tmp_path, *((1, 100 * attempt, 100 * attempt + 150) for attempt in range(20))) == [0, 75] * 20


def test_progress_now_and_then_is_progress(tmp_path):
    starts = [0, 0, 0, 5, 5, 5, 9, 9, 9, 9]
    assert play(tmp_path, *((1, start, start + 3) for start in starts)) == [0, 75] * 9 + [0, 1]


def test_stops_on_request_that_saved_count_as_progress(tmp_path):
    assert play(tmp_path, *((75, step, step + 1) for step in range(8))) == [0, 75] * 8
    assert play(tmp_path, *[(75, 8, 8)] * 5)[-1] == 1


def test_a_step_that_was_not_saved_is_no_progress(tmp_path):
    assert play(tmp_path, (1, 0, 50), (1, 0, 60), (1, 0, 70), (1, 0, 80)) == [0, 75, 0, 75, 0, 75, 0, 1]


def test_lost_nodes_are_judged_at_the_next_start(tmp_path):
    """SLURM requeues them without asking; four starts from the same step are enough."""
    lost = [(KILLED, 7, 9)] * 6
    assert play(tmp_path, (75, 0, 7), *lost) == [0, 75, 0, 0, 0, 0, 1]
    attempts = requeue.read_history(tmp_path / "history.json")
    assert [attempt.then for attempt in attempts] == ["requeued", *["ended by SLURM"] * 4]
    assert [attempt.start_step for attempt in attempts] == [0, 7, 7, 7, 7]


def test_an_attempt_that_never_loaded_a_checkpoint_is_no_step_back(tmp_path):
    dead = (None, None, None)
    assert play(tmp_path, (1, 10, 12), dead, (1, 10, 12), dead) == [0, 75, 0, 75, 0, 75, 0, 1]


def test_an_older_checkpoint_after_a_damaged_one_is_no_loop(tmp_path):
    assert play(tmp_path, (1, 100, 120), (1, 50, 60), (1, 60, 70), (1, 70, 80), (1, 80, 95)) == [0, 75] * 5


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "PREEMPTED", "NODE_FAIL", "TIMEOUT"])
def test_a_job_that_slurm_ends_is_left_to_slurm(tmp_path, state):
    """A user's scancel, a preemption, a lost node: COMPLETING, or already what comes next."""
    assert play(tmp_path, (75, 0, 10), job=Job(state)) == [0, 1]


def test_a_job_that_was_requeued_meanwhile_is_not_requeued_again(tmp_path):
    requeue.begin(tmp_path, 0)
    (tmp_path / "exit.json").write_text(json.dumps({"code": 75, "reason": "SIGTERM", "step": 3, "start_step": 0}))
    assert requeue.end(tmp_path, 1, Job("RUNNING", restarts=1)) == (1, "SLURM has requeued this job already")


def test_a_save_that_outlasts_the_time_limit_is_followed_by_a_requeue(tmp_path):
    """SLURM ends such a job (KillWait), but does not requeue it."""
    requeue.begin(tmp_path, 0)
    (tmp_path / "exit.json").write_text('{"code": 75, "step": 4, "start_step": 0, "reason": "SIGTERM"}')
    assert requeue.end(tmp_path, 1, Job("COMPLETING", 0, "TimeLimit"))[0] == 75


def test_of_an_array_only_the_task_is_asked_for():
    """The number of its last task is that of the whole array."""
    assert requeue.job_name({"SLURM_JOB_ID": "7"}) == "7"
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert requeue.job_name(task) == "7_2"


def test_done_is_done_whatever_slurm_says(tmp_path):
    assert play(tmp_path, (0, 0, 10), job=Job("COMPLETING")) == [0, 0]


def test_without_an_answer_from_slurm_nothing_is_requeued(tmp_path):
    requeue.begin(tmp_path, 0)
    code, words = requeue.end(tmp_path, 1, None)
    assert code == 1 and "sbatch again" in words


def test_what_srun_says_counts_only_without_an_exit_file(tmp_path):
    requeue.begin(tmp_path, 0)
    assert requeue.end(tmp_path, 2, RUNNING)[0] == 2  # torchrun did not understand its arguments
    requeue.begin(tmp_path, 1)
    (tmp_path / "exit.json").write_text('{"code": 75, "step": 4, "start_step": 0, "reason": "SIGUSR1"}')
    assert requeue.end(tmp_path, 0, Job("RUNNING", 1))[0] == 75


def test_a_job_started_again_after_bad_input_counts_anew(tmp_path):
    assert play(tmp_path, *[(1, 0, 0)] * 3) == [0, 75] * 3
    assert play(tmp_path, (2, None, None)) == [0, 2]
    assert play(tmp_path, *[(1, 0, 0)] * 4) == [0, 75] * 3 + [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"attempts": 3}', '{"attempts": [3]}', '{"attempts": [{"x": 1}]}', '{"attempts": [{"restart": null}]}',
        '{"attempts": [{"restart": 0, "start_step": 1.5, "code": 75, "step": "9"}]}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_history_that_is_not_whole_is_begun_anew(tmp_path, text):
    (tmp_path / "history.json").write_text(text)
    assert play(tmp_path, (75, 0, 3)) == [0, 75]
    assert len(requeue.read_history(tmp_path / "history.json")) == 1


@pytest.mark.parametrize("code", ["9999", "true", '"75"', "null"])
def test_a_code_that_is_none_of_ours_is_a_crash(tmp_path, code):
    requeue.begin(tmp_path, 0)
    (tmp_path / "exit.json").write_text(f'{{"code": {code}, "step": 4, "start_step": 0}}')
    assert requeue.end(tmp_path, 1, RUNNING)[0] == 75
    (attempt,) = requeue.read_history(tmp_path / "history.json")
    assert attempt.code is None and attempt.step == 4


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path):
    with pytest.raises(UserError, match="history.json cannot be written.*DDPM_DIST_LOGS"):
        requeue.begin(tmp_path / "missing", 0)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 75, None]), st.integers(0, 5) | st.none(), st.integers(0, 9)), max_size=6
    )
)  # fmt: skip
def test_after_any_history_a_loop_stops_and_progress_goes_on(exits):
    attempts = [Attempt(n, start, step, code) for n, (code, start, step) in enumerate(exits)]
    same = [Attempt(9, 3, 4, 1) for _ in range(4)]
    assert requeue.stuck([*attempts, *same])
    assert not requeue.stuck([*attempts, *same[:3], Attempt(9, 3, 4, 75)])  # it saved step 4
    assert not requeue.stuck([*attempts, *same[:3], Attempt(9, 4, 4, 1)])
    assert not requeue.stuck([*attempts, Attempt(9, None, None, 0), *same[:3]])
    assert len(attempts) > 3 or not requeue.stuck(attempts)


SHOWN = (
    "JobId=7 JobName=cifar64 UserId=u(1) JobState={} Reason={} Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 "
    "Command=/home/JobState=x"
)


def scontrol(folder, body: str) -> None:
    path = folder / "scontrol"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_state_is_read_from_scontrol_which_may_need_a_second_question(tmp_path, monkeypatch):
    """The real scontrol answers in test_slurm_train.py; here is one that fails first."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(requeue, "PAUSE", 0.0)
    shown = SHOWN.format("COMPLETING", "TimeLimit")
    scontrol(tmp_path, f"test -e {tmp_path}/asked && echo '{shown}' || {{ touch {tmp_path}/asked; exit 1; }}")
    assert requeue.ask_slurm("7") == Job("COMPLETING", 2, "TimeLimit")
    scontrol(tmp_path, "exit 1")
    assert requeue.ask_slurm("7") is None


def test_the_command_is_quick_and_answers_with_its_exit_code(tmp_path):
    scontrol(tmp_path, f"echo '{SHOWN.format('RUNNING', 'None')}'")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    values = environment(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2", PATH=path)

    def ask(*arguments: str):
        command = [sys.executable, "-X", "importtime", "-m", "ddpm_dist.requeue", *arguments]
        return subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True, check=False)

    first = ask("begin", str(tmp_path))
    assert (first.returncode, first.stdout) == (0, "job 7: restart 2\n")
    assert "torch" not in first.stderr and "pydantic" not in first.stderr
    (tmp_path / "exit.json").write_text('{"code": 75, "step": 4, "start_step": 0, "reason": "SIGUSR1"}')
    second = ask("end", str(tmp_path), "1")
    assert (second.returncode, second.stdout) == (75, "job 7: stopped by SIGUSR1 after step 4; requeueing\n")
    del values["SLURM_JOB_ID"]
    assert ask("end", str(tmp_path), "1").returncode == 2


def test_reading_takes_no_time(tmp_path):
    """A job that was restarted a thousand times."""
    requeue.write(tmp_path / "history.json", [Attempt(n, n, n + 1, 75, "SIGUSR1", "requeued") for n in range(1000)])
    begin = time.monotonic()
    assert requeue.begin(tmp_path, 1000)[0] == 0
    assert time.monotonic() - begin < 10
