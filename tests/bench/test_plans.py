"""Rows of the plan's table that are made of measurements choose what was measured, and no more."""

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from lora_kernels.plan import Measured, Product

from bench import plans, repository, rows
from bench.providers import FUSED, SANDWICH
from bench.shapes import Cell
from lora_kernels import plan

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FASTER, SLOWER, WITHHELD = 0.9, 1.1, None
NOISE = (0.8,) * 11 + (1.2,) * 9


def both_rows(ratio=FASTER, **changes):
    """Of one cell in which fused took ratio times as long as sandwich; a tuple: of each round."""
    values = {
        "m": 512, "k": 4096, "n": 14336, "r": 16, "dropout_p": 0.1, "mode": "forward",
        "dtype": torch.bfloat16, "device": "cuda", "execution": "graph",
    }  # fmt: skip
    cell = Cell(**{**values, **changes})
    samples = {SANDWICH: [1.0] * 20}
    if ratio is not WITHHELD:
        samples[FUSED] = ratio if isinstance(ratio, tuple) else [ratio] * 20
    machine = {"commit": COMMIT, "gpu": "a GPU", "capability": [9, 0]}
    made = rows.make_rows(cell.fields(), [FUSED, SANDWICH], samples, {FUSED: "wrong: y"}).values()
    return [{**rows.LATER_FIELDS, **row, **machine} for row in made]


def canned(ratio=FASTER, source="a.json", **changes):
    """The row of plan fused, as plans.load leaves it."""
    return {**both_rows(ratio, **changes)[0], "source": source}


def product(row):
    return Product(
        row["m"], row["n"], row["k"], row["r"], getattr(torch, row["dtype"]), torch.device("cuda"),
        dropout=row["dropout_p"] > 0, backward=row["mode"] == "backward",
    )  # fmt: skip


def pasted(text):
    """The table as it is where the text stands in plan.py."""
    names = vars(plan).copy()
    exec(text, names)
    return names["TABLE"]


@pytest.fixture
def chosen(monkeypatch):
    """The plan that a product takes under the table made of rows."""
    monkeypatch.setattr(plan, "capability_of", lambda device: (9, 0))
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")

    def choose(measured, wanted):
        monkeypatch.setattr(plan, "TABLE", pasted(plans.python(plans.table(measured))))
        return [plan.choose(one).name for one in wanted]

    return choose


def bounds(measured, name="m"):
    return [getattr(row, name) for row in plans.table(measured)]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({512: FASTER}, [(512, 512)]),
        ({512: SLOWER}, []),
        ({16: FASTER, 64: FASTER, 512: SLOWER}, [(16, 64)]),
        ({512: SLOWER, 4096: FASTER, 8192: FASTER}, [(4096, math.inf)]),
        ({4096: SLOWER, 8192: FASTER}, [(8192, 8192)]),
        ({512: FASTER, 600: SLOWER, 800: FASTER, 900: SLOWER}, [(512, 512), (800, 800)]),
        ({64: FASTER, 512: WITHHELD, 4096: FASTER}, [(64, 64), (4096, 4096)]),
        ({4096: FASTER, 8192: FASTER, 16384: WITHHELD}, [(4096, 8192)]),
    ],
    ids=str,
)
def test_tokens_reach_from_one_measurement_to_its_neighbours(ratios, expected):
    measured = [canned(ratio, m=m) for m, ratio in ratios.items()]
    assert bounds(measured) == expected
    assert bounds(measured[::-1]) == expected


def test_few_rows_where_fused_is_no_faster_take_the_sandwich():
    """Fused is what they take unmeasured: up to 16 rows with dropout, 64 without."""
    ratios = {1: FASTER, 16: SLOWER, 17: SLOWER, 64: NOISE, 65: SLOWER}
    for p, expected in ((0.1, [16]), (0.0, [16, 17, 64])):
        measured = [canned(ratio, m=m, dropout_p=p) for m, ratio in ratios.items()]
        fused, sandwich = plans.table(measured)
        assert (fused.plan, fused.m) == ("fused", (1, 1))
        assert (sandwich.plan, sandwich.m) == ("sandwich", (expected[0], expected[-1]))
        assert sandwich.source == "a.json"
    assert plans.table([canned(SLOWER, m=16, mode="backward")]) == []


def test_ranks_reach_from_one_measurement_to_its_neighbours():
    ratios = {8: FASTER, 12: FASTER, 16: SLOWER, 64: FASTER}
    measured = [canned(ratio, r=r) for r, ratio in ratios.items()]
    assert bounds(measured, "r") == [(8, 12), (64, 64)]


def test_ranks_join_where_they_say_the_same_of_the_same_tokens():
    measured = [canned(m=512), canned(SLOWER, m=4096), canned(m=4096, r=8)]
    assert [(row.m, row.r) for row in plans.table(measured)] == [
        ((512, 512), (16, 16)), ((4096, 4096), (8, 8)),
    ]  # fmt: skip


def test_rows_of_other_layers_dtypes_and_parts_stand_apart():
    for changes in ({"k": 2048}, {"n": 4096}, {"dtype": torch.float16}):
        assert len(plans.table([canned(), canned(**changes)])) == 2
    other = {**canned(), "capability": [10, 0]}
    assert {row.capability for row in plans.table([canned(), other])} == {(9, 0), (10, 0)}


def test_dropout_and_pass_are_named_unless_both_values_say_the_same():
    def flags(*measured):
        return [(row.dropout, row.backward) for row in plans.table(measured)]

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
def test_eager_calls_and_whole_steps_are_shown_and_decide_nothing(changes, shown):
    made = canned(**changes)
    assert plans.table([made]) == []
    assert plans.terminal([made]).splitlines()[1:] == [
        f"linear 4096x14336 m512 r16 p0.1 bfloat16 cuda {shown}  0.900 (0.900-0.900)"
    ]
    assert bounds([canned(SLOWER, **changes), canned()]) == [(512, 512)]


@pytest.mark.parametrize("ratio", [NOISE, 1.0], ids=["noise", "tie"])
def test_a_tie_is_no_win(ratio):
    assert plans.table([canned(ratio)]) == []


def test_layers_with_the_same_product_have_to_agree(chosen):
    linear = canned()
    for ratio, verdict in ((FASTER, "fused"), (SLOWER, "sandwich")):
        merged = canned(ratio, enable_lora=(True, False))
        assert chosen([linear, merged], [product(linear)]) == [verdict]


def test_rows_that_descriptors_cannot_read_are_their_own(chosen):
    for changes, verdicts in (
        ({"k": 4095}, ["sandwich", "fused"]),
        ({"n": 4095}, ["fused", "sandwich"]),
        ({"n": 4095, "mode": "backward"}, ["sandwich", "fused"]),  # dy
    ):
        made = canned(**changes)
        both = [product(made), product(made)._replace(aligned=False)]
        assert chosen([made], both) == verdicts


def test_sources_are_the_files_of_the_cells_within_the_bounds():
    measured = [
        canned(m=16), canned(m=64, source="b.json"), canned(m=64, k=64, source="c.json"),
    ]  # fmt: skip
    assert [row.source for row in plans.table(measured)] == ["a.json, b.json", "c.json"]


def test_any_verdicts_are_chosen_again(seed, chosen):
    """Of every pass, dtype, dropout, rank and M, with cells missing, withheld and tied."""
    draw = random.Random(seed)
    grid = itertools.product(
        (1, 16, 64, 512, 8191, 8192), (8, 16, 64), (0.0, 0.1), ("forward", "backward"),
        (torch.float16, torch.bfloat16), (4096, 14336),
    )  # fmt: skip
    measured, wanted, verdicts = [], [], []
    for m, r, p, mode, dtype, k in draw.sample(list(grid), 250):
        ratio = draw.choice([FASTER, FASTER, SLOWER, WITHHELD, NOISE])
        made = canned(ratio, m=m, r=r, dropout_p=p, mode=mode, dtype=dtype, k=k)
        measured.append(made)
        wanted.append(product(made))
        verdicts.append("fused" if ratio == FASTER else "sandwich")
    assert chosen(measured, wanted) == verdicts


TERMINAL = """\
cell                                                              fused/sandwich (99 %)  plan
linear 4096x14336 m512 r16 p0.1 bfloat16 cuda forward graph       0.900 (0.900-0.900)    fused
linear 4096x14336 m4096 r16 p0.1 bfloat16 cuda forward graph      0.900 (0.900-0.900)    fused
linear 4096x14336 m4096 r16 p0.1 bfloat16 cuda forward            1.100 (1.100-1.100)
linear 4096x14336 m4096 r16 p0.1 bfloat16 cuda backward graph     1.100 (1.100-1.100)    sandwich
linear 14336x14336 m16384 r128 p0.1 bfloat16 cuda backward graph  0.900 (0.900-0.900)    fused
linear 4096x14336 m8192 r64 p0.1 bfloat16 cuda forward graph      wrong: y               sandwich

TABLE: tuple[Measured, ...] = (
    Measured(
        (9, 0), torch.bfloat16, "fused", "canned.json", m=(512, math.inf), n=(14336, 14336),
        k=(4096, 4096), r=(16, 16), dropout=True, backward=False,
    ),
    Measured(
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
        both_rows(m=16384, k=14336, r=128, mode="backward"), both_rows(WITHHELD, m=8192, r=64),
    )  # fmt: skip
    model = [{**row, "kind": "model"} for row in both_rows(m=1)]
    rows.save(list(itertools.chain(*cells, model)), path)
    return path


def test_output_for_a_canned_file_is_exact(result_file, capsys):
    assert plans.main([str(result_file)]) == 0
    assert capsys.readouterr().out == TERMINAL
    first, _ = pasted(TERMINAL.partition("\n\n")[2])
    assert first == Measured(
        (9, 0), torch.bfloat16, "fused", "canned.json", m=(512, math.inf), n=(14336, 14336),
        k=(4096, 4096), r=(16, 16), dropout=True, backward=False,
    )  # fmt: skip


def test_a_recorded_file_is_named_with_its_gpu(result_file, monkeypatch, tmp_path):
    """Those of two GPUs have the name of their commit alike."""
    monkeypatch.setattr(repository, "REPOSITORY", tmp_path)
    recorded = repository.result_file(COMMIT, "NVIDIA H200", tmp_path)
    rows.save(rows.load(result_file), recorded)
    assert {row["source"] for row in plans.load([recorded])} == {"nvidia-h200/0123456789.json"}


def test_without_a_win_the_table_is_empty():
    assert plans.python([]) == "TABLE: tuple[Measured, ...] = ()"
    assert pasted(plans.python([])) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": COMMIT + "-dirty"}, "results are kept of committed code only"),
        ({"device": "cpu"}, "canned.json: rows of a GPU are needed"),
        ({"capability": None}, "canned.json: a row does not say the GPU's capability"),
        ({"provider": "peft"}, "no cell holds lora_kernels[fused]"),
    ],
)
def test_other_rows_are_refused(result_file, changes, message, capsys):
    rows.save([row | changes for row in rows.load(result_file)], result_file)
    assert plans.main([str(result_file)]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_results_of_the_repository_are_a_cpus():
    (recorded,) = Path(plans.__file__).parent.glob("results/cpu/??????????.json")
    with pytest.raises(ValueError, match="rows of a GPU are needed"):
        plans.load([recorded])
