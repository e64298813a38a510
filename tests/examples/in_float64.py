"""An example with its models in float64: ``python -m tests.examples.in_float64 nlg ...``.

AdamW makes rounding grow, so that two ways to compute the same are compared in more bits.
"""

import importlib
import sys
from collections.abc import Sequence
from unittest import mock

# The module where an example looks up its load_model.
LOADERS = {
    "finetune": "examples.finetune.experiment",
    "nlg": "examples.nlg.model",
    "nlu": "examples.nlu.experiment",
}


def main(example: str, argv: Sequence[str]) -> int:
    """The exit code of ``python -m examples.EXAMPLE argv``."""
    owner = importlib.import_module(LOADERS[example])
    load_model = owner.load_model
    with mock.patch.object(owner, "load_model", lambda *args: load_model(*args).double()):
        return importlib.import_module(f"examples.{example}.__main__").main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
