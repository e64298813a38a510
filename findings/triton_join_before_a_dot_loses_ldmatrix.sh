#!/usr/bin/env bash
# Triton 3.6.0 and 3.9.0, compiled ahead of time for sm_80 (A100); no GPU is needed.
#
# Behaviour: if anything that an operand of tl.dot is computed from goes through tl.join, Triton takes the
# operand for one that was unpacked from fewer bits, whatever its dtype. A tile of bfloat16 that is only
# masked by joined random words gets the layout of 8-bit elements (kWidth 4, not 2): no ldmatrix (LDSM),
# and two loads from shared memory in the place of each. sm_90 does not do so.
#
# Seen on sm_80, of a 64 x 64 tile times 16 columns, with both versions:
#   words computed: kWidth 2, 8 LDSM, 8 LDS; words joined: kWidth 4, no LDSM, 24 LDS
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/find.py" <<'PY'
import os
import re
import subprocess
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@triton.jit
def masked_times(x, a, y, K, seed, WAY: tl.constexpr):
    m, k, n = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 16)
    acc = tl.zeros([64, 16], tl.float32)
    for start in tl.range(0, K, 64):
        x_tile = tl.load(x + m[:, None] * K + (start + k)[None, :])
        a_tile = tl.load(a + n[:, None] * K + (start + k)[None, :])
        if WAY == "computed":
            words = (m[:, None] * 7919 + start + k[None, :]) * seed
        else:
            word = (m[:, None] * 7919 + start + tl.arange(0, 32)[None, :]) * seed
            words = tl.join(word, word * seed).reshape(64, 64)
        acc = tl.dot(tl.where(words > 0, x_tile, 0.0), a_tile.T, acc)
    tl.store(y + m[:, None] * 16 + n[None, :], acc)


def compiled(capability, way):
    types = {"x": "*bf16", "a": "*bf16", "y": "*fp32", "K": "i32", "seed": "i32"}
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    made = triton.compile(
        ASTSource(masked_times, types, {"WAY": way}, divisible),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 3},
    )
    (width,) = set(re.findall(r"opIdx = \d, parent = #\w+, kWidth = (\d+)", made.asm["ttgir"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [os.path.join(TOOLS, "cuobjdump"), "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loads = [len(re.findall(rf"\b{name}\.", code)) for name in ("LDSM", "LDS")]
    return int(width), *loads


found = {way: compiled(80, way) for way in ("computed", "joined")}
print(triton.__version__, "sm_80:", found)
width, ldmatrix, loads = found["computed"]
assert (width, ldmatrix) == (2, 8)
assert found["joined"] == (4, 0, loads + 2 * ldmatrix)
assert compiled(90, "joined")[:2] == compiled(90, "computed")[:2] == (2, 4)
PY
export TRITON_CACHE_DIR=$folder/cache TRITON_DEFAULT_FP_FUSION=1
for version in 3.6.0 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "triton==$version"
    "$folder/$version/bin/python" "$folder/find.py"
done
