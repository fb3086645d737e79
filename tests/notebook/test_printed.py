"""Every printed table can be read and names its source; what is wrong with one is said."""

import itertools
import math
import tomllib

import pytest

from common import paths
from common.notebook import printed as module
from common.notebook.printed import path_of, printed

TABLES = sorted((file.parts[-3], file.stem) for file in (paths.SOURCE / "common").glob("*/printed/*.csv"))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a table of a paper that is made up, and reads it."""
    (tmp_path / "paper" / "printed").mkdir(parents=True)
    monkeypatch.setattr(module, "path_of", lambda paper, table: tmp_path / paper / "printed" / f"{table}.csv")

    def write(text):
        (tmp_path / "paper" / "printed" / "table.csv").write_text(text, encoding="utf-8")
        return printed("paper", "table")

    return write


@pytest.mark.parametrize(("paper", "table"), TABLES)
def test_every_table_names_its_source_and_can_be_read(paper, table):
    first, *_ = path_of(paper, table).read_text(encoding="utf-8").splitlines()
    assert first.startswith("# source: ") and f"Table {int(table.removeprefix('table'))}, Appendix " in first
    rows = printed(paper, table)
    assert rows and all(list(row) == list(rows[0]) for row in rows)
    for column in rows[0]:
        assert len({type(row[column]) for row in rows} - {type(None)}) == 1
        assert column == column.strip() != ""
    for row in rows:
        assert all(math.isfinite(cell) for cell in row.values() if isinstance(cell, float))
    keys = [tuple(cell for cell in row.values() if isinstance(cell, str)) for row in rows]
    assert len(set(keys)) == len(keys)  # a mapping by them loses no row


@pytest.mark.parametrize("table", ["table06", "table07", "table09"])
def test_means_lie_between_the_smallest_and_the_largest(table):
    for row, quantity in itertools.product(printed("wu_dissecting", table), ("dot", "ratio")):
        low, mean, high = (row[f"{quantity}_{part}"] for part in ("min", "mean", "max"))
        assert low <= mean <= high
        assert high <= 1 if quantity == "dot" else low >= 1


def test_a_column_has_the_narrowest_type_of_all_its_cells(written):
    rows = written('# source: here\n# more\na,b,c,d\n1,5071,"x, y",\n-2,4612.6,7,0.5\n')
    assert rows == [{"a": 1, "b": 5071.0, "c": "x, y", "d": None}, {"a": -2, "b": 4612.6, "c": "7", "d": 0.5}]
    assert [type(cell) for cell in rows[0].values()] == [int, float, str, type(None)]


def test_a_table_that_is_missing_or_ragged_is_named(written):
    with pytest.raises(FileNotFoundError, match=r"no printed table paper/table99; known are .*li_adaptive/table02"):
        printed("paper", "table99")
    with pytest.raises(ValueError, match=r"paper/table: 2 columns, but 3 cells in \['1', '2', '3'\]"):
        written("# source: here\na,b\n1,2,3\n")


def test_tables_are_installed_with_the_package():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "printed/*.csv" in project["tool"]["setuptools"]["package-data"]["*"]
    assert ("wu_dissecting", "table10") in TABLES and ("li_adaptive", "table02") in TABLES
