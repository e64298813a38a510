"""Which modules PEFT saves as a whole."""

from collections.abc import Callable, Iterable

from lora_kernels.adapters.formats.adapter import Adapter
from lora_kernels.model.paths import in_model_order, is_inside, is_named, split

__all__ = ["all_saved", "saved_modules"]


def saved_modules(
    paths: Iterable[str], names: Iterable[str], takes_part: Callable[[str], bool]
) -> list[str]:
    """Those of paths that PEFT saves as a whole for these modules_to_save; none inside another.

    PEFT compares the end of the path without regard to dots: "head" means "lm_head" too. A path
    that only such a comparison finds is taken if takes_part says so.
    """
    names = list(names)
    found: list[str] = []
    for path in paths:
        loose = any(path.endswith(name) for name in names)
        if loose and not is_inside(path, found) and (is_named(path, names) or takes_part(path)):
            found.append(path)
    return found


def all_saved(adapter: Adapter) -> list[str]:
    """modules_to_save, and the other modules of the adapter that PEFT takes these names to mean."""

    def takes_part(path: str) -> bool:
        return not any(is_inside(layer, [path]) for layer in adapter.layers)

    holders = (split(entry)[0] for entry in adapter.entries)
    paths = in_model_order([*adapter.layers, *holders])
    found = saved_modules(paths, adapter.modules_to_save, takes_part)
    if all(is_inside(path, adapter.modules_to_save) for path in found):
        return adapter.modules_to_save
    return found + [path for path in adapter.modules_to_save if not is_inside(path, found)]
