"""PEFT's DoRA over linears: which adapters lora_linear computes with their magnitude."""

import inspect
import sys
from collections.abc import Callable

from torch import Tensor

from lora_kernels.foreign import ForeignModule
from lora_kernels.integrations.peft.guard import (
    VARIANTS,
    NotFused,
    not_plain_module,
    not_plain_tensor,
    parameter,
)
from lora_kernels.integrations.peft.source import digest

__all__ = ["magnitude_of", "register"]

# sha256 of the sources that this file stands in for, in PEFT 0.16.0 to 0.21.2.
_KNOWN = {
    "DoraLinearVariant.forward": (
        "205b1c33010fc724cede53917af35c3adb01433735956b5d2a3005cc81cbdcb1",  # to 0.17.1
        "6d640ee16f356b10bcf8c364203e370512e32707249997b75b332be736de1897",  # 0.18
        "d8a1e321908706d8c42183fc77ae8317e600a31728c9a2aacd6b91c011df5d33",
    ),
    "DoraLinearLayer.forward": (
        "542315d724b74876430089d0aa8d17ed75397703caba657c9da8d8b3bb2eac9e",  # to 0.18
        "749337c074dab8a6d3d7a8fb99c497499789fa352b2e81a08cff9374239b2fa5",
    ),
    "DoraLinearLayer.get_weight_norm": (
        "9814ad173fb7d3a1046b6de6e8ac90843c0d3e05c017cbe304708e2b8c67c42c",  # to 0.18
        "df92c9b862d0abe477c4d3ef55560a67fb9467344fc0c53ebc7d4dfd2584c81f",
    ),
}
_forwards: dict[type, Callable] = {}  # of the variant and of the module with the magnitude


def register() -> None:
    """Has the guard ask magnitude_of, if PEFT's DoRA is what this file is written for."""
    try:
        from peft.tuners.lora.dora import DoraLinearLayer
        from peft.tuners.lora.variants import DoraLinearVariant
    except ImportError:  # before 0.16
        return
    of_layer = DoraLinearLayer.forward, DoraLinearLayer.get_weight_norm  # under torch.no_grad
    methods = map(inspect.unwrap, (DoraLinearVariant.forward, *of_layer))
    if all(digest(method) in _KNOWN[method.__qualname__] for method in methods):
        for kind in (DoraLinearVariant, DoraLinearLayer):
            _forwards.setdefault(kind, kind.forward)
        VARIANTS[DoraLinearVariant] = magnitude_of


def magnitude_of(layer: ForeignModule, adapter: str) -> Tensor | NotFused:
    """The magnitude of an adapter of a PEFT lora.Linear, or why PEFT's own forward runs."""
    variant = type(layer.lora_variant[adapter])
    if variant.forward is not _forwards[variant]:
        return NotFused(f"{variant.__name__}.forward has been replaced")
    if getattr(sys.modules["peft.tuners.lora.dora"], "ENABLE_DORA_CACHING", False):
        return NotFused("ENABLE_DORA_CACHING is set")
    if layer.ephemeral_gpu_offload:
        return NotFused("ephemeral_gpu_offload is set")
    vector = layer._modules["lora_magnitude_vector"]._modules[adapter]
    magnitude = parameter(vector, "weight")
    return (
        not_plain_module(vector, "lora_magnitude_vector", _forwards)
        or not_plain_tensor(magnitude, "lora_magnitude_vector.weight", 1)
        or magnitude
    )
