"""The merged weight of a layer: a tensor of its own beside the base weight, after eval()."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lora_kernels import checks, distributed
from lora_kernels.ops.obstacle import is_plain

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MergedWeight", "MergesOnEval", "takes_merged_weight", "undisturbed"]

_Forward = TypeVar("_Forward", bound=Callable[..., Tensor])
_Sources = Sequence[Tensor | None]  # None: a stand-in is in its place


class MergedWeight:
    """A base weight with the update in it, and the tensors that it was made of.

    Immutable, so that threads may share one. A copy or a pickle is empty: it has neither the
    weight nor the tensors, and the layer that it belongs to merges anew at its next forward.
    """

    weight: Tensor | None = None
    sources: tuple[Tensor, ...] = ()  # base weight, lora_A, lora_B, perhaps lora_magnitude
    places: tuple[int, ...] = ()  # where the memory of the sources begins
    values: tuple = ()  # what changes if the sources change in place, and scaling

    @classmethod
    def of(cls, layer: "MergesOnEval", sources: tuple[Tensor, ...]) -> "MergedWeight":
        """That of layer, whose tensors are sources."""
        merged = cls()
        merged.sources, merged.places = sources, _places(sources)
        merged.values = _values(sources, layer.scaling)
        merged.weight = layer.merged_weight()
        return merged

    def has_same(self, sources: _Sources) -> bool:
        """Whether it was made of the same tensors."""
        return len(self.sources) == len(sources) and all(map(operator.is_, self.sources, sources))

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether it was made of the same tensors, which still lie where they lay."""
        return self.has_same(sources) and self.places == _places(sources)

    def is_current(self, sources: tuple[Tensor, ...], scaling: float) -> bool:
        """Whether the same tensors would give the same weight now."""
        return self.values == _values(sources, scaling)

    def __reduce__(self):
        return type(self), ()


def _places(sources: tuple[Tensor, ...]) -> tuple[int, ...]:
    try:
        return tuple(map(Tensor.data_ptr, sources))
    except RuntimeError:  # on a device that has no addresses
        return ()


_version = operator.attrgetter("_version")
_both = operator.itemgetter("_merged_weight", "merged")


def _values(sources: tuple[Tensor, ...], scaling: float) -> tuple:
    try:
        return *map(_version, sources), scaling
    except RuntimeError:  # inference tensors do not count how often they were changed
        return *(0 if t.is_inference() else t._version for t in sources), scaling


def takes_merged_weight(forward: _Forward) -> _Forward:
    """Marks a layer's forward that asks ``complete_weight()``: a layer with another never merges.

    A forward that a subclass brings along may read ``weight``, which has no update in it.
    """
    vars(forward)["takes_merged_weight"] = True
    return forward


if TYPE_CHECKING:
    _Module = nn.Module  # which stands behind the mixins in a layer's bases
else:
    _Module = object


class MergesOnEval(_Module):
    """Mixin of LoRALayer: eval() makes the merged weight, train() drops it, a forward renews it.

    Nothing is ever written to a tensor that the layer did not make itself.

    A class that derives from it has ``has_lora``, ``lora_A``, ``lora_B``, ``scaling`` and
    ``delta_weight()``, and says with ``weight_name`` where its base weight is. If its forward asks
    ``complete_weight()``, it has ``weight`` too.
    """

    weight_name = "weight"  # the base weight's, among the layer's parameters
    use_dora = False  # whether there is a lora_magnitude besides lora_A and lora_B
    merged: bool
    merge_weights: bool
    scaling: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter
    _merged_weight: MergedWeight | None = None  # None: this mixin has not merged

    if TYPE_CHECKING:

        @property
        def has_lora(self) -> bool: ...

        @property
        def weight(self) -> Tensor: ...

        def delta_weight(self) -> Tensor: ...

    # ---- the weights ----

    def weight_owner(self) -> nn.Module:
        """The module that holds the base weight and the bias: the layer, or one inside it."""
        path, _, _ = self.weight_name.rpartition(".")
        return self.get_submodule(path) if path else self

    @property
    def has_base_weight(self) -> bool:
        """Whether there is a base weight of that name: a user's own layer may have none."""
        return hasattr(self.weight_owner(), self.weight_name.rpartition(".")[2])

    def base_weight(self) -> Tensor:
        """The base weight, which has no update in it in any mode."""
        return getattr(self.weight_owner(), self.weight_name.rpartition(".")[2])

    def held_weight(self) -> Tensor:
        """The base weight, for its dtype, shape and device.

        While torch.fx records, base_weight() is a stand-in without them.
        """
        held = self.weight_owner()._parameters.get("weight")
        return self.base_weight() if held is None else held

    def merged_weight(self) -> Tensor:
        """base + delta, rounded once to the weight's dtype. A copy, not differentiable.

        Raises: TypeError if the weight is of a class that knows no sum, such as a quantised one.
        """
        weight = self.base_weight()
        with undisturbed(weight):
            if not self.has_lora:
                return weight.detach().clone()
            base = weight.detach()
            delta = distributed.distribute_like(self.delta_weight(), base)
            try:
                return (base + delta).to(weight.dtype)
            except Exception as error:
                if is_plain(type(base)):
                    raise
                raise TypeError(
                    f"{checks.layer_name(self)}: weight is a {type(base).__name__}, to which the "
                    f"update cannot be added: it has no merged weight"
                ) from error

    def complete_weight(self) -> Tensor | None:
        """The weight that a forward needs alone, or None if it has to add the update itself.

        It is the merged weight, made anew if values have changed in place. It is the base weight
        if there is no update, or if a subclass merges on its own: then ``merged`` is set, but not
        by this mixin. It is None if the layer is not merged, and for a call that is to give the
        base weight a gradient.
        """
        if not self.has_lora:
            return self.weight
        if not self.merged:
            return None
        weight = self.weight
        merged = self._merged_weight
        if merged is None:
            merged, still = self._kept()
            if merged is None:
                return weight if still else None
        if not isinstance(weight, Tensor):
            return self._merged_for_a_record(merged)
        if weight.requires_grad and torch.is_grad_enabled():
            return None
        sources = self._sources(weight)
        if torch.compiler.is_compiling():
            # torch.export puts its own tensors in the place of parameters.
            same = merged.has_same(sources) or not torch.compiler.is_dynamo_compiling()
            return merged.weight if same else None
        if merged.weight is not None and not merged.is_of(sources):
            self._unmerge()  # somebody moves the weights, or takes others for a call
            return None
        if merged.weight is not None and merged.is_current(sources, self.scaling):
            return merged.weight
        if torch._C._are_functorch_transforms_active():
            return None  # what is computed here would not outlive the transform
        if self.merging_obstacle() is not None:
            self._unmerge()
            return None
        renewed = MergedWeight.of(self, sources)
        if self._merged_weight is merged:  # no other thread has called train() meanwhile
            self._merged_weight = renewed
        return renewed.weight

    def _merged_for_a_record(self, merged: MergedWeight) -> Tensor | None:
        """The merged weight while torch.fx records, which has stand-ins in parameters' places."""
        sources = (self.held_weight(), *self._held_factors())
        current = merged.has_same(sources) and merged.is_current(merged.sources, self.scaling)
        return merged.weight if current else None

    def _sources(self, weight: Tensor) -> tuple[Tensor, ...]:
        """weight, and what the layer makes its merged weight of besides."""
        if self.use_dora:
            return weight, self.lora_A, self.lora_B, self.lora_magnitude
        return weight, self.lora_A, self.lora_B

    def _held_factors(self) -> tuple[Tensor | None, ...]:
        """What _sources has besides the weight, past stand-ins and parametrizations."""
        names = ("lora_A", "lora_B", "lora_magnitude")[: 3 if self.use_dora else 2]
        return tuple(map(self._parameters.get, names))

    # ---- when the merged weight is made and dropped ----

    def train(self, mode: bool = True) -> "Self":
        """Merges if mode is False and ``merge_weights`` is set, drops the merged weight if not."""
        super().train(mode)
        if self.merge_weights and not mode:
            self._merge()
        else:
            self._unmerge()
        return self

    def merging_obstacle(self) -> str | None:
        """Why the layer cannot be merged and computes its update on the fly, or None."""
        if "forward" in self.__dict__ or not hasattr(type(self).forward, "takes_merged_weight"):
            return "its forward is not the package's own"
        if not self.has_lora:
            return None
        if torch._C._are_functorch_transforms_active():
            return "a transform of torch.func is running"
        owner = self.weight_owner()
        if "forward" in owner.__dict__:
            return "the forward of the module with its weight was replaced"
        sources: tuple[Any, ...] = (owner._parameters.get("weight"), *self._held_factors())
        weight, a, b, *_ = sources
        if distributed.is_managed(owner):
            return "its weight is sharded"
        if not {*map(type, sources)} <= {nn.Parameter, Tensor}:
            sharded = any(map(distributed.is_dtensor, sources))
            return "its weight is sharded" if sharded else "its tensors are computed, or not plain"
        if any(tensor.is_meta for tensor in sources):
            return "it is on the meta device"
        whole = weight.dim() > 1 and weight.numel() > 0 and a.dim() == b.dim() == 2
        dense = weight.layout is torch.strided and weight.is_floating_point()
        if not (whole and dense and all(tensor.device == a.device for tensor in sources)):
            return "weight, lora_A and lora_B are not whole floating-point tensors on one device"
        if a.is_cpu and any(tensor.untyped_storage().is_shared() for tensor in sources[1:]):
            return "other processes share its memory, and may change it unseen"
        return None

    def _merge(self) -> None:
        """Makes the merged weight, if it can be and is not there already."""
        if self.merged and self.has_lora and self._merged_weight is None:
            return  # a subclass, or the program, has merged on its own
        if self.merging_obstacle() is not None:
            self._unmerge()
            return
        if not self.has_lora:
            self._keep(None, True)
            return
        sources, merged = self._sources(self.base_weight()), self._merged_weight
        if merged is not None:
            if merged.is_of(sources) and merged.is_current(sources, self.scaling):
                self._keep(merged, True)
                return
            merged = None
            self._keep(MergedWeight(), True)  # frees the old one first
        self._keep(MergedWeight.of(self, sources), True)

    def _unmerge(self) -> None:
        if self.merged or self._merged_weight is not None:
            self._keep(None, False)

    def _keep(self, merged_weight: MergedWeight | None, merged: bool) -> None:
        # Past nn.Module.__setattr__, which would take a tenth of the time of eval(). The former one
        # is freed behind the change, so that another thread sees both values or neither.
        former = self._merged_weight
        self.__dict__.update(_merged_weight=merged_weight, merged=merged)
        del former

    def _kept(self) -> tuple[MergedWeight | None, bool]:
        """The merged weight and ``merged`` as they are at one moment: a thread may change them."""
        if torch.compiler.is_compiling() or "_merged_weight" not in self.__dict__:
            return None, self.merged  # no other thread is seen, or this mixin has never merged
        return _both(self.__dict__)

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        if self._merged_weight is not None:
            self._merge()
        return result


@contextlib.contextmanager
def undisturbed(weight: Tensor) -> Iterator[None]:
    """Arithmetic on weight without gradients, autocast, or the caller's inference_mode."""
    # What is so already is not entered again: eval() comes here for each layer.
    inference = weight.is_inference()
    entered = torch.is_inference_mode_enabled() == inference
    with (
        contextlib.nullcontext() if entered else torch.inference_mode(inference),
        torch.no_grad(),
        checks.without_autocast(weight.device),
    ):
        yield
