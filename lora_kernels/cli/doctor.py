"""lora-kernels doctor: what is installed, which algorithms products take, whether PEFT's layers are
fused under patch_peft(), what is wrong or missing.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Sequence

import torch
from torch import nn

import lora_kernels
from lora_kernels import functional
from lora_kernels.cli import advice
from lora_kernels.cli.advice import Missing
from lora_kernels.cli.variables import VARIABLES, misspelt, not_taken, unwritable_cache
from lora_kernels.dispatch import algorithm
from lora_kernels.dispatch.algorithm import GemmShape
from lora_kernels.integrations import patch_peft, unpatch_peft
from lora_kernels.reporting import report

__all__ = [
    "Findings", "Missing", "as_json", "as_text", "examine", "examine_machine", "machine_as_text",
    "main", "rest_as_text", "with_peft",
]  # fmt: skip

PACKAGES = ("torch", "triton", "peft", "transformers", "accelerate")
# Most machines of which this is true have no GPU, and lack nothing.
NO_DRIVER = Missing(
    "no NVIDIA driver answers",
    "if this machine has no GPU there is nothing to do, PyTorch's operators run; if it has one, "
    "install its driver",
)
# Tokens and pass of products with a 4096 x 4096 weight at rank 16, as in a model of 7 billion
# parameters.
PRODUCTS = {
    "training, forward": (8192, False),
    "training, backward": (8192, True),
    "decoding": (1, False),
}


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found. None: a package is not installed, a variable is not set.

    gpus: device, name, capability, driver of each; no_gpu: why there is none. algorithms: device,
    product, algorithm and reason. peft: what patch_peft() does to the installed PEFT.
    notes: what could be faster, files of the cache that are in use or ignored, and variables that
    nothing reads; with what changes it.
    wrong: empty if every variable has a value that it takes.
    missing: empty if the kernels will run on every GPU that there is, and for PEFT too if it is
    installed.
    """

    python: str
    versions: dict[str, str | None]
    variables: dict[str, str | None]
    gpus: list[dict[str, str]]
    no_gpu: str | None
    algorithms: list[dict[str, str]]
    peft: str
    notes: list[Missing]
    wrong: list[Missing]
    missing: list[Missing]

    def code(self) -> int:
        """The exit code: 1 if something is wrong or missing."""
        return 1 if self.wrong or self.missing else 0


def main(options: argparse.Namespace) -> int:
    """Prints what is found; 1 if something is wrong or missing."""
    if options.json:
        found = examine()
        print(as_json(found))
        return found.code()
    columns = shutil.get_terminal_size().columns
    found = examine_machine()
    print(machine_as_text(found, columns), flush=True)  # PEFT takes seconds to import
    found = with_peft(found)
    print(rest_as_text(found, columns))
    return found.code()


def examine() -> Findings:
    """examine_machine(), and what patch_peft() does to the installed PEFT."""
    return with_peft(examine_machine())


def with_peft(findings: Findings) -> Findings:
    """findings with what patch_peft() does to the installed PEFT, which takes seconds to import."""
    peft, not_fused = _peft()
    missing = list(dict.fromkeys(findings.missing + not_fused))
    return dataclasses.replace(findings, peft=peft, missing=missing)


def examine_machine() -> Findings:
    """Looks at the environment of this process and runs a small product on every GPU."""
    gpus, no_gpu = _gpus()
    notes = ([no_gpu] if no_gpu == NO_DRIVER else []) + misspelt()
    missing = [no_gpu] if no_gpu and no_gpu != NO_DRIVER else []
    refused = not_taken()
    wrong = list(refused)
    if os.environ.get("LORA_KERNELS_CACHE"):
        wrong += unwritable_cache()
    elif gpus:
        notes += unwritable_cache()
    algorithms: list[dict[str, str]] = []
    for name in [gpu["device"] for gpu in gpus] or ["cpu"]:
        device = torch.device(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                chosen = _algorithms(device)
            except ValueError as error:
                wrong.append(Missing(str(error), "unset LORA_KERNELS_PLAN"))
                break
            said = advice.notes(chosen, device)
        algorithms += chosen
        notes += advice.warned(caught, device) + said
        if gpus:
            lacking = _why_reference(chosen) or advice.compiler()
            missing += lacking if lacking or refused else _failures(device)
    return Findings(
        python=f"{platform.python_version()}, {sys.executable}",
        versions={
            "lora_kernels": lora_kernels.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        variables={name: os.environ.get(name) for name in VARIABLES},
        gpus=gpus,
        no_gpu=None if no_gpu is None else no_gpu.what,
        algorithms=algorithms,
        peft="",
        notes=list(dict.fromkeys(notes)),
        wrong=list(dict.fromkeys(wrong)),
        missing=list(dict.fromkeys(missing)),
    )


def as_json(findings: Findings) -> str:
    """The findings as one JSON object, with the names of their fields."""
    return json.dumps(dataclasses.asdict(findings), indent=2)


def as_text(findings: Findings, columns: int | None = None) -> str:
    """The findings as lines for people; columns: how wide they may be."""
    return "\n".join((machine_as_text(findings, columns), rest_as_text(findings, columns)))


def machine_as_text(findings: Findings, columns: int | None = None) -> str:
    """What was found before PEFT was asked."""
    rows = [("python", findings.python)]
    rows += [
        (name, version or f"not installed: pip install {name}")
        for name, version in findings.versions.items()
    ]
    rows += [(name, "not set" if v is None else v) for name, v in findings.variables.items()]
    rows += [
        (gpu["device"], f"{gpu['name']}, {gpu['capability']}, driver {gpu['driver']}")
        for gpu in findings.gpus
    ]
    if findings.no_gpu:
        rows.append(("GPU", f"none: {findings.no_gpu}"))
    rows += [
        (f"algorithm on {row['device']}", f"{row['product']}: {row['algorithm']}, {row['reason']}")
        for row in findings.algorithms
    ]
    return _aligned(rows, columns)


def rest_as_text(findings: Findings, columns: int | None = None) -> str:
    """What machine_as_text has left out."""
    rows = [("patch_peft()", findings.peft)]
    rows += [("note", f"{note.what}: {note.fix}") for note in findings.notes]
    rows += [("wrong", f"{wrong.what}: {wrong.fix}") for wrong in findings.wrong]
    rows += [("missing", f"{missing.what}: {missing.fix}") for missing in findings.missing]
    if not findings.missing:
        rows.append(("missing", "nothing"))
    return _aligned(rows, columns)


def _aligned(rows: Sequence[tuple[str, str]], columns: int | None) -> str:
    width = max(map(len, (*VARIABLES, "algorithm on cuda:0")))
    lines = []
    for label, value in rows:
        value_width = 10_000 if columns is None else max(30, columns - width - 2)
        first, *others = textwrap.wrap(
            value, value_width, break_long_words=False, break_on_hyphens=False
        ) or [""]
        lines.append(f"{label:<{width}}  {first}".rstrip())
        lines += [f"{'':<{width}}  {line}" for line in others]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _peft() -> tuple[str, list[Missing]]:
    """What report() says of a layer of PEFT under patch_peft(), which is undone afterwards."""
    if _version("peft") is None:
        return "peft is not installed", []
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.layer import Linear
    except Exception as error:  # incompatible versions fail in many ways
        reason = f"peft cannot be imported: {' '.join(str(error).split())}"
        return reason, [Missing(reason, "pip install --upgrade peft transformers accelerate")]
    upstream = Linear.forward
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
        caught.clear()
        patch_peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a variable, which is a note
            (row,) = report(model)
    except ValueError as error:  # a variable, which examine() has put into wrong
        return f"not known: {error}", []
    finally:
        if Linear.forward is not upstream:
            unpatch_peft()
    if not row.fused:
        reason = f"lora.Linear of peft is not fused: {row.reason}"
        return reason, [Missing(reason, "pip install --upgrade peft")]
    found = ["lora.Linear of peft is fused", *(str(w.message) for w in caught)]
    return "; ".join(found + _refused_by_transformers()), []


def _refused_by_transformers() -> list[str]:
    """What the installed transformers says of the installed PEFT in model.add_adapter()."""
    try:
        from transformers.integrations.peft import MIN_PEFT_VERSION
        from transformers.utils.peft_utils import check_peft_version
    except ImportError:
        return []  # no transformers, or one that does not ask
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        return [
            f"model.add_adapter() of transformers {_version('transformers')} refuses peft "
            f"{_version('peft')}, peft.get_peft_model() takes it: {error}"
        ]
    return []


def _gpus() -> tuple[list[dict[str, str]], Missing | None]:
    """The GPUs, and why there is none."""
    try:
        gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:  # the driver counts more than CUDA reaches
        reason = str(error).partition("\n")[0]
        return [], Missing(reason, "update the driver, or see what nvidia-smi says of the GPU")
    return gpus, None if gpus else _why_no_gpu()


def _gpu(index: int) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": properties.gcnArchName if hip else f"sm_{properties.major}{properties.minor}",
        "driver": f"HIP {hip}" if hip else _driver() or "unknown",
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, which PyTorch does not tell; None if there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else None


def _why_no_gpu() -> Missing:
    driver = _driver()
    if driver is None and torch.version.hip is None:
        return NO_DRIVER
    if torch.version.cuda is None and torch.version.hip is None:
        return Missing(
            f"driver {driver} is there, torch {torch.__version__} is built without CUDA",
            "pip install --force-reinstall torch",
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return Missing(
            f"CUDA_VISIBLE_DEVICES={hidden!r} shows no GPU", "unset CUDA_VISIBLE_DEVICES"
        )
    try:
        torch.cuda.init()
        reason = "PyTorch sees no GPU"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
    return Missing(reason, "update the driver, or run on a machine with a GPU")


def _algorithms(device: torch.device) -> list[dict[str, str]]:
    rows = []
    for name, (m, backward) in PRODUCTS.items():
        shape = GemmShape(m, 4096, 4096, 16, torch.bfloat16, device, backward=backward)
        chosen = algorithm.choose(shape)
        what = f"{name}, [{shape.m}, 4096] x [4096, 4096], r=16, bfloat16"
        row = {"device": str(device), "product": what}
        rows.append(row | {"algorithm": chosen.name, "reason": chosen.reason})
    return rows


def _why_reference(algorithms: list[dict[str, str]]) -> list[Missing]:
    """What keeps a GPU's products from the kernels."""
    fixes = {
        "LORA_KERNELS_PLAN": "unset LORA_KERNELS_PLAN",
        "3.7.1": 'pip install --upgrade "triton>=3.7.1"',
        "is not installed": 'pip install --upgrade "triton>=3.4"',
    }
    none = "PyTorch's operators run here; the kernels need another GPU"
    return [
        Missing(
            row["reason"], next((fix for word, fix in fixes.items() if word in row["reason"]), none)
        )
        for row in algorithms
        if row["algorithm"] == "reference"
    ]


def _failures(device: torch.device) -> list[Missing]:
    """What went wrong when a small product's forward and backward ran on device."""
    shapes = (16, 64), (64, 64), (8, 64), (64, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            x, w, a, b = (
                torch.ones(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
                for shape in shapes
            )
            functional.lora_linear(x, w.detach(), a, b, dropout_p=0.1).sum().backward()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            return [Missing(f"{device}: {reason}", "see what nvidia-smi says of it")]
    return [
        Missing(
            " ".join(str(warning.message).split()),
            "Triton compiles with gcc and Python's headers: apt-get install gcc python3-dev",
        )
        for warning in caught
        if str(warning.message).startswith("lora_kernels: algorithm")
    ]
