"""LoRA layers and functions; loralib's names are aliases of them.

The first name that is used imports PyTorch and registers this package's operators. Neither happens
before, so that ``lora-kernels --help`` is fast. Before a program is loaded that torch.export or
torch.jit has saved, ``import lora_kernels.ops`` registers them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_kernels.adapters.hub import push_to_hub
    from lora_kernels.adapters.load import load_adapter
    from lora_kernels.adapters.save import save_adapter
    from lora_kernels.adapters.state_dict import lora_state_dict, merged_state_dict
    from lora_kernels.functional import (
        lora_grouped_linear,
        lora_linear,
        lora_merged_linear,
        lora_shared_linear,
    )
    from lora_kernels.integrations import adapter_callback, patch_peft, unpatch_peft
    from lora_kernels.layers import (
        Conv1d,
        Conv2d,
        Conv3d,
        ConvLoRA,
        Embedding,
        Linear,
        LoRAConv1d,
        LoRAConv2d,
        LoRAConv3d,
        LoRAEmbedding,
        LoRAExperts,
        LoRALayer,
        LoRALinear,
        LoRAMergedLinear,
        LoRAQuantizedLinear,
        MergedLinear,
        MultiLoRALinear,
        share_inputs,
    )
    from lora_kernels.model.apply import apply_lora
    from lora_kernels.model.merge import merge_lora, unmerge_lora, use_merged_state_dicts
    from lora_kernels.model.route import adapter_parameters, route
    from lora_kernels.model.trainable import mark_only_lora_as_trainable, print_trainable_parameters
    from lora_kernels.quantization import frozen_weight
    from lora_kernels.reporting import report

__version__ = "0.2.0"

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
    "adapter_callback",
    "adapter_parameters",
    "apply_lora",
    "frozen_weight",
    "load_adapter",
    "lora_grouped_linear",
    "lora_linear",
    "lora_merged_linear",
    "lora_shared_linear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_lora",
    "merged_state_dict",
    "patch_peft",
    "print_trainable_parameters",
    "push_to_hub",
    "report",
    "route",
    "save_adapter",
    "share_inputs",
    "unmerge_lora",
    "unpatch_peft",
    "use_merged_state_dicts",
]

# Where __getattr__ finds them; type checkers read the imports above.
_HOMES = (
    "adapters.hub",
    "adapters.load",
    "adapters.save",
    "adapters.state_dict",
    "functional",
    "integrations",
    "layers",
    "model.apply",
    "model.merge",
    "model.route",
    "model.trainable",
    "quantization",
    "reporting",
)

if not TYPE_CHECKING:

    def __getattr__(name: str):
        """A public name at its first use, which imports all of them; or a module of the package."""
        from importlib import import_module

        if name in __all__:
            for home in _HOMES:
                module = import_module(f"{__name__}.{home}")
                own = [public for public in module.__all__ if public in __all__]
                globals().update({public: getattr(module, public) for public in own})
            return globals()[name]
        path = f"{__name__}.{name}"
        try:
            if not name.startswith("_"):
                return import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
