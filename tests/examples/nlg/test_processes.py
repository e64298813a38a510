"""Two processes under torchrun train what one process does with batches as big as all of theirs."""

import functools
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.nlg.decode import read_predictions
from tests import torchrun
from tests.examples import in_float64

main = functools.partial(in_float64.main, "nlg")


@pytest.fixture(scope="module")
def command(tokenizer, restaurants, tiny_gpt2, tmp_path_factory) -> list[str]:
    """A training on 42 texts: three steps of twelve and one of six."""
    path = tmp_path_factory.mktemp("data") / "train.txt"
    rows = restaurants[:42]
    assert len({len(tokenizer(f" {row.completion}")["input_ids"]) for row in rows}) > 2
    lines = [f"{row.context}||{row.completion}\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return [
        "train", "--model", tiny_gpt2, "--task", "e2e", "--data", str(path), "--max-length", "64",
        "--epochs", "2", "--lr", "1e-2", "--warmup", "1", "--dropout", "0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def together(command, tmp_path_factory) -> Path:
    """What two processes wrote: two batches of three on each, one where an epoch ends."""
    output = tmp_path_factory.mktemp("together")
    torchrun.run(
        "tests.examples.in_float64", "nlg", *command, "--batch-size", "3", "--accumulation", "2",
        "--output", output, CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    return output


def test_two_processes_are_one_with_batches_as_big_as_all_of_theirs(command, together, tmp_path):
    assert main([*command, "--batch-size", "12", "--output", str(tmp_path)]) == 0
    one, two = (json.loads((path / "results.json").read_text()) for path in (tmp_path, together))
    assert len(one["losses"]) == 2 * 4
    # Sums in another order, which AdamW makes grow.
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert two["tokens"] == one["tokens"]
    expected, actual = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path, together)
    )
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() < 1e-9 * tensor.norm(), name


def test_the_adapter_of_two_processes_decodes(command, together, tmp_path):
    """Other texts than the base's."""
    predictions = []
    for extra in ([], ["--adapter", str(together / "adapter")]):
        path = tmp_path / "predictions.jsonl"
        arguments = [
            "decode", *command[1:9], "--new-tokens", "8", "--beams", "2", "--output", str(path),
        ]  # fmt: skip
        assert main([*arguments, *extra]) == 0
        predictions.append(read_predictions(path)[1])
    assert predictions[0] != predictions[1]


def test_one_process_cannot_resume_what_two_began(command, together, capsys):
    arguments = [*command, "--batch-size", "3", "--output", str(together), "--resume"]
    assert main(arguments) == 2
    assert "processes was 2, is 1" in capsys.readouterr().err
