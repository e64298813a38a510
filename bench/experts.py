"""``python -m bench.experts``: a training step of one experts layer of a mixture under PEFT.

PEFT's LoRA on both parameters (target_parameters, rank 8), by PEFT's own code and under
patch_peft(), beside the frozen layer. One process; each round calls all three in an order drawn
anew, and ratios are taken within a round. Kept: the bytes of storages that autograd saves in the
forward, without parameters and inputs.
"""

import argparse
import contextlib
import statistics
import types

import peft
import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bench.rounds import Subject, kept_bytes, median_ratio, patched, rounds, training_step
from lora_kernels import report

__all__ = ["main"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
R, HIDDEN = 8, 512
# Class, experts, width inside, experts for each token: as in the model of the name, but narrower.
LAYERS = {
    "mixtral": (MixtralExperts, 8, 1792, 2),
    "gpt_oss": (GptOssExperts, 32, 512, 4),
    "qwen3_moe": (Qwen3MoeExperts, 32, 192, 8),
    "qwen3_moe_128": (Qwen3MoeExperts, 128, 192, 8),
}


class Holder(nn.Module):
    """What PEFT looks for the parameters of experts in."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)


def build(name: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """The frozen layer, a copy of it with PEFT's LoRA, and what else they are called with."""
    kind, experts, inner, top_k = LAYERS[name]
    sizes = {
        **dict.fromkeys(("num_experts", "num_local_experts"), experts),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), inner),
        **{"hidden_size": HIDDEN, "hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    }
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        config = types.SimpleNamespace(_experts_implementation="grouped_mm", **sizes)
        layers.append(Holder(kind(config)).to(DEVICE, DTYPE).requires_grad_(False))
        for parameter in layers[-1].parameters():
            nn.init.normal_(parameter, std=0.02)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=R, lora_alpha=16, target_modules=[], target_parameters=targets)
    model = peft.get_peft_model(layers[1], config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.02)
    return layers[0], model, (experts, top_k)


def inputs(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, and the experts of each token with their weights."""
    x = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=DTYPE).requires_grad_()
    weights, ids = torch.randn(tokens, experts, device=DEVICE).softmax(-1).topk(top_k)
    return x, ids, (weights / weights.sum(-1, keepdim=True)).to(DTYPE)


def subjects(
    frozen: nn.Module, model: nn.Module, operands: tuple[Tensor, ...]
) -> tuple[dict[str, Subject], dict[str, float]]:
    """The steps by name, and the megabytes that their forwards keep."""
    plain = contextlib.nullcontext
    layers = {"frozen": (frozen, plain), "PEFT": (model, plain), "patched": (model, patched)}
    steps, kept = {}, {}
    for name, (layer, context) in layers.items():
        steps[name] = training_step(layer, operands, context)
        known = (*operands, *layer.parameters())
        with context():
            kept[name] = kept_bytes(lambda layer=layer: layer(*operands), known) / 2**20
    return steps, kept


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each layer and number of tokens."""
    parser = argparse.ArgumentParser(prog="python -m bench.experts")
    parser.add_argument("--layers", default=",".join(LAYERS), metavar="NAME,...")
    parser.add_argument("--tokens", default="64,512", metavar="N,...")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    options = parser.parse_args(arguments)
    print(f"step over the frozen layer's, and MB kept; {DEVICE}, {DTYPE}, rank {R}")
    print(f"{'layer':14}{'tokens':>7}{'frozen':>20}{'PEFT':>18}{'patched':>18}{'PEFT/patched':>14}")
    for name in options.layers.split(","):
        frozen, model, routing = build(name)
        with patched():
            if not all(row.fused for row in report(model)):
                print(report(model))
        for tokens in map(int, options.tokens.split(",")):
            operands = inputs(tokens, *routing)
            steps, kept = subjects(frozen, model, operands)
            samples = rounds(steps, options.rounds)
            cells = [f"{1e3 * statistics.median(samples['frozen']):.1f} ms"]
            cells += [
                f"{median_ratio(samples, step, 'frozen'):.2f}" for step in ("PEFT", "patched")
            ]
            widths = (20, 18, 18)
            pairs = zip(widths, cells, kept.values(), strict=True)
            columns = "".join(f"{f'{cell}, {mb:.1f} MB':>{width}}" for width, cell, mb in pairs)
            last = median_ratio(samples, "PEFT", "patched")
            print(f"{name:14}{tokens:>7}{columns}{last:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
