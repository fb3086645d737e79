"""What takes long in a notebook, made without Jupyter: its cells tagged ``prepare``, and nothing else.

Everything lies in the cache (``HESSIAN_CACHE``), where the notebook finds it, and a training goes on from its last
checkpoint, so that a command that ran out of time is simply given again:

    python -m common.pipeline.prepare wu_dissecting/fig04_overlap --scale paper --minutes 9

A pattern such as ``'wu_dissecting/*'`` stands for all notebooks that match it and have such cells, in the order of the
scale's file; that of ``paper`` begins with those that decide most claims for an hour.

These cells see the parameters and each other, so they import what they need; nothing of Jupyter is needed for them,
nor of what draws. ``--list`` names what is missing and can be made at once, and ``--piece NAME`` makes one of it: that
is how each training becomes a job of its own on a cluster (:mod:`common.pipeline.workflow`). What needs a piece that is
missing, such as eigenpairs of a network that is not trained, is named once that is made.
"""

import argparse
import ast
import contextlib
import fnmatch
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType

from common import cache, paths
from common.notebook.provenance import ParameterError, code_cells, read_notebook, resolve_parameters
from common.pipeline.execute import THREAD_VARIABLES, PlanError, scale_parameters
from common.pipeline.isolation import tether

#: Exit code of a call that ran out of time.
AGAIN = 3


class _OutOfTime(BaseException):
    """Not an Exception: nothing that guards a file may take it for a fault of the file."""


def run_cells(ident: str, overrides: Mapping[str, object]) -> None:
    """Run the cells of a notebook that are tagged ``prepare``, its parameters set.

    Raises
    ------
    ParameterError
        If a parameter does not fit.
    """
    for code, namespace in _statements(ident, overrides):
        exec(code, namespace)


def make_some(ident: str, overrides: Mapping[str, object], *names: str) -> list[str]:
    """Make only the pieces of these names, and list those that are missing and could be made at once.

    A statement that needs a missing piece is left out, and so are those that need what it would have set.
    """
    with cache.making_only(*names) as missing, contextlib.redirect_stdout(sys.stderr):
        for code, namespace in _statements(ident, overrides):
            before = len(missing)
            try:
                exec(code, namespace)
            except cache.MissingError:
                pass
            except NameError:
                if before == 0:
                    raise
        return list(dict.fromkeys(missing))


def _statements(ident: str, overrides: Mapping[str, object]) -> Iterator[tuple[CodeType, dict[str, object]]]:
    """The statements of the cells tagged ``prepare``, one by one, and the namespace that they share."""
    notebook = paths.notebook_path(ident)
    namespace: dict[str, object] = {"__name__": "__main__", **resolve_parameters(notebook, overrides)}
    for number, cell in enumerate(code_cells(read_notebook(notebook), "prepare"), 1):
        for statement in ast.parse(cell).body:
            yield compile(ast.Module([statement], []), f"{ident}, prepare cell {number}", "exec"), namespace


def _try_piece(ident: str, overrides: Mapping[str, object], piece: str) -> None:
    """Make one piece; what goes wrong is printed, and left for the notebook to meet and to name."""
    try:
        make_some(ident, overrides, piece)
    except Exception:
        traceback.print_exc()


def matching(pattern: str) -> list[str]:
    """Notebooks that match a glob pattern and have cells tagged ``prepare``."""
    idents = [ident for ident in paths.notebook_ids() if fnmatch.fnmatchcase(ident, pattern)]
    return [ident for ident in idents if code_cells(read_notebook(paths.notebook_path(ident)), "prepare")]


def in_one_thread() -> None:
    """Begin anew with as many BLAS threads as a notebook has, unless it is so: what is made depends on their number."""
    if any(os.environ.get(name) != value for name, value in THREAD_VARIABLES.items()):
        os.environ.update(THREAD_VARIABLES)
        os.execv(sys.executable, [sys.executable, "-m", "common.pipeline.prepare", *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 when all is made, 3 when time ran out before, 2 for what makes no sense."""
    parser = argparse.ArgumentParser(prog="python -m common.pipeline.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", help="<paper>/<notebook>, or a pattern such as 'wu_dissecting/*'")
    parser.add_argument("--scale", choices=("quick", "laptop", "paper"), default="paper")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same call goes on")
    parser.add_argument("--list", action="store_true", help="name what is missing, as a line of JSON, and make nothing")
    parser.add_argument("--piece", help="make this one only")
    options = parser.parse_args(arguments)
    idents = matching(options.notebook)
    if not idents:
        print(f"prepare: no notebook that matches {options.notebook!r} has cells to prepare", file=sys.stderr)
        return 2

    def out_of_time(*_: object) -> None:
        raise _OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    tether()
    ident = options.notebook
    try:
        overrides = scale_parameters(options.scale)
        order = list(overrides)
        idents.sort(key=lambda ident: order.index(ident) if ident in overrides else len(order))
        if options.list:
            print(json.dumps([name for one in idents for name in make_some(one, overrides.get(one, {}))]))
            return 0
        signal.setitimer(signal.ITIMER_REAL, 60 * (options.minutes or 0))
        for ident in idents:
            if options.piece:
                _try_piece(ident, overrides.get(ident, {}), options.piece)
            else:
                run_cells(ident, overrides.get(ident, {}))
                print(f"{ident}: all is made", flush=True)
    except (ParameterError, PlanError) as error:
        print(f"prepare: {ident}: {error}", file=sys.stderr)
        return 2
    except _OutOfTime:
        print(f"{ident}: {options.minutes:g} minutes are over; call again to go on", flush=True)
        return AGAIN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


if __name__ == "__main__":
    in_one_thread()
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads that still train are not waited for; every file that they leave is whole
