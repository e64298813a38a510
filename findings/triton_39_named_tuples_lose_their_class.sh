#!/usr/bin/env bash
# Triton 3.6.0, 3.7.1 and 3.9.0, compiled ahead of time for sm_80 (A100); no GPU is needed.
#
# Behaviour: a NamedTuple may be a constexpr argument of a kernel, and every version reads its fields and
# its length. 3.9.0 makes a plain tuple with the same fields of it, which has no properties and no methods:
# a kernel that reads one, and that older versions compile, does not compile any more.
#
# Seen, for Sizes(rows=3, cols=5):
#   3.6.0: rows * cols 15, the property area 15, the method twice() 6
#   3.7.1: the same
#   3.9.0: rows * cols 15; area and twice(): 'tuple' object has no attribute ...
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/find.py" <<'PY'
import re
import sys
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Sizes(NamedTuple):
    rows: int
    cols: int

    @property
    def area(self):
        return self.rows * self.cols

    def twice(self):
        return 2 * self.rows


@triton.jit
def fields(y, SIZES: tl.constexpr):
    tl.store(y, SIZES.rows * SIZES.cols)


@triton.jit
def its_length(y, SIZES: tl.constexpr):
    tl.store(y, len(SIZES))


@triton.jit
def its_property(y, SIZES: tl.constexpr):
    tl.store(y, SIZES.area)


@triton.jit
def its_method(y, SIZES: tl.constexpr):
    tl.store(y, SIZES.twice())


def stored(kernel):
    types = {"y": "*i32", "SIZES": "constexpr"}
    source = ASTSource(kernel, types, {"SIZES": Sizes(3, 5)})
    try:
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    except triton.CompilationError as error:
        return re.search(r"'tuple' object has no attribute '?(\w+)", str(error))[1]
    return int(re.search(r"arith\.constant (\d+) : i32", made.asm["ttir"])[1])


found = {kernel.fn.__name__: stored(kernel) for kernel in (fields, its_length, its_property, its_method)}
print(triton.__version__, found)
assert (found["fields"], found["its_length"]) == (15, 2)
expected = ("area", "twice") if sys.argv[1] == "lost" else (15, 6)
assert (found["its_property"], found["its_method"]) == expected
PY
export TRITON_CACHE_DIR=$folder/cache TRITON_DEFAULT_FP_FUSION=1
for version in 3.6.0 3.7.1 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "triton==$version"
    "$folder/$version/bin/python" "$folder/find.py" "$([ "$version" = 3.9.0 ] && echo lost || echo kept)"
done
