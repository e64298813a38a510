"""split_terms: 16-bit terms whose sum is a factor."""

import pytest
import torch

from lora_kernels.kernels.split_terms import BLOCK, split_terms
from lora_kernels.testing.memory import between_nan, guarded_outputs

BF16, F16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (2, 5, BLOCK + 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F16], ids=str)
def test_three_terms_have_all_bits(dtype, shape, seed, device):
    factor = torch.randn(shape, device=device).to(dtype)
    factor = between_nan(factor) if len(shape) == 2 else factor
    with guarded_outputs():
        terms, count = split_terms(factor, BF16, 3)
    assert (terms.dtype, terms.shape, count) == (BF16, (3, *shape), 3)
    assert torch.equal(terms.double().sum(0), factor.double())


def test_two_terms_have_more_bits_than_tf32(seed, device):
    factor = torch.randn(40, 40, device=device)
    terms, _ = split_terms(factor, BF16, 2)
    assert ((terms.double().sum(0) - factor.double()) / factor).abs().max() < 2**-15


@pytest.mark.parametrize("count", [2, 3])
def test_an_infinite_factor_is_an_infinite_term_and_zeros(count, device):
    factor = torch.tensor([[torch.inf, -torch.inf, torch.nan, -0.0]], device=device)
    terms, _ = split_terms(factor, BF16, count)
    assert torch.equal(terms.float().sum(0)[:, :2], factor[:, :2])
    assert not terms[1:, :, :2].any()
    assert terms[0, :, 2].isnan().all()
    assert not terms[..., 3].any()


def test_a_finite_factor_above_the_largest_bfloat16_has_finite_terms(rounded_bfloat16, device):
    factor = torch.finfo(torch.float32).max * torch.tensor([[1, -1, 0.999, 0.998]], device=device)
    assert factor.bfloat16().isinf().any()
    terms, _ = split_terms(factor, BF16, 3)
    assert torch.equal(terms.double().sum(0), factor.double())


def test_one_term_is_rounded_as_pytorch_rounds(seed, device):
    factor = torch.randn(9, 33, device=device)
    terms, count = split_terms(factor[:, 1:], F16, 1)
    assert count == 1
    assert torch.equal(terms[0], factor[:, 1:].half())


@pytest.mark.parametrize(("dtype", "terms"), [(torch.float32, 0), (BF16, 3)], ids=str)
def test_what_needs_no_terms_is_taken_as_it_is(dtype, terms, device):
    factor = torch.ones(2, 2, dtype=dtype, device=device)
    assert split_terms(factor, BF16, terms) == (factor, 1)
