"""What formats with one scaling, or with an alpha in float32, cannot hold is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.adapters.formats import FORMATS
from lora_kernels.adapters.formats.adapter import Hints
from tests.adapters.formats import made

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("common", "scaling", "dtype"),
    [
        (0.0, 3.0, torch.float32),
        (3.0, 0.0, torch.float32),
        (3.0, 3e6, torch.float16),
        (3.0, 3e-9, torch.float16),
        (1e-200, 1e200, torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["mlx", "torchtune", "litgpt"])
def test_scalings_that_lora_b_cannot_take_are_refused(name, common, scaling, dtype, tmp_path, seed):
    adapter = made.with_scaling(made.adapter(alpha=2 * common, dtype=dtype), Q, scaling)
    with pytest.raises(ValueError, match=rf"{Q}: scaling .* one scaling for all"):
        FORMATS[name].write(adapter, tmp_path / "out", made.HINTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", [0.0, 1e-60, 1e60])
@pytest.mark.parametrize("name", ["kohya", "gguf"])
def test_alphas_that_no_float32_holds_are_refused(name, alpha, tmp_path, seed):
    if name == "gguf":
        pytest.importorskip("gguf")
    adapter = made.adapter({Q: made.LINEARS[Q]}, alpha=alpha)
    with pytest.raises(ValueError, match=rf"{Q}: alpha .* as the float32"):
        FORMATS[name].write(adapter, tmp_path / "out.safetensors", made.HINTS)
    assert list(tmp_path.iterdir()) == []


def test_an_alpha_of_0_in_a_file_of_kohya_is_none(tmp_path, seed):
    file = tmp_path / "x.safetensors"
    FORMATS["kohya"].write(made.adapter({Q: made.LINEARS[Q]}), file, Hints())
    tensors = load_file(file)
    alpha = next(key for key in tensors if key.endswith(".alpha"))
    save_file({**tensors, alpha: torch.tensor(0.0)}, file)
    with pytest.raises(ValueError, match=r"alpha: is 0, r is 2: give --lora-alpha"):
        FORMATS["kohya"].read(file, Hints())
    (layer,) = FORMATS["kohya"].read(file, Hints(lora_alpha=2.0)).layers.values()
    assert layer.spec.scaling == 1.0


@pytest.mark.parametrize("name", ["kohya", "torchtune", "gguf"])
def test_a_dropout_that_the_format_does_not_keep_is_told(name, tmp_path, seed):
    if name == "gguf":
        pytest.importorskip("gguf")
    for dropout in (0.0, 0.25):
        adapter = made.adapter(lora_dropout=dropout)
        lines = FORMATS[name].write(adapter, tmp_path / f"{dropout}.safetensors", made.HINTS)
        remarks = [line for line in lines if line.startswith("remark: ") and "dropout" in line]
        assert [line.rpartition(" ")[2] for line in remarks] == ["0.25"] * (dropout > 0)
