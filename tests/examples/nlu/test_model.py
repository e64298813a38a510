"""What trains, and adapters: ours, loralib's released ones, those of another task."""

import json
import re
import shutil

import loralib
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_kernels as lora
from examples.errors import InputError
from examples.finetune.model import load_tokenizer
from examples.nlu.model import adapt, load_model, positions, start_from
from examples.nlu.tasks import TASKS, settings

SETTINGS = settings("roberta-base-scripts", "mnli")


@pytest.fixture
def released(tiny_roberta, tmp_path):
    """A file with the keys of roberta_base_lora_mnli.bin, written by loralib itself."""
    model = tiny_roberta(3)
    for layer in model.roberta.encoder.layer:
        for name in ("query", "value"):
            setattr(layer.attention.self, name, loralib.Linear(8, 8, r=8, lora_alpha=16))
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tensors = loralib.lora_state_dict(model)
    tensors |= {k: v for k, v in model.state_dict().items() if k.startswith("classifier.")}
    path = tmp_path / "roberta_base_lora_mnli.bin"
    torch.save(tensors, path)
    return path


def adapted(tiny_roberta, labels=3):
    return adapt(tiny_roberta(labels), "lora", SETTINGS)


def test_the_file_has_the_48_and_4_tensors_of_the_released_one(released):
    keys = torch.load(released, weights_only=True)
    pattern = r"roberta\.encoder\.layer\.\d+\.attention\.self\.(query|value)\.lora_[AB]"
    assert sum(bool(re.fullmatch(pattern, key)) for key in keys) == 48
    head = {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
    assert {key.removeprefix("classifier.") for key in keys if "lora" not in key} == head
    assert len(keys) == 52


def test_a_released_adapter_loads_whole_and_computes_what_loralib_does(
    released, tiny_roberta, device
):
    model = adapted(tiny_roberta)
    assert start_from(model, released, SETTINGS, with_head=True, alpha_chosen=True) == []
    tensors = torch.load(released, weights_only=True)
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in tensors.items())

    theirs = tiny_roberta(3)
    for layer in theirs.roberta.encoder.layer:
        for name in ("query", "value"):
            old, new = getattr(layer.attention.self, name), loralib.Linear(8, 8, r=8, lora_alpha=16)
            new.load_state_dict(old.state_dict(), strict=False)
            setattr(layer.attention.self, name, new)
    _, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    ids = torch.tensor([[0, 5, 6, 2], [0, 7, 8, 2]], device=device)
    # float64, where the order of sums does not show.
    ours, theirs = (m.double().to(device).eval()(ids).logits for m in (model, theirs))
    torch.testing.assert_close(ours, theirs)
    plain = tiny_roberta(3).double().to(device).eval()(ids).logits
    assert not torch.allclose(ours, plain)


def test_another_task_takes_the_adapter_without_its_head(released, tiny_roberta):
    model = adapted(tiny_roberta, labels=2)
    head = {k: v.clone() for k, v in model.classifier.state_dict().items()}
    left_out = start_from(model, released, SETTINGS, with_head=False, alpha_chosen=True)
    assert left_out == [
        "classifier.dense.bias", "classifier.dense.weight", "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    ]  # fmt: skip
    assert all(torch.equal(model.classifier.state_dict()[k], v) for k, v in head.items())
    tensors = torch.load(released, weights_only=True)
    own = model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in tensors.items() if k not in left_out)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("classifier.out_proj.bias"), ["missing classifier.out_proj.bias"]),
        (
            lambda t: t.update({"roberta.layer.12.lora_A": t.pop("classifier.dense.bias")}),
            ["unexpected roberta.layer.12.lora_A", "missing classifier.dense.bias"],
        ),
        (
            lambda t: t.update({"classifier.dense.bias": torch.zeros(9)}),
            ["classifier.dense.bias is [9], must be [8]"],
        ),
        (lambda t: t.update(extra=torch.zeros(1)), ["unexpected extra"]),
        (lambda t: t.update(note="hello"), ["note must be a tensor, got str"]),
        (lambda t: t.update({0: torch.zeros(1)}), ["unexpected 0"]),
    ],
)  # fmt: skip
def test_every_key_is_accounted_for(released, tiny_roberta, change, named):
    tensors = torch.load(released, weights_only=True)
    change(tensors)
    torch.save(tensors, released)
    model = adapted(tiny_roberta)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        start_from(model, released, SETTINGS, with_head=True, alpha_chosen=True)
    assert all(name in str(error.value) for name in [*named, str(released)])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_head_of_another_width_is_named(released, tiny_roberta):
    with pytest.raises(InputError, match=r"out_proj.weight is \[3, 8\], must be \[2, 8\]"):
        start_from(
            adapted(tiny_roberta, labels=2), released, SETTINGS, with_head=True, alpha_chosen=True
        )


def test_a_pickle_that_would_run_code_is_refused(tmp_path, tiny_roberta):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(InputError, match=r"evil.bin: cannot be read"):
        start_from(adapted(tiny_roberta), tmp_path / "evil.bin", SETTINGS, with_head=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, b"", b"no zip file"])
def test_a_file_that_is_none_is_named(tmp_path, tiny_roberta, content):
    path = tmp_path / "some.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"some.bin: cannot be read"):
        start_from(adapted(tiny_roberta), path, SETTINGS, with_head=True)


def test_our_own_folder_loads_with_and_without_its_head(tmp_path, tiny_roberta):
    trained = adapted(tiny_roberta)
    torch.manual_seed(2)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    lora.save_adapter(trained, tmp_path)
    whole, part = adapted(tiny_roberta), adapted(tiny_roberta, labels=2)
    assert start_from(whole, tmp_path, SETTINGS, with_head=True) == []
    assert len(start_from(part, tmp_path, SETTINGS, with_head=False)) == 4
    state = trained.state_dict()
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in state.items())
    factors = [key for key in state if "lora_" in key]
    assert all(torch.equal(part.state_dict()[key], state[key]) for key in factors)


def test_a_folder_with_another_alpha_is_refused(tmp_path, tiny_roberta):
    lora.save_adapter(adapted(tiny_roberta), tmp_path)
    paper = settings("roberta-base", "mnli")
    model = adapt(tiny_roberta(3), "lora", paper)
    with pytest.raises(InputError, match="has alpha 16, this run 8"):
        start_from(model, tmp_path, paper, with_head=True)


def test_a_file_does_not_say_its_alpha_so_the_user_has_to(released, tiny_roberta):
    model = adapted(tiny_roberta)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for with_head in (True, False):
        with pytest.raises(InputError, match="pass --alpha, or --settings") as error:
            start_from(model, released, SETTINGS, with_head=with_head)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    # What the message says of loralib's scripts.
    assert "16 for RoBERTa and 32 for DeBERTa XXL" in str(error.value)
    alphas = {
        name: {settings(f"{name}-scripts", task).alpha for task in TASKS}
        for name in ("roberta-base", "roberta-large", "deberta-v2-xxlarge")
    }
    assert alphas == {"roberta-base": {16}, "roberta-large": {16}, "deberta-v2-xxlarge": {32}}


@pytest.mark.parametrize(("key", "value"), [("use_rslora", True), ("alpha_pattern", {"q": 1})])
def test_a_folder_of_peft_with_other_scaling_is_refused(tmp_path, tiny_roberta, key, value):
    lora.save_adapter(adapted(tiny_roberta), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(InputError, match=f"{key} is not supported"):
        start_from(adapted(tiny_roberta), tmp_path, SETTINGS, with_head=True)


def test_deberta_gets_lora_in_its_projections_and_trains_pooler_and_classifier():
    config = transformers.DebertaV2Config(
        vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=9, num_labels=3,
    )  # fmt: skip
    model = transformers.DebertaV2ForSequenceClassification(config)
    adapt(model, "lora", settings("deberta-v2-xxlarge", "mnli"))
    wrapped = {n for n, m in model.named_modules() if isinstance(m, lora.LoRALayer)}
    assert wrapped == {
        f"deberta.encoder.layer.{i}.attention.self.{name}"
        for i in range(2) for name in ("query_proj", "value_proj")
    }  # fmt: skip
    trains = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trains == {
        "pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip


def test_the_longest_input_is_told_by_the_positions(tiny_roberta, tiny_model):
    model = tiny_roberta(2).eval()
    assert positions(model) == 7  # of 9, behind those of the padding token 1 and before it
    model(torch.full((1, 7), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 8), 5))
    assert positions(load(tiny_model)) == 32
    config = transformers.DebertaV2Config(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, relative_attention=True, position_biased_input=False,
    )  # fmt: skip
    deberta = transformers.DebertaV2ForSequenceClassification(config)
    assert positions(deberta) == float("inf")


@pytest.mark.parametrize(
    ("method", "trainable"), [("lora", 24 * 2 * 8 * 8 + 99), ("head", 99), ("full", None)]
)
def test_what_trains(tiny_roberta, method, trainable):
    model = adapt(tiny_roberta(3), method, SETTINGS)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    assert sum(sizes) == (trainable or total)


@pytest.fixture
def incomplete(tiny_model, tmp_path):
    """The tiny BERT with its tensors changed: change, a function of them -> the model's folder."""

    def build(change) -> str:
        folder = tmp_path / "incomplete"
        shutil.copytree(tiny_model, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return build


def load(location):
    return load_model(location, TASKS["sst2"], SETTINGS, load_tokenizer(location), 0)


def drop_layer_1(tensors):
    for key in [key for key in tensors if key.startswith("encoder.layer.1.")]:
        del tensors[key]


@pytest.mark.parametrize(
    ("change", "count", "first"),
    [
        (
            lambda t: t.pop("encoder.layer.1.output.dense.weight"), 1,
            "encoder.layer.1.output.dense.weight",
        ),
        (drop_layer_1, 16, "encoder.layer.1.attention.output.LayerNorm.bias"),
        (
            lambda t: t.update({"encoder.layer.0.output.dense.bias": torch.zeros(7)}), 1,
            "encoder.layer.0.output.dense.bias",
        ),
    ],
    ids=["one missing", "a layer missing", "another shape"],
)  # fmt: skip
def test_a_body_is_never_drawn_at_random(incomplete, change, count, first):
    location = incomplete(change)
    named = rf"--model {location}: {count} weights of .* the first is bert\.{first}$"
    with pytest.raises(InputError, match=named):
        load(location)


def test_a_head_is_new_where_it_is_missing_or_for_other_classes(incomplete, tiny_model, tmp_path):
    def without_pooler(tensors):
        for leaf in ("weight", "bias"):
            del tensors[f"pooler.dense.{leaf}"]

    model = load(incomplete(without_pooler))
    whole = load(tiny_model).state_dict()
    changed = {key for key, v in model.state_dict().items() if not torch.equal(v, whole[key])}
    assert changed == {"bert.pooler.dense.weight", "classifier.weight"}  # biases start at 0
    model.save_pretrained(tmp_path / "two")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "two")
    task = TASKS["mnli"]
    three = load_model(str(tmp_path / "two"), task, SETTINGS, load_tokenizer(tiny_model), 0)
    assert three.classifier.out_features == 3


def test_targets_that_match_nothing_are_named(tiny_roberta):
    with pytest.raises(InputError, match="--targets nowhere"):
        adapt(tiny_roberta(3), "lora", SETTINGS, targets=["nowhere"])
