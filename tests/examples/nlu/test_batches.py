"""A batch in parts, one after the other or on two processes under torchrun, is the whole batch."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.testing.tolerance import assert_close
from tests import torchrun
from tests.examples import in_float64, tiny


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_data) -> list[str]:
    """144 examples without dropout: nine whole steps of 16 an epoch.

    No --rank, which torchrun would take for an option of its own.
    """
    model = str(tmp_path_factory.mktemp("no-dropout"))
    tiny.save_model(model, attention_probs_dropout_prob=0.0)
    return [
        "--task", "sst2", "--model", model, "--data", tiny_data, "--settings", "roberta-base",
        "--train", "144", "--held-out", "50", "--epochs", "2", "--lr", "1e-2", "--max-length", "32",
        "--keep", "last", "--device", "cpu",
    ]  # fmt: skip


def read(output):
    """results.json, the losses, and all that was trained in one row."""
    results = json.loads((output / "results.json").read_text())
    losses = [entry["loss"] for entry in results["log"] if "loss" in entry]
    saved = load_file(output / "trained" / "adapter_model.safetensors")
    weights = torch.cat([saved[key].flatten() for key in sorted(saved)])
    return results, torch.tensor(losses, dtype=torch.float64), weights


def assert_same(output, whole):
    (results, *found), (expected, *references) = read(output), read(whole)
    assert len(references[0]) == 18
    for actual, reference in zip(found, references, strict=True):
        assert actual.dtype == torch.float64
        assert_close(actual.float(), reference, reference.float())
    assert results["dev"] == expected["dev"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The run of one process with batches of 16."""
    output = tmp_path_factory.mktemp("whole")
    assert in_float64.main("nlu", [*arguments, "--batch-size", "16", "--output", str(output)]) == 0
    return output


def test_accumulated_batches_are_one(arguments, whole, tmp_path):
    flags = ["--batch-size", "4", "--accumulation", "4", "--output", str(tmp_path)]
    assert in_float64.main("nlu", [*arguments, *flags]) == 0
    assert_same(tmp_path, whole)


def test_the_batches_of_two_processes_are_one(arguments, whole, tmp_path):
    stdout = torchrun.run(
        "tests.examples.in_float64", "nlu", *arguments, "--batch-size", "8", "--output", tmp_path
    )
    assert_same(tmp_path, whole)
    # The first process alone speaks and writes.
    said = [line.split()[0] for line in stdout.splitlines() if line.strip()]
    assert said == ["model", "data", "epoch", "epoch", "held_out", "results"]
    assert read(tmp_path)[0]["processes"] == 2
    states = {file.name for file in tmp_path.glob("checkpoint-18/rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
