"""In which dtype a CPU multiplies."""

import pytest
import torch

from lora_kernels.reference import products
from lora_kernels.reference.products import product_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Sets what the CPU has instructions for."""

    def set_to(**capabilities):
        known = {"architecture": "x86_64", **capabilities}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
        products._answers.clear()

    monkeypatch.delenv("LORA_KERNELS_CPU_PRODUCTS", raising=False)
    yield set_to
    monkeypatch.undo()
    products._answers.clear()


def test_asks_the_cpu(machine):
    machine(avx512_bf16=True)
    assert product_dtype(torch.bfloat16, CPU, 512) == torch.bfloat16
    assert product_dtype(torch.float16, CPU, 512) == torch.float32
    machine()
    assert product_dtype(torch.bfloat16, CPU, 512) == torch.float32
    assert product_dtype(torch.bfloat16, CPU, 1) == torch.bfloat16
    assert product_dtype(torch.bfloat16, CPU, 1, backward=True) == torch.float32
    machine(architecture="aarch64")
    assert product_dtype(torch.bfloat16, CPU, 512) == torch.bfloat16


def test_other_dtypes_and_devices_multiply_in_their_own(machine):
    machine()
    for dtype in (torch.float32, torch.float64):
        assert product_dtype(dtype, CPU, 512) == dtype
    assert product_dtype(torch.float16, CUDA, 512) == torch.float16


def test_the_switch(machine, monkeypatch):
    machine(avx512_bf16=True)
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", "float32")
    assert product_dtype(torch.bfloat16, CPU, 1) == torch.float32
    machine()
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", "own")
    assert product_dtype(torch.bfloat16, CPU, 512) == torch.bfloat16
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", "yes")
    with pytest.raises(ValueError, match="LORA_KERNELS_CPU_PRODUCTS must be one of"):
        product_dtype(torch.bfloat16, CPU, 512)
