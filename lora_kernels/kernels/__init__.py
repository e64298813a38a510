"""Triton kernels, one in a file, and the ops that are made of them: linear.py and the like.

registry.py has an entry for each: its function, its launchers, tiles, FLOPs, bytes and formula.
"""
