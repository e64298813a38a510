"""The search for hazards, on machine code that is written for it."""

import pytest

from tests.kernels.wgmma import hazards

LOOP = [
    "LDS.128 R24, [R3]",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x16x16.F32.BF16 R8, R24, gdesc[UR4], R8, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P0 BRA 0x0000",
]


def sass(lines):
    return "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))


def changed(**lines):
    """The loop with other lines in the places of some; one of "" is left out."""
    found = list(LOOP)
    for name, line in lines.items():
        found[int(name[1:])] = line or "NOP"
    return sass(found)


@pytest.mark.parametrize(
    "code",
    [
        sass(LOOP),
        changed(_2="HGMMA.64x16x16.F32.BF16 R8, gdesc[UR8], gdesc[UR4], R8, gsb0", _3=""),
        changed(_0="LDS.128 R28, [R3]", _3=""),
        changed(_0="STS.128 [R3], R24", _3=""),
        changed(_0="ISETP.GE.AND P0, PT, R24, R5, PT", _3=""),
    ],
)
def test_code_that_waits_or_writes_elsewhere_has_none(code):
    assert hazards(code) == []


@pytest.mark.parametrize(
    ("code", "instruction"),
    [
        (changed(_3=""), "LDS.128 R24"),
        (changed(_3="WARPGROUP.DEPBAR.LE gsb0, 0x1"), "LDS.128 R24"),
        (changed(_3="IADD3 R27, R5, R6, RZ"), "IADD3 R27"),
        (changed(_3="@!P1 MOV R25, R6"), "MOV R25"),
        (changed(_3="IMAD.WIDE R26, R5, R6, R2"), "IMAD.WIDE R26"),
        (changed(_0="LDSM.16.M88.4 R21, [R3]", _3=""), "LDSM.16.M88.4 R21"),
    ],
)
def test_a_write_to_what_a_product_still_reads_is_found(code, instruction):
    assert any(instruction in found for found in hazards(code))
