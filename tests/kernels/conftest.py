"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest
import torch

from lora_kernels.kernels import config, split_terms
from tests.kernels import races


@pytest.fixture
def allow_tf32(request) -> Iterator[bool]:
    """torch's permission to multiply float32 as TF32, as the parameter says, for one test."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def hopper(monkeypatch):
    """Meta tensors count as tensors of an H200."""
    monkeypatch.setattr(config, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(config, "num_sms", lambda device: 132)


@pytest.fixture(params=["apart", "side by side"])
def terms(request, monkeypatch, device) -> str:
    """How dots take the terms of a factor: each has one of its own, or all have one."""
    chosen = (config.target_of(device),) if request.param == "side by side" else ()
    monkeypatch.setattr(split_terms, "SIDE_BY_SIDE", chosen)
    return request.param


@pytest.fixture
def rounded_bfloat16(monkeypatch):
    """Triton's interpreter cuts bfloat16 off, where every GPU rounds to the nearest: it rounds."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    cut = builder.create_fp_trunc

    def rounded(src, dst_type):
        if str(dst_type.scalar) != "bf16":
            return cut(src, dst_type)
        bits = torch.from_numpy(src.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, dst_type.scalar)

    monkeypatch.setattr(builder, "create_fp_trunc", rounded)


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    with races.noticed():
        yield
