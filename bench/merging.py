"""``python -m bench.merging [--base COMMIT]``: how long eval() of a whole model takes.

224 LoRA layers, as many as Llama 3 8B has, small ones, so that what is timed is the work for each
layer. What training keeps alive is alive: AdamW over all parameters, a state dict, DDP. loralib,
this package and, with --base, the package at a commit are called in turn in every round. A round
makes one call of eval() for each; train() before it is not timed.
"""

import argparse
import contextlib
import statistics
import tempfile
from types import ModuleType

import loralib
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import lora_kernels
from bench import base
from bench.rounds import Subject, median_ratio, rounds

__all__ = ["main", "times"]

LAYERS, WIDTH, R, ROUNDS = 224, 64, 4, 20


class Training:
    """A model of this library's layers, and what a training program holds beside it."""

    def __init__(self, library: ModuleType):
        layers = [library.Linear(WIDTH, WIDTH, r=R, lora_alpha=R) for _ in range(LAYERS)]
        self.model = nn.Sequential(*layers)
        library.mark_only_lora_as_trainable(self.model)
        self.parallel = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.parallel(torch.randn(2, WIDTH)).sum().backward()
        self.optimizer.step()
        self.checkpoint = self.model.state_dict()

    def subject(self) -> Subject:
        """One eval()."""
        return Subject(self.model.eval, self.model.train)


def times(libraries: dict[str, ModuleType], turns: int) -> dict[str, list[float]]:
    """Seconds of eval() by name, a value for each round."""
    trainings = {name: Training(library) for name, library in libraries.items()}
    return rounds({name: training.subject() for name, training in trainings.items()}, turns)


def main(arguments: list[str] | None = None) -> None:
    """Prints the median of each, and the median over rounds of its ratio to this package's."""
    parser = argparse.ArgumentParser(prog="python -m bench.merging")
    parser.add_argument("--base", help="this package at the commit as well", metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        libraries = {"loralib": loralib, "lora_kernels": lora_kernels}
        if options.base:
            commit, package = stack.enter_context(base.package(options.base))
            libraries[f"lora_kernels@{commit}"] = package
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        distributed.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        stack.callback(distributed.destroy_process_group)
        samples = times(libraries, options.rounds)
    print(f"eval() of {LAYERS} layers of {WIDTH} x {WIDTH}, rank {R}, {options.rounds} rounds")
    for name, values in samples.items():
        ratio = median_ratio(samples, name, "lora_kernels")
        print(f"{name:24}{statistics.median(values) * 1e3:12.2f} ms {ratio:10.2f} times ours")


if __name__ == "__main__":
    main()
