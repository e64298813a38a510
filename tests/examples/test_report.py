"""The comparison and the sizes."""

from examples.finetune import report


def test_the_comparison_names_both_runs_and_the_ratio_of_their_times():
    row = {
        "name": "lora_kernels", "accuracy_before": 0.5, "accuracy_after": 0.876,
        "train_seconds": 90.0, "tokens_per_second": 1234.0, "trainable_parameters": 74498,
    }  # fmt: skip
    table = report.comparison([row, {**row, "name": "PEFT", "train_seconds": 120.0}])
    header, first, second, ratio = table.splitlines()
    assert first.split() == ["lora_kernels", "50.0", "%", "87.6", "%", "90.0", "1,234", "74,498"]
    assert second.split()[0] == "PEFT"
    assert len(header) == len(first) == len(second)
    assert ratio == "lora_kernels takes 0.75 of the time of PEFT"


def test_directory_bytes_counts_every_file_below(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "inner" / "b").write_bytes(b"678")
    assert report.directory_bytes(tmp_path) == 8
