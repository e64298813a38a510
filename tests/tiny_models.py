"""Hugging Face models of a few hundred weights, freshly initialised."""

import functools

import torch
import transformers


def tiny_bert(**kwargs):
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=9, **kwargs,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def tiny_gpt2(layers=2, **kwargs):
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=9, n_embd=8, n_layer=layers, n_head=2, **kwargs
    )
    return transformers.GPT2LMHeadModel(config)


def tiny_llama(layers=2, **kwargs):
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=9, **kwargs,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# Models and the layers of a block that LoRA goes into: nn.Linear without bias, Conv1D with one.
BASES = {
    "llama": tiny_llama,
    "gpt2": functools.partial(tiny_gpt2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],  # c_proj twice
}
LAYERS = {"llama": 14, "gpt2": 8}


def randomise(model):
    """Weights as after training: nothing is zero, every layer tells in the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def tiny_moe(family):
    """A mixture of experts with a dense block and, for glm4_moe, shared experts."""
    sizes = {
        "vocab_size": 13, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 9,
    }  # fmt: skip
    experts = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
    if family == "mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=4)
        return transformers.MixtralForCausalLM(config)
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**sizes, **experts, num_experts=4, mlp_only_layers=[0])
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.Glm4MoeConfig(
        **sizes, **experts, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
        n_group=1, topk_group=1,
    )  # fmt: skip
    return transformers.Glm4MoeForCausalLM(config)
