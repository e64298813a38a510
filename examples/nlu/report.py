"""What runs leave behind: results.json, curves, and the paper's table of many runs.

``python -m examples.nlu.report FOLDER`` prints the table of every results.json below FOLDER.
"""

import argparse
import json
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure

from examples.errors import InputError
from examples.nlu.tasks import TASKS, Task, settings

__all__ = ["curves", "peak_memory", "table", "versions", "weight_bytes", "write_json"]

# What a run with the settings of a row and nothing else has.
UNCHANGED = {
    "dropout": 0.0, "targets": None, "adapter": None, "adapter_hash": None, "train": None,
    "keep": "best", "accumulate": 1, "group_by_length": False, "precision": "fp32", "processes": 1,
}  # fmt: skip
# What else of a run's record tells rows apart, the rest of it being of one seed: named where runs
# differ in it that are alike up to there. Data differs from task to task, and is compared in each.
COMPARED = ("model_hash", "device", "data_hash")
NEEDED = {
    "task", "model", "method", "seed", "settings", "start_from", "paper_score",
    "trainable_parameters", *UNCHANGED, *COMPARED,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the runs below a folder; 1 where there are none, 2 where one is odd."""
    parser = argparse.ArgumentParser(prog="python -m examples.nlu.report", description=__doc__)
    parser.add_argument("folder", type=Path)
    files = sorted(parser.parse_args(argv).folder.rglob("results.json"))
    if not files:
        print("error: no results.json there", file=sys.stderr)
        return 1
    try:
        print(table({str(file): _read(file) for file in files}))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read(file: Path) -> Mapping:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{file}: cannot be read as JSON") from None
    missing = NEEDED - set(result if isinstance(result, dict) else ())
    if missing:
        raise InputError(f"{file}: is not of this version of examples.nlu: no {min(missing)!r}")
    return result


def table(results: Mapping[str, Mapping]) -> str:
    """A row per experiment, which is all of a run but its task and seed; medians in per cent.

    results: name of the file -> what it holds.
    Raises: InputError where two are the same run, or one's settings are unknown.
    """
    from examples.nlu.metrics import average  # scikit-learn takes a second

    runs = {file: one for file, one in results.items() if one["paper_score"] is not None}
    cells = defaultdict(lambda: defaultdict(dict))  # row -> task -> seed -> file
    trainable = {}
    for file, row in _rows(runs).items():
        one = runs[file]
        first = cells[row][one["task"]].setdefault(one["seed"], file)
        if first != file:
            raise InputError(f"{file}: the same task, seed and settings as {first}: keep one")
        trainable[row] = one["trainable_parameters"]
    titles = [task.title for task in TASKS.values()]
    lines = [f"| model | method | settings | trainable | {' | '.join(titles)} | average |"]
    lines.append("|---" * (len(titles) + 5) + "|")
    for row, tasks in cells.items():
        scores = {
            task: [runs[file]["paper_score"] for file in seeds.values()]
            for task, seeds in tasks.items()
        }
        shown = [*row, f"{trainable[row]:,}"]
        shown += [_points(statistics.median(scores[t])) if t in scores else "" for t in TASKS]
        mean = average(scores)
        shown.append("" if mean is None else _points(mean))
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _rows(runs: Mapping[str, Mapping]) -> dict[str, tuple[str, str, str]]:
    """file -> model, method and settings of its row."""
    rows = {file: (run["model"], run["method"], _settings(file, run)) for file, run in runs.items()}
    for key in COMPARED:
        alike = {
            file: (row, runs[file]["task"] if key == "data_hash" else None)
            for file, row in rows.items()
        }
        values = defaultdict(set)
        for file, group in alike.items():
            values[group].add(runs[file][key])
        for file, group in alike.items():
            if len(values[group]) > 1:
                model, method, named = rows[file]
                rows[file] = model, method, f"{named}, {key} {runs[file][key]}"
    return rows


def _settings(file: str, result: Mapping) -> str:
    """The name of a run's settings, and what the run changed in them."""
    own = result["settings"]
    try:
        row = asdict(settings(own["name"], result["task"]))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    changed = {key: own.get(key) for key, value in row.items() if own.get(key) != value}
    changed |= {key: result[key] for key, value in UNCHANGED.items() if result[key] != value}
    # From which adapter a run starts depends on its seed; that it starts from one does not.
    start = row["start"] if result["method"] == "lora" else None
    if bool(start) != bool(result["start_from"]):
        changed["start_from"] = result["start_from"]
    return ", ".join([own["name"], *(f"{key} {value}" for key, value in changed.items())])


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def curves(results: Mapping, task: Task, path: Path) -> None:
    """Draws the training loss over the steps and, where epochs were measured, the score."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    _line(axes, results["log"], "loss", color="tab:blue")
    name = f"eval_{task.metrics[0]}"
    if any(name in entry for entry in results["log"]):
        right = axes.twinx()
        right.set_ylabel(f"{task.metrics[0]}, {next(iter(results['dev']))}")
        _line(right, results["log"], name, color="tab:orange", marker="o")
    axes.set_title(f"{task.title}, {Path(results['model']).name}, {results['method']}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _line(axes, log: Sequence[Mapping], name: str, **kwargs) -> None:
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), **kwargs)


def write_json(results: Mapping, path: Path) -> None:
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def weight_bytes(directory: Path) -> int:
    """Size of the weights saved in directory, 0 where there are none."""
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def peak_memory(device) -> int:
    """Bytes: the most that PyTorch has held on a GPU, or the process in memory on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def versions() -> dict[str, str]:
    import lora_kernels  # its own word: from a clone it need not be installed

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "lora_kernels": lora_kernels.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
