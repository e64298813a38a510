"""Measures configurations and algorithms of the kernels on the machine at hand, interleaved."""

__all__: list[str] = []
