"""loralib's module of this name."""

from lora_kernels.adapters.state_dict import lora_state_dict
from lora_kernels.layers import LoRALayer
from lora_kernels.model.trainable import mark_only_lora_as_trainable

__all__ = ["LoRALayer", "lora_state_dict", "mark_only_lora_as_trainable"]
