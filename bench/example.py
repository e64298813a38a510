"""``python -m bench.example``: times one operation in plain sight, lora_linear beside its formula.

Read it from top to bottom. ``pytest bench/`` does the same for many shapes, peers and models.
"""

import random
import statistics
import time

import torch
import torch.nn.functional as F

from lora_kernels import lora_linear
from lora_kernels.testing.tolerance import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
M, K, N, R = (8192, 4096, 4096, 16) if DEVICE == "cuda" else (512, 1024, 1024, 8)
SCALING, WARMUP, ROUNDS = 2.0, 5, 50


def ours(x, w, a, b):
    return lora_linear(x, w, a, b, scaling=SCALING)


def formula(x, w, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALING  # [M, N]


def step(function, operands, dy):
    """Forward and backward: y, dx, da and db."""
    x, _, a, b = operands
    y = function(*operands)
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)


def seconds(call):
    """How long a call takes, on the clock of its device."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def main():
    # Operands: w is frozen, and dy comes from the layers above.
    sizes = ((M, K), 1), ((N, K), K**-0.5), ((R, K), K**-0.5), ((N, R), 0.1), ((M, N), 1)
    x, w, a, b, dy = ((torch.randn(size) * std).to(DEVICE, DTYPE) for size, std in sizes)
    operands = x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_()

    # Check: an error against float64 is judged by the one that the formula makes in DTYPE.
    exact = step(formula, [t.detach().double().requires_grad_() for t in operands], dy.double())
    results = step(ours, operands, dy), exact, step(formula, operands, dy)
    for what, *tensors in zip(("y", "dx", "da", "db"), *results, strict=True):
        assert_close(*tensors, what)

    # Rounds: each calls both, in a new order, so that noise of the machine hits both alike.
    samples = {ours: [], formula: []}
    for turn in range(WARMUP + ROUNDS):
        for function in random.sample(list(samples), 2):
            elapsed = seconds(lambda function=function: step(function, operands, dy))
            samples[function] += [elapsed] * (turn >= WARMUP)

    # Result: the median ratio within a round drifts far less than the medians themselves.
    ratios = [mine / other for mine, other in zip(*samples.values(), strict=True)]
    for function, times in samples.items():
        print(f"{function.__name__:8}{statistics.median(times) * 1e3:9.3f} ms")
    print(f"ours / formula: {statistics.median(ratios):.3f}, on {DEVICE} in {DTYPE}")


if __name__ == "__main__":
    main()
