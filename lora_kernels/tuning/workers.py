"""Runs tasks in processes of their own: one that fails, hangs or dies takes no other with it."""

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

__all__ = ["NOT_REACHED", "attempt", "most_jobs", "reason"]

_Task = TypeVar("_Task")
_MOST_JOBS = 16
_JOB_BYTES = 1 << 30  # of a CUDA context, with operands
NOT_REACHED = "not reached in time"
TIMEOUT = 180.0  # seconds; a process starts in some ten, a kernel compiles in a few


def most_jobs() -> int:
    """As many processes as there are cores, up to a limit, and as the GPU's free memory holds."""
    most = min(os.cpu_count() or 1, _MOST_JOBS)
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        most = min(most, max(1, free // _JOB_BYTES))
    return most


def attempt(
    function: Callable[[_Task], object],
    tasks: Sequence[_Task],
    jobs: int,
    timeout: float = TIMEOUT,
    seconds: float = math.inf,
) -> list[str | None]:
    """Why function(task) fails, for each task; None if it does not.

    jobs: how many processes share the tasks; 1 is this process, which has no such protection.
    function: one that a new process can import. timeout: in seconds, of one task. seconds: tasks
    that have not begun by then are NOT_REACHED.
    """
    end = time.monotonic() + seconds
    if jobs <= 1 or not tasks:
        return [
            _failure(function, task) if time.monotonic() < end else NOT_REACHED for task in tasks
        ]
    workers = [_Worker(function, timeout) for _ in range(min(jobs, len(tasks)))]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    ended = threading.Event()

    def run(task: _Task) -> str | None:
        if ended.is_set() or time.monotonic() >= end:
            return NOT_REACHED
        worker = idle.get()
        try:
            return worker.run(task)
        finally:
            idle.put(worker)

    try:
        with concurrent.futures.ThreadPoolExecutor(
            len(workers), initializer=_block_interrupts
        ) as pool:
            try:
                return list(pool.map(run, tasks))
            except BaseException:  # such as Ctrl-C, after which no task is waited for
                ended.set()
                for worker in workers:
                    worker.kill()
                raise
    finally:
        for worker in workers:
            worker.stop()


def _block_interrupts() -> None:
    """Ctrl-C is for the main thread alone: processes that this one starts do not hear of it."""
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # which lets them through again where it is started
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Worker:
    """A process for one task after the other, and a new one if it is of no more use."""

    def __init__(self, function: Callable[[Any], object], timeout: float):
        self._function, self._timeout = function, timeout
        self._process: multiprocessing.process.BaseProcess | None = None

    def run(self, task: object) -> str | None:
        try:
            process = self._start() if self._process is None else self._process
        except OSError as error:  # no memory or no number is left for another one
            return reason(error)
        try:
            self._pipe.send(task)
            if self._pipe.poll(self._timeout):
                failure, usable = self._pipe.recv()
            else:
                failure, usable = f"no end within {self._timeout:g} s", False
        except (EOFError, OSError):
            process.join(self._timeout)
            failure, usable = f"its process died, exit code {process.exitcode}", False
        if not usable:
            self.stop()
        return failure

    def _start(self) -> multiprocessing.process.BaseProcess:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._process = process
        return process

    def kill(self) -> None:
        """Ends the process, so that run() does not wait for it any longer."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection, function: Callable[[Any], object]) -> None:
    """Answers each task with its failure, and whether this process can take another one."""
    with contextlib.suppress(EOFError, OSError):  # the process that asks was killed
        while True:
            failure = _failure(function, pipe.recv())
            pipe.send((failure, failure is None or _cuda_works()))


def _failure(function: Callable[[_Task], object], task: _Task) -> str | None:
    try:
        function(task)
    except Exception as error:  # whatever it is, the other tasks go on
        return reason(error)
    return None


def _cuda_works() -> bool:
    """False after an illegal access, say: every later call in the process fails as well."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True
