"""Which layers have a frozen weight that is not dense: a table of classes by their names."""

from collections.abc import Callable

from torch import Tensor, nn

from lora_kernels.foreign import ForeignModule
from lora_kernels.quantization import (
    bitsandbytes,
    compressed_tensors,
    finegrained_fp8,
    hqq,
    quanto,
    torchao,
)
from lora_kernels.quantization.base import FrozenWeight, NotFrozen
from lora_kernels.quantization.unsupported import REASONS

__all__ = ["find", "frozen_weight", "is_quantised", "restore"]

_Reader = Callable[[ForeignModule], FrozenWeight | NotFrozen]
# By name: a class exists only if its library has been imported, which is not done here.
_READERS: dict[str, _Reader] = {
    "torch.nn.modules.linear.Linear": torchao.linear,
    "bitsandbytes.nn.modules.Linear4bit": bitsandbytes.linear_4bit,
    "bitsandbytes.nn.modules.LinearFP4": bitsandbytes.linear_4bit,
    "bitsandbytes.nn.modules.LinearNF4": bitsandbytes.linear_4bit,
    "bitsandbytes.nn.modules.Linear8bitLt": bitsandbytes.linear_8bit,
    "hqq.core.quantize.HQQLinear": hqq.linear,
    "optimum.quanto.nn.qlinear.QLinear": quanto.linear,
    "transformers.integrations.finegrained_fp8.FP8Linear": finegrained_fp8.linear,
    "transformers.integrations.compressed_tensors.CompressedTensorsFP8Linear": (
        compressed_tensors.linear_fp8
    ),
}
_readers: dict[tuple[type, Callable], _Reader] = {}  # of classes met, with the forwards they had


def find(layer: ForeignModule) -> FrozenWeight | NotFrozen:
    """The frozen weight of a layer as it is now, or why it has none.

    It is asked in every call of a layer: what it looks at can change from one to the next.
    """
    kind = type(layer)
    try:
        reader = _readers[kind, kind.forward]
    except (KeyError, AttributeError):
        known = _reader_of(kind)
        if isinstance(known, NotFrozen):
            return known
        reader = known
        _readers[kind, kind.forward] = reader
    if "forward" in layer.__dict__:
        if hasattr(layer, "quantization_scheme"):
            return NotFrozen("compressed-tensors patched it: load the model with dequantize=True")
        return NotFrozen("it has a forward of its own, from a hook or a patch: remove that")
    return reader(layer)


def is_quantised(layer: ForeignModule) -> bool:
    """Whether layer is a linear of a quantiser, taken or not; it may have to be quantised yet."""
    kind = type(layer)
    if kind.__module__.partition(".")[0] in REASONS:
        return True
    reader = _READERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if reader is None:
        return False
    found = reader(layer)
    return isinstance(found, FrozenWeight) or found.error is ValueError


def frozen_weight(layer: nn.Module) -> FrozenWeight:
    """The weight of a quantised linear layer, for lora_linear: layer(x) is x·weightᵀ + bias.

    It has a shape (N, K), the dtype that the layer multiplies in (None: x's), a kind such as "nf4",
    and dense(dtype), which makes the matrix [N, K] anew.
    layer: of bitsandbytes (Linear4bit, Linear8bitLt), HQQ (HQQLinear), quanto (QLinear) or
    transformers (FP8Linear, CompressedTensorsFP8Linear), or an nn.Linear with a weight of torchao.
    Raises: TypeError if layer is of another kind, ValueError if its state does not fit.
    """
    found = find(layer)
    if isinstance(found, NotFrozen):
        raise found.error(f"{type(layer).__name__} has no frozen weight: {found.reason}")
    return found


def restore(module: nn.Module) -> None:
    """Undoes what forwards did in place to the quantised weights in module; see FrozenWeight."""
    for layer in module.modules():
        found = find(layer)
        if isinstance(found, FrozenWeight):
            found.restore()


def _reader_of(kind: type[ForeignModule]) -> _Reader | NotFrozen:
    reader = _READERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if reader is None:
        package = kind.__module__.partition(".")[0]
        unknown = "it is of no class that this package knows: pass a dense weight [N, K]"
        if issubclass(kind, Tensor):
            unknown = "it is a tensor: pass the layer that holds it"
        reason = REASONS.get(package, unknown)
        return NotFrozen(reason, TypeError)
    if _is_replaced(kind):
        return NotFrozen(f"{kind.__name__}.forward has been replaced: undo that patch")
    return reader


def _is_replaced(kind: type[ForeignModule]) -> bool:
    """Whether the forward of a class is another than that which it was defined with."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = kind.forward
    return (
        forward.__module__ != owner.__module__
        or not forward.__qualname__.startswith(f"{owner.__qualname__}.")
        or hasattr(forward, "__wrapped__")
    )


# torch.compile calls it and keeps the answer: it cannot trace what is asked of functions here. So
# does torch.compiler.assume_constant_result, which imports the compiler, for more than a second.
vars(_is_replaced)["_dynamo_marked_constant"] = True
