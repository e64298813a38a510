"""Which cells are measured on which device, asked and unasked."""

import itertools

import pytest
import torch

from bench.cells import select


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_select_unasked_gives_few_cells_that_all_differ(device):
    cells = select(device)
    assert 10 <= len(set(cells)) == len(cells) <= 20
    assert len({str(cell) for cell in cells}) == len(cells)
    assert {cell.device for cell in cells} == {device}


def test_select_unasked_gives_a_gpu_the_layers_of_llama_and_gpt2_in_many_tokens_and_few():
    cells = select("cuda")
    assert {cell.dtype for cell in cells} == {torch.bfloat16}
    steps = [c for c in cells if c.m == 8192 and c.execution == "graph" and c.dropout_p == 0.1]
    sizes = {(cell.k, cell.n) for cell in steps if cell.mode == "forward+backward"}
    assert sizes >= {
        (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192), (1024, 3072),
    }  # fmt: skip
    assert {cell.execution for cell in cells if cell.m == 16} == {"eager", "graph"}


def test_select_all_is_the_whole_grid():
    cells = select("cuda", ["all"], mode=["forward+backward"], execution=["graph"])
    linear = {(c.k, c.n, c.m, c.r, c.dropout_p) for c in cells if not c.merged}
    sizes = [
        (2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (5120, 13824),
        (4096, 1024), (1024, 3072),
    ]  # fmt: skip
    tokens = (1, 16, 64, 512, 4096, 8191, 8192, 16384)
    grid = itertools.product(sizes, tokens, (8, 12, 16, 64, 128), (0.0, 0.1))
    assert linear == {(*size, m, r, p) for size, m, r, p in grid}


def test_select_decode_has_few_tokens_and_sets_do_not_repeat_a_cell():
    decode = select("cuda", ["decode"])
    assert {cell.m for cell in decode} == {1, 16, 64}
    both = select("cuda", ["square", "llama3-8b"])
    assert len(set(both)) == len(both)


def test_select_by_values_replaces_those_of_a_set_and_thins_out_the_representative():
    asked = {"tokens": [7], "ranks": [3], "dropout": [0.5], "mode": ["backward"]}
    cells = select("cpu", ["gpt2-medium"], **asked)
    assert {(c.m, c.r, c.dropout_p, c.mode, c.merged) for c in cells} == {
        (7, 3, 0.5, "backward", False), (7, 3, 0.5, "backward", True),
    }  # fmt: skip
    assert {cell.m for cell in select("cpu", tokens=[16])} == {16}
    assert select("cpu", tokens=[7]) == []
