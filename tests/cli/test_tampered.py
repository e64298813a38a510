"""Files of adapters that are damaged, incomplete, or of another tool than they seem.

convert answers each with one line and exit code 2, and changes no file.
"""

import contextlib
import importlib.util
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_kernels.adapters.formats import FORMATS, peft
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.base import Base
from tests.adapters.formats import made

HAS_GGUF = importlib.util.find_spec("gguf") is not None
Q = "model.layers.0.self_attn.q_proj"
# The file of weights of each format in valid/NAME/.
WEIGHTS = {
    "peft": "adapter_model.safetensors", "mlx": "adapters.safetensors",
    "torchtune": "adapter_model.pt", "kohya": "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors", "litgpt": "lit_model.pth.lora",
    "adapterhub": "pytorch_adapter.bin", "loralib": "lora.pt", "gguf": "adapter.gguf",
}  # fmt: skip
IN_FILE = ("kohya", "loralib", "gguf")  # written as a file, not as a directory
CONFIGS = {
    "peft": "adapter_config.json", "mlx": "adapter_config.json",
    "torchtune": "adapter_config.json", "litgpt": "hyperparameters.yaml",
    "adapterhub": "adapter_config.json",
}  # fmt: skip
NEED_GGUF = pytest.mark.skipif(not HAS_GGUF, reason="needs the package gguf")
NAMES = [pytest.param(n, marks=NEED_GGUF) if n == "gguf" else n for n in WEIGHTS]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A folder for each format, with one good adapter of q, k and v in it."""
    folder = tmp_path_factory.mktemp("valid")
    torch.manual_seed(0)
    attention = [p for p in made.LINEARS if p.endswith(("q_proj", "k_proj", "v_proj"))]
    adapter = made.adapter({path: made.LINEARS[path] for path in attention})
    for name in WEIGHTS:
        if name == "gguf" and not HAS_GGUF:
            continue
        path = folder / name
        if name in IN_FILE:
            path.mkdir()
            path /= WEIGHTS[name]
        FORMATS[name].write(adapter, path, made.HINTS)
    return folder


@pytest.fixture
def place(valid, tmp_path, refused):
    """Puts a valid adapter of a format, and the base model's config, into tmp_path; the folder."""
    made.write_config(tmp_path / "base")

    def put(name, to="a"):
        return shutil.copytree(valid / name, tmp_path / to)

    return put


def rewrite(file, change):
    """Changes the tensors of a file of safetensors or a pickle by change(tensors)."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return
    state = torch.load(file, weights_only=True)
    change(state.get("model", state))
    torch.save(state, file)


def factors(tensors):
    """The keys of a lora_A and its lora_B, in any format."""
    first = next(
        k for k in tensors if ".q_proj" in k or "_q_proj" in k or ".qkv." in k or "attn_q" in k
    )
    layer = first
    for end in (".weight", ".lora_A", ".lora_B", ".lora_a", ".lora_b", ".lora_down", ".lora_up",
                ".alpha"):  # fmt: skip
        layer = layer.removesuffix(end)
    return sorted(k for k in tensors if k.startswith(layer + ".") and "lora" in k)


BASE = ("--base", "base")


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_file_is_refused(place, refused, name):
    file = place(name) / WEIGHTS[name]
    content = file.read_bytes()
    for length in (0, 5, len(content) // 3, len(content) - 40):
        file.write_bytes(content[:length])
        assert "lora-kernels: error: convert: " in refused("a", "out", *BASE, "--to", "peft")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_something_else_is_refused(place, refused, name):
    file = place(name) / WEIGHTS[name]
    for content in (b"not an adapter at all, but a text", b"GGUF" + bytes(64), bytes(range(200))):
        file.write_bytes(content)
        assert refused("a", "out", *BASE, "--to", "peft")


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n != "gguf"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_numbers_that_are_not_finite_are_named(place, refused, name, value):
    file = place(name) / WEIGHTS[name]
    key = []

    def spoil(tensors):
        key.append(factors(tensors)[0])
        tensors[key[0]].view(-1)[3] = value

    rewrite(file, spoil)
    flags = ["--lora-alpha", "6"] if name == "loralib" else []
    err = refused("a", "out", *BASE, "--to", "peft", *flags)
    assert key[0] in err or "finite" in err


def drop_one(tensors):
    del tensors[factors(tensors)[0]]


def drop_other(tensors):
    del tensors[factors(tensors)[1]]


def shrink(tensors):
    key = factors(tensors)[0]
    tensors[key] = tensors[key][:1, :1].clone()


def flatten(tensors):
    key = factors(tensors)[1]
    tensors[key] = tensors[key].flatten()


def whole_numbers(tensors):
    key = factors(tensors)[0]
    tensors[key] = tensors[key].int()


def strange_key(tensors):
    tensors["model.norm.scale"] = torch.ones(3)


def duplicate(tensors):
    key = factors(tensors)[0]
    tensors[f"_orig_mod.{key}"] = tensors[key].clone()


def empty(tensors):
    tensors.clear()


CHANGES = [drop_one, drop_other, shrink, flatten, whole_numbers, strange_key, empty]


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n not in ("gguf", "peft", "loralib")])
@pytest.mark.parametrize("change", [*CHANGES, duplicate], ids=lambda change: change.__name__)
def test_tensors_that_do_not_go_together_are_refused(place, refused, name, change):
    rewrite(place(name) / WEIGHTS[name], change)
    err = refused("a", "out", *BASE, "--to", "peft")
    assert WEIGHTS[name] in err or "error: convert: a" in err


@pytest.mark.parametrize("name", ["peft", "loralib"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_tensors_of_peft_and_loralib_that_do_not_go_together(place, refused, name, change):
    rewrite(place(name) / WEIGHTS[name], change)
    assert refused("a", "out", *BASE, "--to", "mlx")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00", b'["a list"]'], ids=str)
def test_configs_that_are_missing_or_damaged_are_named(place, refused, name, content):
    config = place(name) / CONFIGS[name]
    config.unlink()
    if content is not None:
        config.write_bytes(content)
    err = refused("a", "out", *BASE, "--to", "kohya" if name == "peft" else "peft")
    assert CONFIGS[name] in err or "lora_alpha" in err or "--lora-alpha" in err


CONFIG_CHANGES = [
    ("mlx", {"lora_parameters": {"rank": 3, "scale": 1.0}}, "has rank 2"),
    ("mlx", {"lora_parameters": {"rank": 2}}, "lora_parameters: scale"),
    ("mlx", {"lora_parameters": {"rank": "2", "scale": 1.0}}, "lora_parameters: rank"),
    ("mlx", {"lora_parameters": {"rank": 2, "scale": float("nan")}}, "lora_alpha"),
    ("mlx", {"lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 2}}, "dropout"),
    ("mlx", {"lora_parameters": None}, "lora_parameters"),
    ("mlx", {"fine_tune_type": "full"}, "fine_tune_type"),
    ("mlx", {"fine_tune_type": "dora"}, "fine_tune_type"),
    ("torchtune", {"r": 3}, "has rank 2"),
    ("torchtune", {"lora_alpha": None}, "--lora-alpha"),
    ("torchtune", {"lora_alpha": "six"}, "lora_alpha"),
    ("adapterhub", {"config": {"r": 3, "alpha": 6}}, "rank 3"),
    ("adapterhub", {"config": {"r": 2}}, "alpha"),
    ("adapterhub", {"config": {"r": 2, "alpha": 6, "composition_mode": "scale"}}, "composition"),
    ("adapterhub", {"config": {"r": 2, "alpha": 6, "use_gating": True}}, "use_gating"),
    ("peft", {"r": 3}, "rank 3"),
    ("peft", {"peft_type": "IA3"}, "peft_type"),
    ("peft", {"lora_alpha": [1]}, "lora_alpha"),
]


@pytest.mark.parametrize(("name", "change", "named"), CONFIG_CHANGES, ids=str)
def test_configs_that_do_not_fit_are_named(place, refused, name, change, named):
    config = place(name) / CONFIGS[name]
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert named in refused("a", "out", *BASE, "--to", "kohya" if name == "peft" else "peft")


@pytest.mark.parametrize("text", ["lora_r: 3\nlora_alpha: 6\n", "lora_r: 2\n", "lora_alpha: x\n"])
def test_hyperparameters_of_litgpt_that_do_not_fit(place, refused, text):
    flags = "lora_query: true\nlora_key: true\nlora_value: true\n"
    (place("litgpt") / "hyperparameters.yaml").write_text(text + flags)
    assert "hyperparameters.yaml" in refused("a", "out", *BASE)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan")), None], ids=str)
def test_alphas_of_kohya_that_are_none(place, refused, alpha):
    def change(tensors):
        key = next(key for key in tensors if key.endswith(".alpha"))
        del tensors[key]
        if alpha is not None:
            tensors[key] = alpha

    rewrite(place("kohya") / WEIGHTS["kohya"], change)
    assert "alpha" in refused("a", "out", *BASE)


@pytest.mark.parametrize("header", ["{", "[]", '{"peft_type": "LORA", "r": 9}', '{"r": 2}'])
def test_headers_of_diffusers_that_do_not_fit(place, refused, header):
    file = place("diffusers") / WEIGHTS["diffusers"]
    save_file(load_file(file), file, {"lora_adapter_metadata": header})
    assert "lora_adapter_metadata" in refused("a", "out") or header == "[]"


@NEED_GGUF
@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("type", "model", "general.type"), ("adapter.type", "other", "adapter.type"),
        ("architecture", "bert", "general.architecture"), ("alpha", None, "adapter.lora.alpha"),
        ("alpha", 0.0, "adapter.lora.alpha"), ("alpha", float("nan"), "adapter.lora.alpha"),
        ("name", "blk.0.odd.weight.lora_a", "blk.0.odd"), ("name", "blk.0.attn_q.weight", "attn_q"),
        ("nan", True, "NaN"),
    ],
    ids=str,
)  # fmt: skip
def test_gguf_files_that_do_not_fit_are_named(refused, tmp_path, field, value, named):
    import gguf

    told = {"type": "adapter", "adapter.type": "lora", "architecture": "qwen2", "alpha": 6.0,
            "name": "blk.0.attn_q.weight.lora_a", "nan": False, field: value}  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", told["architecture"])
    writer.add_type(told["type"])
    writer.add_string("adapter.type", told["adapter.type"])
    if told["alpha"] is not None:
        writer.add_float32("adapter.lora.alpha", told["alpha"])
    a = torch.ones(2, 16)
    a[0, 0] = float("nan") if told["nan"] else 1.0
    writer.add_tensor(told["name"], a.numpy())
    writer.add_tensor("blk.0.attn_q.weight.lora_b", torch.ones(16, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert named in refused("a.gguf", "out")


@pytest.mark.parametrize("other", ["torchtune", "kohya", "diffusers", "litgpt"])
def test_two_adapters_in_a_directory_are_both_named(place, refused, tmp_path, other):
    folder = place("mlx")
    shutil.copy(place(other, "b") / WEIGHTS[other], folder / WEIGHTS[other])
    shutil.rmtree(tmp_path / "b")
    if other == "kohya":  # only formats with names of their own are looked for beside others
        (folder / WEIGHTS["mlx"]).rename(folder / "one.safetensors")
    err = refused("a", "out", *BASE)
    assert "holds several adapters" in err
    assert WEIGHTS[other] in err


@pytest.mark.parametrize("name", NAMES)
def test_another_format_than_wanted_is_refused(place, refused, name):
    place(name)
    other = "mlx" if name != "mlx" else "kohya"
    assert f"formats: {other}" in refused("a", "out", *BASE, "--from", other)


@pytest.mark.parametrize("name", NAMES)
def test_a_destination_that_is_there_is_left_alone(place, refused, tmp_path, name):
    place("peft")
    taken = tmp_path / f"out{'.safetensors' if name == 'kohya' else ''}"
    taken.write_text("mine")
    assert "is there already" in refused("a", str(taken), *BASE, "--to", name)
    taken.unlink()
    taken.mkdir()
    (taken / "mine").write_text("mine")
    assert "not empty" in refused("a", str(taken), *BASE, "--to", name)


def test_mixed_keys_of_two_formats_are_refused(place, refused):
    kohya = load_file(place("kohya", "b") / WEIGHTS["kohya"])
    for name in ("mlx", "diffusers"):
        rewrite(place(name, f"a_{name}") / WEIGHTS[name], lambda tensors: tensors.update(kohya))
        assert refused(f"a_{name}", "out", *BASE)


@pytest.mark.parametrize(
    "config",
    [
        "{", "[]", '{"num_attention_heads": "4"}', '{"num_attention_heads": 0}',
        '{"model_type": "llama"}', '{"num_attention_heads": 8, "hidden_size": 16}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["torchtune", "litgpt"])
def test_bases_that_do_not_fit_are_refused(place, refused, tmp_path, name, config):
    place(name)
    (tmp_path / "base" / "config.json").write_text(config)
    assert refused("a", "out", *BASE)


def test_bases_that_are_missing_are_named(place, refused):
    place("torchtune")
    assert "elsewhere" in refused("a", "out", "--base", "elsewhere")
    assert "--base" in refused("a", "out")


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n not in ("peft", "loralib")])
def test_what_is_trained_besides_is_refused_by_name(place, refused, tmp_path, name):
    if name == "gguf" and not HAS_GGUF:
        pytest.skip("needs the package gguf")
    adapter = made.adapter({Q: made.LINEARS[Q]})
    adapter.entries["head.weight"] = torch.ones(2, 2)
    adapter.modules_to_save.append("head")
    peft.write(adapter, tmp_path / "p")
    out = "out.safetensors" if name == "kohya" else "out"
    assert "head.weight" in refused("p", out, *BASE, "--to", name)


def test_a_pickle_in_the_place_of_safetensors_is_never_read(place, refused, valid):
    folder = place("peft")
    (folder / WEIGHTS["peft"]).rename(folder / "adapter_model.bin")
    assert "a pickle can run code" in refused("a", "out", "--to", "mlx")


def test_valid_adapters_are_taken(valid, tmp_path):
    """What is tampered with above is right before."""
    for name in WEIGHTS:
        if (valid / name).exists():
            hints = Hints(base=made.BASE, lora_alpha=6.0 if name == "loralib" else None)
            path = valid / name if name == "peft" else valid / name / WEIGHTS[name]
            assert Q in FORMATS[name].read(path, hints).layers


STRANGE = [None, True, -1, 0, 1.5, 10**400, float("nan"), "x", "", [], [[]], [None], {}, {"a": 1}]


def is_read_or_refused(name, path, hints=made.HINTS):
    """Reads; any other error than the two that become one line ends the test."""
    with contextlib.suppress(ValueError, OSError):
        FORMATS[name].read(path, hints)


@pytest.mark.parametrize("name", ["mlx", "torchtune", "adapterhub", "peft"])
def test_no_value_of_a_config_is_a_bug(place, name):
    """Whatever JSON a config holds, it is taken, or refused in a line."""
    config = place(name) / CONFIGS[name]
    path = config.parent if name == "peft" else config.parent / WEIGHTS[name]
    told = json.loads(config.read_text())
    nested = [key for key, value in told.items() if isinstance(value, dict)]
    keys = [(key, None) for key in told] + [(key, k) for key in nested for k in told[key]]
    for key, inner in keys:
        for value in STRANGE:
            forged = json.loads(json.dumps(told))
            (forged if inner is None else forged[key])[key if inner is None else inner] = value
            config.write_text(json.dumps(forged))
            is_read_or_refused(name, path)


def test_no_value_of_a_header_or_a_base_is_a_bug(place, tmp_path):
    diffusers, base = place("diffusers") / WEIGHTS["diffusers"], tmp_path / "base" / "config.json"
    torchtune = place("torchtune", "b") / WEIGHTS["torchtune"]
    with safe_open(diffusers, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = load_file(diffusers)
    for key in told:
        for value in STRANGE:
            header = json.dumps(told | {key: value})
            save_file(tensors, diffusers, {"lora_adapter_metadata": header})
            is_read_or_refused("diffusers", diffusers)
    for key in (*made.CONFIG, "head_dim", "text_config"):
        for value in STRANGE:
            base.write_text(json.dumps(made.CONFIG | {key: value}))
            with contextlib.suppress(ValueError):
                is_read_or_refused("torchtune", torchtune, Hints(base=Base.read(base)))
