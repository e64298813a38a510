"""``python -m bench.quantized [--dora]``: a training step of LoRA over a quantised layer.

PEFT's layer by PEFT's own code and under patch_peft(), and this package's own layer, beside the
frozen quantised layer. One process and one thread; each round calls all of them in an order drawn
anew, and ratios are taken within a round. Kept: what the forward keeps beside x and the parameters,
in % of x. "plain" is a layer that is not quantised. --dora: all of them with a magnitude (DoRA),
and this package's LoRA besides. On a CPU with instructions for bfloat16,
LORA_KERNELS_CPU_PRODUCTS=float32 and ONEDNN_MAX_CPU_ISA=AVX512_CORE show one without.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import lora_kernels
from bench.rounds import Subject, kept_bytes, median_ratio, patched, rounds, training_step
from lora_kernels import LoRALinear, LoRAQuantizedLinear
from lora_kernels.quantization import is_quantised

__all__ = ["KINDS", "main"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, R, ALPHA = 512, 16, 32


def _bitsandbytes_4bit(dense: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    n, k = dense.weight.shape
    options = {"compress_statistics": True, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dense.weight.dtype, **options)
    layer.weight = bnb.nn.Params4bit(dense.weight.detach(), requires_grad=False, **options)
    return layer.to(DEVICE)


def _bitsandbytes_8bit(dense: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    n, k = dense.weight.shape
    layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(dense.weight.detach(), requires_grad=False)
    return layer.to(DEVICE)


def _torchao(config: str) -> Callable[[nn.Linear], nn.Module]:
    def make(dense: nn.Linear) -> nn.Module:
        from torchao import quantization

        quantization.quantize_(dense, getattr(quantization, config)())
        return dense

    return make


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": _bitsandbytes_4bit,
    "int8": _bitsandbytes_8bit,
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "plain": lambda dense: dense,
}


def base_layer(kind: str, width: int, dtype: torch.dtype) -> nn.Module:
    """The frozen layer [width, width]; the same one whenever it is asked for."""
    torch.manual_seed(0)
    dense = nn.Linear(width, width, bias=False, dtype=dtype, device=DEVICE)
    return KINDS[kind](dense).requires_grad_(False)


def peft_layer(kind: str, base: nn.Module, dropout_p: float, dora: bool = False) -> nn.Module:
    """PEFT's layer over base, with float32 factors as get_peft_model makes them, in training."""
    model = nn.Sequential(base)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    config = LoraConfig(
        r=R, lora_alpha=ALPHA, lora_dropout=dropout_p, target_modules=["0"], use_dora=dora
    )
    layer = inject_adapter_in_model(config, model)[0].train()
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(layer, name).float()
    nn.init.normal_(layer.lora_B["default"].weight, std=R**-0.5)
    return layer


def own_layer(base: nn.Module, dropout_p: float, dora: bool = False) -> nn.Module:
    """This package's layer over base, with float32 factors."""
    wrap = LoRAQuantizedLinear if is_quantised(base) else LoRALinear.from_linear
    layer = wrap(base, R, ALPHA, dropout_p, lora_dtype=torch.float32, use_dora=dora)
    layer.train()
    nn.init.normal_(layer.lora_B, std=R**-0.5)
    return layer


def cell(
    kind: str, width: int, dtype: torch.dtype, dropout_p: float, dora: bool = False
) -> tuple[dict[str, Subject], dict[str, float]]:
    """The steps by name, and what their forwards keep, in % of x."""
    base = base_layer(kind, width, dtype)
    theirs = peft_layer(kind, base, dropout_p, dora)
    layers = {
        "frozen": (base, contextlib.nullcontext),
        "PEFT": (theirs, contextlib.nullcontext),
        "patched": (theirs, patched),
        "own": (own_layer(base, dropout_p, dora), contextlib.nullcontext),
    }
    if dora:
        layers["own LoRA"] = own_layer(base, dropout_p), contextlib.nullcontext
    with patched():
        (row,) = lora_kernels.report(theirs)
        assert row.fused, row.reason
    x = torch.randn(4, TOKENS // 4, width, device=DEVICE).to(dtype).requires_grad_()
    dy = torch.randn(4, TOKENS // 4, width, device=DEVICE).to(dtype)
    subjects, kept = {}, {}
    for name, (layer, context) in layers.items():
        subjects[name] = training_step(layer, (x,), context, dy)
        with context():
            known = [x, *layer.parameters(), *layer.buffers()]
            state = vars(getattr(base, "state", object))  # of bitsandbytes' 8-bit layers
            known += [value for value in state.values() if isinstance(value, Tensor)]
            kept[name] = 100 * kept_bytes(lambda layer=layer: layer(x), known) / x.nbytes
    return subjects, kept


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each cell."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantized")
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="KIND,...")
    parser.add_argument("--widths", default="768,1024,2048", metavar="N,...")
    parser.add_argument("--dtypes", default="float32,bfloat16", metavar="DTYPE,...")
    parser.add_argument("--dropout", default="0,0.1", metavar="P,...")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--dora", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    print(f"step over the frozen layer's, and kept in % of x; {TOKENS} tokens, rank {R}, {DEVICE}")
    head = ("frozen", "PEFT", "patched", "own", *(["own LoRA"] if options.dora else []))
    print(f"{'cell':32}{''.join(f'{name:>16}' for name in head)}{'patched/PEFT':>14}")
    for kind in options.kinds.split(","):
        if options.dora and kind == "int8":  # PEFT's DoRA empties the layer that it reads
            print("int8: PEFT 0.21.2 raises an error in its second forward")
            continue
        for name in options.dtypes.split(","):
            for width in map(int, options.widths.split(",")):
                for p in map(float, options.dropout.split(",")):
                    subjects, kept = cell(kind, width, getattr(torch, name), p, options.dora)
                    samples = rounds(subjects, options.rounds, clock)
                    times = [f"{1e3 * statistics.median(samples['frozen']):.1f} ms"]
                    times += [f"{median_ratio(samples, each, 'frozen'):.2f}" for each in head[1:]]
                    pairs = zip(times, head, strict=True)
                    columns = "".join(f"{f'{t}, {kept[each]:.1f}%':>16}" for t, each in pairs)
                    last = median_ratio(samples, "patched", "PEFT")
                    line = f"{kind} {name} {width} p {p:g}"
                    print(f"{line:32}{columns}{last:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
