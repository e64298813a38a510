"""The command line, ``lora-kernels`` or ``python -m lora_kernels``.

Exit codes: 0; 1 if doctor or check found something wrong, or doctor something missing; 2, with
one line on stderr, if an argument or a file is wrong; 3 if check found nothing wrong but had no
time for all; 130 after Ctrl-C; 141 if the program that reads stdout has ended. What ``run`` runs
ends with its own exit code. A command is the module of its name here, which is imported if it is
asked for, and an entry of COMMANDS in arguments.py.
"""
# PYTHON_ARGCOMPLETE_OK: argcomplete's completion for all commands looks for this line here.

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lora_kernels.cli import arguments
from lora_kernels.cli.errors import UsageError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    argv: the arguments without the program's name; None takes those of sys.argv.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["run"]:  # stdout is the program's own
        return _main(argv)
    if hasattr(sys.stdout, "reconfigure"):  # names of files may have what stdout has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _main(argv)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell has it for SIGPIPE


def _main(argv: list[str]) -> int:
    own, its = _split(argv)
    parser = arguments.parser()
    _complete(parser)
    if not own:
        parser.print_help()
        return 2
    options = parser.parse_args(own, argparse.Namespace(arguments=its))
    try:
        return import_module(f"{__name__}.{options.command}").main(options)
    except UsageError as error:
        print(f"lora-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if options.command == "run":  # the program's own end
            raise
        print("lora-kernels: interrupted", file=sys.stderr)
        return 130


def _complete(parser: argparse.ArgumentParser) -> None:
    """Ends the process with what the shell asked for, if it asks for completions."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """argv up to the program that run is to run, and the program's own arguments as they are."""
    if argv[:1] != ["run"]:
        return argv, []
    flags = itertools.takewhile(lambda argument: argument.startswith("-"), argv[1:])
    end = 2 + len(list(flags))
    return argv[:end], argv[end:]
