"""What type checkers see: the package is clean for mypy, and user code is told what is wrong."""

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_kernels

REPOSITORY = Path(__file__).parents[1]

# What a user writes. A line with a code in brackets behind it is one that a checker must refuse.
USER = """
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_kernels as lora

x = torch.ones(2, 4)
layer = lora.Linear(4, 4, r=2, lora_alpha=4, bias=False, dtype=torch.float32)
y: Tensor = layer(x) + layer(x=x)
other: lora.LoRALinear = layer.train().eval()
factors: tuple[nn.Parameter, nn.Parameter] = (layer.lora_A, layer.lora_B)
scaling: float = layer.scaling * layer.r
wrapped: lora.LoRALinear = lora.LoRALinear.from_linear(nn.Linear(4, 4), r=2, use_dora=True)
image: Tensor = lora.Conv2d(3, 4, kernel_size=3, r=2, stride=(1, 1), padding=1)(x)
convolution: lora.ConvLoRA = lora.LoRAConv2d.from_conv(nn.Conv2d(3, 4, 3), r=2)
rows: Tensor = lora.Embedding(9, 4, r=2, padding_idx=0)(torch.tensor([1]))
split: Tensor = lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True])(x)
mixed: Tensor = lora.MultiLoRALinear(4, 4, {"a": {"r": 2}}, bias=True)(x)
z: Tensor = lora.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, dropout_p=0.1)
model: nn.Sequential = lora.apply_lora(nn.Sequential(nn.Linear(4, 4)), r=2, lora_alpha=4)
model = lora.use_merged_state_dicts(lora.unmerge_lora(lora.merge_lora(model)))
model = lora.load_adapter(model, "adapter")
lora.mark_only_lora_as_trainable(model, bias="all")
state: dict[str, Tensor] = lora.lora_state_dict(model)
lora.save_adapter(model, Path("adapter"))
with lora.route(model, ["a", None]):
    model(x)
for row in lora.report(model):
    print(row.name)

lora.Linear(4, 4, rank=2)  # [call-arg]
lora.MergedLinear(4, 6, rank=2)  # [call-arg]
lora.Embedding(9, 4, rank=2)  # [call-arg]
lora.Conv1d(3, 4, 3, rank=2)  # [call-arg]
lora.ConvLoRA(nn.Conv2d, 3, 4, 3, strides=2)  # [call-arg]
lora.MultiLoRALinear(4, 4, {"a": {"r": 2}}, r=2)  # [call-arg]
lora.LoRALinear.from_linear(nn.Linear(4, 4), rank=2)  # [call-arg]
lora.apply_lora(model, rank=2)  # [call-arg]
lora.apply_lora(model, r=2, lora_alpha=4, bias="foo")  # [arg-type]
lora.mark_only_lora_as_trainable(model, "foo")  # [arg-type]
lora.lora_state_dict(model, bias="lora")  # [arg-type]
listed: nn.ModuleList = lora.merge_lora(model)  # [assignment]
lora.merge_lora(layer.lora_A)  # [type-var]
lora.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, dropout=0.1)  # [call-arg]
lora.Linear(4, 4, r="2")  # [arg-type]
lora.Linear(4, 4, r=2, dtype="float16")  # [arg-type]
lora.ConvLoRA(nn.Linear, 3, 4, 3)  # [arg-type]
word: str = layer(x)  # [assignment]
layer(x).upper()  # [attr-defined]
layer(3)  # [arg-type]
layer(x, x)  # [call-arg]
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[str]:
    """The lines that mypy writes about the package and the user's file, which is user.py."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    folder = tmp_path_factory.mktemp("types")
    (folder / "user.py").write_text(USER)
    options = ["--config-file", "pyproject.toml", "--cache-dir", str(folder / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "lora_kernels", str(folder / "user.py")],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # it has run, and the user errs
    return done.stdout.splitlines()


def test_mypy_finds_no_error_in_the_package(found):
    assert [line for line in found if line.startswith("lora_kernels/") and ": error:" in line] == []


def test_mypy_refuses_what_is_wrong_in_user_code_and_nothing_else(found):
    errors = (re.search(r"user\.py:(\d+): error: .*\[([\w-]+)\]$", line) for line in found)
    refused = {(int(error[1]), error[2]) for error in errors if error}
    marked = enumerate(USER.splitlines(), start=1)
    marks = ((number, re.search(r"  # \[([\w-]+)\]$", line)) for number, line in marked)
    assert refused == {(number, mark[1]) for number, mark in marks if mark}


def _functions() -> dict[str, Callable]:
    """The public functions, and the public methods and properties of the public classes."""
    found = {}
    for name in lora_kernels.__all__:
        public = getattr(lora_kernels, name)
        if not inspect.isclass(public):
            found[name] = public
            continue
        for kind in public.__mro__:
            if not kind.__module__.startswith("lora_kernels."):
                continue
            for method, held in vars(kind).items():
                function = getattr(held, "fget", getattr(held, "__func__", held))
                if inspect.isfunction(function) and re.match("__init__$|[^_]", method):
                    found[f"{kind.__name__}.{method}"] = function
    return found


@pytest.mark.parametrize(("name", "function"), _functions().items())
def test_public_signatures_are_annotated(name, function):
    signature = inspect.signature(function)
    taken = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    missing = [p.name for p in taken if p.annotation is p.empty]
    if signature.return_annotation is signature.empty and not name.endswith(".__init__"):
        missing.append("return")
    assert missing == []
