"""The program in float64: ``python -m tests.examples.nlu.in_float64``, also under torchrun.

AdamW makes rounding grow, so that two ways to compute the same are compared in more bits.
"""

import sys
from unittest import mock

from examples.nlu import experiment
from examples.nlu.__main__ import main


def run(argv) -> int:
    load_model = experiment.load_model
    with mock.patch.object(experiment, "load_model", lambda *args: load_model(*args).double()):
        return main(argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
