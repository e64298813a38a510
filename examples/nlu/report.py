"""What runs leave behind: results.json, curves, and the paper's table of many runs.

``python -m examples.nlu.report FOLDER`` prints the table of every results.json below FOLDER.
"""

import argparse
import json
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure

from examples.nlu.tasks import TASKS, Task, settings

__all__ = ["curves", "peak_memory", "table", "versions", "weight_bytes", "write_json"]

# What a run with the settings of a row and nothing else has.
UNCHANGED = {"dropout": 0.0, "targets": None, "train": None, "accumulate": 1, "processes": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the runs below a folder; 1 where there are none."""
    parser = argparse.ArgumentParser(prog="python -m examples.nlu.report", description=__doc__)
    parser.add_argument("folder", type=Path)
    files = sorted(parser.parse_args(argv).folder.rglob("results.json"))
    if not files:
        print("error: no results.json there", file=sys.stderr)
        return 1
    print(table(json.loads(file.read_text(encoding="utf-8")) for file in files))
    return 0


def table(results: Iterable[Mapping]) -> str:
    """A row per model, method and settings: medians of the paper's figure, in per cent."""
    from examples.nlu.metrics import average  # scikit-learn takes a second

    rows = defaultdict(lambda: defaultdict(list))
    trainable = {}
    for one in results:
        if one["paper_score"] is not None:
            key = one["model"], one["method"], _settings(one)
            trainable[key] = one["trainable_parameters"]
            rows[key][one["task"]].append(one["paper_score"])
    titles = [task.title for task in TASKS.values()]
    lines = [f"| model | method | settings | trainable | {' | '.join(titles)} | average |"]
    lines.append("|---" * (len(titles) + 5) + "|")
    for key, scores in rows.items():
        cells = [*key, f"{trainable[key]:,}"]
        cells += [_points(statistics.median(scores[t])) if scores.get(t) else "" for t in TASKS]
        mean = average(scores)
        cells.append("" if mean is None else _points(mean))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(result: Mapping) -> str:
    """The name of a run's settings, and what the run changed in them."""
    own = result["settings"]
    row = asdict(settings(own["name"], result["task"]))
    changed = {key: value for key, value in own.items() if value != row[key]}
    changed |= {key: result[key] for key, value in UNCHANGED.items() if result[key] != value}
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
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lora_kernels")},
    }


if __name__ == "__main__":
    sys.exit(main())
