"""GGUF: what llama.cpp's converter writes, read; and what is written for llama.cpp."""

import json
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.adapters.formats import locate, peft
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.gguf import read, write
from tests.adapters.formats import made

gguf = pytest.importorskip("gguf")

Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")


def to_llama_cpp(rows, heads):
    """llama.cpp's own permute."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def tensors_of(file):
    return {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def test_file_is_as_llama_cpp_has_it(tmp_path, seed):
    file, adapter = tmp_path / "a.gguf", made.adapter(embedding=True)
    write(adapter, file, made.HINTS)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 6.0)
    tensors = tensors_of(file)
    for name, path, heads in (("attn_q", Q, made.HEADS), ("attn_k", K, made.KV_HEADS)):
        layer = adapter.layers[path]
        assert torch.equal(tensors[f"blk.0.{name}.weight.lora_a"], layer.lora_A)
        rows = tensors[f"blk.0.{name}.weight.lora_b"]
        assert torch.equal(rows, to_llama_cpp(layer.lora_B, heads))
    embedding = adapter.layers["model.embed_tokens"]
    assert torch.equal(tensors["token_embd.weight.lora_a"], embedding.lora_A.T)
    assert torch.equal(tensors["token_embd.weight.lora_b"], embedding.lora_B)


@pytest.mark.parametrize(
    "options",
    [{}, {"embedding": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}],
    ids=str,
)
def test_what_was_written_is_read_bit_for_bit(tmp_path, seed, options):
    adapter = made.adapter(**options)
    assert len(write(adapter, tmp_path / "a.gguf", made.HINTS)) == 1
    name, file = locate(tmp_path)
    assert name == "gguf"
    made.assert_same_layers(read(file, made.HINTS), adapter)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2"])
def test_rows_of_other_architectures_stay(tmp_path, seed, model_type):
    adapter, hints = made.adapter(), Hints(base=replace(made.BASE, model_type=model_type))
    write(adapter, tmp_path / "a.gguf", hints)
    rows = tensors_of(tmp_path / "a.gguf")["blk.0.attn_q.weight.lora_b"]
    assert torch.equal(rows, adapter.layers[Q].lora_B)
    made.assert_same_layers(read(tmp_path / "a.gguf", Hints()), adapter)


def test_one_alpha_divides_by_each_rank(tmp_path, seed):
    """rank_pattern with one alpha fits GGUF; alpha_pattern and rsLoRA go into lora_B."""
    adapter = made.with_rank(made.adapter(r=4), Q, 2)
    adapter = made.with_scaling(adapter, Q, 3.0)  # alpha 6 at rank 2, as 6 at rank 4
    assert len(write(adapter, tmp_path / "a.gguf", made.HINTS)) == 1
    made.assert_same_layers(read(tmp_path / "a.gguf", made.HINTS), adapter)
    other = made.with_scaling(adapter, K, 1.7)
    lines = write(other, tmp_path / "b.gguf", made.HINTS)
    assert any("remark: the scaling of" in line and K in line for line in lines)
    again = read(tmp_path / "b.gguf", made.HINTS)
    for path, layer in other.layers.items():
        made.assert_same_but_for_rounding(again.layers[path], layer)


def test_an_alpha_that_no_float32_has_is_told(tmp_path, seed):
    lines = write(made.adapter(alpha=0.1), tmp_path / "a.gguf", made.HINTS)
    assert any(line.startswith("remark: alpha 0.1 is 0.10000000149") for line in lines)


def test_what_llama_cpp_lacks_is_refused(tmp_path, seed):
    file = tmp_path / "a.gguf"
    for adapter, hints, match in (
        (made.adapter(dora=True), made.HINTS, "use_dora: GGUF's format has no DoRA"),
        (made.adapter(), Hints(), "give --base"),
        (made.adapter(), Hints(base=replace(made.BASE, model_type="bert")), "model_type: must be"),
        (
            made.adapter({"lm_head": (4, 4)}),
            Hints(base=replace(made.BASE, model_type="gemma")),
            "gemma has no head",
        ),
        (made.adapter({"odd.name": (4, 4)}), made.HINTS, r"odd\.name: llama\.cpp"),
    ):
        with pytest.raises(ValueError, match=match):
            write(adapter, file, hints)
        assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_told_and_leaves_no_file(tmp_path, seed):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=r"a\.gguf: was not written to its end"):
            write(made.adapter(), tmp_path / "a.gguf", made.HINTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_way_out_is_named(tmp_path, seed, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        write(made.adapter(), tmp_path / "a.gguf", made.HINTS)


@pytest.fixture(scope="session")
def converter(tmp_path_factory):
    """convert_lora_to_gguf.py of the llama.cpp that a release of llama-cpp-python brings."""
    folder, release = tmp_path_factory.mktemp("llama.cpp"), "llama-cpp-python==0.3.36"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
    ]
    done = subprocess.run([*command, release, "--dest", folder], capture_output=True, text=True)
    if done.returncode:  # no network: the release is not in the repository
        pytest.skip(f"{release} cannot be had: {done.stderr.strip()[-300:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (script,) = folder.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py")
    return script


@pytest.mark.formats
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_llama_cpps_converter_writes_the_same(tmp_path, seed, converter, model_type, dtype):
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model_type]
    config = {**made.CONFIG, "model_type": model_type, "architectures": [architecture]}
    base = made.write_config(tmp_path / "base", config | {"num_hidden_layers": 2})
    kind = torch.float32 if dtype == "f32" else torch.bfloat16
    adapter = made.adapter(dtype=kind)
    peft.write(adapter, tmp_path / "peft")
    command = [sys.executable, converter, tmp_path / "peft", "--base", base, "--outtype", dtype]
    done = subprocess.run(
        [*command, "--outfile", tmp_path / "theirs.gguf"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hints = Hints(base=made.HINTS.base.read(base))
    write(adapter, tmp_path / "ours.gguf", hints)
    ours, theirs = (tensors_of(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    again = read(tmp_path / "theirs.gguf", hints)
    made.assert_same_layers(again, adapter)
    peft.write(again, tmp_path / "again")
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("peft", "again"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
