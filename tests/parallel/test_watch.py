"""The verdicts of the watch over other processes, with a store in place of JAX's service."""

import contextlib
import threading
import time

import pytest

from aim_jax.parallel import watch
from aim_jax.utils.signals import EXIT_LOST, EXIT_STOPPED


class Store:
    """The calls of JAX's client that the watch uses; an `error` is raised by all of them."""

    def __init__(self):
        self.values = {}
        self.error = None
        self.changed = threading.Condition()

    def _check(self):
        if self.error:
            raise RuntimeError(self.error)

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self._check()
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, key):
        self._check()
        return [(k, v) for k, v in self.values.items() if k.startswith(key)]

    def key_value_try_get(self, key):
        self._check()
        if key not in self.values:
            raise RuntimeError("NOT_FOUND: no such key")
        return self.values[key]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            self.changed.wait_for(lambda: self.error or key in self.values, milliseconds / 1000)
        self._check()
        if key not in self.values:
            raise RuntimeError("DEADLINE_EXCEEDED: timed out")
        return self.values[key]


pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def run(monkeypatch):
    """Starts watches; returns their store, the watches, and a function that waits for ends."""
    ends = {}
    ended = threading.Condition()
    store = Store()

    def end(line, status, linger=0.0):
        with ended:
            ends.setdefault(threading.current_thread().name, (status, line))
            ended.notify_all()
        raise SystemExit  # ends the thread

    def until_end(work):
        with contextlib.suppress(SystemExit):
            work()

    def start(count, seconds=0.5, absent=()):
        watches = {i: watch.Watch(store, i, count, seconds) for i in range(count)}
        for i, each in watches.items():
            if i not in absent:
                for work in (each._beat, each._time):
                    name = f"{i}{work.__name__}"
                    threading.Thread(target=until_end, args=(work,), name=name, daemon=True).start()

        def wait(number):
            with ended:
                assert ended.wait_for(lambda: len(ends) >= number, 20), ends
            for each in watches.values():
                each._finished.set()
            return dict(ends)

        return store, watches, wait

    monkeypatch.setattr(watch, "end_with_line", end)
    return start


def test_a_silent_process_ends_the_others(run):
    _, _, wait = run(3, absent=[2])
    ends = wait(2)
    assert {status for status, _ in ends.values()} == {EXIT_LOST}
    (line,) = {line for _, line in ends.values()}
    assert line.startswith("error: process 2 of 3 was lost: it has not answered for 0.5 s")


def test_the_end_of_process_0_ends_the_others(run):
    store, _, wait = run(2, absent=[0])
    with store.changed:
        store.error = "UNAVAILABLE: connection reset"
        store.changed.notify_all()
    line = f"error: process 0 of 2 was lost: its connection was closed; {watch.RESUMES}"
    assert wait(1) == {"1_beat": (EXIT_LOST, line)}


def test_a_finished_process_is_not_lost_and_sigterm_ends_only_the_start(run):
    store, watches, wait = run(2, absent=[1])
    watches[0].started()
    watches[1].finish()
    store.values[watch.PREEMPTION] = "now"
    time.sleep(0.8)
    assert not wait(0)


def test_sigterm_ends_the_start(run):
    store, _, wait = run(2)
    store.values[watch.PREEMPTION] = "now"
    end = (EXIT_STOPPED, f"SIGTERM: stopped; {watch.RESUMES}")
    assert wait(2) == {"0_beat": end, "1_beat": end}
