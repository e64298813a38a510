"""Training: it learns, it resumes bit for bit, its checkpoints hold adapters only."""

import json

import pytest
import torch
from safetensors import safe_open

import lora_kernels as lora
from examples.finetune.errors import InputError
from examples.nlg import data
from examples.nlg import train as training
from examples.nlg.model import add_lora, load_model
from examples.nlg.train import Settings, mean_loss, train

SETTINGS = Settings(
    epochs=2, batch_size=4, accumulation=2, lr=1e-2, warmup=3, label_smoothing=0.1, seed=1
)


class Killed(BaseException):
    pass


@pytest.fixture
def features(tokenizer, restaurants):
    return data.encode(tokenizer, restaurants[:44], 128)  # 11 batches: the last step has one


@pytest.fixture
def fresh(tiny_gpt2):
    def make():
        torch.manual_seed(0)
        return add_lora(load_model(tiny_gpt2), rank=4, alpha=32, dropout=0.1)

    return make


def kill_after(step: int, monkeypatch):
    """train raises after this many steps, as late as a kill could come: before the checkpoint."""
    plain = training.tqdm.update

    def update(bar, n=1):
        plain(bar, n)
        if bar.n == step:
            raise Killed

    monkeypatch.setattr(training.tqdm, "update", update)


def test_training_lowers_the_loss_and_moves_the_adapter_only(fresh, tokenizer, features):
    model = fresh()
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = mean_loss(model, tokenizer, features)
    progress = train(model, tokenizer, features, SETTINGS)
    assert mean_loss(model, tokenizer, features) < before
    assert model.training
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value.to(now[name].device)) for name, value in base.items())
    assert progress.step == len(progress.losses) == 2 * 6
    assert progress.tokens == 2 * sum(len(row["input_ids"]) for row in features)
    assert progress.seconds > 0


@pytest.mark.parametrize("killed_after", [5, 6, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    fresh, tokenizer, features, tmp_path, monkeypatch, killed_after
):
    """Killed within an epoch, at its end, and in the next; the newest checkpoint is older."""
    whole = fresh()
    expected = train(whole, tokenizer, features, SETTINGS)

    model = fresh()
    with monkeypatch.context() as patch:
        kill_after(killed_after, patch)
        with pytest.raises(Killed):
            train(model, tokenizer, features, SETTINGS, checkpoints=tmp_path, save_every=2)
    saved = {5: "step-00000004", 6: "step-00000004", 9: "step-00000008"}
    assert [path.name for path in tmp_path.iterdir()] == [saved[killed_after]]

    resumed = fresh()
    torch.manual_seed(1234)  # nothing of this process's own may matter
    progress = train(
        resumed, tokenizer, features, SETTINGS, checkpoints=tmp_path, save_every=2, resume=True
    )
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert progress.losses == expected.losses
    assert (progress.step, progress.tokens) == (expected.step, expected.tokens)


def test_checkpoints_hold_the_adapter_and_no_base_weight(fresh, tokenizer, features, tmp_path):
    model = fresh()
    train(model, tokenizer, features, SETTINGS, checkpoints=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert len(tensors) == 4
    assert all("c_attn.lora_" in key for key in tensors)
    largest = max(path.stat().st_size for path in checkpoint.iterdir())
    assert largest < 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad) / 2

    other = fresh()
    lora.load_adapter(other, checkpoint)
    expected = model.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(expected[name].cpu(), value), name


def test_a_half_written_checkpoint_is_not_resumed_from(fresh, tokenizer, features, tmp_path):
    (tmp_path / "partial-00000099").mkdir()
    whole = train(fresh(), tokenizer, features, SETTINGS)
    progress = train(fresh(), tokenizer, features, SETTINGS, checkpoints=tmp_path, resume=True)
    assert progress.losses == whole.losses
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]


def test_resuming_with_other_settings_is_refused(fresh, tokenizer, features, tmp_path):
    train(fresh(), tokenizer, features, SETTINGS, checkpoints=tmp_path)
    other = Settings(**{**vars(SETTINGS), "lr": 1e-3})
    with pytest.raises(InputError, match=r"lr was 0.01, is 0.001"):
        train(fresh(), tokenizer, features, other, checkpoints=tmp_path, resume=True)


def test_an_earlier_runs_checkpoints_are_not_overwritten_unasked(tmp_path):
    training.check_fresh(tmp_path, resume=False)
    (tmp_path / "step-00000100").mkdir()
    training.check_fresh(tmp_path, resume=True)
    with pytest.raises(InputError, match="--resume"):
        training.check_fresh(tmp_path, resume=False)


def test_the_paper_is_the_default():
    assert vars(Settings()) == {
        "epochs": 5, "batch_size": 8, "accumulation": 1, "lr": 2e-4, "warmup": 500,
        "weight_decay": 0.01, "label_smoothing": 0.1, "seed": 110,
    }  # fmt: skip
    assert (training.BETAS, training.EPS) == ((0.9, 0.999), 1e-6)
    json.dumps(vars(Settings()))
