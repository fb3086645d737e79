"""A panel of a spectrum draws what it is given."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from common.liao_eigenspectra.plots import spectrum_panel


def test_histogram_density_and_marks_of_spikes():
    values, x = np.array([0.0, 0.2, 0.4, 0.5, 3.1]), np.linspace(0.0, 1.0, 11)
    fig, ax = plt.subplots()
    spectrum_panel(ax, values, x, 2 * x, spikes=[3.0], bins=31)
    outline = ax.patches[0].get_xy()
    assert (outline[:, 0].min(), outline[:, 0].max()) == (0.0, pytest.approx(3.1))  # the sample reaches beyond x
    assert abs(np.trapezoid(outline[:, 1], outline[:, 0])) == pytest.approx(1)
    density, line, mark = ax.lines
    assert np.array_equal(density.get_ydata(), 2 * x)
    assert list(line.get_xdata()) == [3.0, 3.0]
    assert list(mark.get_xdata()) == [3.1]
    plt.close(fig)


def test_a_spectrum_that_is_one_point_is_drawn():
    fig, ax = plt.subplots()
    spectrum_panel(ax, np.zeros(5), np.zeros(2), np.zeros(2))
    assert ax.patches[0].get_xy()[:, 0].min() < 0 < ax.patches[0].get_xy()[:, 0].max()
    plt.close(fig)


@pytest.mark.parametrize(
    ("values", "x", "density", "message"),
    [
        ([], [0.0, 1.0], [1.0, 1.0], r"the eigenvalues must be .* got shape \(0,\)"),
        ([math.nan], [0.0, 1.0], [1.0, 1.0], "the eigenvalues must be .*got nan"),
        ([1.0], [0.0, math.inf], [1.0, 1.0], "x must be .*got inf"),
        ([1.0], [1.0, 0.0], [1.0, 1.0], "x must be in rising order"),
        ([1.0], [0.0, 1.0], [1.0], r"one value of the density at each, got \(1,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(values, x, density, message):
    with pytest.raises(ValueError, match=message):
        spectrum_panel(None, values, x, density)
