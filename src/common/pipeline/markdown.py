"""Words and tables of the generated pages, as GitHub's Markdown."""

import re
from collections.abc import Iterable, Sequence

from tabulate import DataRow, TableFormat, tabulate

from common.notebook.claims import rounded


def escaped(text: str) -> str:
    """``text`` such that Markdown shows it as it is, on one line, in a table's cell too."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def number(value: float | str, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, from there to a million in full; words stay words."""
    if not isinstance(value, str) and 10**digits <= abs(value) < 1e6:
        return f"{value:.0f}"
    return rounded(value, digits)


def measurement(value: float, interval: Sequence[float]) -> str:
    """A measurement with its interval, three digits or as many, up to six, as tell its ends apart."""
    low, high = interval
    digits = next((d for d in range(3, 6) if low == high or number(low, d) != number(high, d)), 6)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


#: GitHub's tables without padding: a longer cell changes its own line and no other.
_MARKDOWN = TableFormat(
    lineabove=None,
    linebelowheader=lambda widths, _: f"|{' --- |' * len(widths)}",
    linebetweenrows=None,
    linebelow=None,
    headerrow=DataRow("| ", " | ", " |"),
    datarow=DataRow("| ", " | ", " |"),
    padding=0,
    with_header_hide=None,
)


def table(header: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    return tabulate(list(rows), list(header), _MARKDOWN, stralign=None, numalign=None, disable_numparse=True)
