"""What is checked of scales and notebooks before anything runs: any file makes a task, or one line."""

import copy
import json

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import paths
from common.pipeline.execute import NotebookError, PlanError, Task, plan, scale_parameters, task

IDENT = "dong_quantifying/toy"
CELLS = [
    nbformat.v4.new_code_cell("n: int = 3  # draws; paper: 3", metadata={"tags": ["parameters"]}, id="a"),
    nbformat.v4.new_markdown_cell("Words", id="b"),
    nbformat.v4.new_code_cell(f"from common.notebook.run import Run\nrun = Run('{IDENT}', globals())", id="c"),
]
NOTEBOOK = json.loads(nbformat.writes(nbformat.v4.new_notebook(cells=CELLS)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
property_of_files = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for name in ("NOTEBOOKS", "SCALES"):
        monkeypatch.setattr(paths, name, tmp_path / name)
        (tmp_path / name).mkdir()
    paths.notebook_path(IDENT).parent.mkdir()
    return paths.notebook_path(IDENT)


def places(value, here=()):
    """Where something stands in a tree of JSON."""
    yield here
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*here, key))


PLACES = list(places(NOTEBOOK))


@given(place=st.sampled_from(PLACES), other=JSON)
@property_of_files
def test_a_notebook_with_anything_anywhere_is_a_task_or_one_line(toy, place, other):
    content = {"root": copy.deepcopy(NOTEBOOK)}
    *way, last = ("root", *place)
    inner = content
    for key in way:
        inner = inner[key]
    inner[last] = other
    toy.write_text(json.dumps(content["root"]))
    one_line_or(Task, lambda: task(IDENT, "quick", {}))


@given(content=st.binary(max_size=20) | JSON.map(lambda value: json.dumps(value).encode()))
@property_of_files
def test_a_scale_of_anything_is_a_plan_or_one_line(toy, content):
    toy.write_text(json.dumps(NOTEBOOK))
    (paths.SCALES / "laptop.yaml").write_bytes(content)
    one_line_or(dict, lambda: scale_parameters("laptop"))
    one_line_or(tuple, lambda: plan("laptop"))


@given(value=JSON)
@property_of_files
def test_a_parameter_of_any_kind_is_one_or_one_line(toy, value):
    toy.write_text(json.dumps(NOTEBOOK))
    for overrides in ({"n": value}, {str(value): 3}):
        one_line_or(Task, lambda overrides=overrides: task(IDENT, "laptop", overrides))


def one_line_or(kind, make):
    """What is made, or the one line that says why not."""
    try:
        assert isinstance(make(), kind)
    except (NotebookError, PlanError) as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1
