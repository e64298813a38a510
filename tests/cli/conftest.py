"""main() in this process, as a new one would have it."""

import os
import sys

import pytest

from lora_kernels import unpatch_peft
from lora_kernels.cli import main


@pytest.fixture
def in_process(monkeypatch):
    """main(), with all that it changes of the process put back; it starts as a new one does."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # torch.distributed leaves its own
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield main
    unpatch_peft()


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Runs convert in tmp_path: exit code, lines of stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main(["convert", *arguments])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.fixture
def refused(convert, tmp_path):
    """Runs convert, which must end with 2 and one line, and leave every file as it was."""

    def files():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def run(*arguments):
        before = files()
        code, lines, err = convert(*arguments)
        assert code == 2
        assert lines == []
        assert err.startswith("lora-kernels")
        assert err.count("\n") == 1
        assert files() == before
        return err

    return run
