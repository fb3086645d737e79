"""Sentences of a paper held against measurements: criteria, verdicts, and the tables that show them."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
PAPER_IN_ERROR = "paper in error"
UNDECIDED = "undecided"
UNTESTED = "untested"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, PAPER_IN_ERROR, UNDECIDED, UNTESTED)


@dataclass(frozen=True)
class Criterion:
    """A condition on the interval of a measurement, with the words that state it.

    Attributes
    ----------
    holds, violated
        Whether an interval (low, high) fulfils it as a whole, and whether it excludes it as a whole. Where neither is
        true, the measurement is not sharp enough to tell.
    margin
        Half the width of an interval about a value that would be sharp enough.
    """

    text: str
    holds: Callable[[float, float], bool]
    violated: Callable[[float, float], bool]
    margin: Callable[[float], float]


def below(bound: float) -> Criterion:
    """The whole interval lies below ``bound``."""
    return Criterion(
        f"upper end below {bound:g}",
        lambda low, high: high < bound,
        lambda low, high: low >= bound,
        lambda value: abs(value - bound),
    )


def above(bound: float) -> Criterion:
    """The whole interval lies above ``bound``."""
    return Criterion(
        f"lower end above {bound:g}",
        lambda low, high: low > bound,
        lambda low, high: high <= bound,
        lambda value: abs(value - bound),
    )


def inside(lower: float, upper: float) -> Criterion:
    """The whole interval lies between two bounds."""
    return Criterion(
        f"interval within [{lower:g}, {upper:g}]",
        lambda low, high: lower <= low and high <= upper,
        lambda low, high: high < lower or low > upper,
        lambda value: min(abs(value - lower), abs(value - upper)),
    )


def meets(value: float, tolerance: float) -> Criterion:
    """The interval reaches into ``value`` plus or minus ``tolerance``, and is no wider than that."""
    return Criterion(
        f"interval meets {value:.6g} ± {tolerance:g} and is no wider",
        lambda low, high: value - tolerance <= high and low <= value + tolerance and (high - low) / 2 <= tolerance,
        lambda low, high: high < value - tolerance or low > value + tolerance,
        lambda measured: max(tolerance, abs(measured - value) - tolerance),
    )


def exactly(value: float) -> Criterion:
    """Every measured value equals ``value``, with no tolerance."""
    return Criterion(
        f"exactly {value:g}",
        lambda low, high: low == value == high,
        lambda low, high: high < value or low > value,
        lambda measured: 0.0 if measured == value else abs(measured - value),
    )


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper turned into a measurement; fields as in ``record.schema.json``."""

    id: str
    statement: str
    source: str
    expected: float | str
    measured: float
    interval: tuple[float, float]
    criterion: str
    verdict: str
    note: str


def identifier(text: str) -> str:
    """A name of a network, a layer or a row as a part of a claim's identifier, ``"fc1:F-200^2"`` as ``fc1_f_200_2``."""
    return text.lower().translate(str.maketrans("^- :.", "_____", "()"))


def rounded(value: float | str, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, as the tables of claims print it."""
    return value if isinstance(value, str) else f"{value:.{digits}g}"


class Table:
    """Rows of words under a header, drawn by a notebook as a table."""

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[str]]):
        self.header, self.rows = list(header), [list(row) for row in rows]

    def __repr__(self) -> str:
        return tabulate(self.rows, self.header, tablefmt="plain", disable_numparse=True)

    def _repr_html_(self) -> str:
        cells = [[html.escape(cell) for cell in row] for row in self.rows]
        return tabulate(cells, self.header, tablefmt="unsafehtml", disable_numparse=True)


def table_of_measurements(claims: Sequence[Claim]) -> Table:
    """What was measured for each claim and its interval; the last digits differ between processors."""
    rows = [
        (c.id, rounded(c.expected), rounded(c.measured), f"[{rounded(c.interval[0])}, {rounded(c.interval[1])}]")
        for c in claims
    ]
    return Table(("claim", "expected", "measured", "interval"), rows)


def table_of_verdicts(claims: Sequence[Claim], scale: str, committed: tuple[str, dict[str, str]] | None) -> Table:
    """What each claim says, by which criterion, and its verdict: here, and in the committed record beside it.

    Parameters
    ----------
    scale
        Of this run.
    committed
        Scale and verdicts by claim of the committed record; None if there is none.
    """
    there, verdicts = committed or ("committed", {})
    rows = [(c.id, c.statement, c.source, c.criterion, c.verdict, verdicts.get(c.id, "-")) for c in claims]
    return Table(("claim", "statement", "source", "criterion", f"verdict, {scale}", f"verdict, {there}"), rows)
