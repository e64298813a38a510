"""What every LoRA layer shares: hyperparameters, merging on eval, state dicts.

A layer is the mixin :class:`LoRALayer` in front of a torch module; ``class LoRALinear(LoRALayer,
nn.Linear)``. A subclass says where its base weight lives (``_weight_name``) and what it would add
to it (``delta_weight``); merging, restoring and checkpointing are written once, here.
"""

import contextlib
import gc
import sys

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_kernels import distributed
from lora_kernels.checks import check_alpha, check_dropout, check_rank

__all__ = ["LoRALayer"]


class LoRALayer:
    """Mixin of all LoRA layers; loralib's class of the same name.

    Attributes: ``r``, ``lora_alpha``, ``lora_dropout`` (an nn.Dropout), ``merge_weights``,
    ``merged``, and ``scaling`` = lora_alpha / r where r > 0.

    Merging. ``eval()`` adds the delta to the base weight in place when ``merge_weights`` is set;
    ``train()`` restores the base bit for bit from a copy that is kept in host memory meanwhile.
    While merged:

    * the forward is the plain layer's, so ``lora_A`` and ``lora_B`` receive no gradient
      (``merge_weights=False`` trains in eval mode);
    * ``state_dict()`` still holds the unmerged weight, and loading one takes effect at once;
    * edits of ``lora_A``, ``lora_B`` or ``scaling`` that autograd can see take effect at the next
      forward. Edits through ``.data``, and edits under a compiled forward, take effect at the
      next ``eval()``;
    * the base weight itself is changed by ``load_state_dict`` or in training mode only.

    A weight that another module holds too is never merged in place: ``merged`` stays False and
    the forward adds the delta on the fly. So does a layer whose weight FSDP2 (``fully_shard``) has
    sharded; a layer that is merged already when its weight is sharded raises a RuntimeError at its
    next forward.
    """

    _weight_name = "weight"

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool):
        layer = type(self).__name__
        self.r = check_rank(r, layer)
        self.lora_alpha = check_alpha(lora_alpha, layer)
        self.lora_dropout = nn.Dropout(check_dropout(lora_dropout, layer))
        self.merge_weights = merge_weights
        self.merged = False
        self._base_weight: Tensor | None = None
        self._merged_from: tuple | None = None
        if self.r > 0:
            self.scaling = self.lora_alpha / self.r
        if isinstance(self, nn.Module):
            self.register_load_state_dict_post_hook(_remerge_after_load)

    # ---- what a subclass provides ----

    def delta_weight(self) -> Tensor:
        """scaling * (what B and A add to the base weight), in the weight's layout, >= fp32."""
        raise NotImplementedError(f"{type(self).__name__} does not define delta_weight")

    def reset_lora_parameters(self) -> None:
        """Draws lora_A and lora_B anew; a no-op for a layer without them."""
        raise NotImplementedError(f"{type(self).__name__} does not define reset_lora_parameters")

    # ---- what it gets ----

    def _add_adapter(self, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> None:
        """Gives the layer lora_A and lora_B of these shapes and freezes its base weight."""
        weight = self._weight()
        self.lora_A = nn.Parameter(weight.new_zeros(a_shape))
        self.lora_B = nn.Parameter(weight.new_zeros(b_shape))
        weight.requires_grad = False

    def _adopt(self, wrapped: nn.Module, lora_dtype: torch.dtype | None) -> "LoRALayer":
        """Takes over the parameters and the mode of a plain module, and draws the adapter anew."""
        owner, weight = self._weight_owner(), wrapped.weight
        owner.weight = weight
        if getattr(wrapped, "bias", None) is not None:
            owner.bias = wrapped.bias
        if self.has_lora:
            weight.requires_grad = False
            dtype = weight.dtype if lora_dtype is None else lora_dtype
            for name in ("lora_A", "lora_B"):
                empty = torch.empty(getattr(self, name).shape, dtype=dtype, device=weight.device)
                setattr(self, name, nn.Parameter(empty))
            self.reset_lora_parameters()
        return self.train(wrapped.training)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, gathered from all ranks where they are sharded."""
        return distributed.full_tensor(self.lora_A), distributed.full_tensor(self.lora_B)

    @property
    def has_lora(self) -> bool:
        """Whether the layer holds lora_A and lora_B."""
        return hasattr(self, "lora_A")  # parametrized, pruned and replicated layers included

    def _dropout_p(self) -> float:
        """p of lora_dropout as it stands: 0 where it is in eval mode or no dropout at all."""
        dropout = self.lora_dropout
        return getattr(dropout, "p", 0.0) if dropout.training else 0.0

    def _weight_owner(self) -> nn.Module:
        path, _, _ = self._weight_name.rpartition(".")
        return self.get_submodule(path)

    def _weight(self) -> Tensor:
        """The base weight parameter, merged or not."""
        return self._weight_owner()._parameters["weight"]

    def base_weight(self) -> Tensor:
        """The unmerged base weight: the parameter itself, or its copy while merged."""
        return self._weight() if self._base_weight is None else self._base_weight

    def merged_weight(self) -> Tensor:
        """base + delta, rounded once to the weight's dtype. Not differentiable."""
        weight = self._weight()
        with undisturbed(weight):
            if not self.has_lora:
                return weight.detach().clone()
            base = self.base_weight().detach().to(weight.device)
            return (base + distributed.distribute_like(self.delta_weight(), base)).to(weight.dtype)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.merge_weights and not mode:
            self._merge()
        else:
            self._unmerge()
        return self

    def _merge(self) -> None:
        if self.merged:
            if self._base_weight is not None and self._tied():
                self._unmerge()
            self._refresh()
            return
        if self.has_lora:
            if self._tied():
                return
            weight = self._weight()
            with undisturbed(weight):
                host = weight.device if weight.is_meta else "cpu"
                self._base_weight = weight.detach().to(host, copy=True)
            self._write_merged()
        self.merged = True

    def _unmerge(self) -> None:
        if self._base_weight is not None:
            owner = self._weight_owner()
            if distributed.is_managed(owner):
                owner.state_dict()  # has it sharded again, before it is written to
            weight = self._weight()
            with undisturbed(weight):
                weight.copy_(distributed.distribute_like(self._base_weight, weight))
            self._base_weight = self._merged_from = None
        self.merged = False

    def _refresh(self) -> None:
        """While merged: merges again where lora_A, lora_B or scaling have changed since."""
        if self._base_weight is None or torch.compiler.is_compiling():
            return
        if getattr(self, "_is_replica", False):  # of nn.DataParallel: a copy of a merged layer
            return
        if self._adapter_state() != self._merged_from:
            if distributed.is_managed(self._weight_owner()):
                raise RuntimeError(
                    f"{type(self).__name__}({self.extra_repr()}): eval() merged it before "
                    f"fully_shard took its weight: call train() on the model first"
                )
            self._write_merged()

    def _write_merged(self) -> None:
        weight = self._weight()
        with undisturbed(weight):
            weight.copy_(self.merged_weight())
        self._merged_from = self._adapter_state()

    def _adapter_state(self) -> tuple:
        a, b = self.lora_A, self.lora_B
        return id(a), _version(a), id(b), _version(b), self.scaling

    def _tied(self) -> bool:
        """Whether something else holds this layer's base weight, or its storage: another module, or
        FSDP, which gathers and drops what a forward sees as the weight.

        The full scan walks every live object; it runs only where reference counts leave it open.
        """
        owner = self._weight_owner()
        if owner._parameters["weight"].is_meta:
            return False
        if distributed.is_managed(owner) or distributed.is_dtensor(owner._parameters["weight"]):
            return True
        references, storage_uses = _reference_counts(owner)  # before a name here adds to them
        weight = owner._parameters["weight"]
        if storage_uses == _UNSHARED[1] and (
            references == _UNSHARED[0] or not _in_another_dict(weight, owner)
        ):
            return False
        return _held_elsewhere(weight, owner)

    def _apply(self, fn, recurse=True):
        # A moved or cast weight is merged from the moved or cast base, never cast after merging.
        merged = self.merged
        if merged:
            self._unmerge()
        try:
            return super()._apply(fn, recurse)
        finally:
            if merged:
                self._merge()

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        destination = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        if self._base_weight is not None:
            destination[prefix + self._weight_name] = self._base_weight
        return destination

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Loaded into the unmerged layer; _remerge_after_load merges again once the children have
        # been loaded too.
        self._remerge = self.merged
        if self.merged:
            self._unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _remerge_after_load(layer: LoRALayer, incompatible_keys) -> None:
    if layer.__dict__.pop("_remerge", False):
        layer._merge()


def _reference_counts(owner: nn.Module) -> tuple[int, int]:
    """How often owner's weight is referred to: the Python object, and the storage under it."""
    return (
        sys.getrefcount(owner._parameters["weight"]),
        torch._C._storage_Use_Count(owner._parameters["weight"].untyped_storage()._cdata),
    )


# The counts of a weight that nobody shares, read off one: they depend on the Python version.
_UNSHARED = _reference_counts(nn.Linear(1, 1))


def _in_another_dict(weight: Tensor, owner: nn.Module) -> bool:
    """Whether a dict other than owner's, as modules keep their parameters in, refers to weight."""
    return any(
        isinstance(holder, dict) and holder is not owner._parameters
        for holder in gc.get_referrers(weight)
    )


def _held_elsewhere(weight: Tensor, owner: nn.Module) -> bool:
    """Whether a module other than owner has a parameter or buffer that overlaps weight."""
    start, end = _extent(weight)
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), nn.Module) or candidate is owner:
            continue
        held = candidate.__dict__
        for tensor in (*held.get("_parameters", {}).values(), *held.get("_buffers", {}).values()):
            if tensor is None or is_lazy(tensor) or tensor.device != weight.device:
                continue
            if tensor.layout is not torch.strided:
                continue
            other_start, other_end = _extent(tensor)
            if other_start < end and start < other_end:
                return True
    return False


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a contiguous tensor covers."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def undisturbed(weight: Tensor):
    """Arithmetic on weights that gradients, autocast and inference_mode play no part in."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(weight.is_inference()))
        stack.enter_context(torch.no_grad())
        if weight.device.type != "meta":
            stack.enter_context(torch.autocast(weight.device.type, enabled=False))
        yield
