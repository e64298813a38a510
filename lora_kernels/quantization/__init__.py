"""Frozen weights that are not dense: a file for each library that makes them.

A file makes of the library's weight a value with ``shape``, ``dtype`` and ``dense()``, which gives
the weight [N, K] in that dtype; layers and ops see nothing else of it. No library is supported yet:
a layer over such a weight runs PEFT's own code.
"""

__all__: list[str] = []
