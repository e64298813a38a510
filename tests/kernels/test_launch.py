"""What launchers decide on the host: numerics, slices, descriptors, tables."""

import pytest
import torch
import triton.language as tl

from lora_kernels.kernels import da, down, dx, dy_pass, few_rows, fill, forward, launch
from lora_kernels.kernels.launch import Numerics

CPU, META = torch.device("cpu"), torch.device("meta")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def hopper(monkeypatch):
    """Meta tensors count as tensors of an H200."""
    monkeypatch.setattr(launch, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(launch, "programs_at_once", lambda device: 132)


@pytest.mark.parametrize(
    ("x", "factor", "allow_tf32", "expected"),
    [
        (F32, F32, False, Numerics(tl.float32, tl.float32, tl.float32, tl.float32, "ieee", "ieee")),
        (F32, F32, True, Numerics(tl.float32, tl.float32, tl.float32, tl.float32, "tf32", "tf32")),
        (
            BF16, BF16, False,
            Numerics(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, "tf32", "tf32"),
        ),
        (
            F16, F16, False,
            Numerics(tl.float16, tl.float16, tl.float32, tl.float32, "tf32", "tf32"),
        ),
        (
            BF16, F32, False,
            Numerics(tl.bfloat16, tl.float32, tl.float32, tl.bfloat16, "tf32x3", "tf32"),
        ),
        (
            F16, F32, True,
            Numerics(tl.float16, tl.float32, tl.float32, tl.float32, "tf32", "tf32"),
        ),
    ],
    ids=str,
    indirect=["allow_tf32"],
)  # fmt: skip
def test_numerics(hopper, x, factor, allow_tf32, expected):
    operands = [torch.empty(4, 4, dtype=dtype, device=META) for dtype in (x, factor, factor)]
    assert launch.numerics_of(*operands) == expected
    assert launch.numerics_of(operands[0], None, operands[1]) == expected


def test_amd_parts_multiply_float32_as_float32(hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    x, a = torch.empty(4, 4, dtype=F16, device=META), torch.empty(4, 4, device=META)
    numerics = launch.numerics_of(x, a)
    assert (numerics.precision, numerics.update_precision) == ("ieee", "ieee")


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((8, 9), "other")],
    ids=str,
)
def test_a_part_without_a_table_takes_the_smallest_tiles(monkeypatch, capability, target):
    monkeypatch.setattr(launch, "capability_of", lambda device: capability)
    assert launch.target_of(torch.device("cuda", 0)) == target


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("programs", [1, 5, 1000])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("waves", [1, 2, 4])
def test_slices_cover_the_length_in_whole_blocks(length, programs, block, waves):
    count, size = launch.slices(length, block, programs, waves, CPU)
    assert size % block == 0
    assert count * size >= length > (count - 1) * size
    assert count == 1 or size >= 2 * block
    assert count == 1 or count * programs <= waves * launch.programs_at_once(CPU)


@pytest.mark.parametrize(
    ("r", "dtype", "expected"),
    [
        (1, tl.bfloat16, (16, 16)), (17, tl.bfloat16, (32, 32)), (64, tl.bfloat16, (64, 64)),
        (65, tl.bfloat16, (64, 32)), (300, tl.bfloat16, (64, 32)), (300, tl.float32, (32, 16)),
    ],
    ids=str,
)  # fmt: skip
def test_ranks_are_padded_up_to_a_limit(r, dtype, expected):
    assert (launch.rank_block(r, dtype), launch.rank_block(r, dtype, beside_acc=True)) == expected


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda t: t, True),
        (lambda t: t[:, :40], True),
        (lambda t: t[:, 1:], False),
        (lambda t: t[:, ::2], False),
        (lambda t: t[:1].expand(8, -1), False),
        (lambda t: t.flatten()[: 8 * 65].view(8, 65), False),
        (lambda t: t.flatten().as_strided((8, 64), (8, 1)), False),
    ],
)
def test_what_fits_a_descriptor(change, fits):
    assert launch.fits_tma(change(torch.zeros(16, 64, dtype=F16))) == fits


@pytest.mark.parametrize(
    ("m", "r", "dtype", "fits", "entry"),
    [
        (8192, 16, BF16, True, "tma"),
        (8192, 17, BF16, True, "tma_high_rank"),
        (8192, 16, BF16, False, "pointer"),
        (64, 16, F16, True, "few_rows"),
        (64, 16, F32, True, "float32"),
    ],
    ids=str,
)
def test_entries_of_the_table(hopper, m, r, dtype, fits, entry):
    x = torch.empty(m, 16, dtype=dtype, device=META)
    assert launch.choose_gemm(dx.CONFIGS, m, r, x, fits) is dx.CONFIGS["sm_90"][entry]
    if entry == "tma_high_rank":
        entry = "tma"  # no other tiles are needed in the forward
    assert launch.choose_gemm(forward.CONFIGS, m, r, x, fits) is forward.CONFIGS["sm_90"][entry]


@pytest.mark.parametrize(("r", "entry"), [(16, "pointer"), (17, "pointer_high_rank")])
def test_without_descriptors_high_ranks_have_tiles_too(monkeypatch, r, entry):
    monkeypatch.setattr(launch, "capability_of", lambda device: (8, 0))
    x = torch.empty(8192, 16, dtype=BF16, device=META)
    assert launch.choose_gemm(dx.CONFIGS, 8192, r, x, True) is dx.CONFIGS["sm_80"][entry]


@pytest.mark.parametrize(
    ("dtype", "r", "entry"),
    [
        (tl.bfloat16, 16, "narrow"), (tl.bfloat16, 17, "narrow_high_rank"),
        (tl.float32, 16, "wide"), (tl.float32, 17, "wide"),
    ],
    ids=str,
)  # fmt: skip
def test_entries_of_a_table_of_passes(hopper, dtype, r, entry):
    table = dy_pass.CONFIGS["sm_90"]
    assert launch.choose_skinny(dy_pass.CONFIGS, META, dtype, r) is table[entry]
    if entry == "narrow_high_rank":
        entry = "narrow"  # no other tiles are needed for x
    assert launch.choose_skinny(down.CONFIGS, META, dtype, r) is down.CONFIGS["sm_90"][entry]


@pytest.mark.parametrize(
    ("m", "dtype", "lora", "entry"),
    [
        (16, BF16, BF16, "up_to_16"), (17, BF16, BF16, "up_to_64"), (64, F16, F16, "up_to_64"),
        (1, F16, F16, "up_to_16"), (1, BF16, F32, "up_to_64"), (1, F32, F32, "float32"),
    ],
    ids=str,
)  # fmt: skip
def test_entries_of_the_table_of_few_rows(hopper, m, dtype, lora, entry):
    x, a = torch.empty(m, 16, dtype=dtype, device=META), torch.empty(4, 16, dtype=lora, device=META)
    numerics = launch.numerics_of(x, a)
    chosen = few_rows.choose(few_rows.CONFIGS, m, x, numerics)
    assert chosen is few_rows.CONFIGS["sm_90"][entry]
    assert m <= chosen.BLOCK_M


@pytest.mark.parametrize(
    ("m", "r", "dropout_p", "lora", "expected"),
    [
        (64, 64, 0.0, BF16, True), (65, 64, 0.0, BF16, False), (64, 65, 0.0, BF16, False),
        (16, 8, 0.1, BF16, True), (17, 8, 0.1, BF16, False),
        (1, 32, 0.0, F32, True), (1, 33, 0.0, F32, False),
    ],
    ids=str,
)  # fmt: skip
def test_what_few_rows_takes(hopper, m, r, dropout_p, lora, expected):
    x, a = torch.empty(m, 16, dtype=BF16, device=META), torch.empty(r, 16, dtype=lora, device=META)
    assert few_rows.takes(m, r, dropout_p, launch.numerics_of(x, a)) == expected


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        *((module, {"narrow", "wide"}) for module in (down, da, dy_pass, fill)),
        *((module, {"float32", "few_rows", "pointer"}) for module in (forward, dx)),
        (few_rows, {"float32", "up_to_16", "up_to_64"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_table_has_every_target(module, needed):
    targets = {"interpreter", "sm_80", "sm_90", "sm_100", "hip", "other"}
    assert set(module.CONFIGS) == targets
    assert all(needed <= set(module.CONFIGS[target]) for target in targets)


@pytest.mark.parametrize("table", few_rows.CONFIGS.values(), ids=few_rows.CONFIGS)
def test_a_program_of_few_rows_owns_all_rows_that_its_entry_serves(table):
    assert table["up_to_16"].BLOCK_M >= 16
    assert min(table[entry].BLOCK_M for entry in ("up_to_64", "float32")) >= launch.FEW_ROWS
