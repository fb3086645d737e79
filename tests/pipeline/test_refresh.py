"""The committed quick records, and what of another processor's numbers they let pass."""

import copy
import json
import re
import sys

import pytest

from common import paths
from common.pipeline import older_processor
from common.pipeline.refresh import QUICK, differences, quick_record, quick_text, tolerance


def record(**claim):
    """A record of one claim: 2 within 1.6 to 2.4, but for what is named."""
    claim = {"id": "slope", "measured": 2.0, "interval": [1.6, 2.4], "verdict": "reproduced"} | claim
    data = {"name": "MNIST", "origin": "original files", "sha256": "ba89", "samples": 5, "stand_in": False}
    return {"data": [data], "claims": [claim], "numbers": {"x": [1.0]}, "title": "A toy"}


COMMITTED = quick_record(record())


def test_a_quick_record_holds_what_is_compared_and_nothing_else():
    assert json.loads(quick_text(COMMITTED)) == COMMITTED == {
        "data": {"MNIST": "ba89"},
        "claims": {"slope": {"measured": 2.0, "interval": [1.6, 2.4], "verdict": "reproduced"}},
    }  # fmt: skip


def test_the_tolerance_follows_from_the_interval():
    assert tolerance({"measured": 2.0, "interval": [1.6, 2.4]}) == pytest.approx(0.1 + 0.002)
    assert tolerance({"measured": -2.0, "interval": [-2.0, -2.0]}) == pytest.approx(0.002)
    assert 0 < tolerance({"measured": 0.0, "interval": [0.0, 0.0]}) < 1e-11


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"measured": 2.1}, []),
        ({"measured": 2.11}, ["slope: measured 2.11, committed 2 ± 0.1"]),
        ({"interval": [1.7, 2.4]}, []),
        ({"interval": [1.2, 2.8]}, []),
        ({"interval": [1.0, 3.0]}, ["slope: interval of width 2, committed 0.8"]),
        ({"interval": [1.9, 2.1]}, ["slope: interval of width 0.2, committed 0.8"]),
        ({"verdict": "untested"}, ["slope: untested, committed reproduced"]),
        ({"id": "rise"}, ["rise: not in the quick record", "slope: no longer claimed"]),
    ],
)
def test_what_leaves_the_tolerance_is_named(changes, expected):
    assert differences(COMMITTED, record(**changes)) == expected


def test_numbers_from_other_data_are_not_compared():
    far = record(measured=5.0, interval=[4.0, 6.0])
    assert differences(COMMITTED, far)
    for changes in ({"sha256": "0000"}, {"stand_in": True}):
        other = copy.deepcopy(far)
        other["data"][0] |= changes
        assert differences(COMMITTED, other) == []
        assert differences(quick_record(other), other) == []


def test_every_notebook_has_its_quick_record_and_every_quick_record_its_notebook():
    found = sorted(file.relative_to(QUICK).with_suffix("").as_posix() for file in QUICK.glob("*/*.json"))
    assert found == paths.notebook_ids(), "run python -m common.pipeline.refresh"


def test_what_makes_an_older_processor_is_printed_and_what_is_heeded_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["older_processor", "--probe"])
    older_processor.main()
    printed = capsys.readouterr()
    assert dict(line.split("=", 1) for line in printed.out.splitlines()) == older_processor.VARIABLES
    heeded, others = re.fullmatch(r"Heeded here: (.+); not: (.+)\n", printed.err).groups()
    named = [name for part in (heeded, others) if part != "nothing" for name in part.split(", ")]
    assert sorted(named) == sorted(older_processor.VARIABLES)


def test_a_probe_that_fails_is_not_taken_for_a_variable_that_is_heeded(monkeypatch):
    monkeypatch.setattr(older_processor, "VARIABLES", {"HESSIAN_PROBE": "1"})
    monkeypatch.setattr(older_processor, "_PROBE", "import os; print(1 / ('HESSIAN_PROBE' not in os.environ))")
    with pytest.raises(RuntimeError, match="nothing can be computed with HESSIAN_PROBE"):
        older_processor.heeded()
