"""litgpt's file: q, k and v in one layer, with grouped-query attention, and its two YAML files."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.adapters.formats import locate
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.litgpt import read, write
from tests.adapters.formats import made

BLOCK = "transformer.h.0.attn"
ROWS = (made.HEADS * made.SIZE, made.KV_HEADS * made.SIZE, made.KV_HEADS * made.SIZE)
NUMBERS = "lora_r: 2\nlora_alpha: 6\nlora_dropout: 0.25\n"
FLAGS = "lora_query: true\nlora_key: false\nlora_value: true\n"


def save(folder, numbers=NUMBERS + FLAGS, enabled=(0, 2), **more):
    folder.mkdir(exist_ok=True)
    state = {
        f"{BLOCK}.qkv.lora_A": torch.randn(2 * len(enabled), made.WIDTH),
        f"{BLOCK}.qkv.lora_B": torch.randn(sum(ROWS[i] for i in enabled), 2),
        **more,
    }
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    if numbers is not None:
        text = f"checkpoint_dir: checkpoints/a/b\nprecision: null\n{numbers}data:\n  class: JSON\n"
        (folder / "hyperparameters.yaml").write_text(text)
    return state


def read_directory(folder, hints=made.HINTS):
    name, file = locate(folder)
    assert name == "litgpt"
    return read(file, hints)


def test_q_and_v_are_layers_of_their_own(tmp_path, seed):
    state = save(tmp_path)
    adapter = read_directory(tmp_path)
    a, b = state[f"{BLOCK}.qkv.lora_A"], state[f"{BLOCK}.qkv.lora_B"]
    q, v = (adapter.layers[f"model.layers.0.self_attn.{x}_proj"] for x in "qv")
    assert torch.equal(q.lora_A, a[:2])
    assert torch.equal(v.lora_A, a[2:])
    assert torch.equal(q.lora_B, b[: ROWS[0]])
    assert torch.equal(v.lora_B, b[ROWS[0] :])
    assert (q.spec.scaling, q.spec.lora_dropout) == (3.0, 0.25)


def test_heads_may_come_from_model_config(tmp_path, seed):
    save(tmp_path)
    with pytest.raises(ValueError, match=r"model_config.* give --base"):
        read_directory(tmp_path, Hints())
    text = f"n_head: {made.HEADS}\nn_query_groups: {made.KV_HEADS}\nn_embd: {made.WIDTH}\n"
    (tmp_path / "model_config.yaml").write_text(text)
    assert len(read_directory(tmp_path, Hints()).layers) == 2


def test_without_hyperparameters_two_hints_tell(tmp_path, seed):
    save(tmp_path, None)
    with pytest.raises(ValueError, match="give --lora-alpha"):
        read_directory(tmp_path)
    hints = replace(made.HINTS, lora_alpha=6.0)
    with pytest.raises(ValueError, match="give --enable-lora 1,0,1"):
        read_directory(tmp_path, hints)
    adapter = read_directory(tmp_path, replace(hints, enable_lora=(("", (1, 0, 1)),)))
    assert len(adapter.layers) == 2
    with pytest.raises(ValueError, match="are not those of k_proj, v_proj"):
        read_directory(tmp_path, replace(hints, enable_lora=(("qkv", (0, 1, 1)),)))


@pytest.mark.parametrize("left_out", [(), ("k_proj",), ("q_proj", "k_proj", "v_proj")], ids=str)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "lora_dropout": 0.5}], ids=str)
def test_what_was_written_is_read_bit_for_bit(tmp_path, seed, options, left_out):
    sizes = {p: s for p, s in made.LINEARS.items() if not p.endswith(left_out)} if left_out else (
        {**made.LINEARS, "lm_head": (made.WIDTH, made.WORDS)}
    )  # fmt: skip
    adapter = made.adapter(sizes, **options)
    write(adapter, tmp_path / "a", Hints())
    again = read_directory(tmp_path / "a")
    made.assert_same_layers(again, adapter)
    assert {layer.spec.lora_dropout for layer in again.layers.values()} == {
        options.get("lora_dropout", 0.0)
    }


@pytest.mark.parametrize(
    "left_out", ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
)
def test_blocks_that_differ_are_refused(tmp_path, seed, left_out):
    sizes = {path: size for path, size in made.LINEARS.items() if path != left_out}
    with pytest.raises(ValueError, match=rf"{left_out.rpartition('.')[2]} has no LoRA, which lit"):
        write(made.adapter(sizes), tmp_path / "a", Hints())
    assert not (tmp_path / "a").exists()
