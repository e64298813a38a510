"""Writes the code of a record, see records.py, while a call runs."""

import contextlib
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Tape"]

_STREAM = 3  # where the stream is among the arguments of a launch


class _NoRecordError(Exception):
    """A record cannot hold this."""


class _Known:
    """Where a tensor of the recorded call comes from: a variable, or a view that was made.

    root: the variable whose memory it is in. offset: from there, in bytes.
    """

    def __init__(self, name: str | None, root: str, offset: int = 0, made: Callable | None = None):
        self.name, self.root, self.offset, self.made = name, root, offset, made


class Tape(TorchDispatchMode):
    """Writes the code of a record while a call runs."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self._lines: list[str] = []
        self._globals: dict[str, Any] = {"describe": _descriptor}
        self._known: dict[int, _Known] = {}
        self._roots: dict[str, Tensor] = {}
        self._alive: list[Tensor] = []  # or the identity of one could become another's
        self._refusal: str | None = None
        self._inputs = [self._variable("t", tensor) for tensor in tensors]

    # ---- what is seen ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._try(self._operator, func, args, kwargs, result)
        return result

    def launch(self, kernel, grid: tuple[int, ...], arguments: dict) -> None:
        """Launches the kernel, and records that."""
        compiled = kernel.run(grid=grid, warmup=True, **arguments)
        seen: list = []
        with _spying(compiled, seen):
            kernel.run(grid=grid, warmup=False, **arguments)
        self._globals.setdefault("kept", []).append(compiled)  # or its code could be unloaded
        self._try(self._launch, seen)

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """The record may use these, and keeps them."""
        for tensor in tensors:
            name = self._constant("n", tensor)
            self._roots[name] = tensor
            self._known[id(tensor)] = _Known(name, name)

    def finish(self, result: Any) -> Callable | str:
        """The record, or why there is none."""
        if self._refusal is None:
            try:
                self._lines.append(f"return {self._text(result)}")
            except _NoRecordError as error:
                self._refusal = str(error)
        if self._refusal is not None:
            return self._refusal
        code = [f"def record({', '.join(['stream', *self._inputs])}):", *self._with_deletions()]
        exec("\n    ".join(code), self._globals)
        return self._globals["record"]

    def _try(self, step: Callable, *args) -> None:
        if self._refusal is None:
            try:
                step(*args)
            except _NoRecordError as error:
                self._refusal = str(error)

    # ---- the code ----

    def _operator(self, func, args: tuple, kwargs: dict, result: Any) -> None:
        returns = func._schema.returns
        aliases = [returned.alias_info for returned in returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            self._views(func, args, kwargs, result)
        elif isinstance(result, Tensor):
            if func is _aten.empty.memory_format and result.device.type in _EMPTY:
                code = self._empty(result)
            else:
                code = self._call(func, args, kwargs)
            if id(result) in self._known:  # changed in place
                self._lines.append(code)
            else:
                self._lines.append(f"{self._variable('v', result)} = {code}")
        elif isinstance(result, tuple) and result and all(map(_is_new, aliases, result)):
            code = self._call(func, args, kwargs)
            names = [self._variable("v", each) for each in result]
            self._lines.append(f"{', '.join(names)}, = {code}")
        else:
            raise _NoRecordError(f"{func} returns {type(result).__name__}")

    def _empty(self, result: Tensor) -> str:
        make = self._constant("e", _EMPTY[result.device.type])
        given = tuple(result.shape), result.stride(), result.dtype
        return f"{make}({', '.join(map(self._text, given))})"

    def _views(self, func, args: tuple, kwargs: dict, result: Any) -> None:
        base = self._where(args[0])
        if func is _aten.detach.default:  # which autograd does to what is new; a record has none
            self._alive.append(result)
            self._known[id(result)] = base
            return
        several = isinstance(result, (list, tuple))
        for i, view in enumerate(result if several else [result]):

            def made(i: int = i) -> str:
                return self._call(func, args, kwargs) + f"[{i}]" * several

            offset = view.data_ptr() - self._roots[base.root].data_ptr()
            self._alive.append(view)
            self._known.setdefault(id(view), _Known(None, base.root, offset, made))

    def _call(self, func, args: tuple, kwargs: dict) -> str:
        given = [self._text(arg) for arg in args]
        given += [
            f"{name}={self._text(value)}"
            for name, value in kwargs.items()
            if name != "pin_memory" or value  # False unless asked for
        ]
        return f"{self._constant('f', _FAST.get(func, func))}({', '.join(given)})"

    def _launch(self, seen: list[tuple]) -> None:
        if len(seen) != 1:
            raise _NoRecordError("it is not known how Triton launches a kernel")
        launch, args = seen[0]
        runtime = knobs.runtime
        given = []
        for i, value in enumerate(args):
            if i == _STREAM:
                given.append("stream")
            elif value is runtime.launch_enter_hook or value is runtime.launch_exit_hook:
                given.append("None")  # as chains of hooks they are empty
            elif isinstance(value, dict) or hasattr(value, "extras"):
                given.append("None")  # what hooks are told
            else:
                given.append(self._argument(value))
        self._lines.append(f"{self._constant('k', launch)}({', '.join(given)})")

    def _argument(self, value: Any) -> str:
        """The code of a kernel's argument: of a tensor its address is enough."""
        if isinstance(value, Tensor):
            known = self._where(value)
            return f"{known.root}.data_ptr()" + (f" + {known.offset}" if known.offset else "")
        if isinstance(value, TensorDescriptor):
            known, fields = self._where(value.base), dict(vars(value))
            base = known.root if known.offset == 0 else self._text(fields["base"])
            fields["base"] = None
            return f"describe({self._constant('d', fields)}, {base})"
        if isinstance(value, tuple) and _has_tensors(value):
            return f"({''.join(self._argument(part) + ', ' for part in value)})"
        return self._text(value)

    def _text(self, value: Any) -> str:
        if isinstance(value, Tensor):
            known = self._where(value)
            if known.name is None:
                code = known.made()
                known.name = f"v{len(self._alive)}"
                self._alive.append(value)
                self._lines.append(f"{known.name} = {code}")
            return known.name
        if type(value) is list:
            return f"[{', '.join(map(self._text, value))}]"
        if type(value) is tuple:
            return f"({''.join(self._text(part) + ', ' for part in value)})"
        if value is None or type(value) in (int, bool):
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        return self._constant("c", value)

    def _constant(self, letter: str, value: Any) -> str:
        for name, known in self._globals.items():
            if known is value:
                return name
        name = f"{letter}{len(self._globals)}"
        self._globals[name] = value
        return name

    # ---- memory ----

    def _variable(self, letter: str, tensor: Tensor) -> str:
        name = f"{letter}{len(self._alive)}"
        self._roots[name] = tensor
        self._alive.append(tensor)
        self._known[id(tensor)] = _Known(name, name)
        return name

    def _where(self, tensor: Any) -> _Known:
        known = self._known.get(id(tensor))
        if known is None:
            raise _NoRecordError("a tensor comes from nowhere")
        return known

    def _with_deletions(self) -> Iterator[str]:
        """The lines; each variable is deleted after the last that uses it."""
        uses = [set(re.findall(r"\bv\d+\b", line)) for line in self._lines]
        last = {name: i for i, names in enumerate(uses) for name in names}
        for i, line in enumerate(self._lines):
            yield line
            done = [name for name in sorted(uses[i]) if last[name] == i]
            if done and i + 1 < len(self._lines):
                yield f"del {', '.join(done)}"


@contextlib.contextmanager
def _spying(compiled, seen: list[tuple]) -> Iterator[None]:
    """Appends (launch, arguments) of what a compiled kernel's launcher passes on to its C code."""
    launcher = getattr(compiled, "run", None)
    launch = getattr(launcher, "__dict__", {}).get("launch")
    if launch is None:
        yield
        return
    thread = threading.get_ident()

    def spy(*args):
        if threading.get_ident() == thread:
            seen.append((launch, args))
        return launch(*args)

    launcher.launch = spy
    try:
        yield
    finally:
        launcher.launch = launch


def _is_new(alias: Any, result: Any) -> bool:
    """Whether an operator made this tensor: alias is what its schema says of the memory."""
    return alias is None and isinstance(result, Tensor)


def _has_tensors(values: tuple) -> bool:
    return any(
        isinstance(value, (Tensor, TensorDescriptor))
        or (isinstance(value, tuple) and _has_tensors(value))
        for value in values
    )


def _descriptor(fields: dict, base: Tensor) -> TensorDescriptor:
    """A descriptor like a recorded one, for other memory; without the checks that it passed."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(fields)
    made.base = base
    return made


_aten = torch.ops.aten
# What torch.compile's code allocates by, on the current device, for a third of the time.
_EMPTY = {
    kind: getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}")
    for kind in ("cpu", "cuda")
    if hasattr(torch._C._dynamo.guards, f"_empty_strided_{kind}")
}
# The same operators where a call costs less.
_FAST = {
    _aten.addmm_.default: Tensor.addmm_,
    _aten.permute.default: Tensor.permute,
    _aten.view.default: Tensor.view,
    _aten.mm.default: Tensor.mm,
    _aten.select.int: Tensor.select,
}
