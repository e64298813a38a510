"""Which algorithm computes a product: choice, measurements that ship, and what takes over."""

__all__: list[str] = []
