"""Records of calls: all that an op does with operands of a kind, without the code that decides it.

What a launcher decides, and what Triton makes of it, follows from shapes, strides, alignment,
dtypes and constants, and costs the host more than the kernels of a small layer take. So the second
call of a kind is recorded while it runs: each of PyTorch's operators, each launch, and which memory
each argument is in. From the third call on, the record computes. It is straight Python code, of
calls alone:

    v6 = e1((1, 65, 8), (520, 8, 1), c2)  # allocates
    k4(2, 1, 1, stream, ..., (t0.data_ptr(), 16), (t2.data_ptr(), 16), v6.data_ptr(), 65, 16, ...)

An operator is recorded if it is seen, so nothing can be forgotten; what a record cannot hold is
computed as before. On a GPU a new record runs once more, and is kept if its results have the same
bits. A change of what records depend on, such as the tables of algorithms or Triton's
driver, drops all of them. While a profiler has hooked launches none is used.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton import knobs
from triton.runtime import driver

from lora_kernels.dispatch.algorithm import tf32_allowed
from lora_kernels.kernels import config
from lora_kernels.kernels.tape import Tape
from lora_kernels.spec import DoraNeeds, DoraSpec, GroupedSpec, LoraSpec, Needs, OutputSplits

__all__ = ["Call", "call_of", "current", "forget", "hold", "observe", "serves"]

_MOST = 2048  # records; each takes about 10 KB
_TENSORS = frozenset((Tensor, nn.Parameter))
_CONSTANTS = frozenset((int, float, bool, str, type(None), torch.dtype, Needs, DoraNeeds))
_SPECS = frozenset((DoraSpec, GroupedSpec, OutputSplits))
# Of these Triton versions it is known how a compiled kernel is launched.
_KNOWN = (3, 4) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10)

_records: dict[tuple, "Callable | str | None"] = {}  # None: seen once; str: why there is none
_valid_for: list = [()]  # what call_of was told that they depend on
_thread = threading.local()
_recording, _changing = threading.Lock(), threading.Lock()
_WRITING = ("add_lora",)  # ops that write to an operand
_BITS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


class Call:
    """A call of an op: of what kind its operands are, those that are tensors, and the record."""

    __slots__ = ("key", "record", "tensors")

    def __init__(self, key: tuple, tensors: list[Tensor]):
        self.key, self.tensors = key, tensors
        record = _records.get(key)
        self.record = record if callable(record) else None

    def run(self) -> Any:
        """What the record computes; NotImplemented if it cannot, which drops it.

        Raises: torch.OutOfMemoryError.
        """
        try:
            return _run(self.record, self.tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the ordinary path meets it, too, or knows better
            _keep(self.key, f"{type(error).__name__}: {error}")
            return NotImplemented


def _run(record: Callable, tensors: list[Tensor]) -> Any:
    """What a record computes, on the device of the tensors and its current stream."""
    active, index = driver.active, tensors[0].get_device()
    if index < 0 or index == active.get_current_device():
        return record(active.get_current_stream(max(index, 0)), *tensors)
    with torch.cuda.device(index):
        return record(active.get_current_stream(index), *tensors)


def serves(tensor: Tensor) -> bool:
    """Whether calls over tensors of its device have records: not if kernels are interpreted."""
    return not tensor.is_cpu or config.CPU.target != "interpreter"


def call_of(name: str, operands: Sequence, *depends: object) -> Call | None:
    """The call, if a record can hold it and Triton is as records know it.

    depends: all else that algorithms are chosen by. If it is not what it was, no record is valid.
    """
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # None, an empty chain or, of older versions, no chain at all.
    if (
        not _KNOWN
        or (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    ):
        return None
    key: list = [name]
    tensors: list[Tensor] = []
    try:
        known = _describe(operands, key, tensors)
    except RuntimeError:  # a tensor without memory, as one that outlived a transform of torch.func
        return None
    if not known or not serves(tensors[0]):
        return None
    depends = driver.active, tf32_allowed(), *depends
    if depends != _valid_for[0]:
        forget()
        _valid_for[0] = depends
    return Call(tuple(key), tensors)


def _describe(values: Iterable, key: list, tensors: list[Tensor]) -> bool:
    """Appends what matters of each value; False if one is of an unknown class."""
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            tensors.append(value)
            key += (
                value.shape,
                value.stride(),
                value.dtype,
                value.get_device(),
                value.data_ptr() % 16,
            )
        elif kind in _CONSTANTS:
            key += (kind, value)  # 1, 1.0 and True are equal, and not the same to a kernel
        elif kind is LoraSpec:
            splits, scaling = value.splits, value.scaling
            key += (type(scaling), scaling, value.dropout_p, value.narrow)
            key += (splits.sizes, splits.enabled)
        elif kind in _SPECS or kind in (list, tuple):
            parts = vars(value).values() if kind in _SPECS else value
            key += (kind, len(parts))
            if not _describe(parts, key, tensors):
                return False
        else:
            return False
    return True


def current() -> "Tape | None":
    """What records the launches of this thread; None if nothing does."""
    return getattr(_thread, "tape", None)


def hold(*tensors: Tensor) -> None:
    """Says that these are constants of calls of this kind, which a record may keep."""
    tape = current()
    if tape is not None:
        tape.hold(tensors)


def forget() -> None:
    """Drops all records."""
    with _changing:
        _records.clear()


def observe(call: Call, compute: Callable[[], Any]) -> Any:
    """compute(), which the second call of its kind records."""
    if (
        _is_due(call.key)
        and current() is None
        and _are_different(call.tensors)
        and _recording.acquire(blocking=False)  # a tape puts itself into Triton's launchers
    ):
        tape = _thread.tape = Tape(call.tensors)
        try:
            with tape:
                result = compute()
        finally:
            _thread.tape = None
            _recording.release()
        record = tape.finish(result)
        if callable(record) and _can_repeat(call) and not _repeats(record, call, result):
            record = "it does not have the bits of the recorded call"
        _keep(call.key, record)
        return result
    return compute()


def _is_due(key: tuple) -> bool:
    """Whether calls of this kind were seen once, and have no record. A new kind is noted."""
    with _changing:
        if key in _records:
            return _records[key] is None
        while len(_records) >= _MOST:
            del _records[next(iter(_records))]
        _records[key] = None
        return False


def _keep(key: tuple, record: Callable | str) -> None:
    """Keeps a record, or why there is none; unless all were dropped since it was begun."""
    with _changing:
        if key in _records:
            _records[key] = record


def _can_repeat(call: Call) -> bool:
    """Whether the call can run again: on a GPU, outside of a capture, and writing to no operand."""
    on_gpu = call.tensors[0].is_cuda and not torch.cuda.is_current_stream_capturing()
    return on_gpu and call.key[0] not in _WRITING


def _repeats(record: Callable, call: Call, result: Any) -> bool:
    """Whether a record gives the same bits as the call that it was made of."""
    try:
        return _equal(_run(record, call.tensors), result)
    except Exception:  # whatever it is, such a record is not kept
        return False


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):  # as integers: a NaN, which overflow leaves, equals nothing
        bits = _BITS[one.dtype.itemsize]
        return one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _are_different(tensors: list[Tensor]) -> bool:
    """Whether no tensor is there twice: a record would take each of the two for the same one."""
    return len(set(map(id, tensors))) == len(tensors)
