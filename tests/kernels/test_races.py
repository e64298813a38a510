"""What two programs do to one element is noticed, in the interpreter too."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="programs run side by side")


@triton.jit
def _shift_kernel(source_ptr, target_ptr, first, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + offs, mask=offs < size, other=0.0)
    tl.store(target_ptr + offs + first, values, mask=offs < size)


@triton.jit
def _overlap_kernel(target_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(target_ptr + offs, offs.to(tl.float32))


@triton.jit
def _add_kernel(target_ptr, first, LATE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(target_ptr + offs, mask=offs >= 0, other=0.0)
    tl.store(target_ptr + offs + first, values + 1)
    if LATE:
        tl.load(target_ptr + offs, mask=offs >= 0, other=0.0)


def test_programs_that_write_elements_of_their_own_pass():
    source, target = torch.arange(8.0), torch.zeros(8)
    for _ in range(2):  # another launch may write them again
        _shift_kernel[(2,)](source, target, 0, 8, BLOCK=4)
    assert torch.equal(target, source)
    _shift_kernel[(2,)](target, source, 0, 8, BLOCK=4)  # and read what one before it wrote


def test_an_element_that_two_programs_write_is_noticed():
    _overlap_kernel[(2,)](torch.zeros(8), STEP=4, BLOCK=4)
    with pytest.raises(AssertionError, match="written twice"):
        _overlap_kernel[(2,)](torch.zeros(8), STEP=2, BLOCK=4)


def test_an_element_that_one_program_reads_and_another_writes_is_noticed():
    memory = torch.arange(12.0)
    with pytest.raises(AssertionError, match="read and written"):
        _shift_kernel[(2,)](memory, memory, 4, 8, BLOCK=4)
    _shift_kernel[(2,)](memory, memory, 8, 4, BLOCK=4)  # the second program is masked


def test_a_program_may_add_to_elements_that_it_alone_reads():
    memory = torch.zeros(12)
    _add_kernel[(2,)](memory, 0, LATE=False, BLOCK=4)
    assert memory.tolist() == [1.0] * 8 + [0.0] * 4
    with pytest.raises(AssertionError, match="read and written"):
        _add_kernel[(2,)](memory, 4, LATE=False, BLOCK=4)


def test_an_element_that_a_program_reads_after_it_wrote_it_is_noticed():
    with pytest.raises(AssertionError, match="read and written"):
        _add_kernel[(2,)](torch.zeros(8), 0, LATE=True, BLOCK=4)
