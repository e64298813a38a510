"""Fine-tunes a pretrained encoder on labelled sentences: ``python -m examples.finetune``."""
