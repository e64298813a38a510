"""The arguments of every command, which the help texts show. PyTorch is not imported for them."""

import argparse
import importlib.metadata
from typing import NoReturn

import lora_kernels
from lora_kernels.adapters.format_names import FORMAT_NAMES
from lora_kernels.tuning import options

__all__ = ["COMMANDS", "DTYPES", "parser"]

DTYPES = ("bfloat16", "float16", "float32")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and name the help of the command."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, which asks each command; what one does not know is its own error."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """What the command line takes. Options of a command have its name in ``command``."""
    parser = _Parser(prog="lora-kernels", description="LoRA on Triton kernels.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="COMMAND", title="commands"
    )
    for name, add in COMMANDS.items():
        add(commands, name)
    return parser


def _version() -> str:
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return f"lora_kernels {lora_kernels.__version__}, torch {torch}"


def _add_run(commands, name: str) -> None:
    run = commands.add_parser(
        name,
        usage="%(prog)s [--report] [--quiet] [-m] SCRIPT_OR_MODULE [ARGUMENT ...]",
        help="run a Python script with PEFT's LoRA layers on this package's kernels",
        description="Runs a script as `python SCRIPT` does, or a module as `python -m MODULE` "
        "does, with PEFT patched as by lora_kernels.patch_peft() once the program imports PEFT. "
        "Works under launchers: torchrun -m lora_kernels run SCRIPT, accelerate launch -m "
        "lora_kernels run SCRIPT. Python processes that the program starts are patched as well, "
        "but for those that ignore PYTHONPATH (python -E or -I, a new environment).",
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


def _add_doctor(commands, name: str) -> None:
    doctor = commands.add_parser(
        name,
        help="print versions, GPUs, what will be fused and what is missing",
        description="Prints versions, GPUs, the algorithm of representative products, values of "
        "variables that are wrong and what is missing, with the command that fixes it. Exit code: "
        "0 if nothing is wrong or missing, 1 if something is. A machine without a GPU lacks "
        "nothing.",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _add_check(commands, name: str) -> None:
    check = commands.add_parser(
        name,
        help="check every kernel on this GPU against float64",
        description="Runs every kernel in every dtype on this GPU, twice, and compares the results "
        "with float64 and with each other. Verdicts are kept in the cache directory "
        "(LORA_KERNELS_CACHE, or ~/.cache/lora_kernels), where training runs read them: a kernel "
        "that is wrong here is not used. Exit code: 0 if all are right, 1 if one is wrong, 3 if "
        "none is wrong but time was over before all were checked.",
    )
    check.add_argument("--json", action="store_true", help="one JSON object, for programs")
    check.add_argument(
        "--kernels", type=_names, default=[], metavar="LIST", help="only these, comma-separated"
    )
    check.add_argument(
        "--seconds",
        type=options.duration,
        default=600.0,
        metavar="S",
        help="what has not begun by then is left out (default: %(default)g)",
    )
    check.add_argument(
        "--jobs", type=options.count, metavar="N", help="processes (default: one a core)"
    )


def _add_tune(commands, name: str) -> None:
    tune = commands.add_parser(
        name,
        usage="%(prog)s [MODEL] [options]",
        help="measure on this GPU which kernels are fastest for a model, and keep it",
        description="Times the algorithms (fused, addmm) and the tiles of the kernels at the "
        "shapes of a model, after a check against float64, and keeps what is fastest in the cache "
        "directory (LORA_KERNELS_CACHE, or ~/.cache/lora_kernels). Every later run on this GPU, "
        "with this driver and these versions, takes it from there. LORA_KERNELS_TUNE=first-use "
        "measures the algorithms in the first calls of a training run instead. Lists are "
        "comma-separated.",
    )
    _add_model(tune, nargs="?")
    tune.add_argument(
        "--shapes", metavar="LIST", help="layers as KxN, such as 4096x1024, or llama3-8b"
    )
    numbers = {
        "--tokens": (options.count, [], "numbers of tokens (default: 16,512,4096)"),
        "--ranks": (options.count, [16], "ranks (default: 16)"),
        "--dropout": (options.probability, [0.0, 0.1], "dropout probabilities (default: 0,0.1)"),
    }
    for option, (kind, default, text) in numbers.items():
        tune.add_argument(
            option, type=options.listed(kind), default=default, metavar="LIST", help=text
        )
    _add_dtype(tune, "bfloat16")
    tune.add_argument(
        "--factors",
        type=options.listed(str, ("own", "float32")),
        default=["own", "float32"],
        metavar="LIST",
        help="dtypes of lora_A and lora_B; own is the layer's (default: own,float32)",
    )
    tune.add_argument(
        "--minutes",
        type=float,
        default=5.0,
        metavar="T",
        help="when to stop (default: %(default)g)",
    )
    tune.add_argument("--jobs", type=options.count, metavar="N", help="processes that compile")
    instead = tune.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print what would be measured")
    instead.add_argument(
        "--show",
        action="store_true",
        help="print what is kept for this GPU, or for every one if there is none",
    )
    instead.add_argument(
        "--clear", action="store_true", help="remove what is kept for this GPU; see --all"
    )
    tune.add_argument(
        "--all",
        action="store_true",
        help="with --clear: for every GPU whose measurements are in the cache directory",
    )


def _names(text: str) -> list[str]:
    from lora_kernels.tuning.check import names

    return options.listed(str, names())(text)


def _add_report(commands, name: str) -> None:
    report = commands.add_parser(
        name,
        usage="%(prog)s MODEL [options]",
        help="show on what each LoRA layer of a model would run here, and why",
        description="Makes a Transformers model of its configuration, without weights, puts LoRA "
        "into it, and prints what lora_kernels.report says: on what the layers would train on this "
        "machine, and why. Nothing is downloaded or measured for a MODEL that is a path.",
    )
    _add_model(report)
    report.add_argument(
        "--rank", type=options.count, default=16, metavar="N", help="(default: %(default)s)"
    )
    report.add_argument(
        "--target-modules",
        type=options.listed(str),
        metavar="LIST",
        help="ends of the paths of modules, such as q_proj,v_proj (default: every linear layer but "
        "the output layer)",
    )
    report.add_argument(
        "--tokens",
        type=options.count,
        default=4096,
        metavar="N",
        help="of a batch (default: %(default)s)",
    )
    _add_dtype(report, "that of the configuration")
    report.add_argument(
        "--peft", action="store_true", help="layers of PEFT under patch_peft(), not this package's"
    )
    report.add_argument(
        "--verbose", action="store_true", help="a line for each layer, not for each kind of layer"
    )
    report.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _add_model(command, nargs: str | None = None) -> None:
    command.add_argument(
        "model", nargs=nargs, metavar="MODEL", help="a folder with config.json, or that file"
    )


def _add_dtype(command, default: str) -> None:
    command.add_argument("--dtype", choices=DTYPES, help=f"(default: {default})")


def _add_convert(commands, name: str) -> None:
    convert = commands.add_parser(
        name,
        usage="%(prog)s SOURCE DESTINATION [options]",
        help="convert an adapter from the files of one tool to those of another",
        description=f"Formats: {', '.join(FORMAT_NAMES)}. SOURCE's is recognised by its content. "
        "Without --to, PEFT's directory (adapter_config.json and adapter_model.safetensors, as "
        "save_adapter writes it, too) becomes a file of torch.save with the keys of loralib's "
        "lora_state_dict, and everything else becomes such a directory. Nothing pickled is "
        "executed. What the other format cannot hold is refused, or written in an equivalent form "
        "with a remark. Factors in loralib's file do not tell a convolution from a Linear: the "
        "command prints what it took each module for. For convolutions load the file into the "
        "model and call lora_kernels.save_adapter.",
    )
    _add_source(convert)
    convert.add_argument(
        "destination",
        metavar="DESTINATION",
        help="must not be there yet; loralib's file is called .pt, GGUF .gguf, a file of kohya or "
        "diffusers .safetensors, and everything else is a directory",
    )
    convert.add_argument("--to", choices=FORMAT_NAMES, metavar="FORMAT", help="of DESTINATION")
    convert.add_argument(
        "--merged",
        action="store_true",
        help="SOURCE is a whole state dict that loralib saved in eval mode, with the update in its "
        "weights. DESTINATION becomes the same with base weights. No file tells its mode: one "
        "that loralib saved in train mode would be damaged. Takes --lora-alpha, which holds for "
        "all layers, --enable-lora, --out-splits, --embedding and --fan-in-fan-out",
    )
    _add_hints(convert)


def _add_inspect(commands, name: str) -> None:
    inspect = commands.add_parser(
        name,
        usage="%(prog)s SOURCE [options]",
        help="show what an adapter's files hold, and what is suspicious about them",
        description=f"Formats: {', '.join(FORMAT_NAMES)}. Shows format, layers, ranks, scalings, "
        "dtypes and size, and what is suspicious: lora_B of zeros, NaN, ranks that differ from the "
        "config, names that no plain model has. With --base, also layers that are not in it.",
    )
    _add_source(inspect)
    inspect.add_argument("--json", action="store_true", help="one JSON object, for programs")
    _add_hints(inspect)


def _add_source(command) -> None:
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a file, a directory, or OWNER/NAME on the Hugging Face Hub",
    )


def _add_hints(command) -> None:
    """The options that tell what SOURCE does not."""
    command.add_argument(
        "--from", dest="source_format", choices=FORMAT_NAMES, metavar="FORMAT", help="of SOURCE"
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
        "--lora-dropout", type=float, metavar="P", help="(default: 0 if no file tells it)"
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


COMMANDS = {
    "run": _add_run,
    "doctor": _add_doctor,
    "report": _add_report,
    "check": _add_check,
    "tune": _add_tune,
    "convert": _add_convert,
    "inspect": _add_inspect,
}
