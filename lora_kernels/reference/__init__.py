"""Every op in plain PyTorch: the specification, the CPU path and the oracle of the tests."""

__all__: list[str] = []
