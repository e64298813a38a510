"""``python -m lora_kernels``: the command line, see cli/."""

import sys

from lora_kernels.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
