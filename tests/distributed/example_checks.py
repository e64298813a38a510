"""What has to hold on every rank for the fine-tuning example."""

import json
from unittest import mock

import torch
import torch.distributed as dist

from examples.finetune import ranks
from lora_kernels.testing.tolerance import assert_close
from tests.examples import in_float64, tiny


def the_example_has_the_losses_of_one_process(directory):
    """71 sentences: of seven the ranks have four and three, and of the last one one has none.

    In float64, to the accuracy of float32: AdamW makes rounding in fewer bits grow.
    """
    model, sentences = directory / "model", directory / "sentences.tsv"
    if dist.get_rank() == 0:
        tiny.save_model(str(model), attention_probs_dropout_prob=0.0)
        tiny.save_sentences(sentences)
    dist.barrier()
    arguments = [
        "--model", str(model), "--data", str(sentences), "--device", "cpu", "--train", "71",
        "--batch-size", "7", "--epochs", "1", "--dropout", "0", "--output",
    ]  # fmt: skip
    alone, together = directory / f"alone{dist.get_rank()}", directory / "together"
    with mock.patch.multiple(ranks, rank=lambda: 0, count=lambda: 1):
        assert in_float64.main("finetune", [*arguments, str(alone)]) == 0
    assert in_float64.main("finetune", [*arguments, str(together)]) == 0
    dist.barrier()
    one, two = (json.loads((path / "results.json").read_text()) for path in (alone, together))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == len(two["losses"]) == 11
    expected = torch.tensor(one["losses"], dtype=torch.float64)
    assert_close(torch.tensor(two["losses"]), expected, expected.float())
    assert two["tokens"] == one["tokens"]


CHECKS = {"the_example_has_the_losses_of_one_process": the_example_has_the_losses_of_one_process}
