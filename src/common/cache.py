"""What took long to make, kept in files that are found again by everything that defines their content.

A function at the top of a module makes a result from its arguments. Both name it: the canonical JSON of the arguments,
in which a tensor is represented by its SHA-256, is hashed together with the fingerprint of the function
(:mod:`common.fingerprint`), and the hash is the name of the file. Other data, another seed, another line of code that
the function reaches: another file. A comment, or code that it does not reach: the same one. Two processes that ask at
once make it once. What is interrupted goes on from its last checkpoint, which lies beside.

A training is kept like this:

    arguments = {"X": X, "y": y, "W": W, "V": V, "loss": "CE", "steps": 50_000, "lr": 1e-4, "keep": [0, 50_000]}
    result = TrainingResult(**cached(train_full_batch, arguments, progress="CE"))
"""

import contextlib
import dataclasses
import errno
import hashlib
import inspect
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from common import paths
from common.fingerprint import Definition, digest, reached_by
from common.paths import alone, replacing

#: Seconds between two checkpoints: the most that an interruption costs.
CHECKPOINT_SECONDS = 20.0


@runtime_checkable
class Checkpoint(Protocol):
    """Where something that takes long leaves its state from time to time, and finds it after an interruption."""

    def load(self) -> dict[str, Tensor] | None:
        """State of the interrupted making, None if there was none."""

    def offer(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep ``state()`` if it is time to."""


class MissingError(LookupError):
    """A result that is not there, and that may not be made now (:func:`making_only`)."""


class _Policy:
    """What :func:`cached` does about a result that is not there, and what it has seen."""

    def __init__(self) -> None:
        #: The names that may be made; None for any.
        self.allowed: frozenset[str] | None = None
        #: Names that were asked for, were missing, and were not made.
        self.missing: list[str] = []
        #: Thread-seconds that results took which were found, by their names.
        self.spared: dict[str, float] = {}


_policy = _Policy()


@contextlib.contextmanager
def making_only(*names: str) -> Iterator[list[str]]:
    """Inside, only results of these names are made; for others that are missing :class:`MissingError` is raised.

    Yields
    ------
    list of str
        The names of those others, as they are asked for.
    """
    before = _policy.allowed, _policy.missing
    _policy.allowed, _policy.missing = frozenset(names), []
    try:
        yield _policy.missing
    finally:
        _policy.allowed, _policy.missing = before


def spared_seconds() -> float:
    """Thread-seconds that all results together once took that this process has found in the cache."""
    return sum(_policy.spared.values())


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and content."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_json(value: object) -> object:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": _digest(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return vars(value)
    if isinstance(value, np.generic):
        return value.item()
    kinds = "numbers, strings, lists, mappings, dataclasses and tensors"
    raise TypeError(f"a key holds {kinds}; got {type(value).__name__}")


def _plain(value: object) -> object:
    """Arguments with Python's numbers in the place of NumPy's, which torch does not take for seeds."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _dataclasses(value: object) -> set[type]:
    """The classes of the dataclasses in an argument: their methods may run."""
    if isinstance(value, Mapping):
        return set().union(*map(_dataclasses, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_dataclasses, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value), *_dataclasses(vars(value))}
    return set()


def code_of(make: Callable, arguments: Mapping[str, object]) -> set[Definition]:
    """Definitions that a result depends on: those that the function reaches, and the classes of its arguments.

    Raises
    ------
    FingerprintError
        If the function does not stand at the top of a module of ``common``.
    """
    return reached_by(make).union(*map(reached_by, _dataclasses(arguments)))


def describe(make: Callable, arguments: Mapping[str, object]) -> str:
    """Canonical JSON of the arguments of a function and of the code that it reaches.

    Raises
    ------
    TypeError
        If an argument is neither JSON nor a dataclass nor a tensor.
    FingerprintError
        If the function does not stand at the top of a module of ``common``.
    """
    content = {"make": name_of(make), "code": digest(code_of(make, arguments)), "arguments": dict(arguments)}
    return json.dumps(content, sort_keys=True, allow_nan=False, default=_as_json)


def name_of(make: Callable) -> str:
    """Name of the folder of what a function makes: where it stands, ``"wu_dissecting.training.train"``."""
    return f"{make.__module__}.{make.__qualname__}".removeprefix("common.")


def file_of(make: Callable, arguments: Mapping[str, object]) -> Path:
    """Where :func:`cached` keeps what ``make(**arguments)`` gives, whether it is there or not."""
    return _file(make, describe(make, arguments))


def _file(make: Callable, description: str) -> Path:
    return paths.CACHE / name_of(make) / f"{hashlib.sha256(description.encode()).hexdigest()}.pt"


def _write(path: Path, description: str, tensors: Mapping[str, Tensor], seconds: float) -> None:
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # not what they are views of
    content = io.BytesIO()  # torch.save into a file answers a full disk with a RuntimeError of its own
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    torch.save({"description": description, "digests": digests, "tensors": tensors, "seconds": seconds}, content)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content.getbuffer())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: cannot keep {path.parent.name}/{path.name}") from error


def _read(path: Path, description: str) -> tuple[dict[str, Tensor], float] | None:
    """Tensors of a file and what they took, None where there is none; a damaged one is named, set aside, and none.

    Raises
    ------
    OSError
        If it cannot be read, or is damaged and cannot be set aside.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        if content["description"] != description:
            raise ValueError("it describes something else")
        if {name: _digest(tensor) for name, tensor in content["tensors"].items()} != content["digests"]:
            raise ValueError("its content does not have the SHA-256 it should have")
        return content["tensors"], content["seconds"]
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes the unpickler do
        aside = path.with_suffix(".damaged")
        reason = str(error).partition("\n")[0][:80]
        try:
            path.replace(aside)
        except OSError as refused:
            raise OSError(refused.errno, f"{path.parent.name}/{path.name} is damaged ({reason}), and stays") from error
        print(
            f"{path.parent.name}/{path.name} is damaged ({reason}): set aside as {aside.name}, made again", flush=True
        )
        return None


class PartialFile:
    """The checkpoint of a result in the making, beside the file that it will have; its seconds are this thread's."""

    def __init__(self, path: Path, description: str):
        self.path = path
        self._description = description
        self._last = time.monotonic()
        self._before = 0.0
        self._began = time.thread_time()

    @property
    def seconds(self) -> float:
        """Thread-seconds spent so far, those before an interruption included."""
        return self._before + time.thread_time() - self._began

    def load(self) -> dict[str, Tensor] | None:
        """State of the interrupted making, None if there was none."""
        found = _read(self.path, self._description)
        if found is None:
            return None
        state, self._before = found
        return state

    def offer(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write ``state()`` if the last time is :data:`CHECKPOINT_SECONDS` ago."""
        if time.monotonic() - self._last >= CHECKPOINT_SECONDS:
            _write(self.path, self._description, state(), self.seconds)
            self._last = time.monotonic()


def cached(make: Callable, arguments: Mapping[str, object], **unkeyed: object) -> dict[str, Tensor]:
    """The tensors that ``make(**arguments)`` gives, from their file if they were made before.

    Parameters
    ----------
    make
        A function at the top of a module of ``common``. It gives tensors by name, as a mapping or a dataclass. If it
        has a parameter ``checkpoint``, it is handed a :class:`Checkpoint` in which to leave its state on the way.
    arguments
        Everything that defines the result: sizes, seeds, hyperparameters as JSON or dataclasses, data as tensors.
    unkeyed
        Arguments that change nothing in the result, such as the words that tell of its progress.

    Returns
    -------
    dict of str to Tensor
        On the CPU.

    Raises
    ------
    TypeError
        If an argument is neither JSON nor a dataclass nor a tensor.
    FingerprintError
        If the function does not stand at the top of a module of ``common``.
    MissingError
        Inside of :func:`making_only`.
    OSError
        If the disk is full; the files that were there are whole, and the last checkpoint is among them. If the result
        is missing, and its folder cannot be written to.
    """
    arguments = _plain(arguments)
    description = describe(make, arguments)
    path = _file(make, description)
    name = f"{path.parent.name}/{path.stem}"
    if _policy.allowed is not None and name not in _policy.allowed and not path.exists():
        _policy.missing.append(name)
        raise MissingError(f"{name} is not in the cache, and may not be made now")
    with alone(path.with_suffix(".lock"), f"making {name}") as writable:
        found = _read(path, description)
        partial = PartialFile(path.with_suffix(".partial.pt"), description)
        if found is not None:
            result, _policy.spared[name] = found
        elif not writable:
            raise OSError(errno.EACCES, f"{name} is missing, and its folder cannot be written to")
        else:
            if "checkpoint" in inspect.signature(make).parameters:
                unkeyed["checkpoint"] = partial
            made = make(**arguments, **unkeyed)
            made = vars(made) if dataclasses.is_dataclass(made) else made
            result = {key: tensor.detach().cpu() for key, tensor in made.items()}
            _write(path, description, result, partial.seconds)
        if writable:
            partial.path.unlink(missing_ok=True)
        return result
