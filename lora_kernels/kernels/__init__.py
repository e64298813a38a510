"""Triton only; a file per kernel. linear.py makes the two ops of reference.py of them."""
