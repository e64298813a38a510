"""What a user gets who installs the package: its names, its cost, its files."""

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lora_kernels

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "lora_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))

PUBLIC = [
    "LoRALinear", "LoRAMergedLinear", "LoRAEmbedding", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d",
    "LoRAQuantizedLinear", "frozen_weight",
    "LoRALayer", "LoRAExperts", "MultiLoRALinear", "adapter_parameters", "route",
    "Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ConvLoRA",
    "mark_only_lora_as_trainable", "lora_state_dict",
    "lora_linear", "lora_merged_linear", "lora_shared_linear", "lora_grouped_linear",
    "share_inputs",
    "apply_lora", "save_adapter", "load_adapter", "merged_state_dict", "merge_lora", "unmerge_lora",
    "use_merged_state_dicts",
    "patch_peft", "unpatch_peft", "report", "print_trainable_parameters", "adapter_callback",
    "push_to_hub",
]  # fmt: skip

# One direction of travel: a module may import those of its own level and below.
LEVELS = {
    "checks": 0,
    "distributed": 0,
    "environment": 0,
    "foreign": 0,
    "dropout": 0,
    "quantization": 0,
    "spec": 0,
    "dispatch": 1,
    "reference": 1,
    "testing": 1,
    "kernels": 2,
    "ops": 3,
    "functional": 4,
    "layers": 5,
    "model": 6,
    "adapters": 7,
    "integrations": 8,
    "reporting": 8,
    "report_rows": 0,
    "utils": 8,
    "": 9,  # lora_kernels/__init__.py
    "tuning": 10,
    "cli": 11,
    "__main__": 12,
}


def python(code):
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_runs_the_package_alone():
    """What takes long to import, triton among it, waits for its first use."""
    code = """
import json, sys, torch
before = set(sys.modules)
import lora_kernels
lora_kernels.Linear
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    # Of PyTorch and of the standard library nothing is loaded that torch itself has not loaded.
    assert python(code) == ["lora_kernels"]


def test_import_waits_with_pytorch_for_the_first_name():
    code = """
import json, sys
import lora_kernels
before = "torch" in sys.modules
names = [name in dir(lora_kernels) for name in lora_kernels.__all__]
found = lora_kernels.layers.Linear is lora_kernels.Linear
print(json.dumps([before, all(names), found, "torch" in sys.modules]))
"""
    assert python(code) == [False, True, True, True]


def test_star_import_gives_the_public_names():
    code = """
import json
before = set(dir())
from lora_kernels import *
print(json.dumps(sorted(set(dir()) - before - {"before"})))
"""
    assert python(code) == sorted(PUBLIC)


def test_names_are_those_that_type_checkers_see():
    """Each is what the imports under TYPE_CHECKING name, and there are no others."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lora_kernels.")
        for alias in node.names
    ]
    assert sorted(name for _, name in seen) == sorted(PUBLIC)
    for home, name in seen:
        assert getattr(lora_kernels, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("name", ["Linera", "_Linear", "__wrapped__"])
def test_a_name_that_is_none_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'lora_kernels' has no attribute '{name}'"):
        getattr(lora_kernels, name)


def test_import_of_the_ops_registers_all_of_them():
    """For programs that another process has exported."""
    code = """
import json, torch, lora_kernels.ops
registered = set(torch._C._dispatch_get_all_op_names())
import lora_kernels.cli.doctor, lora_kernels.testing.problem
lora_kernels.Linear
print(json.dumps(sorted(set(torch._C._dispatch_get_all_op_names()) - registered)))
"""
    assert [name for name in python(code) if name.startswith("lora_kernels::")] == []


def test_layers_work_where_triton_is_absent():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
import torch, lora_kernels as lora
layer = lora.Linear(4, 3, r=2, lora_dropout=0.5)
layer(torch.ones(2, 4)).sum().backward()
print(int("triton" in sys.modules or layer.lora_B.grad is None))
"""
    assert python(code) == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_exported(name):
    assert hasattr(lora_kernels, name)
    assert name in lora_kernels.__all__


def test_nothing_else_is_exported():
    assert sorted(lora_kernels.__all__) == sorted(PUBLIC)


def label(path):
    return str(path.relative_to(PACKAGE))


# Without kernels/: its files import triton and export nothing to users.
@pytest.mark.parametrize(
    "path", [file for file in FILES if not label(file).startswith("kernels")], ids=label
)
def test_every_exported_name_exists_and_is_documented(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value):
            assert vars(value).get("__doc__"), f"{name} has no docstring of its own"
        elif inspect.isfunction(value):
            assert value.__doc__, f"{name} has no docstring"


def imported_parts(path):
    """The parts of lora_kernels that a file imports anywhere in it: "functional", "layers", …"""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            if node.module == "lora_kernels":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("lora_kernels."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "lora_kernels":
                    yield rest.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_go_one_way(path):
    inside = path.relative_to(PACKAGE).parts
    part = inside[0].removesuffix(".py") if inside != ("__init__.py",) else ""
    for imported in imported_parts(path):
        assert imported in LEVELS, f"{path.name} imports {imported}, which has no level"
        assert LEVELS[imported] <= LEVELS[part], f"{path.name} imports {imported}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the repository, built from a copy so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(REPOSITORY, folder / "source", ignore=skipped)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
            "--wheel-dir", folder, folder / "source",
        ],
        check=True,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_package_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(REPOSITORY)) for path in FILES}
    assert files == {*expected, "lora_kernels/py.typed"}


def test_description_links_to_nothing_that_only_a_clone_has(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    _, _, description = wheel.read(name).decode().partition("\n\n")
    assert "The kernels have not run on a GPU yet" in description
    assert "[loralib](https://" in description
    assert "Benchmarks has the figures" in description
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert [link for link in links if not link.startswith("https://")] == []


def test_wheel_metadata_has_the_version_the_license_and_the_base_dependencies(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
    assert f"Version: {lora_kernels.__version__}" in lines
    assert "Requires-Python: >=3.10" in lines
    needed = [line for line in lines if line.startswith("Requires-Dist: ") and "extra" not in line]
    assert sorted(needed) == [
        "Requires-Dist: safetensors",
        "Requires-Dist: torch>=2.6",
        'Requires-Dist: triton; platform_system == "Linux"',
    ]
    assert any(file.endswith("LICENSE") for file in wheel.namelist())


def test_nothing_of_the_package_is_left_out_by_python_without_asserts():
    asserts = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert asserts == []
