"""Independent tasks at once: their order, failures and interruptions."""

import signal
import threading
import time

import pytest

from common.devices import side_by_side


def test_two_tasks_at_once_keep_their_order():
    barrier = threading.Barrier(2, timeout=20)

    def square(k):
        barrier.wait()  # never met by one thread alone
        return k * k

    assert side_by_side(square, [3, 1, 2, 5]) == [9, 1, 4, 25]


def test_a_failure_stops_no_other_and_is_raised_in_the_end():
    done = []

    def work(k):
        if k == 0:
            raise ValueError("zero")
        done.append(k)

    with pytest.raises(ValueError, match="zero"):
        side_by_side(work, [0, 1, 2, 3])
    assert sorted(done) == [1, 2, 3]


def test_an_interruption_waits_for_no_task():
    waiting = threading.Event()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    begin = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            side_by_side(lambda k: waiting.wait(20), [0, 1, 2])
    finally:
        signal.signal(signal.SIGALRM, before)
        waiting.set()
    assert time.monotonic() - begin < 10
