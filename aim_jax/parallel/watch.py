"""Watch over the processes of a run: a lost one ends the others with one line and `EXIT_LOST`.

JAX's own heartbeat ends a process by aborting it, with a dump of the native stack and a status that
says nothing. This watch is faster than it, and leaves it the cases in which Python cannot run.

Every process writes a beat into the key-value store of JAX's coordination service, which runs in
process 0. Process 0 reads the beats and publishes the verdict, which the others wait for; if the
service does not answer them, process 0 itself is lost.
"""

import atexit
import contextlib
import socket
import threading
import time
from typing import Any, NoReturn

from jax._src import distributed

from aim_jax.utils.signals import EXIT_LOST, EXIT_STOPPED, RESUMES, end_with_line

BEATS = "aim_jax/beats/"
VERDICT = "aim_jax/verdict"
# Key under which JAX's preemption service announces that some process got SIGTERM.
PREEMPTION = "RECEIVED_PREEMPTION_NOTICE"
# A process that has ended its work, but may wait for others at its exit.
FINISHED = "finished"
# Longest call that waits for the verdict; a process that exits waits for it.
POLL_MILLISECONDS = 500
# Pause before another connection to the service; JAX aborts the process within a second.
RETRY_SECONDS = 0.01
# Seconds between a verdict and the end of a process, which breaks the connections to it: all should
# have read the verdict by then. That of process 0 also ends the service.
LINGER = 1.0
LINGER_OF_FIRST = 2.0


class Watch:
    """Watch of one process over the others, in threads of its own.

    Args:
      client: Client of JAX's coordination service.
      process: Number of this process.
      count: Number of processes.
      seconds: Seconds without a beat after which a process is lost.
      address: "HOST:PORT" of the service, to notice its end before its client aborts the process.
    """

    def __init__(self, client: Any, process: int, count: int, seconds: float, address: str = ""):
        self._client = client
        self._process = process
        self._count = count
        self._seconds = seconds
        self._address = address
        self._pause = min(seconds / 10, 5.0)
        self._starting = True
        self._finished = threading.Event()
        self._threads: list[threading.Thread] = []
        self._answered = time.monotonic()
        self._seen = dict.fromkeys(range(count), ("", self._answered))

    def start(self) -> None:
        """Start the threads."""
        works = [self._beat, self._time]
        if self._address and self._process != 0:
            works.append(self._follow_service)
        for work in works:
            self._threads.append(threading.Thread(target=work, name="aim_jax watch", daemon=True))
            self._threads[-1].start()

    def started(self) -> None:
        """Leave SIGTERM to the training loop from now on."""
        self._starting = False

    def finish(self) -> None:
        """Stop watching: the process exits."""
        self._finished.set()
        # At the exit of the interpreter, a thread inside the client would abort the process.
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(Exception):  # the service has ended
            self._client.key_value_set(f"{BEATS}{self._process}", FINISHED, True)

    def _beat(self) -> None:
        number = 0
        while not self._finished.is_set():
            number += 1
            try:
                self._client.key_value_set(f"{BEATS}{self._process}", str(number), True)
                self._judge() if self._process == 0 else self._await_verdict()
            except Exception:
                if not self._finished.is_set():
                    self._end_lost(0, "its connection was closed")
                return
            self._answered = time.monotonic()

    def _time(self) -> None:
        """End the process if the service neither answers nor fails, as that of a lost host."""
        while not self._finished.is_set():
            self._finished.wait(self._pause)
            if time.monotonic() - self._answered > self._seconds and not self._finished.is_set():
                self._end_lost(0, self._silence())

    def _follow_service(self) -> None:
        """End the process as soon as nothing listens at the address of the service.

        Its client notices that as well, but then aborts the process in the thread that would also
        answer the calls of `_beat`.
        """
        host, _, port = self._address.rpartition(":")
        while not self._finished.is_set():
            try:
                with socket.create_connection((host.strip("[]"), int(port)), self._seconds) as link:
                    link.settimeout(POLL_MILLISECONDS / 1000)
                    while not self._finished.is_set():
                        with contextlib.suppress(TimeoutError):
                            if not link.recv(4096):
                                break  # the service closes connections that say nothing
            except ConnectionRefusedError:
                if not self._finished.is_set():
                    self._end_lost(0, "its connection was closed")
            except OSError:  # no route for a moment, or a name that is not resolved
                pass
            self._finished.wait(RETRY_SECONDS)

    def _judge(self) -> None:
        self._finished.wait(self._pause)
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get(BEATS):
            process = int(key.rpartition("/")[2])
            if beat == FINISHED or beat != self._seen[process][0]:
                self._seen[process] = beat, now
        for process, (_, since) in self._seen.items():
            if now - since > self._seconds and not self._finished.is_set():
                self._publish(EXIT_LOST, self._lost(process, self._silence()))
        if self._starting and self._is_preempted():
            self._publish(EXIT_STOPPED, f"SIGTERM: stopped; {RESUMES}")

    def _is_preempted(self) -> bool:
        try:
            return bool(self._client.key_value_try_get(PREEMPTION))
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return False
            raise

    def _publish(self, status: int, line: str) -> NoReturn:
        self._client.key_value_set(VERDICT, f"{status} {line}", True)
        end_with_line(line, status, LINGER_OF_FIRST)

    def _await_verdict(self) -> None:
        end = time.monotonic() + self._pause
        while time.monotonic() < end and not self._finished.is_set():
            try:
                verdict = self._client.blocking_key_value_get(VERDICT, POLL_MILLISECONDS)
                break
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        else:
            return
        status, _, line = verdict.partition(" ")
        end_with_line(line, int(status), LINGER)

    def _silence(self) -> str:
        return f"it has not answered for {self._seconds:g} s (--heartbeat_seconds)"

    def _lost(self, process: int, how: str) -> str:
        return f"error: process {process} of {self._count} was lost: {how}; {RESUMES}"

    def _end_lost(self, process: int, how: str) -> NoReturn:
        end_with_line(self._lost(process, how), EXIT_LOST)  # before JAX aborts the process


_watch: Watch | None = None


def watch_others(seconds: float) -> None:
    """Start the watch of this process, which is connected to the others."""
    global _watch
    state = distributed.global_state
    _watch = Watch(
        state.client,
        state.process_id,
        state.num_processes,
        seconds,
        state.coordinator_address or "",
    )
    _watch.start()
    atexit.register(_watch.finish)


def start_is_over() -> None:
    """Let the training loop answer SIGTERM from now on; before, it ends all processes at once."""
    if _watch is not None:
        _watch.started()
