"""The picture of a training: what it says without the code."""

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from examples import plots


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws curves; the figure, and its pixels."""
    kept = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **kw: (kept.append(figure), savefig(figure, *args, **kw)),
    )

    def draw(*args):
        plots.curves(tmp_path / "curves.png", *args)
        return kept[-1], image.imread(tmp_path / "curves.png")

    return draw


@pytest.mark.parametrize("steps", [1, 5, 200])
def test_it_has_a_title_units_a_legend_and_a_scale_for_each_panel(drawn, steps):
    losses = {"one": [(i + 1, 1 / (i + 1)) for i in range(steps)]}
    figure, pixels = drawn("MiniLM", losses, "nats", {"dev": [(steps, 83.0)]}, "accuracy (%)")
    assert pixels.std() > 0
    top, bottom = figure.axes
    assert figure.get_suptitle() == "MiniLM"
    assert top.get_ylabel() == "training loss\n(nats)"
    assert (bottom.get_xlabel(), bottom.get_ylabel()) == ("step of the optimizer", "accuracy (%)")
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == ("one, mean of 10 points" if steps == 200 else "one")
    assert all(tick == int(tick) for tick in bottom.get_xticks())


def test_numbers_stand_at_the_axes_as_they_are(drawn):
    close = [(i + 1, 4567.0 + i / 1e4) for i in range(5)]
    figure, _ = drawn("MiniLM", {"one": close}, "nats", {"dev": close}, "loss")
    for axes in figure.axes:
        assert axes.yaxis.get_offset_text().get_text() == ""
        assert axes.get_yticklabels()[0].get_text().startswith("456")


def test_without_scores_it_is_one_panel(drawn):
    figure, _ = drawn("MiniLM", {"one": [(1, 2.0)], "two": [(1, 3.0)]}, "nats")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "step of the optimizer"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_means_are_those_of_whole_windows():
    points = [(1, 1.0), (2, 3.0), (3, 5.0)]
    assert plots.means(points, 2) == [(2, 2.0), (3, 4.0)]
    assert plots.means(points, 1) == points
