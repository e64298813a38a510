"""Entries of the table that are made of measurements choose what was measured, and no more."""

import itertools
import math
import random

import pytest
import torch

from bench.cells import Cell
from bench.rows import make_rows
from lora_kernels.dispatch import algorithm, table
from lora_kernels.dispatch.table import GemmShape, TuningEntry
from lora_kernels.tuning import algorithms, repository, rows
from lora_kernels.tuning.rows import ADDMM, FUSED

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FASTER, SLOWER, SKIPPED = 0.9, 1.1, None
NOISE = (0.8,) * 11 + (1.2,) * 9


def both_rows(ratio=FASTER, **changes):
    """Of one cell in which fused took ratio times as long as addmm; a tuple: of each round."""
    values = {
        "m": 512, "k": 4096, "n": 14336, "r": 16, "dropout_p": 0.1, "mode": "forward",
        "dtype": torch.bfloat16, "device": "cuda", "execution": "graph",
    }  # fmt: skip
    cell = Cell(**{**values, **changes})
    samples = {ADDMM: [1.0] * 20}
    if ratio is not SKIPPED:
        samples[FUSED] = ratio if isinstance(ratio, tuple) else [ratio] * 20
    machine = {"commit": COMMIT, "gpu": "a GPU", "capability": [9, 0]}
    made = make_rows(cell.fields(), [FUSED, ADDMM], samples, {FUSED: "wrong: y"}).values()
    return [{**row, **machine} for row in made]


def canned(ratio=FASTER, source="a.json", **changes):
    """The row of algorithm fused, as algorithms.load leaves it."""
    return {**both_rows(ratio, **changes)[0], "source": source}


def shape_of(row):
    return GemmShape(
        row["m"], row["n"], row["k"], row["r"], getattr(torch, row["dtype"]), torch.device("cuda"),
        dropout=row["dropout_p"] > 0, backward=row["mode"] == "backward",
    )  # fmt: skip


def pasted(text):
    """The table as it is if the text stands in dispatch/table.py."""
    names = vars(table).copy()
    exec(text, names)
    return names["TABLE"]


@pytest.fixture
def chosen(monkeypatch):
    """The algorithm that a product takes under the table made of rows."""
    monkeypatch.setattr(algorithm, "capability_of", lambda device: (9, 0))
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")

    def choose(measured, wanted):
        made = pasted(algorithms.python(algorithms.table(measured)))
        monkeypatch.setattr(algorithm, "TABLE", made)
        return [algorithm.choose(one).name for one in wanted]

    return choose


def bounds(measured, name="m"):
    return [getattr(row, name) for row in algorithms.table(measured)]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({512: FASTER}, [(512, 512)]),
        ({512: SLOWER}, []),
        ({16: FASTER, 64: FASTER, 512: SLOWER}, [(16, 64)]),
        ({512: SLOWER, 4096: FASTER, 8192: FASTER}, [(4096, math.inf)]),
        ({4096: SLOWER, 8192: FASTER}, [(8192, 8192)]),
        ({512: FASTER, 600: SLOWER, 800: FASTER, 900: SLOWER}, [(512, 512), (800, 800)]),
        ({64: FASTER, 512: SKIPPED, 4096: FASTER}, [(64, 64), (4096, 4096)]),
        ({4096: FASTER, 8192: FASTER, 16384: SKIPPED}, [(4096, 8192)]),
    ],
    ids=str,
)
def test_table_reaches_over_tokens_from_one_measurement_to_its_neighbours(ratios, expected):
    measured = [canned(ratio, m=m) for m, ratio in ratios.items()]
    assert bounds(measured) == expected
    assert bounds(measured[::-1]) == expected


def test_table_gives_a_small_m_to_addmm_if_fused_is_no_faster():
    """Fused is what it takes unmeasured: up to 16 rows with dropout, 64 without."""
    ratios = {1: FASTER, 16: SLOWER, 17: SLOWER, 64: NOISE, 65: SLOWER}
    for p, expected in ((0.1, [16]), (0.0, [16, 17, 64])):
        measured = [canned(ratio, m=m, dropout_p=p) for m, ratio in ratios.items()]
        fused, addmm = algorithms.table(measured)
        assert (fused.algorithm, fused.m) == ("fused", (1, 1))
        assert (addmm.algorithm, addmm.m) == ("addmm", (expected[0], expected[-1]))
        assert addmm.source == "a.json"
    assert algorithms.table([canned(SLOWER, m=16, mode="backward")]) == []


def test_table_reaches_over_ranks_from_one_measurement_to_its_neighbours():
    ratios = {8: FASTER, 12: FASTER, 16: SLOWER, 64: FASTER}
    measured = [canned(ratio, r=r) for r, ratio in ratios.items()]
    assert bounds(measured, "r") == [(8, 12), (64, 64)]


def test_table_joins_ranks_that_say_the_same_of_the_same_tokens():
    measured = [canned(m=512), canned(SLOWER, m=4096), canned(m=4096, r=8)]
    assert [(row.m, row.r) for row in algorithms.table(measured)] == [
        ((512, 512), (16, 16)), ((4096, 4096), (8, 8)),
    ]  # fmt: skip


def test_table_keeps_layers_dtypes_and_gpus_apart():
    for changes in ({"k": 2048}, {"n": 4096}, {"dtype": torch.float16}):
        assert len(algorithms.table([canned(), canned(**changes)])) == 2
    other = {**canned(), "capability": [10, 0]}
    assert {row.capability for row in algorithms.table([canned(), other])} == {(9, 0), (10, 0)}


def test_table_names_dropout_and_pass_unless_both_values_say_the_same():
    def flags(*measured):
        return [(row.dropout, row.backward) for row in algorithms.table(measured)]

    assert flags(canned()) == [(True, False)]
    assert flags(canned(), canned(dropout_p=0.0)) == [(None, False)]
    assert flags(canned(), canned(mode="backward")) == [(True, None)]
    assert flags(canned(), canned(SLOWER, mode="backward")) == [(True, False)]
    both = [canned(dropout_p=p, mode=mode) for p in (0.0, 0.1) for mode in ("forward", "backward")]
    assert flags(*both) == [(None, None)]
    assert flags(*both[:3]) == [(None, False), (False, True)]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({"execution": "eager"}, "forward"), ({"mode": "forward+backward"}, "forward+backward graph")],
)
def test_terminal_shows_eager_calls_and_whole_steps_which_decide_nothing(changes, shown):
    made = canned(**changes)
    assert algorithms.table([made]) == []
    assert algorithms.terminal([made]).splitlines()[1:] == [
        f"linear 4096x14336 m512 r16 p0.1 bfloat16 cuda {shown}  0.900 (0.900-0.900)"
    ]
    assert bounds([canned(SLOWER, **changes), canned()]) == [(512, 512)]


@pytest.mark.parametrize("ratio", [NOISE, 1.0], ids=["noise", "tie"])
def test_table_takes_no_tie_for_a_win(ratio):
    assert algorithms.table([canned(ratio)]) == []


def test_table_needs_layers_with_the_same_product_to_agree(chosen):
    linear = canned()
    for ratio, verdict in ((FASTER, "fused"), (SLOWER, "addmm")):
        merged = canned(ratio, enable_lora=(True, False))
        assert chosen([linear, merged], [shape_of(linear)]) == [verdict]


def test_table_keeps_matrices_that_tma_cannot_read_apart(chosen):
    for changes, verdicts in (
        ({"k": 4095}, ["addmm", "fused"]),
        ({"n": 4095}, ["fused", "addmm"]),
        ({"n": 4095, "mode": "backward"}, ["addmm", "fused"]),  # dy
    ):
        made = canned(**changes)
        both = [shape_of(made), shape_of(made)._replace(tma=False)]
        assert chosen([made], both) == verdicts


def test_table_names_the_files_of_the_cells_within_the_bounds():
    measured = [
        canned(m=16), canned(m=64, source="b.json"), canned(m=64, k=64, source="c.json"),
    ]  # fmt: skip
    assert [row.source for row in algorithms.table(measured)] == ["a.json, b.json", "c.json"]


def test_table_makes_choose_take_any_verdicts_again(seed, chosen):
    """Of every pass, dtype, dropout, rank and M, with cells missing, skipped and tied."""
    draw = random.Random(seed)
    grid = itertools.product(
        (1, 16, 64, 512, 8191, 8192), (8, 16, 64), (0.0, 0.1), ("forward", "backward"),
        (torch.float16, torch.bfloat16), (4096, 14336),
    )  # fmt: skip
    measured, wanted, verdicts = [], [], []
    for m, r, p, mode, dtype, k in draw.sample(list(grid), 250):
        ratio = draw.choice([FASTER, FASTER, SLOWER, SKIPPED, NOISE])
        made = canned(ratio, m=m, r=r, dropout_p=p, mode=mode, dtype=dtype, k=k)
        measured.append(made)
        wanted.append(shape_of(made))
        verdicts.append("fused" if ratio == FASTER else "addmm")
    assert chosen(measured, wanted) == verdicts


TERMINAL = """\
cell                                                              fused/addmm (99 %)     algorithm
linear 4096x14336 m512 r16 p0.1 bfloat16 cuda forward graph       0.900 (0.900-0.900)    fused
linear 4096x14336 m4096 r16 p0.1 bfloat16 cuda forward graph      0.900 (0.900-0.900)    fused
linear 4096x14336 m4096 r16 p0.1 bfloat16 cuda forward            1.100 (1.100-1.100)
linear 4096x14336 m4096 r16 p0.1 bfloat16 cuda backward graph     1.100 (1.100-1.100)    addmm
linear 14336x14336 m16384 r128 p0.1 bfloat16 cuda backward graph  0.900 (0.900-0.900)    fused
linear 4096x14336 m8192 r64 p0.1 bfloat16 cuda forward graph      wrong: y               addmm

TABLE: tuple[TuningEntry, ...] = (
    TuningEntry(
        (9, 0), torch.bfloat16, "fused", "canned.json", m=(512, math.inf), n=(14336, 14336),
        k=(4096, 4096), r=(16, 16), dropout=True, backward=False,
    ),
    TuningEntry(
        (9, 0), torch.bfloat16, "fused", "canned.json", m=(16384, 16384), n=(14336, 14336),
        k=(14336, 14336), r=(128, 128), dropout=True, backward=True,
    ),
)  # fmt: skip
"""


@pytest.fixture
def result_file(tmp_path):
    path = tmp_path / "canned.json"
    cells = (
        both_rows(m=512), both_rows(m=4096), both_rows(SLOWER, m=4096, execution="eager"),
        both_rows(SLOWER, m=4096, mode="backward"),
        both_rows(m=16384, k=14336, r=128, mode="backward"), both_rows(SKIPPED, m=8192, r=64),
    )  # fmt: skip
    model = [{**row, "kind": "model"} for row in both_rows(m=1)]
    rows.save(list(itertools.chain(*cells, model)), path)
    return path


def test_main_prints_a_canned_file_exactly(result_file, capsys):
    assert algorithms.main([str(result_file)]) == 0
    assert capsys.readouterr().out == TERMINAL
    first, _ = pasted(TERMINAL.partition("\n\n")[2])
    assert first == TuningEntry(
        (9, 0), torch.bfloat16, "fused", "canned.json", m=(512, math.inf), n=(14336, 14336),
        k=(4096, 4096), r=(16, 16), dropout=True, backward=False,
    )  # fmt: skip


def test_load_names_a_recorded_file_with_its_gpu(result_file, monkeypatch, tmp_path):
    """Those of two GPUs have the name of their commit alike."""
    monkeypatch.setattr(repository, "REPOSITORY", tmp_path)
    recorded = repository.result_file(COMMIT, "NVIDIA H200", tmp_path)
    rows.save(rows.load(result_file), recorded)
    assert {row["source"] for row in algorithms.load([recorded])} == {"nvidia-h200/0123456789.json"}


def test_python_of_no_win_is_an_empty_table():
    assert algorithms.python([]) == "TABLE: tuple[TuningEntry, ...] = ()"
    assert pasted(algorithms.python([])) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": COMMIT + "-dirty"}, "results are kept of committed code only"),
        ({"device": "cpu"}, "canned.json: rows of a GPU are needed"),
        ({"capability": None}, "canned.json: a row does not say the GPU's capability"),
        ({"implementation": "peft"}, "no cell holds lora_kernels[fused]"),
    ],
)
def test_main_refuses_other_rows(result_file, changes, message, capsys):
    rows.save([row | changes for row in rows.load(result_file)], result_file)
    assert algorithms.main([str(result_file)]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_load_refuses_the_results_of_the_repository_which_are_a_cpus():
    (recorded,) = (repository.REPOSITORY / repository.RESULTS).glob("cpu/??????????.json")
    with pytest.raises(ValueError, match="rows of a GPU are needed"):
        algorithms.load([recorded])
