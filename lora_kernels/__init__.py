"""LoRA layers and functions; loralib's names are aliases of them."""

from lora_kernels.functional import lora_linear, lora_merged_linear
from lora_kernels.layers import LoRALayer, LoRALinear, LoRAMergedLinear

__version__ = "0.1.0"

Linear = LoRALinear
MergedLinear = LoRAMergedLinear

__all__ = [
    "Linear",
    "LoRALayer",
    "LoRALinear",
    "LoRAMergedLinear",
    "MergedLinear",
    "lora_linear",
    "lora_merged_linear",
]
