"""For nbval: a notebook that had to run on stand-in data is checked to run, not for what it prints."""

import pytest

STAND_IN = "STAND-IN DATA for "  # as common.notebook.run.Run.uses announces them


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Do not compare the outputs of the cells after such an announcement."""
    if getattr(item.parent, "stand_ins", None):
        item.options["check"] = False


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Look for announcements in what the cell has printed."""
    printed = "".join(output.get("text", "") for output in item.test_outputs or ())
    names = [line.removeprefix(STAND_IN).partition(":")[0] for line in printed.splitlines() if STAND_IN in line]
    item.parent.stand_ins = [*getattr(item.parent, "stand_ins", ()), *names]
    item.user_properties.extend(("stand-in", name) for name in names)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which notebooks that were."""
    reports = (r for r in terminalreporter.getreports("") + terminalreporter.getreports("passed") if r.when != "setup")
    for nodeid, name in sorted({(r.nodeid, name) for r in reports for _, name in r.user_properties}):
        terminalreporter.write_line(f"stand-in data for {name}, output not compared: {nodeid.partition('::')[0]}")
