"""Other libraries on this package's functions. None of them is imported before it is needed."""

from lora_kernels.integrations.peft import patch_peft, unpatch_peft

__all__ = ["patch_peft", "unpatch_peft"]
