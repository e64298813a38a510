"""What is dispatched: calls of lora_linear, seen from below the code that makes them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """The names of this package's operators, as they are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class FusedCalls(TorchDispatchMode):
    """Counts the forward calls of the one operation, recomputation in a backward included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.lora_kernels.lora_linear_forward.default
        return func(*args, **(kwargs or {}))
