"""Keys of a file without what wrappers add to them, as far as keys alone can tell."""

import re
from collections.abc import Callable, Collection, Iterable

from lora_kernels.model.paths import without_wrappers

__all__ = ["plain_keys", "stripped"]

# In front of every key: of DDP, and of PEFT, which calls what it wraps base_layer.
_DDP, _PEFT = "module.", "base_model.model."
# What AdapterHub puts between a module and its factors; numbers are those of a ModuleList.
_ADAPTERHUB = re.compile(r"\.loras\.(?!\d+\.)[^.]+(?=\.lora_[AB]$)")


def stripped(
    keys: Iterable[str], fronts: Iterable[str] = ()
) -> tuple[Callable[[str], str], list[str]]:
    """What takes wrappers off a key or a path, if keys are all there is; and what was in front.

    Parts that only wrappers are called go anywhere (torch.compile, FSDP, checkpoint_wrapper). What
    DDP and PEFT put in front, and fronts, goes once, in any order, if every key begins with it.
    """
    keys, found = [without_wrappers(key) for key in keys], []
    left = list(dict.fromkeys((_DDP, _PEFT, *fronts)))
    while front := next((f for f in left if _all_begin_with(f, keys)), None):
        keys = [key.removeprefix(front) for key in keys]
        found.append(front)
        left.remove(front)

    def strip(key: str) -> str:
        key = without_wrappers(key)
        for front in found:
            key = key.removeprefix(front)
        return key.replace(".base_layer.", ".") if _PEFT in found else key

    return strip, found


def _all_begin_with(front: str, keys: Collection[str]) -> bool:
    return bool(keys) and all(key.startswith(front) for key in keys)


def plain_keys(
    keys: Collection[str], fronts: Iterable[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Every key -> the key without wrappers; and the parts taken off that a model may have, too.

    fronts: further prefixes that go, once each, if every key begins with them.
    Raises: ValueError that names two keys that become the same.
    """
    strip, found = stripped(keys, fronts)
    plain: dict[str, str] = {}
    taken = {"".join(found)} - {""}
    for key in keys:
        bare = strip(key)
        name, found_in = _ADAPTERHUB.sub("", bare), _ADAPTERHUB.search(bare)
        if found_in is not None:
            taken.add(found_in[0])
        if name in plain:
            raise ValueError(f"{key}: is {name} without wrappers, as {plain[name]} is")
        plain[name] = key
    return {key: name for name, key in plain.items()}, sorted(taken)
