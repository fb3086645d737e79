"""For nbval: every notebook ends with one check more, of its record against the committed one.

The table in a notebook's last cell is compared as text, and holds nothing but what any processor
prints; its numbers are compared by :func:`common.pipeline.refresh.differences`. A notebook that had
to run on stand-in data is checked to run, and not for what it prints.

Each notebook has a cache of its own, empty but for decoded images. After its last cell tagged
``prepare`` nothing may be added to it: what takes long is made there, without Jupyter too.
"""

import json
import os
import shutil
from pathlib import Path

import nbval.kernel
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

from common import paths
from common.pipeline.isolation import isolate, tether
from common.pipeline.refresh import QUICK, differences

tether()
isolate()

STAND_IN = "STAND-IN DATA for "  # as common.notebook.run.Run.uses announces them
#: Images that were decoded before serve all.
IMAGES = paths.CACHE
OUT = Path(os.environ.get("HESSIAN_OUT") or paths.BUILD / "test" / "notebooks")
_start = nbval.kernel.start_new_kernel


def start_new_kernel(*arguments: object, **options: object) -> tuple:
    """As nbval's, and once more if the kernel died: nothing holds its ports until it binds them."""
    try:
        return _start(*arguments, **options)
    except RuntimeError:
        return _start(*arguments, **options)


nbval.kernel.start_new_kernel = start_new_kernel


def ident(file: IPyNbFile) -> str:
    """``"<paper>/<notebook>"``."""
    return file.path.relative_to(paths.NOTEBOOKS).with_suffix("").as_posix()


def kept(file: IPyNbFile) -> set[str]:
    """Names of the results in a notebook's own cache."""
    return {path.name for path in own_cache(file).glob("*/*.pt")}


def own_cache(file: IPyNbFile) -> Path:
    """Where a notebook finds what it has prepared."""
    return OUT / "cache" / ident(file)


class RecordCheck(pytest.Item):
    """The record that a notebook has just written, held against the committed one."""

    def runtest(self) -> None:
        committed = json.loads((QUICK / f"{ident(self.parent)}.json").read_text(encoding="utf-8"))
        record = json.loads((OUT / f"{ident(self.parent)}.json").read_text(encoding="utf-8"))
        found = differences(committed, record)
        found += [
            f"kept only after what is prepared: {n}"
            for n in kept(self.parent) - self.parent.prepared
        ]
        if found:
            pytest.fail("\n".join(found), pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{ident(self.parent)}: record"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the check of the record after the last cell."""
    last = {
        item.parent: position for position, item in enumerate(items) if isinstance(item, IPyNbCell)
    }
    for file, position in reversed(last.items()):
        if (QUICK / f"{ident(file)}.json").exists():
            items.insert(position + 1, RecordCheck.from_parent(file, name="record"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the kernel starts, name the folder of its results; compare nothing after stand-ins."""
    file = item.parent
    if not hasattr(file, "stand_ins"):
        file.stand_ins = []
        file.skip_compare += ("text/html",)  # for a reader, measurements and all
        os.environ["HESSIAN_OUT"] = str((OUT / ident(file)).parent)
        (OUT / f"{ident(file)}.json").unlink(missing_ok=True)
        shutil.rmtree(own_cache(file), ignore_errors=True)
        own_cache(file).mkdir(parents=True)
        (IMAGES / "data").mkdir(parents=True, exist_ok=True)
        (own_cache(file) / "data").symlink_to(IMAGES / "data")
        os.environ["HESSIAN_CACHE"] = str(own_cache(file))
        file.prepared = set()
    if file.stand_ins and isinstance(item, IPyNbCell):
        item.options["check"] = False


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Note what was prepared, and look for announcements of stand-in data in what was printed."""
    if "prepare" in getattr(item, "cell", {}).get("metadata", {}).get("tags", []):
        item.parent.prepared = kept(item.parent)
    printed = "".join(
        output.get("text", "") for output in getattr(item, "test_outputs", None) or ()
    )
    names = [
        line.removeprefix(STAND_IN).partition(":")[0]
        for line in printed.splitlines()
        if STAND_IN in line
    ]
    item.parent.stand_ins += names
    item.user_properties.extend(("stand-in", name) for name in names)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which notebooks that were."""
    reports = [r for kind in ("", "passed") for r in terminalreporter.getreports(kind)]
    named = {(r.nodeid, n) for r in reports if r.when != "setup" for _, n in r.user_properties}
    for nodeid, name in sorted(named):
        file = nodeid.partition("::")[0]
        terminalreporter.write_line(f"stand-in data for {name}, output not compared: {file}")
