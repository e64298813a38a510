"""``python -m bench.adapters [--adapters 4,16,64]``: a training step of many adapters in one batch.

One layer, 64 samples of 32 tokens, ranks 8 and 16 in turn, samples of an adapter one behind
another. A step is a forward and a backward. Compared are the frozen layer; this package's
MultiLoRALinear; PEFT's loop over adapter_names, called on its layer, because its model refuses to
train that way; and PEFT's adapters one after another, each with its own samples. All of them take
part in every round, on one thread. What is printed is time of the process, which other programs on
the machine stretch less than they do the time on the clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels
from bench.rounds import Subject, median_ratio, rounds

__all__ = ["main", "steps", "times"]

WIDTH, SAMPLES, TOKENS, RANKS, ALPHA, ROUNDS = 768, 64, 32, (8, 16), 16, 9


def steps(count: int) -> tuple[dict[str, Callable[[], None]], Callable[[], None]]:
    """A step of each implementation, by name, with count adapters; and what comes before a step."""
    names = [f"adapter{i}" for i in range(count)]
    of_sample = [names[i * count // SAMPLES] for i in range(SAMPLES)]
    ranks = {name: RANKS[i % 2] for i, name in enumerate(names)}
    x = torch.randn(SAMPLES, TOKENS, WIDTH, requires_grad=True)
    dy = torch.randn(SAMPLES, TOKENS, WIDTH)
    frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    ours = lora_kernels.MultiLoRALinear.from_linear(
        frozen, {name: {"r": r, "lora_alpha": ALPHA} for name, r in ranks.items()}
    )
    theirs = _peft_layer(ranks)

    def clear() -> None:
        x.grad = None
        for parameter in (*ours.parameters(), *theirs.parameters()):
            parameter.grad = None
        _train_all(theirs)  # set_adapter freezes the others

    def step_frozen() -> None:
        frozen(x).backward(dy)

    def step_ours() -> None:
        with lora_kernels.route(ours, of_sample):
            ours(x).backward(dy)

    def step_names() -> None:
        theirs(x, adapter_names=of_sample).backward(dy)

    def step_one_by_one() -> None:
        for name, x_of, dy_of in zip(names, x.chunk(count), dy.chunk(count), strict=True):
            theirs.set_adapter(name)
            theirs(x_of).backward(dy_of)

    runs = {
        "frozen layer": step_frozen,
        "lora_kernels": step_ours,
        "PEFT, adapter_names": step_names,
        "PEFT, one by one": step_one_by_one,
    }
    return runs, clear


def _peft_layer(ranks: dict[str, int]) -> nn.Module:
    """PEFT's layer with the adapters, all of which train."""
    model = None
    for name, r in ranks.items():
        config = LoraConfig(r=r, lora_alpha=ALPHA, target_modules=["0"])
        if model is None:
            plain = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
            model = get_peft_model(plain, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.base_model.model[0]


def _train_all(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)


def times(count: int, turns: int) -> dict[str, list[float]]:
    """Seconds of a step by name, a value for each round."""
    runs, clear = steps(count)
    subjects = {name: Subject(run, clear) for name, run in runs.items()}
    return rounds(subjects, turns, time.process_time)


def main(arguments: list[str] | None = None) -> None:
    """Prints medians, and the medians over rounds of the ratios to the frozen layer."""
    parser = argparse.ArgumentParser(prog="python -m bench.adapters")
    parser.add_argument("--adapters", default="4,16,64", metavar="N,N,...")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{WIDTH} x {WIDTH}, {SAMPLES} samples of {TOKENS} tokens, {options.rounds} rounds")
    for count in map(int, options.adapters.split(",")):
        samples = times(count, options.rounds)
        for name, values in samples.items():
            ratio = median_ratio(samples, name, "frozen layer")
            milliseconds = statistics.median(values) * 1e3
            print(f"{count:4} adapters  {name:20}{milliseconds:10.2f} ms {ratio:8.2f} x frozen")


if __name__ == "__main__":
    main()
