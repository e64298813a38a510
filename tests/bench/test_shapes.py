"""Which cells are measured on which device, asked and unasked."""

import itertools

import pytest
import torch

from bench import shapes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_representative_cells_are_few_and_all_different(device):
    cells = shapes.select(device)
    assert 10 <= len(set(cells)) == len(cells) <= 20
    assert len({str(cell) for cell in cells}) == len(cells)
    assert {cell.device for cell in cells} == {device}


def test_representative_cells_of_a_gpu_hold_what_the_goals_speak_of():
    cells = shapes.select("cuda")
    assert {cell.dtype for cell in cells} == {torch.bfloat16}
    goal = [c for c in cells if c.m == 8192 and c.execution == "graph" and c.dropout_p == 0.1]
    sizes = {(cell.k, cell.n) for cell in goal if cell.mode == "forward+backward"}
    assert sizes >= {
        (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192), (1024, 3072),
    }  # fmt: skip
    assert {cell.execution for cell in cells if cell.m == 16} == {"eager", "graph"}


def test_all_is_the_whole_grid():
    cells = shapes.select("cuda", ["all"], modes=["forward+backward"], executions=["graph"])
    linear = {(c.k, c.n, c.m, c.r, c.dropout_p) for c in cells if not c.merged}
    sizes = [
        (2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (5120, 13824),
        (4096, 1024), (1024, 3072),
    ]  # fmt: skip
    tokens = (1, 16, 64, 512, 4096, 8191, 8192, 16384)
    grid = itertools.product(sizes, tokens, (8, 12, 16, 64, 128), (0.0, 0.1))
    assert linear == {(*size, m, r, p) for size, m, r, p in grid}


def test_decode_has_few_tokens_and_sets_do_not_repeat_a_cell():
    decode = shapes.select("cuda", ["decode"])
    assert {cell.m for cell in decode} == {1, 16, 64}
    both = shapes.select("cuda", ["square", "llama3-8b"])
    assert len(set(both)) == len(both)


def test_named_values_of_an_axis_replace_those_of_a_set_and_thin_out_the_representative():
    asked = {"tokens": [7], "ranks": [3], "dropout": [0.5], "modes": ["backward"]}
    cells = shapes.select("cpu", ["gpt2-medium"], **asked)
    assert {(c.m, c.r, c.dropout_p, c.mode, c.merged) for c in cells} == {
        (7, 3, 0.5, "backward", False), (7, 3, 0.5, "backward", True),
    }  # fmt: skip
    assert {cell.m for cell in shapes.select("cpu", tokens=[16])} == {16}
    assert shapes.select("cpu", tokens=[7]) == []


def test_groups_of_a_cell_are_equal_unless_it_says_how_large_they_are():
    equal = shapes.Cell(2, 4, 6, 1, 0.0, "forward", (True, False, True))
    assert equal.problem().out_splits == [2, 2, 2]
    unequal = shapes.Cell(2, 4, 6, 1, 0.0, "forward", (True, False), out_splits=(5, 1))
    assert unequal.problem().out_splits == [5, 1]
