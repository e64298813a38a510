"""LoRAEmbedding: nn.Embedding with a low-rank update."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import checks, distributed
from lora_kernels.foreign import check_options, named_by_layer
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.merging import takes_merged_weight, undisturbed
from lora_kernels.ops.obstacle import is_batched, is_opaque, obstacle

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from lora_kernels.layers.options import EmbeddingOptions

__all__ = ["LoRAEmbedding"]


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """y = W[x] + scaling·lora_Aᵀ[x]·lora_Bᵀ with W frozen.

    Shapes: weight [num, dim], lora_A [r, num], lora_B [dim, r]; x [...] of ids -> [..., dim].
    Dtypes: x int32 or int64; weight any float dtype, lora_A and lora_B may have another. The
    low-rank product runs in float32 at least. y has weight's dtype, under autocast too. lora_A
    starts zero, lora_B normal(0, 1). r = 0: a plain trainable nn.Embedding. Other keywords go to
    nn.Embedding:

    * padding_idx: neither its row of weight nor its column of lora_A receives a gradient;
    * max_norm limits W[x] before the update is added, merged or not. With r > 0 the rows are
      limited as they are read, while nn.Embedding overwrites them in weight;
    * sparse=True: the gradient of lora_A is a sparse [r, num] tensor, that of lora_B dense; under
      transforms of torch.func both are dense;
    * scale_grad_by_freq acts on lora_A as on weight.

    PEFT's create_loraplus_optimizer knows embeddings by PEFT's own class: it would give lora_B here
    the high rate of a linear layer's. Freeze both factors for that call, set requires_grad
    again, and pass them to ``optimizer.add_param_group`` with the rate of embeddings.

    Raises: ValueError as LoRALayer does, and if x is on another device than weight; TypeError if x
    is not a dense or jagged tensor of ids. An id out of range fails as in nn.Embedding.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; loralib's Embedding.
    """

    weight: Tensor

    @named_by_layer
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: "Unpack[EmbeddingOptions]",
    ):
        check_options(type(self), nn.Embedding, kwargs)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if self.r > 0:
            self._add_adapter((self.r, num_embeddings), (embedding_dim, self.r))
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:  # nn.Embedding.from_pretrained: keep these values
            self.reset_lora_parameters()

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        r: int,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        lora_dtype: torch.dtype | None = None,
    ) -> "Self":
        """Wraps an nn.Embedding: same parameter, no copy, same options and mode.

        lora_dtype: dtype of lora_A and lora_B; None takes the weight's.
        Raises: TypeError if embedding is not an nn.Embedding, or has a forward of its own or a
        parametrized weight.
        """
        plain = (
            isinstance(embedding, nn.Embedding)
            and type(embedding).forward is nn.Embedding.forward
            and "weight" in embedding._parameters
        )
        if not plain:
            raise TypeError(
                f"{cls.__name__}: embedding must be a plain nn.Embedding, not a subclass with a "
                f"forward of its own or parametrized, got {type(embedding).__name__}"
            )
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            r,
            lora_alpha,
            merge_weights,
            padding_idx=embedding.padding_idx,
            max_norm=embedding.max_norm,
            norm_type=embedding.norm_type,
            scale_grad_by_freq=embedding.scale_grad_by_freq,
            sparse=embedding.sparse,
            device="meta",
            dtype=embedding.weight.dtype,
        )
        return layer._adopt(embedding, lora_dtype)

    def reset_parameters(self) -> None:
        """Draws weight as nn.Embedding does, lora_A and lora_B anew."""
        nn.Embedding.reset_parameters(self)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        if self.has_lora:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def delta_weight(self) -> Tensor:
        acc = torch.promote_types(self.weight.dtype, torch.float32)
        a, b = self._factors()
        return (b.to(acc) @ a.to(acc)).T * self.scaling

    def merged_weight(self) -> Tensor:
        """limited base + delta, rounded once to the weight's dtype. Not differentiable.

        Rows of the base are limited to max_norm.
        """
        if self.max_norm is None or not self.has_lora:
            return super().merged_weight()
        weight = self.weight
        with undisturbed(weight):
            delta = self.delta_weight()
            base = distributed.full_tensor(weight.detach()).to(delta)
            merged = (self._limit(base) + delta).to(weight.dtype)
            return distributed.distribute_like(merged, weight)

    @takes_merged_weight
    def forward(self, x: Tensor) -> Tensor:
        self._check_ids(x)
        if not self.has_lora:
            return nn.Embedding.forward(self, x)
        complete = self.complete_weight()
        if complete is not None:
            return self._look_up(complete, x)
        dense = self.sparse and torch._C._are_functorch_transforms_active()
        if dense or obstacle(x, self.weight, self.lora_A, self.lora_B, None) is not None:
            return self._by_formula(x)
        ids = x.reshape(-1)
        acc = torch.promote_types(self.weight.dtype, torch.float32)
        with checks.without_autocast(self.weight.device):
            rows = self._limit(self._look_up(self.weight, ids).to(acc))
            h = self._look_up_a(ids).to(acc) * self.scaling
            y = torch.addmm(rows, h, self.lora_B.to(acc).T)
        # Not a view: FSDP would lose its hooks on a view that the caller changes in place.
        shape = (*x.shape, self.embedding_dim)
        return torch.ops.aten._unsafe_view.default(y.to(self.weight.dtype), shape)

    def _by_formula(self, x: Tensor) -> Tensor:
        """The forward for x of any class, and under transforms. No gradient is sparse."""
        weight = self.held_weight()
        acc = torch.promote_types(weight.dtype, torch.float32)
        with checks.without_autocast(weight.device):
            rows = self._limit(self._look_up(self.weight, x, sparse=False).to(acc))
            h = self._look_up(self.lora_A.T, x, sparse=False).to(acc)
            return (rows + F.linear(h, self.lora_B.to(acc)) * self.scaling).to(weight.dtype)

    def _look_up(self, table: Tensor, ids: Tensor, sparse: bool | None = None) -> Tensor:
        return F.embedding(
            ids,
            table,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse if sparse is None else sparse,
        )

    def _look_up_a(self, ids: Tensor) -> Tensor:
        """Rows ids of lora_Aᵀ. Shapes: ids [T] -> [T, r]."""
        if self.sparse:
            return _SparseLookUp.apply(self.lora_A, ids, self.padding_idx)
        return self._look_up(self.lora_A.T, ids)

    def _limit(self, rows: Tensor) -> Tensor:
        """Rows whose norm exceeds max_norm, scaled down to it. Shapes: [..., dim] -> [..., dim]."""
        if self.max_norm is None:
            return rows
        norm = torch.linalg.vector_norm(rows, self.norm_type, -1, keepdim=True)
        scale = self.max_norm / (norm + 1e-7)  # as torch.renorm, which takes matrices alone
        return rows * torch.where(norm > self.max_norm, scale, 1.0)

    def _check_ids(self, x) -> None:
        if not isinstance(x, Tensor):
            if is_opaque(x):
                return
            got = type(x).__name__
        elif x.layout not in (torch.strided, torch.jagged):
            got = str(x.layout)
        elif x.dtype not in (torch.int32, torch.int64):
            got = str(x.dtype)
        elif x.device != self.weight.device:
            raise ValueError(
                f"{checks.layer_name(self)}: x must be on weight's device "
                f"{self.weight.device}, got {x.device}"
            )
        else:
            return
        raise TypeError(
            f"{checks.layer_name(self)}: x must be a dense or jagged torch.Tensor of int32 or "
            f"int64, got {got}"
        )

    def extra_repr(self) -> str:
        text = f"{nn.Embedding.extra_repr(self)}, r={self.r}"
        return f"{text}, lora_alpha={self.lora_alpha}" if self.has_lora else text


class _SparseLookUp(torch.autograd.Function):
    """F.embedding(ids, a.T, padding_idx, sparse=True), whose gradient PyTorch cannot transpose.

    Shapes: a [R, num], ids [T] -> [T, R].
    """

    @staticmethod
    def forward(a, ids, padding_idx):
        return F.embedding(ids, a.T)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, ids, ctx.padding_idx = inputs
        ctx.shape = a.shape
        ctx.save_for_backward(ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        if is_batched(dy):
            raise RuntimeError(
                "LoRAEmbedding: with sparse=True there is no batch of gradients (is_grads_batched, "
                "vectorize=True); make the layer with sparse=False, or use torch.func"
            )
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            kept = ids != ctx.padding_idx
            ids, dy = ids[kept], dy[kept]
        rank = torch.arange(ctx.shape[0], device=ids.device)
        indices = torch.stack((rank.repeat_interleave(len(ids)), ids.repeat(len(rank))))
        # The lookup has already refused ids out of range.
        da = torch.sparse_coo_tensor(indices, dy.T.flatten(), ctx.shape, check_invariants=False)
        return da, None, None
