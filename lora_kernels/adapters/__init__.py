"""Adapters: what LoRA has trained of a model, in memory and on disk.

state_dict.py: lora_state_dict and merged_state_dict. save.py: save_adapter, from a model to a
neutral Adapter. load.py: load_adapter, from an Adapter into a model. hub.py: both, by the name of a
repository of the Hugging Face Hub. files.py: files are checked when they are read, and replaced
only by complete ones. mapped.py: large ones take little memory. formats/: how an Adapter becomes
files, and files become an Adapter.
"""

__all__: list[str] = []
