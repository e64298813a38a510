"""The nn.Modules."""

from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA, LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.merged_linear import LoRAMergedLinear

__all__ = [
    "ConvLoRA",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAMergedLinear",
]
