"""Patches PEFT when it is imported, in this process and in every Python process started from it.

Python imports a module of this name when it starts. So a child of ``lora-kernels run`` is patched
however it is started: by a launcher, as the training that a command such as trl starts, or by
multiprocessing. It is not if it ignores PYTHONPATH (``python -E`` or ``-I``), or is given another
environment. Only the standard library is imported here: most processes never import PEFT.
"""

import importlib.machinery
import importlib.util
import os
import sys

__all__ = ["patch_on_import"]

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def patch_on_import() -> None:
    """Makes the import of peft call patch_peft(), here and in the Python processes started here.

    A second call changes nothing.
    """
    if "peft" in sys.modules:
        _patch()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
    paths = os.environ.get("PYTHONPATH", "")
    if _FOLDER not in paths.split(os.pathsep):
        # An empty entry of what was there stands for the current directory, and stays.
        os.environ["PYTHONPATH"] = os.pathsep.join([_FOLDER, paths] if paths else [_FOLDER])


def _patch() -> None:
    if not hasattr(sys.modules["peft"], "__path__"):
        return  # not the package, but a file of the program's own with its name
    try:
        from lora_kernels.integrations import patch_peft
    except ImportError as error:
        print(
            f"lora-kernels run: PEFT is not patched in {sys.executable}: {error}", file=sys.stderr
        )
    else:
        patch_peft()


class _PeftFinder:
    """Finds peft as the other finders do, and patches it when it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _patch()

        vars(spec.loader)["exec_module"] = exec_module
        return spec


def _run_next() -> None:
    """Runs the module of this name that Python would have imported without this one."""
    paths = [path for path in sys.path if os.path.abspath(path or ".") != _FOLDER]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    patch_on_import()
    _run_next()
