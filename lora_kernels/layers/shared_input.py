"""share_inputs: LoRALinear layers of a block that take the same x compute in one call."""

import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import checks, distributed
from lora_kernels.foreign import check_model, check_no_peft
from lora_kernels.functional import lora_shared_linear
from lora_kernels.layers.linear import LinearLayer, LoRALinear
from lora_kernels.ops.obstacle import is_transformed

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
    "encoder_decoder_attention", "visual_attention", "cross_attn_token_to_image",
    "cross_attn_image_to_token", "final_attn_token_to_image",
)  # fmt: skip


_PLAIN = {Tensor, nn.Parameter}


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
    Joined layers fall apart for good once one finds an output that it cannot take, because x is
    another tensor or has changed, or because gradients, autocast, dropout or weights have. From the
    next call on each computes alone, as if it had never been joined. Another share_inputs joins
    them anew. Its groups can name those alone that do share: ``("k_proj", "v_proj")``.
    Under activation checkpointing the backward of the call that finds it has to come before the
    next call, as in plain training; name the layers in exclude or groups if it does not.
    exclude: names of modules inside which nothing is joined. In cross-attention keys and values get
    another x than queries. Joined layers would give the right results there, but the first call
    would compute in vain before they fall apart.
    Each thread has its own outputs to fetch. The last fetch leaves nothing behind. An output that
    nobody fetches is freed by the next call with another x, and before that if x is freed, or the
    graph behind the output that was asked for first.
    Merged layers compute alone. So do layers on tensors of torch.inference_mode or of subclasses of
    torch.Tensor, layers under a transform of torch.func, forward-mode differentiation or
    torch.jit.trace, replicas of nn.DataParallel, and layers whose weights FSDP or a parametrization
    replaces.
    Under torch.compile outputs are fetched within one graph, and layers that cannot fetch compute
    alone in that call, but do not fall apart: exclude those. x must not change in place between the
    calls, because traced code cannot notice it.
    A layer that is copied on its own takes along copies of the layers it is joined with.
    Joined layers have one backward. A second backward, through another layer's output, needs
    retain_graph=True in the first, as for any outputs of one operation.
    Raises: ValueError if no layers were found to join; NotImplementedError, before anything is
    joined with it, for a layer with use_dora.
    """
    check_model("share_inputs", model)
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
                    _check_no_magnitude(layer, f"{path}.{name}" if path else name)
                    alike[_kind(layer)].append((f"{path}.{name}" if path else name, layer))
            for members in alike.values():
                if len(members) > 1:
                    paths, layers = zip(*members, strict=True)
                    SharedInput(layers)
                    joined.append(paths)
    if not joined:
        check_no_peft("share_inputs", model, "PEFT's layers compute each by itself")
        raise ValueError(
            f"share_inputs: no module has two LoRALinear children that agree in in_features, r, "
            f"dropout and dtypes under the names of one of groups={groups}"
        )
    return joined


def _check_no_magnitude(layer: LoRALinear, path: str) -> None:
    if layer.use_dora:
        raise NotImplementedError(
            f"share_inputs: {path} has use_dora=True, and no call computes several layers that "
            f"have a magnitude: leave it out by groups or exclude"
        )


def _kind(layer: LoRALinear) -> tuple:
    weights = (layer.weight, layer.lora_A, layer.lora_B)
    return layer.in_features, layer.r, layer.lora_dropout.p, *((w.dtype, w.device) for w in weights)


class SharedInput:
    """The layers that share their input, and for each thread the outputs still to be fetched."""

    layers: tuple[LoRALinear, ...]
    _parted_by: int | None  # computed what others could not take
    _traced: "_Waiting | None"  # while TorchDynamo traces, which knows no threads

    def __init__(self, layers: Iterable[LoRALinear]):
        self.__setstate__({"layers": tuple(layers)})
        for layer in self.layers:
            layer._shared_input = self

    def output(self, layer: LinearLayer, x: Tensor) -> Tensor | None:
        """layer's output for x, or None if it has to compute alone."""
        own = [i for i, member in enumerate(self.layers) if member is layer]
        if not own or not isinstance(x, Tensor):
            return None
        index = own[0]
        waiting = self._waiting
        if waiting is not None:
            if index in waiting.states:
                same, y = waiting.fetch(index, layer, x)
                if not waiting.states:
                    self._waiting = None
                if y is not None:
                    return y
                if torch.compiler.is_dynamo_compiling():
                    return None  # a graph of its own may be traced for the second forward
                if not same:
                    self._part(waiting)
                    return None
            waiting.drop()
            self._waiting = None
        if self._parted_by is not None and not (index == self._parted_by and _in_backward()):
            if index == self._parted_by:
                self._fall_apart()
            return None
        if not (_can_wait_for(x) and self.together()):
            return None
        ys = self._compute(layer, x)
        outputs = _Outputs({i: y for i, y in enumerate(ys) if i != index})
        states = {i: _state_for(self.layers[i], x) for i in outputs.by_index}
        self._waiting = waiting = _Waiting(x, index, states, outputs)
        if torch.compiler.is_dynamo_compiling():
            return ys[index]
        return waiting.owned_by(ys[index])

    def together(self) -> bool:
        """Whether all layers run their adapters, on plain weights in one place, with one dropout.

        The answer is the same each time that a step runs a layer. That includes the second forward
        of activation checkpointing, in which weights that fully_shard gathers layer by layer are
        gathered already.
        """
        if self._parted_by is not None and not _in_backward():
            return False
        p, device = self.layers[0].active_dropout_p(), self.layers[0].weight.device
        for layer in self.layers:
            if layer._shared_input is not self or layer.merged or layer.active_dropout_p() != p:
                return False
            weight = layer.weight
            if not {type(weight), type(layer.lora_A), type(layer.lora_B)} <= _PLAIN:
                return False
            if weight.device != device:  # offloaded until its own call
                return False
        return not any(map(distributed.is_sharded_alone, self.layers))

    @property
    def _waiting(self) -> "_Waiting | None":
        if torch.compiler.is_dynamo_compiling():
            return self._traced
        return getattr(self._threads, "waiting", None)

    @_waiting.setter
    def _waiting(self, waiting: "_Waiting | None") -> None:
        if torch.compiler.is_dynamo_compiling():
            self._traced = waiting
        else:
            self._threads.waiting = waiting

    def _part(self, waiting: "_Waiting") -> None:
        """Lets the layers fall apart when the one that has computed in vain is called again.

        Not before, and not by the second forward of activation checkpointing, which comes in the
        backward: it has to save the same tensors and to draw the same seeds as the first.
        """
        waiting.drop()
        self._waiting, self._parted_by = None, waiting.first

    def _fall_apart(self) -> None:
        for layer in self.layers:
            if layer._shared_input is self:
                layer._shared_input = None

    def _compute(self, layer: LinearLayer, x: Tensor) -> tuple[Tensor, ...]:
        checks.check_input(layer, x, layer.oriented(layer.weight))
        layers = self.layers
        weights = [layer.oriented(layer.weight) for layer in layers]
        for member, weight in zip(layers, weights, strict=True):
            checks.check_shape(member, x, weight)
        return lora_shared_linear(
            x,
            weights,
            [layer.lora_A for layer in layers],
            [layer.lora_B for layer in layers],
            [layer.bias for layer in layers],
            scalings=[layer.scaling for layer in layers],
            dropout_p=layer.active_dropout_p(),
        )

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "parted_by": self._parted_by}

    def __setstate__(self, state: dict) -> None:
        self.layers = state["layers"]
        self._threads = threading.local()
        self._parted_by = state.get("parted_by")
        self._traced = None


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _can_wait_for(x: Tensor) -> bool:
    """Whether outputs for x can wait: x counts its changes, and no transform or trace sees them."""
    if torch.compiler.is_compiling():
        return True
    plain = type(x) in _PLAIN and not x.is_inference()
    return plain and not is_transformed() and not torch.jit.is_tracing()


def _state_for(layer: LinearLayer, x: Tensor) -> tuple:
    """What must not have changed between the computation and the fetching of layer's output."""
    state = (
        torch.is_grad_enabled(),
        checks.autocast_dtype(x),
        layer.scaling,
        layer.active_dropout_p(),
        x.requires_grad,
    )
    if torch.compiler.is_compiling():
        return state
    tensors = [layer.weight, layer.lora_A, layer.lora_B]
    if layer.bias is not None:
        tensors.append(layer.bias)
    # Inference tensors do not count how often they were changed.
    versions = [0 if t.is_inference() else t._version for t in tensors]
    trained = [t.requires_grad for t in tensors]
    return *state, x._version, *map(id, tensors), *versions, *trained


class _Outputs:
    """Outputs by the index of their layer; unlike a dict, it can be referred to weakly."""

    def __init__(self, by_index: dict[int, Tensor]):
        self.by_index = by_index


class _Waiting:
    """Outputs over x that their layers have not fetched yet. It keeps neither x nor a graph alive.

    Outputs hold their graph, and the graph holds x. So the graph behind the output that was asked
    for first owns the others, and they are freed with it. Without a graph they live as long as x.
    While TorchDynamo traces nothing owns them: none is left when the traced graph ends.
    """

    def __init__(self, x: Tensor, first: int, states: dict[int, tuple], outputs: _Outputs):
        self.first = first  # the layer that computed them
        self.states = states  # of the layers whose outputs wait
        self._outputs = weakref.ref(outputs)
        self._owned = None if torch.compiler.is_dynamo_compiling() else outputs
        if torch.compiler.is_dynamo_compiling():
            self._x = weakref.ref(x)
        else:
            waiting = self._outputs
            self._x = weakref.ref(x, lambda _: _clear(waiting))

    def owned_by(self, first: Tensor) -> Tensor:
        """first, the output that is handed out at once, as the owner of the others if it can be."""
        if first.grad_fn is None:
            return first
        # A node in front of the one that made them all: there they would hold each other.
        first = torch.ops.aten._unsafe_view(first, first.shape)
        node: Any = first.grad_fn  # whose metadata PyTorch types as a method
        node.metadata["lora_kernels.share_inputs"] = self._owned
        self._owned = None
        return first

    def fetch(self, index: int, layer: LinearLayer, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether layer would compute what waits for it, and that output if it is there still."""
        same = self._x() is x and self.states[index] == _state_for(layer, x)
        del self.states[index]
        outputs = self._outputs()
        y = None if outputs is None else outputs.by_index.pop(index, None)
        return same, y if same else None

    def drop(self) -> None:
        _clear(self._outputs)


def _clear(waiting: weakref.ref) -> None:
    outputs = waiting()
    if outputs is not None:
        outputs.by_index.clear()
