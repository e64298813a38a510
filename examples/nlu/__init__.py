"""LoRA on GLUE, as in Hu et al. 2021: ``python -m examples.nlu``."""
