"""The command line, ``lora-kernels`` or ``python -m lora_kernels``.

Exit codes: 0; 1 if doctor found something missing, or check something wrong; 2, with one line on
stderr, if an argument or a file is wrong; 130 after Ctrl-C; 141 if the program that reads stdout
has ended. What ``run`` runs ends with its own exit code.
"""

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from lora_kernels.adapters.formats import FORMATS
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
    parser = _parser()
    if not own:
        parser.print_help()
        return 2
    options = parser.parse_args(own, argparse.Namespace(arguments=its))
    try:
        return options.command(options)
    except UsageError as error:
        print(f"lora-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if options.command is _run:  # the program's own end
            raise
        print("lora-kernels: interrupted", file=sys.stderr)
        return 130


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """argv up to the program that run is to run, and the program's own arguments as they are."""
    if argv[:1] != ["run"]:
        return argv, []
    flags = itertools.takewhile(lambda argument: argument.startswith("-"), argv[1:])
    end = 2 + len(list(flags))
    return argv[:end], argv[end:]


def _version() -> str:
    import torch

    import lora_kernels

    return f"lora_kernels {lora_kernels.__version__}, torch {torch.__version__}"


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lora-kernels", description="LoRA on Triton kernels.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (_add_run, _add_doctor, _add_check, _add_tune, _add_convert, _add_inspect):
        add(commands)
    return parser


def _add_run(commands) -> None:
    run = commands.add_parser(
        "run",
        usage="%(prog)s [--report] [--quiet] [-m] SCRIPT_OR_MODULE [ARGUMENT ...]",
        help="run a Python script with PEFT's LoRA layers on this package's kernels",
        description="Runs a script as `python SCRIPT` does, or a module as `python -m MODULE` "
        "does, with PEFT patched as by lora_kernels.patch_peft() once the program imports PEFT. "
        "Works under launchers: torchrun -m lora_kernels run SCRIPT, accelerate launch -m "
        "lora_kernels run SCRIPT. Python processes that the program starts are patched as well, "
        "but for those that ignore PYTHONPATH (python -E or -I, a new environment). PyTorch is "
        "imported before the program starts: set environment variables that it reads on import, "
        "such as OMP_NUM_THREADS, outside of the program.",
    )
    run.add_argument("-m", dest="as_module", action="store_true", help="run a module by its name")
    run.add_argument(
        "--report",
        action="store_true",
        help="print on stderr, after the first training step, what PEFT's LoRA layers run on, and "
        "why",
    )
    run.add_argument(
        "--quiet",
        action="store_true",
        help="do not say after the first training step how many layers train on the kernels",
    )
    run.add_argument("target", metavar="SCRIPT_OR_MODULE")
    run.set_defaults(command=_run)


def _add_doctor(commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="print versions, GPUs, what will be fused and what is missing",
        description="Prints versions, GPUs, the algorithm of representative products and what is "
        "missing, with the command that fixes it. Exit code: 0 if the kernels will run, 1 if "
        "something keeps them from it.",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object, for programs")
    doctor.set_defaults(command=_doctor)


def _add_check(commands) -> None:
    check = commands.add_parser(
        "check",
        help="check every kernel on this GPU against float64",
        description="Runs every kernel in every dtype on this GPU, twice, and compares the results "
        "with float64 and with each other. Verdicts are kept in the cache directory "
        "(LORA_KERNELS_CACHE, or ~/.cache/lora_kernels), where training runs read them: a kernel "
        "that is wrong here is not used. Exit code: 0 if all are right, 1 if not.",
    )
    check.add_argument("--json", action="store_true", help="one JSON object, for programs")
    check.add_argument(
        "--kernels", type=_names, default=[], metavar="LIST", help="only these, comma-separated"
    )
    check.add_argument(
        "--seconds",
        type=_option("duration"),
        default=60.0,
        metavar="S",
        help="what has not begun by then is left out (default: %(default)g)",
    )
    check.add_argument(
        "--jobs", type=_option("count"), metavar="N", help="processes (default: one a core)"
    )
    check.set_defaults(command=_check)


def _add_tune(commands) -> None:
    tune = commands.add_parser(
        "tune",
        usage="%(prog)s [MODEL] [options]",
        help="measure on this GPU which kernels are fastest for a model, and keep it",
        description="Times the algorithms (fused, addmm) and the tiles of the kernels at the "
        "shapes of a model, after a check against float64, and keeps what is fastest in the cache "
        "directory (LORA_KERNELS_CACHE, or ~/.cache/lora_kernels). Every later run on this GPU, "
        "with this driver and these versions, takes it from there. LORA_KERNELS_TUNE=first-use "
        "measures the algorithms in the first calls of a training run instead. Lists are "
        "comma-separated.",
    )
    tune.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder with config.json, or that file"
    )
    tune.add_argument(
        "--shapes", metavar="LIST", help="layers as KxN, such as 4096x1024, or llama3-8b"
    )
    numbers = {
        "--tokens": ("count", [], "numbers of tokens (default: 16,512,4096)"),
        "--ranks": ("count", [16], "ranks (default: 16)"),
        "--dropout": ("probability", [0.0, 0.1], "dropout probabilities (default: 0,0.1)"),
    }
    for name, (kind, default, text) in numbers.items():
        tune.add_argument(
            name, type=_list_of(_option(kind)), default=default, metavar="LIST", help=text
        )
    tune.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="(default: bfloat16)"
    )
    tune.add_argument(
        "--factors",
        type=_list_of(str, ("own", "float32")),
        default=["own", "float32"],
        metavar="LIST",
        help="dtypes of lora_A and lora_B: own is the layer's (default: own,float32)",
    )
    tune.add_argument(
        "--minutes",
        type=float,
        default=5.0,
        metavar="T",
        help="when to stop (default: %(default)g)",
    )
    tune.add_argument("--jobs", type=_option("count"), metavar="N", help="processes that compile")
    instead = tune.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print what would be measured")
    instead.add_argument("--show", action="store_true", help="print what is kept for this GPU")
    instead.add_argument("--clear", action="store_true", help="remove what is kept")
    tune.set_defaults(command=_tune)


def _names(text: str) -> list[str]:
    from lora_kernels.tuning.check import names

    return _list_of(str, names())(text)


def _option(kind: str):
    """The type of that name in tuning/options.py."""
    from lora_kernels.tuning import options

    return getattr(options, kind)


def _list_of(kind, choices=()):
    from lora_kernels.tuning.options import listed

    return listed(kind, choices)


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert",
        usage="%(prog)s SOURCE DESTINATION [options]",
        help="convert an adapter from the files of one tool to those of another",
        description=f"Formats: {', '.join(FORMATS)}. SOURCE's is recognised by its content. "
        "Without --to, PEFT's directory (adapter_config.json and adapter_model.safetensors, as "
        "save_adapter writes it, too) becomes a file of torch.save with the keys of loralib's "
        "lora_state_dict, and everything else becomes such a directory. Nothing pickled is "
        "executed. What the other format cannot hold is refused, or written in an equivalent form "
        "with a remark. Factors in loralib's file do not tell a convolution from a Linear: the "
        "command prints what it took each module for. For convolutions load the file into the "
        "model and call lora_kernels.save_adapter.",
    )
    convert.add_argument("source", metavar="SOURCE", help="a file or a directory")
    convert.add_argument("destination", metavar="DESTINATION", help="must not be there yet")
    convert.add_argument("--to", choices=FORMATS, metavar="FORMAT", help="of DESTINATION")
    convert.add_argument(
        "--merged",
        action="store_true",
        help="SOURCE is a whole state dict that loralib saved in eval mode, with the update in its "
        "weights. DESTINATION becomes the same with base weights. No file tells its mode: one "
        "that loralib saved in train mode would be damaged. Takes --lora-alpha, which holds for "
        "all layers, --enable-lora, --out-splits, --embedding and --fan-in-fan-out",
    )
    _add_hints(convert)
    convert.set_defaults(command=_convert)


def _add_inspect(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        usage="%(prog)s SOURCE [options]",
        help="show what an adapter's files hold, and what is suspicious about them",
        description=f"Formats: {', '.join(FORMATS)}. Shows format, layers, ranks, scalings, dtypes "
        "and size, and what is suspicious: lora_B of zeros, NaN, ranks that differ from the "
        "config, names that no plain model has. With --base, also layers that are not in it.",
    )
    inspect.add_argument("source", metavar="SOURCE", help="a file or a directory")
    inspect.add_argument("--json", action="store_true", help="one JSON object, for programs")
    _add_hints(inspect)
    inspect.set_defaults(command=_inspect)


def _add_hints(command) -> None:
    """The options that tell what SOURCE does not."""
    command.add_argument(
        "--from", dest="source_format", choices=FORMATS, metavar="FORMAT", help="of SOURCE"
    )
    command.add_argument(
        "--base",
        metavar="PATH",
        help="the base model's directory, or its config.json: tells the heads of q_proj and k_proj "
        "and, with weights, the paths of modules",
    )
    lacking = command.add_argument_group(
        "what SOURCE does not hold, as a loralib file does not",
        "NAME is the path of a module in the model, or the end of one.",
    )
    lacking.add_argument(
        "--lora-alpha",
        type=float,
        metavar="ALPHA",
        help="lora_alpha of the layers; required if the file does not tell it",
    )
    lacking.add_argument(
        "--lora-dropout", type=float, default=0.0, metavar="P", help="(default: %(default)s)"
    )
    lacking.add_argument(
        "--fan-in-fan-out",
        action="store_true",
        help="the base weights are stored [in, out], as in GPT-2",
    )
    lacking.add_argument(
        "--enable-lora",
        action="append",
        default=[],
        metavar="[NAME=]1,0,1",
        help="enable_lora of a MergedLinear; without NAME, of all that have stacked factors",
    )
    lacking.add_argument(
        "--out-splits",
        action="append",
        default=[],
        metavar="[NAME=]4096,1024,1024",
        help="sizes of its groups if they are not equal",
    )
    lacking.add_argument(
        "--embedding", action="append", default=[], metavar="NAME", help="NAME is an Embedding"
    )
    lacking.add_argument(
        "--modules-to-save",
        action="append",
        default=[],
        metavar="NAME",
        help="NAME was trained as a whole, as a new head is",
    )
    lacking.add_argument(
        "--drop-prefix",
        default="",
        metavar="PREFIX",
        help="what the file has in front of every key and the model has not, such as model. of a "
        "LightningModule; names of other wrappers are taken off unasked",
    )


def _run(options: argparse.Namespace) -> int:
    from lora_kernels.cli.run import run_module, run_script

    if options.quiet:
        os.environ["LORA_KERNELS_QUIET"] = "1"  # in the processes that the program starts, too
    if options.report:
        os.environ["LORA_KERNELS_REPORT"] = "1"
    run = run_module if options.as_module else run_script
    return run(options.target, options.arguments)


def _doctor(options: argparse.Namespace) -> int:
    from lora_kernels.cli import doctor

    if options.json:
        found = doctor.examine()
        print(doctor.as_json(found))
        return 1 if found.missing else 0
    columns = shutil.get_terminal_size().columns
    found = doctor.examine_machine()
    print(doctor.machine_as_text(found, columns), flush=True)  # PEFT takes seconds to import
    found = doctor.with_peft(found)
    print(doctor.rest_as_text(found, columns))
    return 1 if found.missing else 0


def _check(options: argparse.Namespace) -> int:
    from lora_kernels.cli.check import check

    return check(options)


def _tune(options: argparse.Namespace) -> int:
    from lora_kernels.cli.tune import tune

    return tune(options)


def _convert(options: argparse.Namespace) -> int:
    from lora_kernels.cli.convert import convert

    for line in convert(options):
        print(line)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from lora_kernels.cli.inspect import as_json, as_text, inspect

    found = inspect(options)
    print(as_json(found) if options.json else as_text(found))
    return 0
