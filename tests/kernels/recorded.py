"""Checks of records over the stand-in driver: ``python -m tests.kernels.recorded``, uninterpreted.

Nothing is computed, so memory that kernels would fill stays zero. Then PyTorch's own products show
in the results, and all else shows in the launches.
"""

import contextlib
import json
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from bench import standin
from lora_kernels import (
    LoRALinear,
    lora_grouped_linear,
    lora_linear,
    lora_merged_linear,
    lora_shared_linear,
)
from lora_kernels.dispatch import algorithm
from lora_kernels.kernels import records, tape
from lora_kernels.testing.grouped_problem import make_grouped_problem

TARGET = "sm_90"
WIDTH, R = 64, 16


@contextlib.contextmanager
def kept_memory() -> Iterator[list[Tensor]]:
    """What is allocated in the context is zero, and lives as long: no address is used twice."""
    kept: list[Tensor] = []

    def keeping(make: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            kept.append(make(*args, **kwargs).zero_())
            return kept[-1]

        return wrapper

    empty = {kind: keeping(make) for kind, make in tape._EMPTY.items()}
    lines = lambda self: iter(self._lines)  # noqa: E731 - without deletions
    with (
        mock.patch.object(torch, "empty", keeping(torch.empty)),
        mock.patch.dict(tape._EMPTY, empty),
        mock.patch.object(tape.Tape, "_with_deletions", lines),
    ):
        yield kept


def unrecorded() -> contextlib.AbstractContextManager:
    """Calls go by Triton's ordinary path."""
    return mock.patch.object(records, "call_of", return_value=None)


def described(launch: standin.Launch, known: dict[int, str]) -> tuple:
    """A launch with names in the place of addresses: of operands, or in the order of appearance."""

    def named(argument: str) -> str:
        head, address = argument[:-16], int(argument[-16:], 16)
        if len(argument) < 16 or address < 2**32:
            return argument
        return head + known.setdefault(address, f"memory {len(known)}")

    return (*launch[:-1], tuple(map(named, launch.arguments)))


def operand(rng: random.Random, *shape: int, dtype=torch.bfloat16, odd: bool = False) -> Tensor:
    """Somewhere else in memory each time; odd: not at a multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    start = 8 * rng.randrange(4) + (1 if odd else 0)
    values = torch.linspace(-1, 1, size + start)[start:]
    memory = torch.empty(size + start, dtype=dtype)[start:]
    return memory.copy_(values).view(shape)


def draw_kind(rng: random.Random) -> dict:
    """All that a call can differ in."""
    return {
        "function": rng.choice(["plain", "plain", "merged", "shared"]),
        "plan": rng.choice(["fused", "addmm"]),
        "m": rng.choice([65, 70, 128]),
        "leading": rng.choice([(), (1,), (5,)]),
        "odd": rng.random() < 0.2,
        "fan_in_fan_out": rng.random() < 0.2,
        "p": rng.choice([0.0, 0.1, 0.3]),
        "scaling": rng.choice([2.0, 0.5]),
        "dy": rng.choice(["dense", "expanded", "strided"]),
        "wants": rng.choice([("x", "a", "b"), ("a", "b"), ("x",)]),
        "bias": rng.random() < 0.5,
    }


def forward(kind: dict, operands: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """y, and what wants a gradient."""
    os.environ["LORA_KERNELS_PLAN"] = kind["plan"]
    leaves = {
        name: tensor.detach().requires_grad_(name in kind["wants"])
        for name, tensor in operands.items()
        if name not in ("dy", "seed")
    }
    x, w, a, b = (leaves[name] for name in "xwab")
    settings = {"dropout_p": kind["p"], "seed": operands["seed"] if kind["p"] else None}
    if kind["function"] == "shared":
        seed = operands["seed"].expand(2).clone() if kind["p"] else None
        scalings, (w2, a2, b2) = [kind["scaling"], 2.0], (t.detach().clone() for t in (w, a, b))
        y, other = lora_shared_linear(
            x, [w, w2], [a, a2], [b, b2], scalings=scalings, dropout_p=kind["p"], seed=seed
        )
        y = y + other
    elif kind["function"] == "merged":
        groups = {"enable_lora": [True, False], "scaling": kind["scaling"]}
        y = lora_merged_linear(x, w, a, b[: WIDTH // 2], leaves.get("bias"), **groups, **settings)
    else:
        y = lora_linear(x, w, a, b, leaves.get("bias"), scaling=kind["scaling"], **settings)
    return y, [leaves[name] for name in kind["wants"]]


def draw_operands(kind: dict, rng: random.Random) -> dict[str, Tensor]:
    rows = (*kind["leading"], kind["m"])
    w = operand(rng, WIDTH, WIDTH)
    dy = {
        "dense": lambda: operand(rng, *rows, WIDTH, odd=kind["odd"]),
        "expanded": lambda: operand(rng, 1).expand(*rows, WIDTH),
        "strided": lambda: operand(rng, *rows, 2 * WIDTH)[..., :WIDTH],
    }
    found = {
        "x": operand(rng, *rows, WIDTH, odd=kind["odd"]),
        "w": w.T if kind["fan_in_fan_out"] else w,
        "a": operand(rng, R, WIDTH),
        "b": operand(rng, WIDTH, R),
        "dy": dy[kind["dy"]](),
        "seed": torch.tensor([rng.randrange(2**62)]),
    }
    if kind["bias"]:
        found["bias"] = operand(rng, WIDTH)
    return found


def launched(kind: dict, operands: dict[str, Tensor]) -> tuple[list[tuple], list[Tensor]]:
    with kept_memory():
        with standin.launches() as first:
            y, wanted = forward(kind, operands)
        with standin.launches() as second:
            results = [y.detach(), *torch.autograd.grad(y, wanted, operands["dy"])]
        results = [result.clone() for result in results]
    found = []
    for seen in (first, second):
        known = {tensor.data_ptr(): name for name, tensor in operands.items()}
        found += [described(launch, known) for launch in seen]
    return found, results


def records_launch_what_triton_would() -> None:
    """Random calls of few kinds, in random order: the launches and results of the ordinary path."""
    rng = random.Random(0)
    kinds = [draw_kind(rng) for _ in range(int(os.environ.get("KINDS", 10)))]
    records.forget()
    for _ in range(8 * len(kinds)):
        kind = rng.choice(kinds)
        operands = draw_operands(kind, rng)
        ours, results = launched(kind, operands)
        with unrecorded():
            theirs, expected = launched(kind, operands)
        assert ours, kind
        assert ours == theirs, (kind, *zip(ours, theirs, strict=False))
        for result, other in zip(results, expected, strict=True):
            assert torch.equal(result, other), kind
            assert result.stride() == other.stride(), kind
    made = [record for record in records._records.values() if record is not None]
    assert len(made) > len(kinds)
    assert all(map(callable, made)), made


LAYER = LoRALinear(WIDTH, WIDTH, r=R, lora_alpha=32, lora_dropout=0.1).bfloat16()


@contextlib.contextmanager
def counted() -> Iterator[list]:
    """The launches that do not come out of a record."""
    from triton import JITFunction

    seen, run = [], JITFunction.run

    def counting(self, *args, **kwargs):
        seen.append(self)
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", counting):
        yield seen


def step(x: Tensor) -> list:
    """A step of the layer; the launches that are not out of a record."""
    with counted() as seen:
        LAYER(x).sum().backward()
    return seen


def warm() -> Tensor:
    """x, of a kind for which there are records."""
    os.environ["LORA_KERNELS_PLAN"] = "fused"
    records.forget()
    x = torch.randn(65, WIDTH).bfloat16().requires_grad_()
    assert step(x)
    assert step(x)
    assert not step(x)
    return x


def hooks_see_every_launch() -> None:
    from triton import knobs

    x, seen = warm(), []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    chain = knobs.runtime.launch_enter_hook
    if hasattr(chain, "add"):
        chain.add(hook)
    else:
        knobs.runtime.launch_enter_hook = hook
    try:
        ordinary = step(x)
    finally:
        if hasattr(chain, "remove"):
            chain.remove(hook)
        else:
            knobs.runtime.launch_enter_hook = chain
    assert len(ordinary) == len(seen) > 3
    assert not step(x)


def other_states_have_other_records() -> None:
    x = warm()
    os.environ["LORA_KERNELS_PLAN"] = "addmm"
    assert step(x)
    os.environ["LORA_KERNELS_PLAN"] = "fused"
    assert not step(x)
    with mock.patch.object(algorithm, "TABLE", (*algorithm.TABLE, "row")):
        os.environ["LORA_KERNELS_PLAN"] = "addmm"
        assert step(x)
    os.environ["LORA_KERNELS_PLAN"] = "fused"
    assert step(x)
    step(x)
    assert not step(x)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert step(x)
    torch.backends.cuda.matmul.allow_tf32 = False


def a_record_that_fails_gives_way() -> None:
    x = warm()

    def broken(*args):
        raise TypeError("another Triton")

    for key in list(records._records):
        records._records[key] = broken
    assert step(x)
    assert step(x)
    assert all("another Triton" in reason for reason in records._records.values())


def values_of_a_layer_are_looked_at_in_every_call() -> None:
    x = warm()
    LAYER.lora_dropout.p = 0.3
    assert step(x)
    LAYER.lora_dropout.p = 0.1
    assert not step(x)
    data = LAYER.lora_B.data
    LAYER.lora_B.data = torch.zeros(WIDTH + 1, R).bfloat16()
    try:
        step(x)
    except ValueError as error:
        assert "lora_B" in str(error)  # noqa: PT017
    else:
        raise AssertionError("lora_B has a row too many")
    LAYER.lora_B.data = data
    assert not step(x)


def the_output_may_change_in_place() -> None:
    x = warm()
    for shape in ((65, WIDTH), (1, 65, WIDTH), (5, 13, WIDTH)):
        for _ in range(4):
            LAYER(x.view(shape)).add_(1).sum().backward()


def grouped_ops_have_records() -> None:
    """Numbers of the groups are on the device before a call, so no operator shows where from."""
    os.environ["LORA_KERNELS_PLAN"] = "fused"
    records.forget()
    for scaling in (2.0, 0.5):
        for _ in range(3):
            p = make_grouped_problem(
                (9, 20, 5, 36), WIDTH, WIDTH, R, device="cpu", dtype=torch.bfloat16, sources=70
            )
            leaves = [t.requires_grad_() for t in (p.x, p.a, p.b)]
            with counted() as seen:
                y = lora_grouped_linear(
                    p.x, p.w, p.a, p.b, p.ends, groups=p.groups, index=p.index, scaling=scaling
                )
                torch.autograd.grad(y.sum(), leaves)
        assert not seen, records._records.values()
    assert len(records._records) == 4  # another scaling is another kind


def there_is_an_end_to_them() -> None:
    warm()
    with mock.patch.object(records, "_MOST", 5):
        for m in range(65, 75):
            x = torch.randn(m, WIDTH).bfloat16().requires_grad_()
            step(x)
        assert len(records._records) == 5


def autocast_and_modes_are_heeded() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names, x = [], warm()
    with Names():
        y = LAYER(x)
    assert [name for name in names if "lora_linear" in name]
    x32 = x.detach().float()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = LAYER(x32)
        assert y.dtype == torch.bfloat16


CHECKS = (
    records_launch_what_triton_would, hooks_see_every_launch, other_states_have_other_records,
    a_record_that_fails_gives_way, values_of_a_layer_are_looked_at_in_every_call,
    the_output_may_change_in_place, grouped_ops_have_records, there_is_an_end_to_them,
    autocast_and_modes_are_heeded,
)  # fmt: skip


def main() -> None:
    """Prints a JSON object: by check, None or what went wrong."""
    found = {}
    torch.set_num_threads(1)
    for check in CHECKS:
        if len(sys.argv) > 1 and not re.search(sys.argv[1], check.__name__):
            continue
        try:
            with standin.running_on(TARGET):
                check()
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
