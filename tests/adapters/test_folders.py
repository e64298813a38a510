"""Folders around an adapter: a checkpoint of Trainer, the folder of several, names with a typo."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_kernels as lora
from lora_kernels.adapters.formats import locate
from lora_kernels.cli import main


def trained():
    model = lora.apply_lora(nn.Sequential(nn.Linear(6, 4)), r=2, lora_alpha=4)
    nn.init.normal_(model[0].lora_B)
    return model


def checkpoint(folder, model, adapter=True):
    """What Trainer and adapter_callback leave in folder."""
    folder.mkdir(parents=True)
    if adapter:
        lora.save_adapter(model, folder / "adapter")
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    torch.save(
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, folder / "optimizer.pt"
    )
    for name in ("scheduler.pt", "scaler.pt", "rng_state.pt", "training_args.pt"):
        torch.save({"last_epoch": 3}, folder / name)
    return folder


@pytest.fixture
def model(seed):
    return trained()


def assert_loads(path, model):
    plain = nn.Sequential(nn.Linear(6, 4))
    assert torch.equal(lora.load_adapter(plain, path)[0].lora_B, model[0].lora_B)


@pytest.mark.parametrize("only", [False, True])
def test_a_checkpoint_stands_for_the_adapter_in_it(model, tmp_path, only, capsys):
    folder = checkpoint(tmp_path / "checkpoint-9", model)
    if only:
        save_file(dict(lora.lora_state_dict(model)), folder / "model.safetensors")
    assert locate(folder)[0] == "peft"
    assert_loads(folder, model)
    assert main(["inspect", str(folder)]) == 0
    assert main(["convert", str(folder), str(tmp_path / "lora.pt")]) == 0
    assert_loads(tmp_path / "lora.pt", model)


def test_the_folder_of_checkpoints_names_them(model, tmp_path, capsys):
    for step in (3, 9):
        checkpoint(tmp_path / "trained" / f"checkpoint-{step}", model)
    with pytest.raises(ValueError, match="holds no adapter, but its folders do: ") as caught:
        lora.load_adapter(nn.Sequential(nn.Linear(6, 4)), tmp_path / "trained")
    texts = [str(caught.value)]
    for command in (["inspect"], ["convert", str(tmp_path / "out")]):
        assert main([command[0], str(tmp_path / "trained"), *command[1:]]) == 2
        texts.append(capsys.readouterr().err)
    for step in (3, 9):
        named = str(tmp_path / "trained" / f"checkpoint-{step}" / "adapter")
        assert all(named in text for text in texts)


def test_what_training_keeps_is_no_adapter(model, tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-9", model, adapter=False)
    with pytest.raises(ValueError, match="must be in one of these formats"):
        lora.load_adapter(nn.Sequential(nn.Linear(6, 4)), folder)
    torch.save(dict(lora.lora_state_dict(model)), folder / "lora.pt")
    assert locate(folder) == ("loralib", folder / "lora.pt")


def test_a_config_stands_for_its_folder(model, tmp_path, capsys):
    lora.save_adapter(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    assert_loads(config, model)
    assert main(["inspect", str(config)]) == 0
    assert main(["convert", str(config), str(tmp_path / "lora.pt")]) == 0


def test_a_typo_is_told_by_its_own_name(model, tmp_path, capsys):
    path = str(tmp_path / "lroa.pt")
    plain = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(FileNotFoundError, match=r"directory='.*lroa\.pt': no such file or dir"):
        lora.load_adapter(plain, path)
    for command in (["inspect", path], ["convert", path, str(tmp_path / "out")]):
        assert main(command) == 2
        assert f"SOURCE={path!r}: no such file or directory" in capsys.readouterr().err
