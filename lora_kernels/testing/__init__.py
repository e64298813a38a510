"""Random problems, their answer in float64, and the one rule of what is close."""

__all__: list[str] = []
