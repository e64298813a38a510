"""What is dispatched: calls of operators, seen from below the code that makes them."""

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """The names of this package's operators, as they are called; a backward's recomputation too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> int:
        """How many are forwards of lora_linear, with a magnitude too, or of lora_grouped_linear."""
        ops = "lora_linear", "lora_grouped_linear", "dora"
        return sum(self.names.count(f"{op}_forward") for op in ops)
