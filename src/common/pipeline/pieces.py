"""What takes long at the paper's scale, made piece by piece on a machine with a GPU and without Jupyter.

Every piece lies in the cache (``HESSIAN_CACHE``), where the notebook finds it, and a training goes on from its last
checkpoint, so that a command that ran out of time is simply given again.
"""

import argparse
import signal
from collections.abc import Callable, Mapping, Sequence

import torch
import yaml

from common import paths
from common.notebook.provenance import resolve_parameters

#: Makes something that a notebook needs, from the notebook's parameters.
Piece = Callable[[dict], object]


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _OutOfTime(BaseException):
    """Not an Exception: nothing that guards a file may take it for a fault of the file."""


def make_pieces(
    paper: str, pieces: Mapping[str, Sequence[Piece]], arguments: Sequence[str] | None, *, program: str, doc: str
) -> int:
    """The command line ``python -m PROGRAM NOTEBOOK [--scale S] [--minutes M]``.

    Parameters
    ----------
    pieces
        Of each notebook of the paper that can be prepared.
    arguments
        Of the command line; None for the process's own.

    Returns
    -------
    int
        0 when all is made, 3 when time ran out before.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=doc.partition("\n")[0])
    parser.add_argument("notebook", choices=sorted(pieces))
    parser.add_argument("--scale", choices=("quick", "laptop", "paper"), default="paper")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long; the next call goes on")
    options = parser.parse_args(arguments)
    ident = f"{paper}/{options.notebook}"
    file = paths.SCALES / f"{options.scale}.yaml"
    overrides = yaml.safe_load(file.read_text(encoding="utf-8")).get(ident, {}) if file.exists() else {}
    parameters = resolve_parameters(paths.notebook_path(ident), overrides)

    def out_of_time(*_: object) -> None:
        raise _OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    try:
        for piece in pieces[options.notebook]:
            piece(parameters)
    except _OutOfTime:
        print(f"{ident}: {options.minutes:g} minutes are over; call again to go on")
        return 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"{ident}: all is made")
    return 0
