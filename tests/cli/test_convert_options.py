"""lora-kernels convert: options that contradict SOURCE, or that nothing in it takes."""

import pytest
import torch
from torch import nn

import lora_kernels as lora
from lora_kernels.cli import main


class Net(nn.Module):
    """A Linear, a Conv1D's layout of one, an Embedding, a MergedLinear and a head."""

    def __init__(self):
        super().__init__()
        self.emb = lora.LoRAEmbedding(9, 8, 2, 4)
        self.qkv = lora.LoRAMergedLinear(8, 12, 2, 4, 0.1, enable_lora=[True, False, True])
        self.lin = lora.LoRALinear(8, 8, 2, 4, 0.1)
        self.head = nn.Linear(8, 2)


@pytest.fixture
def files(tmp_path, monkeypatch, seed):
    """Net as PEFT's directory, peft, and of this the file that convert makes, own.pt."""
    monkeypatch.chdir(tmp_path)
    model = Net()
    lora.mark_only_lora_as_trainable(model, modules_to_save="head")
    lora.save_adapter(model, "peft")
    assert main(["convert", "peft", "own.pt"]) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--lora-alpha 32", "lora_alpha=4, and 32 was given"),
        ("--lora-dropout 0.3", "lora_dropout=0.1, and 0.3 was given"),
        ("--embedding lin", "lin: the file says kind=linear, and embedding was given"),
        ("--embedding nowhere", "nowhere"),
        ("--enable-lora 1,1,0", "says enable_lora=[1, 0, 1], and [1, 1, 0] was given"),
        ("--enable-lora lin=1,0,0", "says enable_lora=none, and [1, 0, 0] was given"),
        ("--enable-lora nowhere=1,0", "nowhere"),
        ("--out-splits 4,2,6", "says out_splits=[4, 4, 4], and [4, 2, 6] was given"),
        ("--fan-in-fan-out", "says fan_in_fan_out=False, and True was given"),
        ("--modules-to-save nowhere", "nowhere"),
        ("--drop-prefix model.", "--drop-prefix: "),
    ],
)
@pytest.mark.parametrize("source", ["peft", "own.pt"])
def test_convert_refuses_what_the_files_contradict(files, source, options, named, refused):
    destination = "new.pt" if source == "peft" else "new"
    assert named in refused(source, destination, *options.split())


@pytest.mark.parametrize("source", ["peft", "own.pt"])
def test_convert_takes_what_the_files_tell(files, source):
    options = (
        "--lora-alpha 4 --lora-dropout 0.1 --embedding emb --enable-lora 1,0,1 --out-splits 4,4,4 "
        "--modules-to-save head"
    )
    destination = "new.pt" if source == "peft" else "new"
    assert main(["convert", source, destination, *options.split()]) == 0


def test_convert_takes_alpha_of_a_file_with_another_scaling(tmp_path, monkeypatch, seed):
    """rsLoRA's alpha, as its config says it, and the one that gives loralib the same scaling."""
    monkeypatch.chdir(tmp_path)
    model = lora.apply_lora(nn.Sequential(nn.Linear(8, 8)), r=4, lora_alpha=6, use_rslora=True)
    lora.save_adapter(model, "peft")
    for alpha, code in (("6", 0), ("12", 0), ("8", 2)):
        assert main(["convert", "peft", f"{alpha}.pt", "--lora-alpha", alpha]) == code


def test_load_adapter_refuses_another_alpha_than_the_directory_has(files):
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="lora_alpha=4, and 32 was given: leave it out"):
        lora.load_adapter(net, "peft", lora_alpha=32)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    lora.load_adapter(net, "peft", lora_alpha=4)


@pytest.mark.parametrize("option", ["--lora-dropout 0.1", "--modules-to-save out"])
def test_merged_refuses_options_that_it_does_not_take(refused, option):
    state = {"out.lora_A": torch.ones(2, 4), "out.lora_B": torch.ones(3, 2)}
    torch.save(state | {"out.weight": torch.ones(3, 4)}, "merged.pt")
    options = ["--merged", "--lora-alpha", "4", *option.split()]
    named = f"{option.split()[0]}: --merged takes no such option"
    assert named in refused("merged.pt", "new.pt", *options)


@pytest.mark.parametrize("source", ["peft", "own.pt"])
@pytest.mark.parametrize(
    ("destination", "options"),
    [("new.gguf/", ""), ("new/", "--to loralib"), ("a.pt//", "--to kohya")],
)
def test_a_file_is_not_written_as_a_directory(files, source, destination, options, refused):
    named = f"{destination}: is written as a directory"
    assert named in refused(source, destination, *options.split())


def test_merged_writes_a_file(files, refused):
    options = ["--merged", "--lora-alpha", "4"]
    assert "new/: is written as a directory" in refused("own.pt", "new/", *options)


@pytest.mark.parametrize("destination", ["new", "new/", "folder/new-1.5"])
def test_a_directory_becomes_no_pickle_that_is_not_called_so(files, destination, refused):
    named = "call it .pt (or .pth, .bin, .ckpt, .pkl) or .gguf, or give --to FORMAT"
    assert named in refused("peft", destination)
    assert main(["convert", "peft", "new", "--to", "loralib"]) == 0


DOUBTS = ("factors do not tell a convolution", "every key begins with 'model.'")


@pytest.mark.parametrize("command", [["convert", "again"], ["inspect"]])
def test_a_file_that_tells_all_raises_no_doubts(tmp_path, monkeypatch, capsys, command, seed):
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"model": nn.ModuleDict({"lin": lora.LoRALinear(8, 8, 2, 4)})})
    lora.save_adapter(model, "peft")
    assert main(["convert", "peft", "own.pt"]) == 0
    torch.save(dict(torch.load("own.pt")), "bare.pt")  # the keys alone
    name, *destination = command
    for source, doubtful in (("own.pt", False), ("bare.pt", True)):
        capsys.readouterr()
        into = [f"{each}-{source}" for each in destination]
        assert main([name, source, *into, "--lora-alpha", "4"]) == 0
        text = capsys.readouterr().out
        assert [doubt in text for doubt in DOUBTS] == [doubtful] * 2, text
