"""Adapters by the name of a repository: what is downloaded, what is uploaded, what errors say."""

import contextlib
import json
import sys

import pytest
import torch
from torch import nn

import lora_kernels as lora
from lora_kernels.cli import main
from tests.adapters.standin_hub import StandinHub

NAME = "someone/my-lora"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with NAME in it: an adapter for net(), and files that it does not need."""
    from huggingface_hub import constants

    standin = StandinHub()
    monkeypatch.setattr(constants, "ENDPOINT", standin.address)
    template = f"{standin.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.chdir(tmp_path)
    lora.save_adapter(trained(), tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    standin.repositories[NAME] = {**files, "README.md": b"# mine", "model.safetensors": b"0" * 64}
    with contextlib.closing(standin):
        yield standin


def net():
    return nn.Sequential(nn.Linear(6, 4))


def trained():
    torch.manual_seed(0)
    model = lora.apply_lora(net(), r=2, lora_alpha=4)
    nn.init.normal_(model[0].lora_B)
    return model


def assert_loaded(model):
    expected = trained()[0]
    assert torch.equal(model[0].lora_A, expected.lora_A)
    assert torch.equal(model[0].lora_B, expected.lora_B)
    assert model[0].scaling == 2.0


def test_a_name_is_downloaded_and_loaded_without_what_is_no_adapter(hub):
    assert_loaded(lora.load_adapter(net(), NAME))
    assert hub.downloaded() == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_second_load_takes_what_is_kept(hub, monkeypatch):
    from huggingface_hub import constants

    lora.load_adapter(net(), NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert_loaded(lora.load_adapter(net(), NAME))
    assert len(hub.asked) == asked


def test_revision_token_and_cache_dir_are_passed_on(hub, tmp_path):
    hub.tokens[NAME] = "mine"
    options = {"revision": "v1", "token": "mine", "cache_dir": tmp_path / "elsewhere"}
    assert_loaded(lora.load_adapter(net(), NAME, **options))
    assert f"/api/models/{NAME}/revision/v1" in hub.asked
    assert list((tmp_path / "elsewhere").rglob("adapter_config.json"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("someone/other", {}, "Repository Not Found"),
        (NAME, {"revision": "v7"}, "v7"),
        ("someone/a..b", {}, "a..b"),
    ],
)
def test_what_the_hub_does_not_have_is_one_error_that_says_the_way_out(hub, name, options, said):
    model = net()
    with pytest.raises(FileNotFoundError) as error:
        lora.load_adapter(model, name, **options)
    text = str(error.value)
    assert text.startswith(f"load_adapter: directory={name!r}: there is no such path")
    assert said in text
    assert "hf auth login" in text
    assert "\n" not in text
    assert type(model[0]) is nn.Linear


def test_without_a_network_the_error_is_the_same(hub):
    hub.close()
    with pytest.raises(FileNotFoundError, match=r"directory='someone/my-lora'.*path of a copy"):
        lora.load_adapter(net(), NAME)


def test_without_huggingface_hub_the_error_says_what_to_install(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        lora.load_adapter(net(), NAME)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        lora.push_to_hub(trained(), NAME)


def test_a_repository_without_an_adapter_says_so(hub):
    hub.repositories[NAME] = {"model.safetensors": b"0" * 64}
    with pytest.raises(FileNotFoundError, match="has no file that adapters are called by"):
        lora.load_adapter(net(), NAME)
    assert hub.downloaded() == []


@pytest.mark.parametrize("source", ["made/absent", "absent", "a/b/c", "./a", "../a", "~/a"])
def test_what_is_meant_as_a_path_never_reaches_the_hub(hub, source):
    with pytest.raises(FileNotFoundError, match="no such"):
        lora.load_adapter(net(), source)
    assert hub.asked == []


def test_a_directory_that_exists_is_no_name(hub, tmp_path):
    (tmp_path / "made").rename(tmp_path / "someone-else")
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone-else").rename(tmp_path / "someone" / "my-lora")
    assert_loaded(lora.load_adapter(net(), NAME))
    assert hub.asked == []
    with pytest.raises(ValueError, match="revision='v1' is for names"):
        lora.load_adapter(net(), NAME, revision="v1")


def test_inspect_and_convert_take_names(hub, tmp_path, capsys):
    assert main(["inspect", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "peft"
    assert main(["convert", NAME, "out.pt"]) == 0
    assert (tmp_path / "out.pt").is_file()
    assert main(["inspect", "someone/other"]) == 2
    err = capsys.readouterr().err
    assert "SOURCE='someone/other': there is no such path" in err.splitlines()[-1]


def test_what_was_pushed_loads_again(hub):
    url = lora.push_to_hub(trained(), "me/new", token="secret", private=True, commit_message="One")
    assert url.startswith(f"{hub.address}/me/new/commit/")
    assert [commit["summary"] for commit in hub.commits] == ["One"]
    assert hub.created[0].get("private") or hub.created[0]["visibility"] == "private"
    assert set(hub.repositories["me/new"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert_loaded(lora.load_adapter(net(), "me/new"))


def test_a_refused_push_is_one_error_that_names_the_repository(hub):
    with pytest.raises(OSError, match=r"push_to_hub: repo_id='me/new': .*hf auth login") as error:
        lora.push_to_hub(trained(), "me/new", token="wrong")
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_saved_reaches_no_hub(hub):
    with pytest.raises(ValueError, match="no LoRA layer"):
        lora.push_to_hub(net(), "me/new", token="secret")
    assert hub.asked == []


def test_of_several_ranks_the_first_one_uploads(hub, monkeypatch):
    from lora_kernels.adapters import hub as module

    monkeypatch.setattr(module, "rank_of", lambda: (1, 2))
    assert lora.push_to_hub(trained(), "me/new", token="secret") is None
    assert hub.asked == []
