"""The paper's experiment on text generation, GPT-2 with LoRA: ``python -m examples.nlg``."""
