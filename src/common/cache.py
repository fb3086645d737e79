"""What took long to make, kept in files that are found again by everything that defines their content.

A result is named by a key. Its canonical JSON, in which a tensor is represented by its SHA-256, is hashed together with
the sources of the modules that make the result, and the hash is the name of the file: other data, another seed or
another version of the code are another file. Two processes that ask at once make it once. What is interrupted
goes on from its last checkpoint, which lies beside.

A training is kept like this:

    arguments = {"X": X, "y": y, "W": W, "V": V, "loss": "CE", "steps": 50_000, "lr": 1e-4, "keep": [0, 50_000]}
    result = TrainingResult(**cached(
        "dong_hidden", arguments, code=[training],
        make=lambda checkpoint: vars(train_full_batch(**arguments, progress="CE", checkpoint=checkpoint)),
    ))
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import filelock
import torch
from torch import Tensor

from common import paths
from common.paths import replacing

#: Seconds between two checkpoints: the most that an interruption costs.
CHECKPOINT_SECONDS = 20.0


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and content."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_json(value: object) -> object:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": _digest(value)}
    raise TypeError(f"a key holds numbers, strings, lists, mappings and tensors; got {type(value).__name__}")


def describe(key: Mapping[str, object], code: Sequence[ModuleType]) -> str:
    """Canonical JSON of a key and of the sources it depends on.

    Raises
    ------
    TypeError
        If something in the key is neither JSON nor a tensor.
    """
    sources = {module.__name__: hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() for module in code}
    return json.dumps({"key": dict(key), "code": sources}, sort_keys=True, allow_nan=False, default=_as_json)


def _write(path: Path, description: str, tensors: Mapping[str, Tensor]) -> None:
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # not what they are views of
    content = io.BytesIO()  # torch.save into a file answers a full disk with a RuntimeError of its own
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    torch.save({"description": description, "digests": digests, "tensors": tensors}, content)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content.getbuffer())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: cannot keep {path.parent.name}/{path.name}") from error


def _read(path: Path, description: str) -> dict[str, Tensor] | None:
    """Tensors of a file, None where there is none; a damaged one is named, set aside and taken for none."""
    if not path.exists():
        return None
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        if content["description"] != description:
            raise ValueError("it describes something else")
        if {name: _digest(tensor) for name, tensor in content["tensors"].items()} != content["digests"]:
            raise ValueError("its content does not have the SHA-256 it should have")
        return content["tensors"]
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes the unpickler do
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        reason = str(error).partition("\n")[0][:80]
        print(
            f"{path.parent.name}/{path.name} is damaged ({reason}): set aside as {aside.name}, made again", flush=True
        )
        return None


class PartialFile:
    """The checkpoint of a result in the making, beside the file that it will have."""

    def __init__(self, path: Path, description: str):
        self.path = path
        self._description = description
        self._last = time.monotonic()

    def load(self) -> dict[str, Tensor] | None:
        """State of the interrupted making, None if there was none."""
        return _read(self.path, self._description)

    def offer(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Write ``state()`` if the last time is :data:`CHECKPOINT_SECONDS` ago."""
        if time.monotonic() - self._last >= CHECKPOINT_SECONDS:
            _write(self.path, self._description, state())
            self._last = time.monotonic()


def cached(
    kind: str,
    key: Mapping[str, object],
    make: Callable[[PartialFile], Mapping[str, Tensor]],
    *,
    code: Sequence[ModuleType],
) -> dict[str, Tensor]:
    """The tensors that ``make`` gives, from their file if they were made before.

    Parameters
    ----------
    kind
        Name of the folder below :data:`common.paths.CACHE`.
    key
        Everything that defines the result: sizes, seeds, hyperparameters, and the data as tensors.
    make
        Makes the result. It is handed the checkpoint in which to leave its state on the way (a
        :class:`common.dong_quantifying.full_batch.Checkpoint`), and may ignore it.
    code
        The modules whose sources define the result as well.

    Returns
    -------
    dict of str to Tensor
        On the CPU.

    Raises
    ------
    TypeError
        If something in the key is neither JSON nor a tensor.
    OSError
        If the disk is full; the files that were there are whole, and the last checkpoint is among them.
    """
    description = describe(key, code)
    path = paths.CACHE / kind / f"{hashlib.sha256(description.encode()).hexdigest()}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f"another process is making {kind}/{path.name}: waiting for it", flush=True)
        lock.acquire()
    try:
        result = _read(path, description)
        partial = PartialFile(path.with_suffix(".partial.pt"), description)
        if result is None:
            result = {name: tensor.detach().cpu() for name, tensor in make(partial).items()}
            _write(path, description, result)
        partial.path.unlink(missing_ok=True)
        return result
    finally:
        lock.release()
