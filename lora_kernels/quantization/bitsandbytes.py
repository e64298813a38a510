"""Frozen weights of bitsandbytes: Linear4bit (NF4, FP4) and Linear8bitLt (LLM.int8())."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.foreign import ForeignModule
from lora_kernels.quantization.base import TRAINED, FourBit, FrozenWeight, NotFrozen

__all__ = ["linear_4bit", "linear_8bit"]

_OPS = torch.ops.bitsandbytes  # defined once bitsandbytes is imported, as it is if a layer exists
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that its operators give


class Blocks(FrozenWeight):
    """The weight of a Linear4bit: codes of four bits and a scale for each block of them.

    The scales may be in 8 bits themselves (double quantisation). A forward in eval() on a CPU with
    AVX512-BF16 instructions packs codes and scales anew, in place; from then on the layer
    multiplies in bfloat16, with scales in bfloat16.
    """

    keeps_dtype = True

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.layer.weight
        state = _state_of(self.layer, weight)
        codes, scales = weight.detach(), state.absmax
        if _is_packed(state):
            return _unpacked(codes, state, dtype)
        if state.nested:
            of = state.state2
            scales = _OPS.dequantize_blockwise.default(
                scales, of.absmax, of.code, of.blocksize, torch.float32
            )
            scales += state.offset
        # Not by bitsandbytes' dequantize_4bit(): it rounds to the state's dtype first.
        how = (state.blocksize, state.quant_type, state.shape)
        narrow = dtype if dtype in _DTYPES else torch.float32
        w = _OPS.dequantize_4bit.default(codes.view(-1, 1), scales.float(), *how, narrow)
        return w.to(dtype)

    def restore(self) -> None:
        weight = self.layer.weight
        state = _state_of(self.layer, weight)
        if not _is_packed(state):
            return
        first, second = _codes(weight.detach(), state).view(-1, 2).unbind(1)
        storage = state.__dict__.get("original_storage_type", torch.uint8)
        weight.data = (first << 4 | second).view(state.original_qshape).view(storage)
        state.absmax = state.absmax.T.reshape(-1).float()
        state.dtype, state.packing_format_for_cpu = state.original_dtype, False

    def four_bit(self) -> FourBit | None:
        weight = self.layer.weight
        state = _state_of(self.layer, weight)
        if _is_packed(state):
            return None
        nested = None
        if state.nested:
            of = state.state2
            nested = (of.absmax, of.code, of.blocksize, state.offset)
        packed = weight.detach().view(torch.uint8).view(-1)
        shape = tuple(state.shape)
        return FourBit(packed, state.absmax, state.code, state.blocksize, shape, nested)


class EightBit(FrozenWeight):
    """The weight of a Linear8bitLt: int8 [N, K], and a scale for each row."""

    keeps_dtype = True

    def dense(self, dtype: torch.dtype) -> Tensor:
        codes, scales = _rows(self.layer)
        acc = torch.promote_types(dtype, torch.float32)  # a mixed product is slow on a CPU
        return codes.to(acc).mul_(scales.mul(1 / 127).unsqueeze(1)).to(dtype)


def linear_4bit(layer: ForeignModule) -> FrozenWeight | NotFrozen:
    """The weight of a bitsandbytes.nn.Linear4bit.

    exact: once it knows what it computes in. If it was not told, its first forward decides that.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        return NotFrozen("it has no parameter weight")
    state = _state_of(layer, weight)
    if state is None:
        return NotFrozen("it has no quant_state: move it to its device, which quantises it")
    with torch._C.DisableTorchFunctionSubclass():  # attributes of such tensors are slow without
        trained, device = weight.requires_grad, weight.device
    if trained:
        return NotFrozen(TRAINED)
    shape = tuple(state.shape)
    if shape != (layer.out_features, layer.in_features):
        return NotFrozen(
            f"its weight was quantised as {list(shape)}, not as [out_features, in_features] = "
            f"{[layer.out_features, layer.in_features]}: quantise it again in that orientation"
        )
    dtype = layer.compute_dtype
    if _is_packed(state):
        dtype = torch.bfloat16
    elif state.absmax.dim() != 1:
        return NotFrozen(
            "bitsandbytes lost the order of its scales when it unpacked the weight, which "
            "state_dict() and to() do after a forward in eval() on this CPU: load it again"
        )
    return Blocks(layer, shape, device, dtype, state.quant_type, layer.compute_type_is_set)


def linear_8bit(layer: ForeignModule) -> FrozenWeight | NotFrozen:
    """The weight of a bitsandbytes.nn.Linear8bitLt.

    exact: in training on a CPU. Otherwise the layer rounds x to 8 bits.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        return NotFrozen("it has no parameter weight")
    if layer.state.has_fp16_weights:
        return NotFrozen(
            "has_fp16_weights=True keeps a 16-bit weight and quantises it in every forward: "
            "make the layer with has_fp16_weights=False"
        )
    if weight.dtype != torch.int8:
        return NotFrozen("its weight is not quantised yet: move it to its device, which does it")
    if weight.requires_grad:
        return NotFrozen(TRAINED)
    if _rows(layer)[1] is None:
        return NotFrozen("it has no scales (SCB): load it again")
    device = weight.device
    exact = layer.training and device.type in ("cpu", "xpu")
    return EightBit(layer, tuple(weight.shape), device, None, "int8", exact)


def _state_of(layer: ForeignModule, weight: Tensor):
    """The quant_state that the layer's forward finds: FSDP makes weights anew, without theirs."""
    state = getattr(weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _is_packed(state) -> bool:
    return state.__dict__.get("packing_format_for_cpu", False)


def _unpacked(packed: Tensor, state, dtype: torch.dtype) -> Tensor:
    """w [N, K] out of what bitsandbytes packs for its CPU kernel, with scales [K/blocksize, N].

    Its own inverse is none: it quantises double-quantised scales a second time, and leaves others
    in the packed order.
    """
    n, k = state.shape
    codes = _codes(packed, state).view(-1)
    blocks = state.code.index_select(0, codes.int()).view(n, -1, state.blocksize)
    return blocks.mul_(state.absmax.T.float().unsqueeze(2)).view(n, k).to(dtype)


def _codes(packed: Tensor, state) -> Tensor:
    """The numbers [N, K] in a packed weight [N, K/2].

    32 bytes have the codes of 32 rows of w in two neighbouring columns, the first 16 rows in the
    low halves and the others in the high ones.
    """
    n, k = state.shape
    rows = packed.view(torch.uint8).view(-1, 32)
    codes = torch.cat([rows & 15, rows >> 4], dim=1).view(n // 32, k // 2, 32, 2)
    return codes.transpose(1, 2).reshape(n, k)


def _rows(layer: ForeignModule) -> tuple[Tensor, Any]:
    """codes [N, K] and scales [N] that the next forward multiplies by; the first one moves them.

    The scales are None if the layer has none.
    """
    weight, state = layer.weight, layer.state
    held = state if getattr(weight, "CB", None) is None else weight
    codes = weight.detach() if held.CB is None else held.CB
    return codes, held.SCB
