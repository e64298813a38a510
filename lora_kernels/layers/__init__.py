"""The nn.Modules."""

from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.merged_linear import LoRAMergedLinear

__all__ = ["LoRALayer", "LoRALinear", "LoRAMergedLinear"]
