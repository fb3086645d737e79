"""Where something is computed: on the GPU if there is one, else on a CPU, two independent tasks at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def side_by_side(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    """The results of independent tasks: on a CPU two at once, each in a thread, on a GPU in turn.

    One that fails does not stop the others; the first failure is raised when all have ended. An interruption waits for
    none of them.
    """
    pool = ThreadPoolExecutor(2 if default_device().type == "cpu" else 1)
    try:
        futures = [pool.submit(function, task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
