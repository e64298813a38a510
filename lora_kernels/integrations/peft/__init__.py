"""PEFT's lora.Linear on lora_linear: the patch, and the guard that says which calls it takes."""

from lora_kernels.integrations.peft.patch import patch_peft, unpatch_peft

__all__ = ["patch_peft", "unpatch_peft"]
