"""Which algorithm computes a product: choice, measurements that ship, what follows a failure."""

__all__: list[str] = []
