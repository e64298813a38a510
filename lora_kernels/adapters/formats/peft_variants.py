"""What the files of PEFT's variants hold besides LoRA's factors, and what becomes of it.

lora_bias: lora_B.bias; load_adapter adds scaling·lora_B.bias to the bias of the base.
BD-LoRA: a lora_B [out, R/n] of n blocks, which is LoRAMergedLinear's with n groups of rank R/n.
VeLoRA: lora_velora_embed, which acts in PEFT's training alone.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.adapters import files
from lora_kernels.adapters.formats.adapter import Kind
from lora_kernels.adapters.formats.peft_factors import Record
from lora_kernels.model.paths import join

__all__ = ["PLAIN", "Variants", "parse_variants"]

_BIAS, _EMBED = "lora_B.bias", "lora_velora_embed"


@dataclass(frozen=True)
class Variants:
    """What adapter_config.json says of them.

    blocks: of BD-LoRA. in_a, in_b: parts of the paths whose lora_A or lora_B is in blocks.
    """

    lora_bias: bool = False
    velora: bool = False
    blocks: int = 1
    in_a: Collection[str] = ()
    in_b: Collection[str] = ()

    def take_biases(
        self, keys: dict[str, str], kinds: Mapping[str, Kind], tensors: Mapping[str, Tensor],
        file: Path, has_model: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        """lora_B.bias by path; takes all that variants add out of keys, which are the entries'.

        Raises: ValueError if one is missing or not floating, or if there is no model to add it to.
        """
        if self.velora:
            for path in kinds:
                keys.pop(join(path, _EMBED), None)
        if not self.lora_bias:
            return {}
        if not has_model:
            raise ValueError(
                f"{file}: lora_bias: the bias that it adds to is not in the file: "
                f"load_adapter(model, ...) reads it"
            )
        found = {}
        for path in (path for path, kind in kinds.items() if kind != "embedding"):
            key = keys.pop(join(path, _BIAS), None)
            if key is None:
                raise ValueError(f"{file}: {path}.{_BIAS}: missing, though lora_bias asks for it")
            found[path] = tensors[key]
            if found[path].dtype not in files.FLOATS:
                raise ValueError(f"{file}: {key}: dtype must be floating, got {found[path].dtype}")
        return found

    def dense_b(
        self, path: str, b: Tensor, rank: int, record: Record | None
    ) -> tuple[Tensor, Record | None]:
        """lora_B [out, rank] with zeros outside of its blocks, and the record of these groups.

        Raises: ValueError for lora_A in blocks, and if the blocks do not fit b.
        """
        if self.blocks == 1:
            return b, record
        if any(part in path for part in self.in_a):
            raise ValueError(
                f"use_bdlora: lora_A of {path!r} is in blocks, which no layer here keeps: train it "
                f"through PEFT, patch_peft() runs it"
            )
        if not any(part in path for part in self.in_b):
            return b, record
        n = self.blocks
        if rank % n or b.dim() != 2 or b.shape[0] % n or b.shape[1] != rank // n:
            raise ValueError(
                f"use_bdlora: lora_B of {path!r} must be {n} blocks of {rank}/{n} columns, got "
                f"shape {list(b.shape)}"
            )
        sizes = (b.shape[0] // n,) * n
        return torch.block_diag(*b.chunk(n)), Record(rank // n, (True,) * n, sizes)


PLAIN = Variants()


def parse_variants(lora_bias: bool, velora: bool, bdlora: Mapping) -> Variants:
    """The checked values. Raises: ValueError that names the key."""
    unknown = bdlora.keys() - {"nblocks", "target_modules_bd_a", "target_modules_bd_b"}
    blocks = bdlora.get("nblocks", 1)
    names = [bdlora.get(f"target_modules_bd_{factor}") or [] for factor in "ab"]
    if (
        unknown - {"match_strict"}
        or not isinstance(blocks, int)
        or isinstance(blocks, bool)
        or blocks < 1
        or not all(isinstance(parts, list) for parts in names)
        or not all(isinstance(part, str) for parts in names for part in parts)
    ):
        raise ValueError(f"use_bdlora: unexpected value {dict(bdlora)!r}")
    return Variants(lora_bias, velora, blocks, *map(tuple, names))
