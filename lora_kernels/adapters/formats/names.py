"""What other tools call the modules of a decoder that Hugging Face calls model.layers.N...

torchtune and llama.cpp also order the rows of q_proj and k_proj in another way, for models whose
rotary embedding turns neighbouring rows there: within each head, Hugging Face's two halves of rows
lie interleaved.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from lora_kernels.adapters.formats.base import Base
from lora_kernels.adapters.untold import Untold
from lora_kernels.model.paths import split

__all__ = ["Names", "halves", "interleaved", "rotated"]

_TABLES: Mapping[str, Mapping[str, str]] = {
    "torchtune": {
        "layers.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
        "layers.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
        "layers.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
        "layers.{}.attn.output_proj": "model.layers.{}.self_attn.o_proj",
        "layers.{}.mlp.w1": "model.layers.{}.mlp.gate_proj",
        "layers.{}.mlp.w3": "model.layers.{}.mlp.up_proj",
        "layers.{}.mlp.w2": "model.layers.{}.mlp.down_proj",
        "output": "lm_head",
    },
    "llama.cpp": {
        "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
        "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
        "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
        "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
        "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
        "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
        "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
    },
    "litgpt": {
        "transformer.h.{}.attn.qkv": "model.layers.{}.self_attn.qkv_proj",
        "transformer.h.{}.attn.proj": "model.layers.{}.self_attn.o_proj",
        "transformer.h.{}.mlp.fc_1": "model.layers.{}.mlp.gate_proj",
        "transformer.h.{}.mlp.fc_2": "model.layers.{}.mlp.up_proj",
        "transformer.h.{}.mlp.proj": "model.layers.{}.mlp.down_proj",
        "lm_head": "lm_head",
    },
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ROTARY = ("q_proj", "k_proj")


class Names:
    """The names of one tool."""

    def __init__(self, tool: str):
        self._tool, self._to_hf = tool, _TABLES[tool]
        self._from_hf = {theirs: own for own, theirs in self._to_hf.items()}

    def to_hf(self, name: str) -> str:
        """Hugging Face's path. Raises: ValueError for a name that is not in the table."""
        return self._look_up(name, self._to_hf, [name])

    def from_hf(self, path: str) -> str:
        """The tool's name of a path, which may lack "model.". Raises: ValueError."""
        return self._look_up(path, self._from_hf, [path, f"model.{path}"])

    def _look_up(self, name: str, table: Mapping[str, str], tried: Collection[str]) -> str:
        for candidate in tried:
            numbers = _NUMBER.findall(candidate)
            found = table.get(_NUMBER.sub("{}", candidate))
            if found is not None:
                return found.format(*numbers)
        ends = ", ".join(sorted({split(known)[1] or known for known in table}))
        raise ValueError(f"{name}: {self._tool} and Transformers share no such name: {ends}")


def rotated(path: str, base: Base, outputs: int) -> tuple[int, int] | None:
    """Number and size of the heads of q_proj or k_proj; None for another module.

    Raises: ValueError if base does not tell them, or not these outputs.
    """
    name = split(path)[1]
    if name not in _ROTARY:
        return None
    heads = base.heads_of(name)
    if heads is None:
        what = f"{path}: its rows lie in another order here, by heads of the base model"
        raise Untold(what, "--base PATH")
    if heads[0] * heads[1] != outputs or heads[1] % 2:
        raise ValueError(
            f"{path}: has {outputs} outputs, and {base.place} says {heads[0]} heads of {heads[1]}"
        )
    return heads


def interleaved(rows: Tensor, heads: tuple[int, int]) -> Tensor:
    """Hugging Face's rows [heads·size, ...] in the order of those who turn neighbouring rows."""
    count, size = heads
    return rows.view(count, 2, size // 2, -1).transpose(1, 2).reshape(rows.shape)


def halves(rows: Tensor, heads: tuple[int, int]) -> Tensor:
    """The inverse of interleaved."""
    count, size = heads
    return rows.view(count, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)
