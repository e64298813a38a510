#!/usr/bin/env bash
# Triton 3.6.0 against 3.9.0, compiled ahead of time for sm_90 (H100, H200); no GPU is needed.
#
# Behaviour: if a kernel changes a tile before tl.dot (a mask, a ReLU, a cast), Hopper's product reads it
# from registers while the code goes on. The loop's wait lets all products but the first of an iteration
# be unfinished, and says nothing of their left operands. So with Triton 3.6 the next iteration writes
# its tile into registers that a product may still read: the result then depends on timing. Which tiles
# are hit cannot be told from the source: of the simplest loop, more than half of those below. float32
# by TF32 is hit more often than bfloat16, and bfloat16 with 32 columns mostly not. The three products of
# "tf32x3" are waited for one by one. Triton 3.7 and newer copy the registers before each product (its
# pull request 9514); none of these tiles is hit with 3.9.
#
# Seen: of 8 tiles (rows, columns, warps), those whose registers are overwritten while a product may read
# them:
#   3.6.0: bfloat16 5, float32 by TF32 8, float32 by TF32x3 0
#   3.9.0: 0, 0, 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/find.py" <<'PY'
import itertools
import os
import re
import subprocess
import sys
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@triton.jit
def relu_times(x, a, y, K, P: tl.constexpr, M: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, STEP), tl.arange(0, N)
    acc = tl.zeros([M, N], tl.float32)
    for start in tl.range(0, K, STEP):
        x_tile = tl.load(x + m[:, None] * K + (start + k)[None, :])
        a_tile = tl.load(a + n[:, None] * K + (start + k)[None, :])
        acc = tl.dot(tl.where(x_tile > 0, x_tile, 0.0), a_tile.T, acc, input_precision=P)
    tl.store(y + m[:, None] * N + n[None, :], acc)


def loop_of(dtype, precision, rows, step, warps):
    """The instructions of the loop, in order."""
    types = {"x": f"*{dtype}", "a": f"*{dtype}", "y": "*fp32", "K": "i32"}
    constants = {"P": precision, "M": rows, "STEP": step, "N": 16}
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    made = triton.compile(
        ASTSource(relu_times, types, constants, divisible),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": 3},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [os.path.join(TOOLS, "cuobjdump"), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text)
    for last, (address, code) in enumerate(lines):
        jump = re.search(r"BRA 0x([0-9a-f]+)", code)
        if jump and int(jump[1], 16) < int(address, 16):
            first = next(i for i, line in enumerate(lines) if int(line[0], 16) >= int(jump[1], 16))
            body = [code for _, code in lines[first : last + 1]]
            if any("HGMMA" in code for code in body):
                return body
    return []


def overwrites(body):
    """Whether a load into registers of a second round meets a product that reads them."""
    groups = []  # by product that may be unfinished, the registers of its left operand
    for code in body * 2:
        product = re.search(r"HGMMA\S* R\d+, R(\d+)", code)
        wait = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", code)
        load = re.match(r"LDSM\S* R(\d+)|LDS\S* R(\d+)", code)
        if product:
            groups.append(set(range(int(product[1]), int(product[1]) + 4)))
        elif wait:
            groups = groups[-int(wait[1]) :] if int(wait[1]) else []
        elif load and {int(load[1] or load[2])} & set().union(*groups):
            return True
    return False


tiles = list(itertools.product((64, 128), (32, 64), (4, 8)))
found = []
for dtype, precision in (("bf16", "tf32"), ("fp32", "tf32"), ("fp32", "tf32x3")):
    hit = [tile for tile in tiles if overwrites(loop_of(dtype, precision, *tile))]
    print(triton.__version__, dtype, precision, len(hit), "of", len(tiles), hit)
    found.append(len(hit))
expected = [int(count) for count in sys.argv[1:]]
assert found == expected, (found, expected)
PY
for version in 3.6.0 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "triton==$version"
done
export TRITON_CACHE_DIR=$folder/cache TRITON_DEFAULT_FP_FUSION=1
"$folder/3.6.0/bin/python" "$folder/find.py" 5 8 0
"$folder/3.9.0/bin/python" "$folder/find.py" 0 0 0
