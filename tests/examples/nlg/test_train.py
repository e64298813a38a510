"""Training: it learns, it resumes bit for bit, it ends where it diverges."""

import json
from pathlib import Path

import accelerate
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import DataCollatorForSeq2Seq

from examples.errors import InputError
from examples.nlg import checkpoints, data
from examples.nlg import train as training
from examples.nlg.model import CompletionLoss, add_lora, load_model
from examples.nlg.train import Settings, mean_loss, train

SETTINGS = Settings(
    epochs=2, batch_size=4, accumulation=2, lr=1e-2, warmup=3, label_smoothing=0.1, seed=1
)


class Killed(BaseException):
    pass


class Recorded(list):
    """Features that note in which order they are asked for."""

    def __init__(self, rows):
        super().__init__(rows)
        self.order = []

    def __getitem__(self, index):
        self.order.append(index)
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def features(tokenizer, restaurants):
    rows = data.encode(tokenizer, restaurants[:44], 128)  # 11 batches: the last step has one
    return Recorded(rows)


@pytest.fixture(scope="module")
def fresh(tiny_gpt2):
    def make(dropout=0.1):
        torch.manual_seed(0)
        return add_lora(load_model(tiny_gpt2), rank=4, alpha=32, dropout=dropout)

    return make


@pytest.fixture(scope="module")
def whole(fresh, tokenizer, features, tmp_path_factory):
    """A run from start to end: its model and its progress."""
    model = fresh()
    return model, train(
        model, tokenizer, features, SETTINGS, checkpoints=tmp_path_factory.mktemp("whole")
    )


def kill(monkeypatch, owner, name: str, when) -> None:
    """owner.name(...) raises where when(...) is true."""
    plain = getattr(owner, name)

    def call(*args, **kwargs):
        if when(*args):
            raise Killed
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def after_step(number: int):
    """As late as a kill could come: before the checkpoint."""
    return training.tqdm, "update", lambda bar, *_: bar.n + 1 == number


def while_writing(name: str):
    return accelerate.accelerator, "save_custom_state", lambda _, path, *__: Path(path).name == name


def while_removing(name: str):
    return checkpoints.shutil, "rmtree", lambda path, *_: path.name == name


def test_training_lowers_the_loss_and_moves_the_adapter_only(fresh, tokenizer, features, whole):
    model, progress = whole
    before = fresh()
    assert mean_loss(model, tokenizer, features) < mean_loss(before, tokenizer, features)
    trained = model.state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(trained[name].cpu(), value) == (".lora_" not in name), name
    assert progress.step == len(progress.losses) == 2 * 6
    assert progress.tokens == 2 * sum(len(row["input_ids"]) for row in features)
    assert progress.seconds > 0


def test_every_epoch_has_every_example_once_in_an_order_of_its_own(fresh, tokenizer, features):
    features.order.clear()
    train(fresh(), tokenizer, features, SETTINGS)
    first, second = features.order[:44], features.order[44:]
    assert sorted(first) == sorted(second) == list(range(44))
    assert first != second


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        (after_step(7), ["step-00000006"]),  # the end of the first epoch
        (after_step(12), ["step-00000010"]),
        (while_writing("partial-00000004"), ["partial-00000004", "step-00000002"]),
        (while_removing("step-00000002"), ["step-00000002", "step-00000004"]),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    fresh, tokenizer, features, whole, tmp_path, monkeypatch, moment, left
):
    model = fresh()
    with monkeypatch.context() as patch:
        kill(patch, *moment)
        with pytest.raises(Killed):
            train(model, tokenizer, features, SETTINGS, checkpoints=tmp_path, save_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == left

    resumed, expected = fresh(), whole[1]
    torch.manual_seed(1234)  # nothing of this process's own may matter
    progress = train(
        resumed, tokenizer, features, SETTINGS, checkpoints=tmp_path, save_every=2, resume=True
    )
    for a, b in zip(whole[0].parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert progress.losses == expected.losses
    assert (progress.step, progress.tokens) == (expected.step, expected.tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]


@pytest.fixture
def exact(fresh):
    """Without dropout and in float64: a sum in another order gives the same."""
    return lambda: fresh(dropout=0.0).double()


def test_the_gradient_of_a_step_is_that_of_the_mean_over_all_its_predicted_tokens(
    exact, tokenizer, features
):
    """Eleven batches, three a step: the last step has two. Without a rate nothing moves."""
    settings = Settings(**vars(SETTINGS) | {"epochs": 1, "accumulation": 3, "lr": 0.0})
    model, gradients = exact(), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    features.order.clear()
    hook = register_optimizer_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in parameters])
    )
    try:
        progress = train(model, tokenizer, features, settings)
    finally:
        hook.remove()

    loss_of, collate = CompletionLoss(model, 0.1).train(), DataCollatorForSeq2Seq(tokenizer)
    order = list(features.order)
    steps = [[features[i] for i in order[start : start + 12]] for start in range(0, 44, 12)]
    assert [len(step) for step in steps] == [12, 12, 12, 8]
    for step, actual, told in zip(steps, gradients, progress.losses, strict=True):
        loss = loss_of(**collate(step).to(model.device))
        torch.testing.assert_close(actual, list(torch.autograd.grad(loss, parameters)))
        assert told == pytest.approx(loss.item(), rel=1e-12)


def test_accumulated_batches_train_what_one_big_batch_does(exact, tokenizer, features):
    runs = []
    for sizes in ({"accumulation": 3, "batch_size": 4}, {"accumulation": 1, "batch_size": 12}):
        model = exact()
        progress = train(model, tokenizer, features, Settings(**vars(SETTINGS) | sizes))
        runs.append((list(model.parameters()), progress))
    (parameters, progress), (expected, one) = runs
    assert progress.losses == pytest.approx(one.losses, rel=1e-9)  # AdamW makes roundings grow
    assert (progress.step, progress.tokens) == (one.step, one.tokens) == (8, one.tokens)
    torch.testing.assert_close(parameters, expected)


def test_a_run_that_has_diverged_ends_and_leaves_the_last_checkpoint(
    fresh, tokenizer, features, tmp_path
):
    """The first step has no rate yet, the second one makes the weights too large."""
    settings, model = Settings(**vars(SETTINGS) | {"lr": 1e30}), fresh()
    with pytest.raises(InputError, match=r"after step 2 the loss is nan: --lr 1e\+30"):
        train(model, tokenizer, features, settings, checkpoints=tmp_path, save_every=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# ---- mixed precision ----


def test_bf16_learns_with_an_adapter_in_float32(
    fresh, tokenizer, features, whole, fresh_accelerate
):
    model = fresh()
    progress = train(model, tokenizer, features, SETTINGS, precision="bf16")
    assert mean_loss(model, tokenizer, features) < mean_loss(fresh(), tokenizer, features)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # bf16 has eight bits: it was used, and told the losses apart no further than it has to.
    assert progress.losses != whole[1].losses
    assert progress.losses == pytest.approx(whole[1].losses, rel=2**-6)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a device for float16 is there")
def test_fp16_is_refused_on_a_cpu_where_accelerate_would_train_in_float32(
    fresh, tokenizer, features
):
    with pytest.raises(InputError, match=r"--precision fp16: needs a GPU"):
        train(fresh(), tokenizer, features, SETTINGS, precision="fp16")


def test_the_paper_is_the_default():
    assert vars(Settings()) == {
        "epochs": 5, "batch_size": 8, "accumulation": 1, "lr": 2e-4, "warmup": 500,
        "weight_decay": 0.01, "label_smoothing": 0.1, "seed": 0,
    }  # fmt: skip
    assert (training.BETAS, training.EPS) == ((0.9, 0.999), 1e-6)
    json.dumps(vars(Settings()))
