"""The layers: nn.Modules with a low-rank update, and share_inputs."""

from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA, LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.experts import LoRAExperts
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from lora_kernels.layers.multi_linear import MultiLoRALinear
from lora_kernels.layers.quantized_linear import LoRAQuantizedLinear
from lora_kernels.layers.shared_input import share_inputs

# loralib's names
Linear = LoRALinear
MergedLinear = LoRAMergedLinear
Embedding = LoRAEmbedding
Conv1d = LoRAConv1d
Conv2d = LoRAConv2d
Conv3d = LoRAConv3d

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALayer",
    "LoRALinear",
    "LoRAMergedLinear",
    "LoRAQuantizedLinear",
    "MergedLinear",
    "MultiLoRALinear",
    "share_inputs",
]
