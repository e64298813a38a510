"""``python -m examples.nlg`` with models in float64, where the order of a sum hardly matters."""

import sys
from collections.abc import Sequence
from unittest.mock import patch

from examples.nlg import __main__, model


def main(argv: Sequence[str]) -> int:
    load_model = model.load_model
    with patch.object(model, "load_model", lambda name: load_model(name).double()):
        return __main__.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
