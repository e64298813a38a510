"""Other libraries on this package's functions. None of them is imported before it is needed."""

from lora_kernels.integrations.peft import patch_peft, unpatch_peft
from lora_kernels.integrations.trainer import adapter_callback

__all__ = ["adapter_callback", "patch_peft", "unpatch_peft"]
