"""Operands of a shape, and the groups of its columns."""

import torch

from lora_kernels.tuning import shapes
from lora_kernels.tuning.shapes import Shape


def test_problem_is_random_and_the_same_in_every_run():
    shape = Shape(m=32, k=48, n=40, r=4, dropout_p=0.0)
    one, two = shape.problem(), shape.problem()
    for name, operand in one.operands().items():
        assert torch.equal(operand, getattr(two, name))
        assert operand.unique().numel() == operand.numel()


def test_problem_has_equal_groups_unless_the_shape_says_how_large_they_are():
    equal = Shape(2, 4, 6, 1, 0.0, (True, False, True))
    assert equal.problem().splits.sizes == (2, 2, 2)
    unequal = Shape(2, 4, 6, 1, 0.0, (True, False), out_splits=(5, 1))
    assert unequal.problem().splits.sizes == (5, 1)


def test_sets_hold_layers_whose_groups_fit():
    for layers in shapes.SETS.values():
        for layer in layers:
            sizes = layer.out_splits or (layer.n // len(layer.enable_lora),) * len(
                layer.enable_lora
            )
            assert sum(sizes) == layer.n
