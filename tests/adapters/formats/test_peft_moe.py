"""Mixtures of experts: the warning is there exactly if PEFT gives other outputs."""

import copy
import warnings

import pytest
import torch

from lora_kernels import apply_lora, load_adapter, save_adapter
from lora_kernels.adapters.formats.peft_moe import rewritten, rewritten_by_name
from tests.adapters.tied import in_peft, logits, trained
from tests.tiny_models import tiny_llama, tiny_moe

ATTENTION = ["q_proj", "v_proj"]
pytest.importorskip("transformers.conversion_mapping", reason="transformers 5 stacks experts")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("targets", [ATTENTION, [*ATTENTION, "gate_proj", "up_proj", "down_proj"]])
def test_save_adapter_warns_if_peft_loses_layers(family, targets, seed, tmp_path):
    base = tiny_moe(family).eval()
    model = apply_lora(copy.deepcopy(base), r=2, lora_alpha=4, target_modules=targets)
    trained(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapter(model, tmp_path)
    told = [str(w.message) for w in caught if "rewrites the target modules" in str(w.message)]
    expected = logits(model)
    # A lost layer changes logits near one in the first digits, rounding in float32 in the seventh.
    lost = not torch.allclose(logits(in_peft(base, tmp_path)), expected, atol=1e-5)
    assert [family in text and "load_adapter" in text for text in told] == [True] * lost
    assert lost == (targets != ATTENTION and family != "mixtral")
    torch.testing.assert_close(logits(load_adapter(base, tmp_path)), expected)


def test_models_that_are_no_mixtures_are_not_rewritten():
    assert rewritten(tiny_llama(), ["model.layers.0.mlp.gate_proj"]) is None
    assert rewritten(torch.nn.Linear(2, 2), ["gate"]) is None


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["layers.0.mlp.gate_proj"], False),
        (["layers.0.mlp.shared_experts.gate_proj", "layers.0.q_proj"], True),
        (["layers.1.mlp.gate_proj", "layers.0.mlp.experts.0.w1"], True),
        (["layers.1.mlp.experts.0.fc"], False),
    ],
)
def test_names_alone_tell_some_mixtures(paths, told):
    problem = rewritten_by_name(paths)
    assert (problem is not None) == told
    assert problem is None or paths[0] in problem
