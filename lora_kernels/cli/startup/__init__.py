"""A folder that ``lora-kernels run`` puts in front of PYTHONPATH: see sitecustomize.py."""

__all__: list[str] = []
