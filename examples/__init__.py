"""Complete programs on real input, each run from the repository root with ``python -m``."""
