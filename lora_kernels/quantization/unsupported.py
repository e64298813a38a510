"""Quantisers whose layers are refused, and why.

* GPTQ and AWQ: transformers loads both by gptqmodel, whose releases need a newer torch than this
  package is tested with. By reading: TorchLinear multiplies by dequantize_weight() [K, N], which it
  compiles, caches in eval() and may stream in tiles; other kernels refuse training. So dense()
  could be written, but nothing here could show that it is right.
* AQLM, EETQ, FBGEMM, AutoRound, VPTQ, SpQR, HIGGS: kernels for a GPU alone; not tried.
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
