"""Ends of work after an error: clean-up never hides the first error."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def closing_all() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Call the registered functions after the block, the last one first; the first error wins.

    Unlike in `contextlib.ExitStack`, an error of a registered function neither replaces the error
    of the block or of a function before it, nor prevents the others from being called.

    Yields:
      A function that registers another, which takes no arguments.
    """
    actions: list[Callable[[], Any]] = []
    first: BaseException | None = None
    try:
        yield actions.append
    except BaseException as error:
        first = error
    for action in reversed(actions):
        try:
            action()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for its tasks before it closes."""

    SECONDS = 60.0  # at most; a task may wait for one that failed

    def __init__(self) -> None:
        super().__init__()
        self._unfinished: set[asyncio.Task] = set()
        self.set_task_factory(self._new_task)

    def _new_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        task = asyncio.Task(coroutine, loop=loop, **options)
        self._unfinished.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task) -> None:
        self._unfinished.discard(task)
        # Marks the error as seen. Whoever waits for the task still gets it; asyncio would also log
        # the errors that nobody waits for any more, because another task failed first.
        if not task.cancelled():
            task.exception()

    def close(self) -> None:
        if not self.is_closed() and not self.is_running() and self._unfinished:
            waiting = asyncio.wait(set(self._unfinished), timeout=self.SECONDS)
            self.run_until_complete(waiting)
        super().close()


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextlib.contextmanager
def patient_event_loops() -> Iterator[None]:
    """Let event loops that are created during the block finish their tasks before they close.

    Orbax writes the arrays of a checkpoint as tasks of one event loop, and closes it as soon as one
    of them fails. The others still write then. They would call a closed loop when they end, whose
    errors asyncio and TensorStore print, with tracebacks, around the one of the first task.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)
