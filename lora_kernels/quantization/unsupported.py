"""Quantisers whose layers are refused: none of them could be made and run where this was written.

* GPTQ and AWQ, for which transformers needs gptqmodel. By reading gptqmodel 7.7: TorchLinear
  multiplies by dequantize_weight() [K, N], which it compiles, caches in eval() and may stream in
  tiles, and it may rotate x first; most other kernels refuse training.
* AQLM, EETQ, AutoRound, VPTQ: not read.
"""

__all__ = ["REASONS"]

_USE_PEFT = "is not supported: train over it with PEFT"
# By the package in which the class is.
REASONS = {
    "gptqmodel": f"GPTQ and AWQ by gptqmodel {_USE_PEFT}",
    "auto_gptq": f"GPTQ by auto_gptq {_USE_PEFT}",
    "awq": f"AWQ by autoawq {_USE_PEFT}",
    "aqlm": f"AQLM {_USE_PEFT}",
    "eetq": f"EETQ {_USE_PEFT}",
    "auto_round": f"AutoRound {_USE_PEFT}",
    "vptq": f"VPTQ {_USE_PEFT}",
}
