"""One look for every figure: style, colours by meaning, grids of panels, block heat maps, scaling plots."""

from collections.abc import Sequence
from textwrap import fill

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from PIL import Image

from common.notebook.intervals import mean_interval

#: One colour per meaning, from the Okabe-Ito palette, which colour-blind readers tell apart.
COLORS = {
    "CE": "#0072B2",
    "MSE": "#D55E00",
    "theory": "#000000",
    "derived": "#009E73",
    "printed": "#CC79A7",
    "diagonal": "#0072B2",
    "off-diagonal": "#E69F00",
    "ratio": "#009E73",
    "faint": "#999999",
}
#: More series than meanings: lines told apart by order.
SEQUENCE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000"]
DPI = 150


def use_style() -> None:
    """Set matplotlib's defaults for the whole project: 8-point text at the width of a column or page."""
    mpl.rcdefaults()  # no file of a person's own
    sns.set_theme(context="paper", style="ticks", palette=SEQUENCE)
    mpl.rcParams.update({
        "figure.dpi": DPI, "savefig.dpi": DPI, "figure.constrained_layout.use": True,
        "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4,
        "xtick.major.size": 3, "ytick.major.size": 3, "xtick.minor.size": 2, "ytick.minor.size": 2,
        "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4,
        "image.cmap": "magma_r", "image.interpolation": "nearest",
    })  # fmt: skip


def with_few_colors(image: Image.Image) -> Image.Image:
    """An RGB image in a palette of 256 colours, among which are those of the lines, exactly."""
    ours = sorted({*COLORS.values(), *SEQUENCE, "#FFFFFF"})
    exact = [channel for color in ours for channel in bytes.fromhex(color[1:])]
    palette = Image.new("P", (1, 1))
    palette.putpalette(exact + image.quantize(256 - len(ours)).getpalette()[: 3 * (256 - len(ours))])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def add_small_print(fig: Figure, text: str) -> None:
    """Write ``text`` below everything else in ``fig``, wrapped to its width."""
    # 5-point sans serif: about 26 characters an inch.
    fig.supxlabel(fill(text, int(26 * fig.get_figwidth())), fontsize=5, color="#555555", x=0.01, ha="left")


def block_heatmap(
    ax: Axes, image: ArrayLike, size: int, *, blocks: Sequence[tuple[int, int]] = (), decades: float = 4.0,
    labels: Sequence[tuple[int, int, str]] = (), colorbar: bool = True, mark_at_least: float = 0.01,
) -> AxesImage:  # fmt: skip
    """Draw the absolute entries of a Hessian, pooled to pixels, on a logarithmic scale with its blocks marked.

    Parameters
    ----------
    image : array, shape (p, p)
        Mean of the absolute entries in each pixel, rows downwards.
    size
        Number of rows of the matrix itself; the axes count matrix rows.
    blocks
        Diagonal blocks as (first row, row after the last); outlined where they are wide enough to be seen.
    decades
        Decades shown below the largest pixel; smaller entries are drawn in the colour of the lowest. The paper
        clips a linear scale at a fraction of the maximum, which shows only what is near it.
    labels
        Groups of rows as (first, after the last, name), named along the top.
    mark_at_least
        Narrowest block to outline, as a share of ``size``.
    """
    image = np.asarray(image, dtype=float)
    top = image.max()
    if not top > 0:
        raise ValueError("a heat map needs at least one entry that is not zero")
    norm = LogNorm(vmin=top * 10.0**-decades, vmax=top)
    drawn = ax.imshow(np.maximum(image, norm.vmin), norm=norm, extent=(0, size, size, 0))
    for start, stop in blocks:
        if stop - start >= mark_at_least * size:
            ax.add_patch(
                Rectangle((start, start), stop - start, stop - start, fill=False, lw=0.5, ec=COLORS["derived"])
            )
    for start, stop, name in labels:
        place, side = ((start + stop) / 2, "center") if stop - start > 0.1 * size else (stop, "right")
        ax.annotate(name, (place, 0), xytext=(0, 2), textcoords="offset points", ha=side, fontsize=7)
        if start > 0:
            for line in (ax.axvline, ax.axhline):
                line(start, color=COLORS["theory"], lw=0.4, ls=":")
    ax.set(xlim=(0, size), ylim=(size, 0))
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3, integer=True))
    ax.yaxis.set_major_locator(mpl.ticker.MaxNLocator(3, integer=True))
    ax.spines[["top", "right"]].set_visible(True)
    if colorbar:
        bar = ax.figure.colorbar(drawn, ax=ax, shrink=0.85, pad=0.02, extend="min")
        bar.ax.tick_params(labelsize=6)
        bar.ax.minorticks_off()
    return drawn


def mean_points(ax: Axes, x: ArrayLike, samples: ArrayLike, **style: object) -> None:
    """Draw the mean of independent samples at every x, with its 95 % interval as an error bar.

    Parameters
    ----------
    x : array, shape (K,)
    samples : array, shape (R, K)
    style
        Passed to :meth:`matplotlib.axes.Axes.errorbar`; points without a line if it does not say otherwise.
    """
    means, intervals = zip(*(mean_interval(column) for column in np.asarray(samples).T), strict=True)
    ax.errorbar(x, means, np.abs(np.transpose(intervals) - means), **{"fmt": "o", "ms": 3} | style)


def band(ax: Axes, x: ArrayLike, samples: ArrayLike, *, label: str = "", **style: object) -> None:
    """Draw the mean of realizations as a line, in a band of one standard deviation of them to either side.

    Parameters
    ----------
    x : array, shape (K,)
    samples : array, shape (R, K)
    label
        Of the line; the band is then in the legend too.
    style
        Of the line, passed to :meth:`matplotlib.axes.Axes.plot`.
    """
    mean, deviation = np.mean(samples, axis=0), np.std(samples, axis=0)
    (line,) = ax.plot(x, mean, label=label or None, **style)
    ax.fill_between(
        x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.25, lw=0,
        label="± 1 standard deviation" if label else None,
    )  # fmt: skip


def panels(count: int, columns: int, *, height: float, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """A page of equal panels, row by row; where the last row is not full, nothing is drawn.

    Parameters
    ----------
    height
        Of a row, in inches.

    Returns
    -------
    Figure, list of Axes
        As many as ``count``; the last ``columns`` of them are the lowest in their columns.
    """
    rows = -(-count // columns)
    fig, grid = plt.subplots(rows, columns, figsize=(7.2, 0.4 + rows * height), sharex=sharex, squeeze=False)
    axes = list(grid.flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[max(0, count - columns) : count]:
        ax.tick_params(labelbottom=True)
    return fig, axes[:count]


def scaling_axes(ax: Axes, xlabel: str, ylabel: str, *, log_y: bool = True) -> None:
    """Make ``ax`` a plot against a number of classes or neurons: logarithmic, with labels and a light grid."""
    ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True, which="major", lw=0.3, alpha=0.6)


def shared_legend(fig: Figure, columns: int = 4) -> None:
    """One legend above all panels of ``fig``, each label once, where it covers no data."""
    entries = {}
    for ax in fig.axes:
        entries |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)
