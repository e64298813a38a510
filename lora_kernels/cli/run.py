"""lora-kernels run: a program as Python itself would run it, with PEFT patched when it is imported.

PEFT takes seconds to import, so nothing is imported for a program that does not use it. A finder
in front of sys.meta_path waits for ``import peft`` and calls patch_peft() right after it, in this
process and in the Python processes that it starts.
"""

import argparse
import builtins
import importlib.util
import os
import re
import runpy
import sys
import types
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader

from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.startup.sitecustomize import patch_on_import

__all__ = ["main", "run_module", "run_script"]


def main(options: argparse.Namespace) -> int:
    """Runs what the command line asks for, and returns its exit code."""
    if options.quiet:
        os.environ["LORA_KERNELS_QUIET"] = "1"  # in the processes that the program starts, too
    if options.report:
        os.environ["LORA_KERNELS_REPORT"] = "1"
    run = run_module if options.as_module else run_script
    return run(options.target, options.arguments)


def run_script(path: str, arguments: Sequence[str]) -> int:
    """Runs a file as ``python path arguments`` would, and returns its exit code.

    __main__, __file__, sys.argv, sys.path[0] and tracebacks are those of that command.
    Raises: UsageError if the file cannot be read; SystemExit as the script does.
    """
    file = os.path.abspath(path)
    loader = SourceFileLoader("__main__", file)
    try:
        source = loader.get_data(file)
    except OSError as error:
        raise UsageError(
            f"run: cannot open {path}: {error.strerror}{_instead(path, arguments)}"
        ) from None
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __file__=file, __cached__=None, __loader__=loader)
    sys.modules["__main__"] = main
    sys.argv = [path, *arguments]
    _replace_first_path(os.path.dirname(os.path.realpath(file)))
    patch_on_import()
    # Not loader.source_to_code, whose frames a SyntaxError's traceback would show.
    return _outcome(lambda: exec(compile(source, file, "exec", dont_inherit=True), main.__dict__))


def run_module(name: str, arguments: Sequence[str]) -> int:
    """Runs a module as ``python -m name arguments`` would, and returns its exit code.

    Raises: UsageError if there is no such module; SystemExit as the module does.
    """
    _replace_first_path(os.getcwd())
    sys.argv = ["-m", *arguments]  # while the module's packages are imported, as in Python
    patch_on_import()
    if not _is_executable(name):
        raise UsageError(f"run: no module named {name} that can be run")
    return _outcome(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def _instead(path: str, arguments: Sequence[str]) -> str:
    """What was meant by a command in the place of a script."""
    name = os.path.basename(path)
    rest = " ".join(arguments)
    if re.fullmatch(r"python[\d.]*", name):
        return f"; did you mean lora-kernels run {rest}?"
    if name in ("accelerate", "torchrun") and os.sep not in path:
        script = next((word for word in arguments if word.endswith(".py")), "SCRIPT")
        launcher = "accelerate launch" if name == "accelerate" else name
        return f"; did you mean {launcher} -m lora_kernels run {script}?"
    if not name.endswith(".py") and _is_executable(path):
        return f"; did you mean lora-kernels run -m {' '.join([path, *arguments])}?"
    return ""


def _is_executable(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, TypeError, ValueError):
        return False
    if spec is not None and spec.submodule_search_locations is not None:
        return not module.endswith(".__main__") and _is_executable(f"{module}.__main__")
    return spec is not None


def _replace_first_path(directory: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = directory


def _outcome(run) -> int:
    """0, or 1 after an exception, whose traceback starts where the program does.

    Raises: KeyboardInterrupt, with which Python ends the process as it always does.
    """
    try:
        run()
    except Exception as error:
        traceback = _its_own(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        return 1
    except KeyboardInterrupt as error:
        traceback, hook = _its_own(error.__traceback__), sys.excepthook
        sys.excepthook = lambda kind, value, _: hook(
            kind, value.with_traceback(traceback), traceback
        )
        raise
    return 0


def _its_own(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """traceback from the program's first frame on."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return traceback
