"""Tasks in processes of their own: one that fails, hangs or dies takes no other with it."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from lora_kernels.tuning import workers


def attempted(what: str) -> None:
    if what == "raise":
        raise ValueError("two\nlines")
    if what == "die":
        os._exit(3)


def interrupts(what: str) -> None:
    """As Ctrl-C does, which all processes of a terminal hear; then it takes long."""
    if what == "a":
        os.killpg(os.getpgrp(), signal.SIGINT)
    time.sleep(60)


def kills_its_parent(what: str) -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def of_attempting(name: str) -> subprocess.CompletedProcess:
    """A process of its own that attempts the function of this name."""
    code = (
        f"from tests.tuning.test_workers import {name}\n"
        "from lora_kernels.tuning import workers\n"
        "if __name__ == '__main__':\n"
        f"    workers.attempt({name}, ['a', 'b', 'c'], jobs=2)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True,
        timeout=55,
    )  # fmt: skip


needs_groups = pytest.mark.skipif(os.name != "posix", reason="sends signals to a group")


@needs_groups
def test_an_interrupt_ends_all_processes_of_which_one_says_so():
    done = of_attempting("interrupts")
    assert done.returncode not in (0, 1)
    assert done.stderr.count("KeyboardInterrupt\n") == 1, done.stderr
    assert "SpawnProcess" not in done.stderr


@needs_groups
def test_processes_end_without_a_word_if_the_one_that_asks_is_killed():
    done = of_attempting("kills_its_parent")
    assert done.returncode == -signal.SIGKILL
    assert "Traceback" not in done.stderr


def test_attempt_says_that_no_process_starts(monkeypatch):
    def start(worker):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(workers._Worker, "_start", start)
    (failure,) = workers.attempt(attempted, ["fine"], jobs=2)
    assert failure == "OSError: [Errno 12] Cannot allocate memory"


def test_attempt_loses_the_task_of_a_process_that_dies_alone():
    died = "its process died, exit code 3"
    failures = workers.attempt(attempted, ["die", "die", "fine", "raise"], jobs=2)
    assert failures == [died, died, None, "ValueError: two lines"]


def test_serve_says_that_a_process_with_broken_cuda_is_of_no_more_use(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    answers, tasks = [], iter(["fine", "raise"])
    pipe = types.SimpleNamespace(recv=lambda: next(tasks), send=answers.append)
    with pytest.raises(StopIteration):
        workers._serve(pipe, attempted)
    assert answers == [(None, True), ("ValueError: two lines", False)]


def test_attempt_gives_a_task_without_end_up():
    assert workers.attempt(attempted, ["fine"], jobs=2, timeout=0.0) == ["no end within 0 s"]


def test_attempt_with_one_job_runs_in_this_process():
    assert workers.attempt(attempted, ["raise", "fine"], jobs=1) == ["ValueError: two lines", None]


@pytest.mark.parametrize(("gigabytes", "jobs"), [(0.2, 1), (5.5, 5), (80, 12)])
def test_as_many_jobs_as_fit_into_memory(gigabytes, jobs, monkeypatch):
    """A kernel of a process without memory would look as if it failed."""
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gigabytes * 2**30), 80 * 2**30))
    assert workers.most_jobs() == jobs
