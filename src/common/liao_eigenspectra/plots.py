"""Spectra: histograms of eigenvalues under their limiting density, with spikes marked."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from common.liao_eigenspectra.glm import finite_array
from common.notebook.plotting import COLORS

#: The colour of what is sampled; theory is black everywhere.
SAMPLE = "#56B4E9"


def spectrum_panel(
    ax: Axes, eigenvalues: ArrayLike, x: ArrayLike, density: ArrayLike, *, spikes: Sequence[float] = (),
    label: str = "theory", bins: int = 60,
) -> None:  # fmt: skip
    """Draw a histogram of eigenvalues, normalized, under a density.

    Parameters
    ----------
    eigenvalues
        Sample, shape (p,).
    x, density
        The limiting density at points in rising order, shape (n,); the histogram's bins cover both x and the sample.
    spikes
        Predicted isolated eigenvalues, marked by a dashed line; the eigenvalue of the sample nearest to each is
        marked by a triangle, as its bar is one in p high.
    label
        Name of the density in the legend.

    Raises
    ------
    ValueError
        If the eigenvalues or x are none or not finite, x does not rise, or the density is of another shape.
    """
    values, x = finite_array("the eigenvalues", eigenvalues, (None,)), finite_array("x", x, (None,))
    if np.shape(density) != x.shape or (np.diff(x) < 0).any():
        raise ValueError(f"x must be in rising order, with one value of the density at each, got {np.shape(density)}")
    low, high = min(values.min(), x[0]), max(values.max(), x[-1])
    if low == high:  # a spectrum that is one point
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    ax.hist(values, bins=edges, density=True, histtype="stepfilled", color=SAMPLE, label="sample")
    ax.plot(x, density, color=COLORS["theory"], lw=1, label=label, zorder=3)
    for k, spike in enumerate(spikes):
        ax.axvline(spike, color=COLORS["theory"], ls="--", lw=0.8, label="predicted spike" if k == 0 else None)
        nearest = values[np.abs(values - spike).argmin()]
        ax.plot(
            nearest, 0.03, "v", color=COLORS["MSE"], ms=5, transform=ax.get_xaxis_transform(), zorder=4,
            label="its eigenvalue in the sample" if k == 0 else None,
        )  # fmt: skip
    ax.set(xlabel="eigenvalue of the Hessian", ylabel="density", ylim=(0, None))
