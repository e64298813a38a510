"""share_inputs: LoRALinear layers of a block that take the same x compute in one call."""

from collections import defaultdict
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from lora_kernels import checks, distributed
from lora_kernels.functional import lora_shared_linear
from lora_kernels.layers.linear import LoRALinear

__all__ = ["SharedInput", "share_inputs"]

# Names that attention and feed-forward blocks of Transformers give to linears over one input.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# Names that they give to blocks whose keys and values come from another input.
CROSS_ATTENTION = (
    "encoder_attn", "crossattention", "cross_attn", "cross_attention", "EncDecAttention",
)  # fmt: skip


def share_inputs(
    model: nn.Module,
    groups: Iterable[Collection[str]] = GROUPS,
    exclude: Collection[str] = CROSS_ATTENTION,
) -> list[tuple[str, ...]]:
    """Makes LoRALinear layers that take the same input compute together; returns their paths.

    groups: each entry lists names of children that one module may have. The LoRALinear layers among
    these children are joined if two or more of them agree in in_features, r, dropout, dtypes and
    devices. Layers, parameters and state dicts stay what they are, and so do calls: ``q_proj(x)``,
    ``k_proj(x)``, ``v_proj(x)``. The first call with a new x computes for all joined layers. The
    others fetch their part, as long as x is the same and nothing has changed since. So x is read
    once for all low-rank products and the layers add to one dx in place, see lora_shared_linear.
    Each layer has its own dropout mask.
    exclude: names of modules inside which nothing is joined. In cross-attention keys and values get
    another x than queries. Joined layers would give the right results there, but each would throw
    away what it has computed for the others.
    Merged layers compute alone. So do layers on tensors of torch.inference_mode, and layers whose
    weights FSDP or a parametrization replaces.
    In a model under torch.compile x must not change in place between the calls, because traced code
    cannot notice it. In other models such a change is noticed, and the layer computes anew.
    A layer that is copied on its own takes along copies of the layers it is joined with.
    Joined layers have one backward. A second backward, through another layer's output, needs
    retain_graph=True in the first, as for any outputs of one operation.
    Raises: ValueError if no layers were found to join.
    """
    groups = [tuple(group) for group in groups]
    joined = []
    for path, module in model.named_modules():
        if not set(exclude).isdisjoint(path.split(".")):
            continue
        for names in groups:
            alike = defaultdict(list)
            for name in names:
                layer = module._modules.get(name)
                if isinstance(layer, LoRALinear) and layer.has_lora:
                    alike[_kind(layer)].append((f"{path}.{name}" if path else name, layer))
            for members in alike.values():
                if len(members) > 1:
                    paths, layers = zip(*members, strict=True)
                    SharedInput(layers)
                    joined.append(paths)
    if not joined:
        raise ValueError(
            f"share_inputs: no module has two LoRALinear children that agree in in_features, r, "
            f"dropout and dtypes under the names of one of groups={groups}"
        )
    return joined


def _kind(layer: LoRALinear) -> tuple:
    weights = (layer.weight, layer.lora_A, layer.lora_B)
    return layer.in_features, layer.r, layer.lora_dropout.p, *((w.dtype, w.device) for w in weights)


class SharedInput:
    """The layers that share their input, and the outputs that some of them have not fetched yet."""

    def __init__(self, layers: Iterable[LoRALinear]):
        self.layers = tuple(layers)
        self._x: Tensor | None = None
        self._state: tuple = ()
        self._outputs: dict[int, Tensor] = {}
        for layer in self.layers:
            layer._shared_input = self

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """layer's output for x, or None if it has to compute alone."""
        index = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if index is None or not isinstance(x, Tensor):
            return None
        if not torch.compiler.is_compiling() and x.is_inference():
            return None  # it has no version that tells of changes
        if x is self._x and index in self._outputs and self._state == self._state_for(x):
            y = self._outputs.pop(index)
        elif self.together():
            checks.check_input(layer, x, layer.oriented(layer.weight))
            ys = self._compute(x)
            self._x, self._state = x, self._state_for(x)
            self._outputs = {i: y for i, y in enumerate(ys) if i != index}
            y = ys[index]
        else:
            self._outputs, y = {}, None
        if not self._outputs:
            self._x = None
        return y

    def together(self) -> bool:
        """Whether every layer runs its adapter, on plain weights, with one dropout.

        The answer is the same each time that a step runs a layer. That includes the second forward
        of activation checkpointing, in which weights that fully_shard gathers layer by layer are
        gathered already.
        """
        return (
            len({layer.active_dropout_p() for layer in self.layers}) == 1
            and not any(map(distributed.is_sharded_alone, self.layers))
            and not any(
                layer.merged or type(tensor) not in (nn.Parameter, Tensor)
                for layer in self.layers
                for tensor in (layer.weight, layer.lora_A, layer.lora_B)
            )
        )

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        layers = self.layers
        for layer in layers:
            checks.check_shape(layer, x, layer.oriented(layer.weight))
        return lora_shared_linear(
            x,
            [layer.oriented(layer.weight) for layer in layers],
            [layer.lora_A for layer in layers],
            [layer.lora_B for layer in layers],
            [layer.bias for layer in layers],
            scalings=[layer.scaling for layer in layers],
            dropout_p=layers[0].active_dropout_p(),
        )

    def _state_for(self, x: Tensor) -> tuple:
        """What must not have changed between the computation and the fetching of an output."""
        state = (
            torch.is_grad_enabled(),
            checks.autocast_dtype(x),
            *((layer.scaling, layer.active_dropout_p()) for layer in self.layers),
        )
        if torch.compiler.is_compiling():
            return state
        tensors = (
            t
            for layer in self.layers
            for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B)
            if t is not None
        )
        return (
            *state,
            x._version,
            *((id(t), 0 if t.is_inference() else t._version) for t in tensors),
        )

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "_x": None, "_state": (), "_outputs": {}}
