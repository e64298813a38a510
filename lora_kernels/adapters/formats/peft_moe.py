"""Mixtures of experts: which layers of an adapter PEFT takes for others.

From transformers 5 on, the experts of a block are stacked in one parameter. PEFT 0.19 and later
rewrites the target modules of such models: it looks for the names of the experts' projections and
of the router, and means the stacked parameters by them. Dense layers and shared experts have the
same names; their factors are then left out without an error.
"""

import sys
from collections.abc import Iterable

from torch import nn

from lora_kernels.foreign import ForeignModule
from lora_kernels.model.paths import split

__all__ = ["rewritten", "rewritten_by_name"]

# Names that PEFT rewrites, by the family that transformers counts the model to.
_REWRITTEN = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
# Parts of paths that only mixtures of experts have.
_EXPERTS = {"block_sparse_moe", "experts", "moe", "shared_expert", "shared_experts"}
_WAY_OUT = (
    "load the adapter with lora_kernels.load_adapter, or deploy merged_state_dict(model), or leave "
    "these modules out of target_modules"
)


def rewritten(model: ForeignModule, paths: Iterable[str]) -> str | None:
    """What PEFT does to LoRA of model, with the way out; None if it takes all layers as they are.

    model: without wrappers. paths: of its layers.
    """
    names = _REWRITTEN.get(_family(model) or "", ())
    lost = [path for path in paths if split(path)[1] in names]
    if not lost:
        return None
    return (
        f"PEFT 0.19 and later rewrites the target modules of a {model.config.model_type} model and "
        f"leaves out {len(lost)} layers of this adapter ({lost[0]}, ...): {_WAY_OUT}"
    )


def _family(model: nn.Module) -> str | None:
    """mixtral, qwen2_moe or another name in transformers; None for a model that is not its own."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if "transformers" not in sys.modules or kind is None:
        return None
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as families
    except ImportError:  # before transformers 5, whose models have a module for each expert
        return None
    return "mixtral" if kind == "mixtral" else families.get(kind)


def rewritten_by_name(paths: Iterable[str]) -> str | None:
    """The same, if nothing is known but paths: of models that surely are mixtures of experts."""
    names = set().union(*_REWRITTEN.values())
    paths = list(paths)
    lost = [path for path in paths if split(path)[1] in names]
    if not lost or not any(_EXPERTS.intersection(path.split(".")) for path in paths):
        return None
    return (
        f"PEFT 0.19 and later rewrites the target modules of many mixtures of experts of "
        f"transformers 5 and may leave out {len(lost)} of these layers ({lost[0]}, ...): {_WAY_OUT}"
    )
