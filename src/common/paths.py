"""Where things are. The only module that knows the layout of the repository."""

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
NOTEBOOKS = ROOT / "notebooks"
SCALES = ROOT / "scales"
FIGURES = ROOT / "figures"
BUILD = ROOT / "build"


def _folder(variable: str, default: Path) -> Path:
    """The folder that a variable of the environment names, an absolute path from now on for what this process starts.

    A relative path is one from where the command was typed. That is not known in a notebook, which runs where it lies.

    Raises
    ------
    SystemExit
        In one line, if it is relative in a notebook, or if a file lies there.
    """
    given = os.environ.get(variable)
    if not given:
        return default
    path = Path(given).expanduser()
    if not path.is_absolute() and "ipykernel" in sys.modules:
        raise SystemExit(f"{variable}={given} is a relative path, which a notebook cannot follow: make it absolute")
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise SystemExit(f"{variable}={given} is no folder")
    os.environ[variable] = str(path)
    return path


#: Folder of the data sets; the environment variable HESSIAN_DATA overrides it.
DATA = _folder("HESSIAN_DATA", ROOT / "data")
#: Folder of what is expensive and can be made again (training runs); HESSIAN_CACHE overrides it.
CACHE = _folder("HESSIAN_CACHE", BUILD / "cache")


def notebook_path(ident: str) -> Path:
    """File of the notebook ``ident``, such as ``"dong_quantifying/fig08_scaling_linear"``."""
    return NOTEBOOKS / f"{ident}.ipynb"


def notebook_ids() -> list[str]:
    """Identifiers of all notebooks, sorted."""
    return sorted(
        path.relative_to(NOTEBOOKS).with_suffix("").as_posix()
        for path in NOTEBOOKS.glob("*/*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    )


def read_json(file: Path) -> dict:
    """What a file of JSON holds.

    Raises
    ------
    ValueError
        With the file's name, if it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        raise ValueError(f"{name} is damaged: {error}") from None


@contextlib.contextmanager
def alone(lock: Path, doing: str) -> Iterator[bool]:
    """Inside, no other process is where this lock file says; it is waited for, and after a second that is said.

    Parameters
    ----------
    lock
        The file.
    doing
        What the other process is ``"making"``, in words.

    Yields
    ------
    bool
        False where no file may be put, as in a cache of somebody else: what is there is whole, and stays as it is.
    """
    held = filelock.FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=1)
    except filelock.Timeout:
        print(f"another process is {doing}: waiting for it", flush=True)
        held.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        yield held.is_locked
    finally:
        held.release()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an error.

    A reader sees the old file or the new one, never half of it, whatever kills the process; a full disk
    raises in the block and leaves the old file as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
