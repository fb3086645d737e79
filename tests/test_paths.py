"""Folders that the environment names: absolute for all that is started, or refused in one line."""

import subprocess
import sys

import pytest

from common import paths

SHOW = "import os; from common import paths; print(paths.DATA, paths.CACHE, os.environ['HESSIAN_DATA'], sep='\\n')"


def show(folder, before="", **variables):
    """What a process that starts in a folder takes the data and the cache for."""
    environment = {"PYTHONPATH": str(paths.SOURCE), "HOME": str(folder / "home"), **variables}
    command = [sys.executable, "-c", before + SHOW]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_relative_folder_is_made_absolute_for_what_is_started_too(tmp_path):
    done = show(tmp_path, HESSIAN_DATA="data", HESSIAN_CACHE="~/cache")
    assert done.stdout.splitlines() == [f"{tmp_path}/data", f"{tmp_path}/home/cache", f"{tmp_path}/data"]


@pytest.mark.parametrize("value", ["data", "../data", "~"])
def test_in_a_notebook_a_relative_folder_is_refused(tmp_path, value):
    done = show(tmp_path, "import sys; sys.modules['ipykernel'] = sys; ", HESSIAN_DATA=value)
    if value == "~":
        assert done.stdout.startswith(f"{tmp_path}/home\n")
    else:
        line = f"HESSIAN_DATA={value} is a relative path, which a notebook cannot follow: make it absolute\n"
        assert (done.returncode, done.stderr) == (1, line)


def test_a_file_where_a_folder_is_wanted_is_named(tmp_path):
    (tmp_path / "data").touch()
    done = show(tmp_path, HESSIAN_DATA="data")
    assert (done.returncode, done.stderr) == (1, "HESSIAN_DATA=data is no folder\n")
