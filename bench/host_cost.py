"""``python -m bench.host_cost``: what a layer costs the host, beside PEFT's and frozen.

Over the stand-in driver of bench/standin, so without a GPU: the kernels are launched as beside one,
and nothing is computed, while PyTorch's own operators compute tiny tensors on the CPU. All layers
run in one process and thread; each round calls all of them, in an order drawn anew. The time of
NVIDIA's driver is in no number. This package's numbers hold a few microseconds that a GPU does not
take: of a tensor on the CPU a layer asks whether the product is small.
"""

import argparse
import contextlib
import os
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench import standin
from bench.rounds import Subject, median_ratio, rounds

__all__ = ["main"]

M, WIDTH, R, ALPHA, DROPOUT_P = 65, 16, 8, 16, 0.1
OURS = ("addmm", "fused")


def layers() -> dict[str, nn.Module]:
    """By name: the frozen layer, PEFT's over it, and this package's for each algorithm."""
    from peft import LoraConfig, inject_adapter_in_model

    from lora_kernels import LoRALinear

    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    settings = {"r": R, "lora_alpha": ALPHA, "lora_dropout": DROPOUT_P}
    config = LoraConfig(target_modules=["0"], **settings)
    peft = inject_adapter_in_model(config, nn.Sequential(nn.Linear(WIDTH, WIDTH)))[0]
    ours = LoRALinear.from_linear(frozen, **settings)
    ours.bias.requires_grad_(False)
    return {"frozen": frozen, "PEFT": peft} | dict.fromkeys(OURS, ours)


@contextlib.contextmanager
def algorithm(name: str) -> Iterator[None]:
    """What LORA_KERNELS_PLAN is for a layer."""
    os.environ["LORA_KERNELS_PLAN"] = name if name in OURS else "auto"
    yield


def subjects(x: Tensor, dy: Tensor) -> dict[tuple[str, str], Subject]:
    """By layer and mode: a forward, or a forward and the gradients of all that wants one."""

    def forward(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(x)

    def both(layer: nn.Module) -> Callable[[], object]:
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), wanted, dy)

    found = {}
    for name, layer in layers().items():
        for mode, make in (("forward", forward), ("forward + backward", both)):
            found[name, mode] = Subject(
                make(layer.train()), context=lambda name=name: algorithm(name)
            )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=standin.DEVICES, default="sm_90")
    parser.add_argument("--rounds", type=int, default=2000)
    options = parser.parse_args(arguments)
    if reason := standin.why_not():
        parser.exit(2, f"{reason}\n")
    os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
    torch.set_num_threads(1)
    import triton

    x, dy = torch.randn(M, WIDTH, requires_grad=True), torch.randn(M, WIDTH)
    with standin.running_on(options.target):
        measured = subjects(x, dy)
        rounds(measured, 10)
        samples = rounds(measured, options.rounds)
    print(
        f"triton {triton.__version__}, torch {torch.__version__}, {options.target}, p {DROPOUT_P}"
    )
    print(f"{'':8}{'':20}{'min us':>9}{'median us':>11}{'/ PEFT':>9}")
    for (name, mode), seconds in samples.items():
        least, middle = min(seconds) * 1e6, statistics.median(seconds) * 1e6
        ratio = median_ratio(samples, (name, mode), ("PEFT", mode))
        print(f"{name:8}{mode:20}{least:9.1f}{middle:11.1f}{ratio:9.2f}")


if __name__ == "__main__":
    main()
