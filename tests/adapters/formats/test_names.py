"""Names and rows of other tools' decoders."""

import pytest
import torch

from lora_kernels.adapters.formats.names import Names, halves, interleaved, rotated
from tests.adapters.formats import made


@pytest.mark.parametrize(
    ("tool", "name", "path"),
    [
        ("torchtune", "layers.11.attn.output_proj", "model.layers.11.self_attn.o_proj"),
        ("torchtune", "output", "lm_head"),
        ("llama.cpp", "blk.3.ffn_down", "model.layers.3.mlp.down_proj"),
        ("llama.cpp", "token_embd", "model.embed_tokens"),
        ("litgpt", "transformer.h.0.mlp.fc_2", "model.layers.0.mlp.up_proj"),
    ],
)
def test_names_go_both_ways(tool, name, path):
    names = Names(tool)
    assert names.to_hf(name) == path
    assert names.from_hf(path) == name
    if path.startswith("model."):
        assert names.from_hf(path.removeprefix("model.")) == name


@pytest.mark.parametrize("name", ["layers.0.attn.odd", "layers.x.attn.q_proj", "", "layers.0.1.w1"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="torchtune and Transformers share no such name"):
        Names("torchtune").to_hf(name)


@pytest.mark.parametrize("shape", [(12,), (12, 1), (12, 5)])
def test_halves_undo_interleaved(shape, seed):
    rows = torch.randn(shape)
    assert torch.equal(halves(interleaved(rows, (3, 4)), (3, 4)), rows)
    # The rows 0 and 1 of a head's first half alternate with those of its second.
    assert torch.equal(interleaved(rows, (3, 4))[:4], rows[[0, 2, 1, 3]])


def test_only_q_and_k_are_rotated():
    assert rotated("a.q_proj", made.BASE, 16) == (made.HEADS, made.SIZE)
    assert rotated("a.k_proj", made.BASE, 8) == (made.KV_HEADS, made.SIZE)
    assert rotated("a.v_proj", made.BASE, 8) is None
