"""What runs leave behind: results.json, curves, and the paper's table of many runs.

python -m examples.nlu.report FOLDER prints the table of every results.json below FOLDER.
"""

import argparse
import json
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from examples.errors import InputError
from examples.nlu.tasks import TASKS, Task, settings
from examples.plots import curves

__all__ = ["draw", "peak_memory", "table", "weight_bytes"]

# What a run with the settings of a row and nothing else has.
UNCHANGED = {
    "dropout": 0.0, "targets": None, "adapter": None, "adapter_hash": None, "train": None,
    "keep": "best", "accumulation": 1, "group_by_length": False, "precision": "fp32",
    "processes": 1,
}  # fmt: skip
# What else of a run's record tells rows apart, the rest of it being of one seed: named where runs
# differ in it that are alike up to there. Data differs from task to task, and is compared in each.
COMPARED = ("model_hash", "device", "data_hash")
NEEDED = {
    "task", "model", "method", "seed", "settings", "start_from", "paper_score", "status",
    "trainable_parameters", *UNCHANGED, *COMPARED,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the runs below a folder; 1 where there are none, 2 where one is odd."""
    parser = argparse.ArgumentParser(prog="python -m examples.nlu.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what runs wrote to")
    folder = parser.parse_args(argv).folder
    files = sorted(folder.rglob("results.json"))
    if not files:
        print(f"error: {folder}: no results.json of a run is there", file=sys.stderr)
        return 1
    try:
        read = {str(file): _read(file) for file in files}
        counted = {file: one for file, one in read.items() if not _why_left_out(one)}
        print(table(counted) if counted else f"{folder}: none of its runs counts")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file, one in read.items():
        if why := _why_left_out(one):
            print(f"{file}: left out: {why}", file=sys.stderr)
    return 0


def _why_left_out(result: Mapping) -> str | None:
    if result["status"] != "complete":
        return f"the run is {result['status']}"
    if result["paper_score"] is None:
        return "it was not measured on GLUE's development set"
    return None


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

    runs = {file: one for file, one in results.items() if _why_left_out(one) is None}
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
        shown += [_per_cent(statistics.median(scores[t])) if t in scores else "" for t in TASKS]
        mean = average(scores)
        shown.append("" if mean is None else _per_cent(mean))
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


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f}"


def draw(results: Mapping, task: Task, path: Path) -> None:
    """Draws the training loss over the steps and, if epochs were measured, the score."""
    score, measure = (
        f"eval_{task.metrics[0]}",
        f"{task.metrics[0]}\non {next(iter(results['dev']))}",
    )
    method = {
        "lora": f"LoRA of rank {results['settings']['rank']}",
        "full": "full fine-tuning",
        "head": "the head alone",
    }
    share = 100 if task.metrics[0] == "accuracy" else 1
    curves(
        path,
        f"{Path(results['model']).name} on {task.title}, {method[results['method']]}",
        {"training": _points(results["log"], "loss")},
        "cross-entropy, nats" if task.labels else "squared error",
        {"dev": [(step, share * value) for step, value in _points(results["log"], score)]},
        f"{measure} (%)" if share == 100 else measure,
    )


def _points(log: Sequence[Mapping], name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in log if name in entry]


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


if __name__ == "__main__":
    sys.exit(main())
