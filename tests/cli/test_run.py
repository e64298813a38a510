"""lora-kernels run: a script or a module as Python runs it, with PEFT patched on its import."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lora_kernels
from lora_kernels.cli import startup

STARTUP = Path(startup.__file__).parent

# What a program can see of how it was started.
FACTS = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "file": __file__, "name": __name__,
    "main": sys.modules["__main__"].__dict__ is globals(), "package": __package__ or None,
    "peft": "peft" in sys.modules, "torch": "torch" in sys.modules,
}), flush=True)
"""
ARGUMENTS = ["--", "--rank", "4", "-m", "x", "-h", "--", "last"]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """What ``python arguments`` does in directory cwd."""
    root = str(Path(lora_kernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
def test_run_shows_a_program_what_it_sees_under_python(tmp_path, as_module):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "program.py").write_text(FACTS + "sys.exit(3)")
    target = ["-m", "package.program"] if as_module else ["package/program.py"]
    expected = python(*target, *ARGUMENTS, cwd=tmp_path)
    actual = python("-m", "lora_kernels", "run", *target, *ARGUMENTS, cwd=tmp_path)
    assert actual.returncode == expected.returncode == 3, actual.stderr
    facts = json.loads(actual.stdout)
    assert facts == json.loads(expected.stdout)
    assert facts["argv"][1:] == ARGUMENTS
    assert facts["name"] == "__main__"
    assert not facts["peft"]


@pytest.mark.parametrize(
    "source",
    ["def f():\n    raise KeyError('left out')\n\nf()\n", "print(1\n", "import not_there_at_all\n"],
    ids=["raises", "syntax", "import"],
)
def test_run_ends_an_exception_with_pythons_traceback_and_1(tmp_path, in_process, capsys, source):
    script = tmp_path / "script.py"
    script.write_text(source)
    expected = python(str(script), cwd=tmp_path)
    assert in_process(["run", str(script)]) == expected.returncode == 1
    assert capsys.readouterr().err == expected.stderr


def test_run_ends_after_ctrl_c_as_python_does(tmp_path):
    source = "import os, signal\n\ndef f():\n    os.kill(os.getpid(), signal.SIGINT)\n\nf()\n"
    (tmp_path / "script.py").write_text(source)
    expected = python("script.py", cwd=tmp_path)
    actual = python("-m", "lora_kernels", "run", "script.py", cwd=tmp_path)
    assert actual.returncode == expected.returncode == -signal.SIGINT
    assert actual.stderr == expected.stderr


def test_run_shows_ctrl_c_with_the_hook_of_the_program(tmp_path):
    source = "import sys\nsys.excepthook = lambda *_: print('mine')\nraise KeyboardInterrupt\n"
    (tmp_path / "script.py").write_text(source)
    actual = python("-m", "lora_kernels", "run", "script.py", cwd=tmp_path)
    assert (actual.stdout, actual.stderr) == ("mine\n", "")


def test_run_of_a_script_without_an_exception_ends_with_0(tmp_path, in_process):
    (tmp_path / "script.py").write_text("seen = 1")
    assert in_process(["run", str(tmp_path / "script.py")]) == 0
    assert sys.modules["__main__"].seen == 1


PATCHED = """
from peft.tuners.lora.layer import Linear
print("patched", hasattr(Linear.forward, "__wrapped__"), Linear.forward.__module__)
"""


def test_accelerate_launch_runs_a_script_in_every_process(tmp_path):
    """Under torchrun, and with PEFT: tests/distributed."""
    (tmp_path / "script.py").write_text(
        """
import sys
import torch
from torch import distributed
distributed.init_process_group("gloo")
rank = torch.tensor(distributed.get_rank() + 1)
distributed.all_reduce(rank)
with open(f"rank{distributed.get_rank()}", "w") as file:
    print(__name__, sys.argv[1:], rank.item(), "peft" in sys.modules, file=file)
distributed.destroy_process_group()
"""
    )
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0 -m lora_kernels run"
    done = python(*launch.split(), "script.py", "--lr", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        text = (tmp_path / f"rank{rank}").read_text()
        assert text == "__main__ ['--lr', '1'] 3 False\n"


def test_patch_of_a_peft_that_is_there_already_comes_at_once(tmp_path, in_process, capsys):
    from peft.tuners.lora.layer import Linear

    assert not hasattr(Linear.forward, "__wrapped__")
    script = tmp_path / "script.py"
    script.write_text(PATCHED)
    assert in_process(["run", str(script)]) == 0
    assert capsys.readouterr().out.startswith("patched True")


def test_patch_leaves_a_module_of_ones_own_called_peft_alone(tmp_path):
    (tmp_path / "peft.py").write_text("rank = 7")
    (tmp_path / "script.py").write_text("import peft\nprint(peft.rank)")
    done = python("-m", "lora_kernels", "run", "script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


# A stand-in for the package PEFT and for this package's patch: their import takes seconds.
STAND_INS = {
    "peft/__init__.py": "patched = False",
    "lora_kernels/__init__.py": "",
    "lora_kernels/integrations.py": "def patch_peft():\n    import peft\n    peft.patched = True",
}
CHILDREN = {
    "subprocess": "import subprocess\nsubprocess.run([sys.executable, 'child.py'], check=True)",
    "grandchild": "import subprocess\nsubprocess.run([sys.executable, '-c', "
    "\"import subprocess, sys; subprocess.run([sys.executable, 'child.py'], check=True)\"])",
    "spawn": "import multiprocessing\nfrom child import tell\n"
    "process = multiprocessing.get_context('spawn').Process(target=tell)\n"
    "process.start(), process.join()",
    "forkserver": "import multiprocessing\nfrom child import tell\n"
    "process = multiprocessing.get_context('forkserver').Process(target=tell)\n"
    "process.start(), process.join()",
}


@pytest.mark.parametrize("how", CHILDREN)
def test_processes_that_the_program_starts_are_patched(how, tmp_path):
    for name, text in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.own = 'own'")
    (tmp_path / "child.py").write_text(
        "def tell():\n    import peft\n    print(peft.patched, own)\n"
        "if __name__ == '__main__':\n    tell()"
    )
    main = f"import sys\nif __name__ == '__main__':\n{textwrap.indent(CHILDREN[how], '    ')}"
    (tmp_path / "script.py").write_text(main)
    (tmp_path / "start.py").write_text(
        # What `run` does, without this package's own import.
        f"import runpy, sys\nsys.path.insert(0, {str(STARTUP)!r})\n"
        "sys.modules.pop('sitecustomize', None)\nimport sitecustomize\n"
        "runpy.run_path('script.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "start.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("True own\n", "")


def test_run_starts_children_that_patch_peft_on_its_import(tmp_path):
    (tmp_path / "script.py").write_text(
        "import subprocess, sys\n"
        "code = 'import sys; print(type(sys.meta_path[0]).__name__, \"torch\" in sys.modules)'\n"
        "subprocess.run([sys.executable, '-c', code])\n"
    )
    done = python("-m", "lora_kernels", "run", "script.py", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("_PeftFinder False\n", "")


@pytest.mark.parametrize("before", [None, "", ":elsewhere", "elsewhere:"], ids=repr)
def test_what_was_in_pythonpath_stays(before, tmp_path):
    """An empty entry is the current directory, which children may import from."""
    code = "from lora_kernels.cli.startup import sitecustomize as s; s.patch_on_import()"
    code += "; s.patch_on_import(); import os; print(os.environ['PYTHONPATH'])"
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if before is not None:
        environment["PYTHONPATH"] = before
    root = Path(lora_kernels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    expected = f"{STARTUP}:{before}" if before else str(STARTUP)
    assert done.stdout == f"{expected}\n", done.stderr


def test_a_child_without_this_package_goes_on_with_plain_peft(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").touch()
    (tmp_path / "child.py").write_text(
        "import sys\nsys.modules['lora_kernels'] = None\nimport peft"
    )
    done = subprocess.run(
        [sys.executable, "child.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(STARTUP)},
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.startswith("lora-kernels run: PEFT is not patched in ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["walk"], "walk"),
        (["run"], "SCRIPT_OR_MODULE"),
        (["run", "--fast", "script.py"], "--fast"),
        (["run", "nowhere/script.py"], "nowhere/script.py"),
        (["run", "."], "cannot open ."),
        (["run", "-m", "no_such.module"], "no_such.module"),
        (["run", "-m", "json"], "json"),
        (["doctor", "--xml"], "--xml"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_2(in_process, capsys, arguments, named):
    try:
        code = in_process(arguments)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("lora-kernels")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert named in err
