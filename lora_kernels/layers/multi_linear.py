"""MultiLoRALinear: nn.Linear with several adapters, each for its own rows of a batch."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import checks
from lora_kernels.checks import check_alpha, check_dropout, check_rank
from lora_kernels.foreign import ForeignModule, check_options
from lora_kernels.functional import lora_grouped_linear
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.linear import LinearLayer, LoRALinear
from lora_kernels.layers.routing import ActiveRoutes
from lora_kernels.ops.obstacle import is_opaque

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from lora_kernels.layers.options import LinearOptions

__all__ = ["AdapterSpec", "MultiLoRALinear", "check_adapter_name"]


class AdapterSpec(NamedTuple):
    """The values of one adapter of a layer that are not tensors."""

    r: int
    lora_alpha: float
    lora_dropout: float
    scaling: float

    @classmethod
    def of(cls, owner: str, r: int, lora_alpha: float = 1, lora_dropout: float = 0.0) -> "Self":
        """With scaling = lora_alpha / r. Raises: ValueError that names owner, for a bad value."""
        rank = check_rank(r, owner)
        if rank == 0:
            raise ValueError(f"{owner}: r must be an integer >= 1, got {r!r}")
        alpha, dropout = check_alpha(lora_alpha, owner), check_dropout(lora_dropout, owner)
        return cls(rank, alpha, dropout, alpha / rank)


def check_adapter_name(owner: str, name: object) -> str:
    """name can be part of a parameter's name. Raises: ValueError that names it."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(
            f"{owner}: the name of an adapter must be a string of at least one character without "
            f"'.', got {name!r}"
        )
    return name


class MultiLoRALinear(LinearLayer):
    """y_i = x_i·Wᵀ + bias + scaling_g·(dropout(x_i)·lora_A_gᵀ)·lora_B_gᵀ for rows i of adapter g.

    Several adapters over one frozen weight, in one call. ``route(model, names)`` says which adapter
    each sample takes; without it a call raises. Rows of no adapter, or of one that this layer
    lacks, get the base alone.

    adapters: by name a mapping with ``r``, and ``lora_alpha`` (1) and ``lora_dropout`` (0.0) if
    wanted; then ``layer.adapters[name]`` holds the values. Adapter NAME has two parameters of its
    own, ``lora_A_NAME`` [r, in] and ``lora_B_NAME`` [out, r], under these keys in a state dict, so
    each can have an optimizer of its own. One that the batch does not contain gets no gradient:
    None, not zeros. There is an exception: if fully_shard has sharded the layer, it gets zeros,
    because all ranks have to reduce the same gradients.
    Shapes: weight [out, in] ([in, out] with fan_in_fan_out); x [..., in] -> [..., out]. Dropout
    acts in training mode only. Nothing merges in eval mode. Other keywords go to nn.Linear.
    Dtypes: as lora_grouped_linear.
    Raises: ValueError for a bad name or number; RuntimeError for a call without a route;
    NotImplementedError, TypeError and ValueError as lora_grouped_linear does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        adapters: Mapping[str, Mapping[str, Any]],
        fan_in_fan_out: bool = False,
        **kwargs: "Unpack[LinearOptions]",
    ):
        specs = self._specs_of(adapters)
        check_options(type(self), nn.Linear, kwargs)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, 0, 1, 0.0, merge_weights=False)
        self._set_layout(fan_in_fan_out)
        self._active = ActiveRoutes()
        self.adapters: dict[str, AdapterSpec] = {}
        for name, spec in specs.items():
            self._add(name, spec, self.weight.dtype)
        self.reset_parameters()

    @classmethod
    def _specs_of(cls, adapters: Mapping[str, Mapping[str, Any]]) -> dict[str, AdapterSpec]:
        layer = cls.__name__
        if not isinstance(adapters, Mapping) or not adapters:
            raise ValueError(
                f"{layer}: adapters must map at least one name to r, ..., got {adapters!r}"
            )
        specs = {}
        for name, values in adapters.items():
            check_adapter_name(layer, name)
            known = isinstance(values, Mapping) and "r" in values
            if not known or values.keys() - {"r", "lora_alpha", "lora_dropout"}:
                raise ValueError(
                    f"{layer}: adapters[{name!r}] must be a mapping of r and, if wanted, "
                    f"lora_alpha and lora_dropout, got {values!r}"
                )
            specs[name] = AdapterSpec.of(f"{layer}: adapters[{name!r}]", **values)
        return specs

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        adapters: Mapping[str, Mapping[str, Any]],
        lora_dtype: torch.dtype | None = None,
    ) -> "Self":
        """Wraps an nn.Linear or a Hugging Face Conv1D: same parameters, no copy, same mode.

        lora_dtype: dtype of the factors; None takes the weight's.
        Raises: TypeError for any other module, subclasses with a forward of their own included.
        """
        return cls._wrap(linear, lora_dtype, adapters=adapters)

    def _adopt(self, wrapped: ForeignModule, lora_dtype: torch.dtype | None) -> "Self":
        super()._adopt(wrapped, lora_dtype)
        for name, spec in self.adapters.items():
            self._add(name, spec, lora_dtype)
        return self

    def add_adapter(
        self, name: str, spec: AdapterSpec, lora_dtype: torch.dtype | None = None
    ) -> None:
        """One more adapter, drawn anew. Raises: ValueError for a bad name, or one that it has."""
        layer = checks.layer_name(self)
        if check_adapter_name(layer, name) in self.adapters:
            raise ValueError(f"{layer}: has an adapter {name!r} already")
        self._add(name, spec, lora_dtype)

    def _add(self, name: str, spec: AdapterSpec, lora_dtype: torch.dtype | None) -> None:
        weight = self.weight
        dtype, device = lora_dtype or weight.dtype, weight.device
        a = torch.empty((spec.r, self.in_features), dtype=dtype, device=device)
        b = torch.empty((self.out_features, spec.r), dtype=dtype, device=device)
        for kind, factor in zip(self._factor_names(name), (a, b), strict=True):
            self.register_parameter(kind, nn.Parameter(factor))
        self.adapters[name] = spec
        self._draw(name)
        weight.requires_grad = False
        if weight.is_meta:
            self._undrawn = True

    def _draw(self, name: str) -> None:
        a, b = self.factors(name)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def reset_lora_parameters(self) -> None:
        for name in getattr(self, "adapters", ()):
            self._draw(name)

    # ---- the adapters ----

    @staticmethod
    def _factor_names(name: str) -> tuple[str, str]:
        return f"lora_A_{name}", f"lora_B_{name}"

    @property
    def factor_names(self) -> tuple[str, ...]:
        return tuple(kind for name in self.adapters for kind in self._factor_names(name))

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B of an adapter. Raises: ValueError that names those there are."""
        if name not in self.adapters:
            raise ValueError(
                f"{checks.layer_name(self)}: has no adapter {name!r}, only "
                f"{', '.join(map(repr, self.adapters))}"
            )
        a, b = self._factor_names(name)
        return getattr(self, a), getattr(self, b)

    def alone(self, name: str) -> LoRALinear:
        """A LoRALinear with this layer's weight and bias and one of its adapters: no copies."""
        a, b = self.factors(name)
        spec = self.adapters[name]
        layer = LoRALinear(
            self.in_features,
            self.out_features,
            r=spec.r,
            lora_alpha=spec.lora_alpha,
            lora_dropout=spec.lora_dropout,
            fan_in_fan_out=self.fan_in_fan_out,
            merge_weights=False,
            bias=self.bias is not None,
            device="meta",
            dtype=self.weight.dtype,
        )
        layer.weight, layer.bias, layer.lora_A, layer.lora_B = self.weight, self.bias, a, b
        layer.scaling = spec.scaling
        return layer.train(self.training)

    # ---- forward ----

    def forward(self, x: Tensor) -> Tensor:
        if is_opaque(x):
            raise NotImplementedError(
                f"{checks.layer_name(self)}: takes dense tensors alone, got {type(x).__name__}"
            )
        routed, call = self._active.current(self)
        weight, segments = self.oriented(self.weight), routed.segments
        checks.check_weight(self, weight)
        checks.check_input(self, x, weight)
        ends = segments.ends_in(self, x)
        if not segments.present:
            return F.linear(x, weight, self.bias)
        specs = [self.adapters[name] for name in segments.present]
        factors = [self.factors(name) for name in segments.present]
        dropout_ps = [spec.lora_dropout if self.training else 0.0 for spec in specs]
        y = lora_grouped_linear(
            x.reshape(-1, x.shape[-1]),
            weight,
            [a for a, _ in factors],
            [b for _, b in factors],
            ends,
            self.bias,
            groups=segments.groups,
            scaling=[spec.scaling for spec in specs],
            dropout_p=dropout_ps,
            seed=routed.seeds_of(call) if any(dropout_ps) else None,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={spec.r}" for name, spec in self.adapters.items())
        return f"{nn.Linear.extra_repr(self)}, adapters=({adapters})"
