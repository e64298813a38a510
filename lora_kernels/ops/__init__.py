"""Differentiable ops: schema, shapes for tracing, dispatch, and the autograd Function of each."""

__all__: list[str] = []
