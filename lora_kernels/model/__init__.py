"""A model and its LoRA layers.

paths.py: modules by their paths, and what wrappers do to those. targets.py: which modules
target_modules means, and what each becomes. parameters.py: which target_parameters means. apply.py:
apply_lora; multi.py: several adapters in one model; place.py: layers get into their places.
route.py: which sample takes which adapter. merge.py: merge_lora and unmerge_lora.
trainable.py: what trains, and the record of it.
"""

__all__: list[str] = []
