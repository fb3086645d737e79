"""When a claim on trained networks may be decided before they were trained as long as the paper's.

The rule was fixed before any result was seen that it decides, and after others: before, networks counted as converged
with more than 99 % of their training labels right. The note of what it decides says so. Of a quantity Q, measured in
several networks after t/4, t/2 and t epochs, over all training images:

a. data and scheme of the training are the paper's;
b. the Hessian is over all training images, or over so many that twice as many move Q by less than a quarter of its
   distance from the bound, :func:`settled_in_samples`;
c. Q, extrapolated linearly in ln t to the paper's number of epochs, is with its 95 % interval over networks on the same
   side of the bound as now, and has moved by less than half of its distance from the bound since t/2;
d. the effective number of samples is above 10 k in every network, if Q is of k eigenvectors; if Q is the place of a
   peak, k is where it is claimed to be.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from common.notebook.claims import Criterion
from common.notebook.intervals import Estimate, mean_interval

#: So many effective samples are needed for each eigenvector.
SAMPLES_PER_VECTOR = 10
#: Epochs of the paper's trainings (App E.3).
PAPER_EPOCHS = 1000
#: What the note of a claim ends with that the rule decides.
CHANGED = f"The rule that decides short of {PAPER_EPOCHS} epochs on all images was adopted after results had been seen."


@runtime_checkable
class Claimant(Protocol):
    """What claims are made to: a :class:`~common.notebook.run.Run`, which prepared cells must not import."""

    def claim(self, *arguments: object, **keywords: object) -> None:
        """As :meth:`~common.notebook.run.Run.claim`."""


def extrapolated(
    epochs: Sequence[int], values: Float[ArrayLike, "K R"], target: int
) -> Float[np.ndarray, " R"]:  # fmt: skip
    """Values of R networks after K numbers of epochs, by a line in ln t (least squares) at t = ``target``.

    Raises
    ------
    ValueError
        If there are fewer than two epochs, or they are not positive and ascending, or not as many as values.
    """
    values = np.asarray(values, dtype=float)
    if len(epochs) < 2 or min(epochs) < 1 or (np.diff(epochs) <= 0).any() or values.shape[:1] != (len(epochs),):
        raise ValueError(f"ascending epochs, one for each row, are needed; got {list(epochs)} and {values.shape}")
    slope, level = np.polyfit(np.log(epochs), values.reshape(len(epochs), -1), 1)
    return (slope * np.log(target) + level).reshape(values.shape[1:])


class Snapshot(NamedTuple):
    """Networks after so many epochs, and their Hessian over the first so many images, 0 for all of them."""

    epoch: int
    images: int = 0

    @property
    def half(self) -> "Snapshot":
        """The same networks over half of the images."""
        return Snapshot(self.epoch, self.images // 2)


def snapshots_to_measure(
    checkpoints: Sequence[int], images: int, of: int, *, differs: bool = False, of_any: bool = False,
    target: int = PAPER_EPOCHS,
) -> list[Snapshot]:  # fmt: skip
    """Where Q is needed by the rule: the last alone where it does not ask for others.

    Parameters
    ----------
    checkpoints
        Epochs at which networks were kept, the last ones trained.
    images
        Of the Hessian, 0 for all.
    of
        How many images there are.
    differs
        Whether data or scheme are unlike the paper's, so that nothing is decided of networks as the paper's.
    of_any
        Whether something is claimed of any networks, for which half of the images are needed even so.

    Returns
    -------
    list
        At ``checkpoints``, or the last of them, and before these, where the Hessian is not over all images, the last
        over half of the images.
    """
    last, some = checkpoints[-1], images if images < of else 0
    half = [Snapshot(last, some).half] if some > 1 and (of_any or not differs) else []
    kept = checkpoints[-1:] if differs or last >= target else checkpoints
    return half + [Snapshot(epoch, some) for epoch in kept]


def not_decidable(
    epochs: Sequence[int], values: Float[ArrayLike, "K R"], criterion: Criterion, *, target: int = PAPER_EPOCHS,
    differs: str = "", effective: ArrayLike = (), k: int = 0,
    estimate: Callable[[np.ndarray], Estimate] = mean_interval,
) -> str:  # fmt: skip
    """Why a claim on Q may not be decided after ``epochs[-1]`` epochs; empty if it may.

    Parameters
    ----------
    epochs
        At most t/4, at most t/2, and t; t alone if no networks were kept on the way.
    values
        Q of every network after these, or pseudovalues.
    criterion
        What the interval of the claim must satisfy.
    target
        The paper's number of epochs; networks that were trained as long have nothing to be extrapolated.
    differs
        What else is unlike the paper in data, scheme or the images of the Hessian, in words; it is a reason by itself.
    effective
        (R,) or (K, R) effective numbers of samples.
    k
        Number of eigenvectors that Q is of.
    estimate
        Of a row of values.

    Raises
    ------
    ValueError
        If there are not as many rows as epochs, or there is no effective number of samples for eigenvectors.
    """
    values, counts = (np.asarray(part, dtype=float) for part in (values, effective))
    if len(values) != len(epochs):
        raise ValueError(f"a row for each of {len(epochs)} epochs is needed, got {len(values)}")
    if k and not counts.size:
        raise ValueError(f"effective numbers of samples are needed for {k} eigenvectors")
    if differs:
        return differs
    last = epochs[-1]
    if last >= target:
        return ""
    if len(epochs) < 3 or epochs[-2] > last / 2 or epochs[-3] > last / 4:
        return f"{last} of {target} epochs, and the value after a quarter and a half of them is not known"
    if few := too_few_samples(counts, k):
        return f"{last} of {target} epochs, and {few}"
    now, before = (estimate(row) for row in (values[-1], values[-2]))
    later = estimate(extrapolated(epochs, values, target))
    margin = criterion.margin(now.value)
    if not abs(now.value - before.value) < margin / 2:
        return (
            f"{last} of {target} epochs: from {epochs[-2]} to {last} the value went from {before.value:.3g} to "
            f"{now.value:.3g}, which is not below half of its distance from the bound"
        )
    if _side(criterion, now) != _side(criterion, later) or not _side(criterion, now):
        low, high = later.interval
        return (
            f"{last} of {target} epochs: extrapolated to {target} the interval is [{low:.3g}, {high:.3g}], "
            "not on the side of the bound where it is now"
        )
    return ""


def too_few_samples(effective: Float[np.ndarray, "..."], k: int) -> str:
    """Rule d: why effective numbers of samples are too small for k eigenvectors; empty if they are not."""
    fewest = float(effective.min()) if effective.size else np.inf
    return "" if fewest > SAMPLES_PER_VECTOR * k else f"{fewest:.0f} effective samples are too few for {k} eigenvectors"


def _side(criterion: Criterion, estimate: Estimate) -> int:
    """1 if the interval fulfils the criterion, −1 if it violates it, 0 if it straddles."""
    return int(criterion.holds(*estimate.interval)) - int(criterion.violated(*estimate.interval))


def claim_by_schedule(
    run: Claimant, ident: str, statement: str, values: Float[ArrayLike, "K R"], criterion: Criterion, *,
    snapshots: Sequence[Snapshot], source: str, expected: float | str, differs: str = "", effective: ArrayLike = (),
    k: int = 0, estimate: Callable[[np.ndarray], Estimate] = mean_interval, target: int = PAPER_EPOCHS, note: str = "",
    needs: str = "", current: Float[ArrayLike, "K R"] | None = None,
) -> None:  # fmt: skip
    """A claim of a run on networks after ``snapshots[-1].epoch`` epochs, ``untested`` where the rule leaves it open.

    Parameters as of :func:`not_decidable` and of :meth:`~common.notebook.run.Run.claim`; ``values`` has a row for each
    of ``snapshots``, :func:`snapshots_to_measure`, and ``needs`` is what trainings as long as the paper's take, which
    is said where longer ones would decide. Where they are extremes since the beginning, which do not move once they
    were reached, the rule must decide by the ``current`` values too. The note names the values on the way, where they
    decide, and the effective numbers of samples, and says of what the rule decides that it took the place of another.

    Raises
    ------
    ValueError
        If there are not as many rows as snapshots, or as :func:`not_decidable`.
    """
    last, values = snapshots[-1], np.asarray(values, dtype=float)
    of_half = dict(zip(snapshots, values, strict=True)).get(last.half)
    along = [one.images == last.images for one in snapshots]
    epochs, found = [one.epoch for one in snapshots if one.images == last.images], values[along]
    counts = np.asarray(effective, dtype=float)
    rest = {"effective": counts, "k": k, "estimate": estimate}
    images = "" if differs or not last.images else _of_images(criterion, of_half, found[-1], images=last.images, **rest)
    reason = not_decidable(epochs, found, criterion, target=target, differs=differs or images, **rest)
    if current is not None and not reason:
        reason = not_decidable(epochs, np.asarray(current, dtype=float)[along], criterion, target=target, **rest)
    counted = f"n_eff is {counts.mean():.0f}." if counts.size and np.isfinite(counts).all() else ""
    course = "" if reason or len(epochs) < 2 else _course(epochs, [estimate(row).value for row in found])
    by_rule = CHANGED if not reason and (last.epoch < target or last.images) else ""
    run.claim(
        ident, statement, estimate(found[-1]), source=source, expected=expected,
        criterion=criterion, note=" ".join(filter(None, (note, course, counted, by_rule))),
        untested="; ".join(filter(None, (reason, "" if images else needs))) if reason else "",
    )  # fmt: skip


def _course(epochs: Sequence[int], values: Sequence[float]) -> str:
    """Such as ``"After 25, 50, 100 epochs the value is 0.61, 0.58, 0.566."``."""
    return f"After {', '.join(map(str, epochs))} epochs the value is {', '.join(f'{value:.3g}' for value in values)}."


def _of_images(
    criterion: Criterion, of_half: np.ndarray | None, of_all: np.ndarray, *, images: int, effective: np.ndarray,
    k: int, estimate: Callable[[np.ndarray], Estimate],
) -> str:  # fmt: skip
    """Why a claim may not be decided with so many images of the Hessian; empty if it may."""
    if of_half is None:
        return f"{images} images of the Hessian, and the value over half of them is not known"
    if few := too_few_samples(effective, k):
        return f"{images} images of the Hessian: {few}"
    return settled_in_samples(criterion, of_half, of_all, images=images, estimate=estimate)


def decided_early(
    epochs: Sequence[int], values: Float[ArrayLike, "K R"], criterion: Criterion,
    estimate: Callable[[np.ndarray], Estimate] = mean_interval,
) -> dict[int, str]:  # fmt: skip
    """What :func:`not_decidable` would have said on the way to ``epochs[-1]``: the calibration of the rule.

    Returns
    -------
    dict
        For every t before the last with kept epochs at most t/4 and t/2: ``"open"`` if the rule leaves it open,
        ``"right"`` if it decides as the last epoch does, ``"wrong"`` if not. What is open at the last is ``"wrong"``
        if decided before.
    """
    values = np.asarray(values, dtype=float)
    truth, found = _side(criterion, estimate(values[-1])), {}
    for place, t in enumerate(epochs[:-1]):
        middle = max((i for i in range(place) if 0 < epochs[i] <= t / 2), default=-1)
        early = max((i for i in range(middle) if 0 < epochs[i] <= t / 4), default=-1)
        if early < 0:
            continue
        some = [early, middle, place]
        rest = {"target": epochs[-1], "estimate": estimate}
        reason = not_decidable([epochs[i] for i in some], values[some], criterion, **rest)
        found[t] = "open" if reason else "right" if _side(criterion, estimate(values[place])) == truth else "wrong"
    return found


def settled_in_samples(
    criterion: Criterion, of_half: Float[ArrayLike, " R"], of_all: Float[ArrayLike, " R"], *, images: int,
    estimate: Callable[[np.ndarray], Estimate] = mean_interval,
) -> str:  # fmt: skip
    """Why ``images`` images of the Hessian are too few for a claim, from Q over half of them and over all of them.

    Empty if twice as many moved Q by less than a quarter of its distance from the bound.
    """
    half, every = (estimate(np.asarray(values, dtype=float)).value for values in (of_half, of_all))
    if abs(every - half) < criterion.margin(every) / 4:
        return ""
    return (
        f"{images} images of the Hessian: from half of them to all the value went from {half:.3g} to {every:.3g}, "
        "which is not below a quarter of its distance from the bound; more images are needed"
    )
