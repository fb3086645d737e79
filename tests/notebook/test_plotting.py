"""What is drawn, read off the axes."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from common.notebook.plotting import COLORS, SEQUENCE, band, panels, use_style, with_few_colors


@pytest.fixture
def axes():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def test_the_style_is_the_same_whatever_was_set_before():
    use_style()
    expected = dict(mpl.rcParams)
    mpl.rcParams.update({"savefig.bbox": "tight", "image.origin": "lower", "axes.formatter.use_mathtext": True})
    use_style()
    assert dict(mpl.rcParams) == expected


def test_a_band_is_one_standard_deviation_of_the_realizations(axes):
    samples = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 6.0]])
    band(axes, [1, 2, 3], samples, color="black", label="mean over pairs")
    assert axes.lines[0].get_ydata().tolist() == [1, 1, 4]
    corners = axes.collections[0].get_paths()[0].vertices
    assert [corners[corners[:, 0] == x, 1].min() for x in (1, 2, 3)] == [0, 1, 2]
    assert [corners[corners[:, 0] == x, 1].max() for x in (1, 2, 3)] == [2, 1, 6]
    assert axes.get_legend_handles_labels()[1] == ["mean over pairs", "± 1 standard deviation"]
    band(axes, [1, 2, 3], samples)
    assert len(axes.get_legend_handles_labels()[1]) == 2


def test_panels_fill_rows_and_leave_no_empty_frame():
    fig, axes = panels(5, 3, height=1.0, sharex=True)
    assert len(axes) == 5
    assert [ax.get_visible() for ax in fig.axes] == [True] * 5 + [False]
    assert axes[4].get_position().y0 < axes[2].get_position().y0
    assert axes[2].xaxis.get_tick_params()["labelbottom"]  # no panel is below it
    assert not axes[1].xaxis.get_tick_params()["labelbottom"]
    plt.close(fig)
    fig, axes = panels(2, 3, height=1.0)
    assert len(axes) == 2
    plt.close(fig)


def test_few_colors_keep_those_of_the_lines():
    """A heat map of noise takes all 256 colours that a median cut has to give."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    lines = {tuple(bytes.fromhex(color[1:])) for color in [*COLORS.values(), *SEQUENCE]}
    for row, color in enumerate(sorted(lines)):
        noise[row] = color
    reduced = np.asarray(with_few_colors(Image.fromarray(noise)).convert("RGB"))
    assert len(np.unique(reduced.reshape(-1, 3), axis=0)) <= 256
    for row, color in enumerate(sorted(lines)):
        assert (reduced[row] == color).all()
