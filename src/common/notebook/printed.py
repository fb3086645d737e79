"""Numbers that a paper prints in a table, kept as a CSV file with their source in the paper's room.

``src/common/<paper>/printed/table06.csv`` begins with lines of comment, the first of them ``# source: ...``, then the
names of the columns. A notebook compares its own numbers with them:

    rows = {row["row"]: row for row in printed("wu_dissecting", "table06")}

It depends on the content of the file. Paper and table are to be written out in the call, as here: that is how
:func:`path_of` is called with them when what the notebook depends on is hashed.
"""

import csv
from pathlib import Path

#: What stands in a cell: a whole number, a number, a word; None where the paper prints nothing.
Cell = int | float | str | None


def path_of(paper: str, table: str) -> Path:
    """File of a printed table, whether there is one or not."""
    return Path(__file__).parents[1] / paper / "printed" / f"{table}.csv"


def _typed(column: list[str]) -> list[Cell]:
    """The cells of a column, all of the narrowest type that they all have, but empty ones."""
    for kind in (int, float):
        try:
            return [kind(cell) if cell else None for cell in column]
        except ValueError:
            continue
    return [cell or None for cell in column]


def printed(paper: str, table: str) -> list[dict[str, Cell]]:
    """Rows of a printed table.

    Parameters
    ----------
    paper
        Name of the paper's room, ``"wu_dissecting"``.
    table
        ``"table06"``.

    Returns
    -------
    list of dict
        In the order of the paper. All cells of a column are whole numbers, or numbers, or words, or None.

    Raises
    ------
    FileNotFoundError
        If there is no such table; the message names those that there are.
    ValueError
        If a row has more or fewer cells than there are columns.
    """
    path = path_of(paper, table)
    if not path.is_file():
        known = sorted(f"{file.parts[-3]}/{file.stem}" for file in Path(__file__).parents[1].glob("*/printed/*.csv"))
        raise FileNotFoundError(f"no printed table {paper}/{table}; known are {', '.join(known)}")
    lines = path.read_text(encoding="utf-8").splitlines()
    header, *rows = csv.reader(line for line in lines if not line.startswith("#"))
    if ragged := [row for row in rows if len(row) != len(header)]:
        raise ValueError(f"{paper}/{table}: {len(header)} columns, but {len(ragged[0])} cells in {ragged[0]}")
    columns = [_typed([row[k] for row in rows]) for k in range(len(header))]
    return [dict(zip(header, cells, strict=True)) for cells in zip(*columns, strict=True)]
