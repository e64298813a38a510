"""Tasks in processes of their own: one that fails, hangs or dies takes no other with it."""

import os
import types

import pytest
import torch

from lora_kernels.tuning import workers


def attempted(what: str) -> None:
    if what == "raise":
        raise ValueError("two\nlines")
    if what == "die":
        os._exit(3)


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
