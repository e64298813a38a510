"""What seconds say of each other, and files of rows."""

import random

import pytest

from lora_kernels.tuning import rows


def test_quantiles_are_those_of_a_uniform_grid():
    samples = list(range(101))
    random.Random(0).shuffle(samples)
    assert rows.quantiles(samples) == (10, 50, 90)


def test_median_interval_holds_the_median_and_narrows_with_the_rounds():
    widths = []
    for count in (21, 101, 1001):
        low, high = rows.median_interval(range(count))
        assert low < (count - 1) / 2 < high
        widths.append((high - low) / count)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.1


def test_median_interval_misses_the_true_median_in_about_one_of_a_hundred_samples():
    draw = random.Random(0)
    misses = 0
    for _ in range(2000):
        low, high = rows.median_interval(draw.gauss(0, 1) for _ in range(41))
        misses += not low <= 0 <= high
    assert misses <= 40


def test_paired_ratio_is_that_within_a_round():
    noise = [1.0, 3.0, 2.0, 5.0] * 10
    assert rows.paired_ratio([0.75 * t for t in noise], noise) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize(
    ("ratio", "faster", "text"),
    [
        ((0.8, 0.7, 0.9), True, "0.800 (0.700-0.900)"),
        ((0.8, 0.7, 1.0), False, "0.800 (0.700-1.000)"),
        (None, False, ""),
    ],
)
def test_faster_only_if_the_whole_interval_says_so(ratio, faster, text):
    assert rows.faster(ratio) is faster
    assert rows.ratio_text(ratio) == text


def test_save_makes_the_folder_and_load_reads_the_rows_again(tmp_path):
    path = tmp_path / "folder" / "rows.json"
    rows.save([{"cell": "one", "median_ms": None}], path)
    assert rows.load(path) == [{"cell": "one", "median_ms": None}]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("[{", "not a file of JSON"),
        ("{}", "holds no rows"),
        ("[]", "holds"),
    ],
)
def test_a_file_without_rows_is_named(text, why, tmp_path):
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=why) as error:
        rows.load(path)
    assert str(error.value).startswith(f"{path}: ")
