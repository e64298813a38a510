"""share_inputs on models whose layers of one block do not all see the same input.

Behind the first call a model computes each layer once for each call of it, as without share_inputs.
"""

import copy

import pytest
import torch
import transformers
from torch import nn

import lora_kernels as lora
from lora_kernels.layers import shared_input
from lora_kernels.testing.tolerance import assert_close
from tests.layers.attention import ALONE, SHARED, calls_of

WIDTH = 16
SIZES = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "dropout": 0.0}  # fmt: skip


def tokens(*shape):
    return torch.randint(3, 13, shape)


def sam():
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": WIDTH, "output_channels": WIDTH, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "mlp_dim": WIDTH,
            "num_pos_feats": WIDTH // 2, "global_attn_indexes": [0], "window_size": 2,
        },
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": 16, "patch_size": 8},
        mask_decoder_config={
            "hidden_size": WIDTH, "mlp_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "iou_head_depth": 2, "iou_head_hidden_dim": WIDTH,
        },
    )  # fmt: skip
    points = torch.tensor([[[[5.0, 5.0], [8.0, 9.0]]]])
    images = torch.randn(1, 3, 16, 16)
    return transformers.SamModel(config), {"pixel_values": images, "input_points": points}


def pix2struct():
    config = transformers.Pix2StructTextConfig(
        vocab_size=13, hidden_size=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        dropout_rate=0.0, initializer_range=0.02,
    )  # fmt: skip
    inputs = {"input_ids": tokens(2, 5), "encoder_hidden_states": torch.randn(2, 7, WIDTH)}
    return transformers.Pix2StructTextModel(config), inputs


def lxmert():
    config = transformers.LxmertConfig(
        vocab_size=13, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=24, l_layers=1,
        x_layers=2, r_layers=1, visual_feat_dim=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    visual = {"visual_feats": torch.randn(2, 4, 8), "visual_pos": torch.rand(2, 4, 4)}
    return transformers.LxmertModel(config), {"input_ids": tokens(2, 5), **visual}


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, num_queries=5, attention_dropout=0.0, **SIZES,
    )  # fmt: skip
    config.dropout = 0.0
    return transformers.DetrModel(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def bart():
    model = transformers.BartModel(transformers.BartConfig(vocab_size=13, **SIZES))
    return model, {"input_ids": tokens(2, 5), "decoder_input_ids": tokens(2, 4)}


def t5():
    config = transformers.T5Config(
        vocab_size=13, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": tokens(2, 5), "decoder_input_ids": tokens(2, 4)}
    return transformers.T5ForConditionalGeneration(config), inputs


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=13, num_mel_bins=4, max_source_positions=6, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None, **SIZES,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 4, 12), "decoder_input_ids": tokens(2, 4)}
    return transformers.WhisperModel(config), inputs


# The model, and the ends of the paths of layers that see one input and so stay joined.
FAMILIES = {
    "sam": (sam, ("layers.0.self_attn",)),  # adds no positions in its first layer
    "pix2struct": (pix2struct, ("self_attention.attention", "mlp.DenseReluDense")),
    "lxmert": (lxmert, ("attention.self", "self_att.self")),
    "detr": (detr, ()),  # adds positions to queries and keys
    "bart": (bart, ("self_attn",)),
    "t5": (t5, ("SelfAttention", "DenseReluDense")),
    "whisper": (whisper, ("self_attn",)),
}


@pytest.fixture
def computed(monkeypatch):
    """How many layers each call of joined layers has computed."""
    counts, compute = [], shared_input.lora_shared_linear

    def counted(x, weights, *args, **kwargs):
        counts.append(len(weights))
        return compute(x, weights, *args, **kwargs)

    monkeypatch.setattr(shared_input, "lora_shared_linear", counted)
    return counts


def family(name, device):
    model, inputs = FAMILIES[name][0]()
    lora.apply_lora(model, r=2, lora_alpha=4)
    for path, parameter in model.named_parameters():
        if path.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model.eval().to(device), {name: value.to(device) for name, value in inputs.items()}


def first_output(model, inputs):
    output = model(**inputs)
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


def doubled(inputs):
    return {k: v.double() if torch.is_floating_point(v) else v for k, v in inputs.items()}


def assert_no_layer_is_computed_in_vain(model, computed, run):
    """As many outputs are computed as layers are called."""
    called = []
    layers = [layer for layer in model.modules() if isinstance(layer, lora.LoRALinear)]
    hooks = [
        layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers
    ]
    computed.clear()
    alone = calls_of(run).count(ALONE)
    for hook in hooks:
        hook.remove()
    assert called
    assert alone + sum(computed) == len(called)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_is_computed_in_vain_behind_the_first_call(name, grad, computed, seed, device):
    model, inputs = family(name, device)
    shared = copy.deepcopy(model)
    lora.share_inputs(shared, exclude=())
    with torch.set_grad_enabled(grad):
        baseline = first_output(model, inputs)
        exact = first_output(copy.deepcopy(model).double(), doubled(inputs))
        for _ in range(2):
            assert_close(first_output(shared, inputs), exact, baseline, name)
            assert_no_layer_is_computed_in_vain(
                shared, computed, lambda: first_output(shared, inputs)
            )


@pytest.mark.parametrize("name", ["sam", "pix2struct", "lxmert", "bart", "t5", "whisper"])
def test_cross_attention_of_known_names_is_left_out(name, seed, device):
    model, inputs = family(name, device)
    everything = set(lora.share_inputs(copy.deepcopy(model), exclude=()))
    groups = lora.share_inputs(model)
    assert set(groups) < everything
    assert calls_of(first_output, model, inputs).count(SHARED)
    for paths in groups:
        block = model.get_submodule(paths[0].rpartition(".")[0])
        assert "ross" not in type(block).__name__ + paths[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_over_one_input_stay_joined_and_others_are_what_they_were(name, seed, device):
    model, inputs = family(name, device)
    shared = copy.deepcopy(model)
    groups = lora.share_inputs(shared, exclude=())
    first_output(shared, inputs)
    rows = {row.name: row for row in lora.report(shared)}
    plain = {row.name: row for row in lora.report(model)}
    for paths in groups:
        blocks = {path.rpartition(".")[0] for path in paths}
        joined = any(block.endswith(FAMILIES[name][1]) for block in blocks)
        for path in paths:
            assert (len(shared.get_submodule(path).computed_together) > 1) == joined, path
            assert ("in one call with" in rows[path].reason) == joined, path
            assert joined or rows[path] == plain[path]
    assert repr(shared) == repr(model)


def test_generation_with_a_cache_computes_each_layer_once(computed, seed, device):
    model, inputs = family("t5", device)
    shared = copy.deepcopy(model)
    lora.share_inputs(shared, exclude=())

    def generate(model):
        ids = inputs["input_ids"]
        return model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)

    expected = generate(model)
    assert torch.equal(generate(shared), expected)
    assert_no_layer_is_computed_in_vain(shared, computed, lambda: generate(shared))
