"""Exclusive ownership of a directory: one run at a time writes to a workdir, cache or report.

The owner keeps a lock file in the directory. It names host and process, and is touched every
`BEAT_SECONDS`. It is created, replaced and removed by single operations of the file system, so that
it also works on network file systems, and no clocks of different hosts are compared.

A lock is left behind by a process that was killed. On the same host, it is taken over if its
process has ended. Otherwise it is taken over if it was not touched for `PATIENCE_SECONDS` of
watching.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aim_jax.parallel.processes import text_of_first
from aim_jax.utils.files import replacing
from aim_jax.utils.logging import say

BEAT_SECONDS = 15.0
PATIENCE_SECONDS = 120.0
POLL_SECONDS = 1.0  # between two looks at the lock of another host
CHECK_SECONDS = 5.0  # a check trusts an earlier one for so long
MOST_BYTES = 4096  # that are read of a lock file
LOCK = ".owner.json"


class OwnershipError(OSError):
    """A directory belongs to another run, or cannot be claimed."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Content of a lock file: the process that holds it.

    Attributes:
      host: Name of the host.
      machine: Identifies the boot and the process namespace that `pid` belongs to.
      pid: Number of the process.
      start: Start time of the process in the units of its kernel; "" where it cannot be read.
      since: Time of the claim, for messages.
      token: Unique for each claim.
    """

    host: str
    machine: str
    pid: int
    start: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    @classmethod
    def this_process(cls) -> "Holder":
        """Return a new claim of this process."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _status(pid)[1], now, uuid.uuid4().hex)

    @classmethod
    def parse(cls, text: str) -> "Holder | None":
        """Return the holder that a lock file names, or None if it is incomplete."""
        try:
            holder = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        is_number = isinstance(holder.pid, int) and 0 < holder.pid < 2**31
        texts = (value for name, value in vars(holder).items() if name != "pid")
        return holder if is_number and all(map(_is_line, texts)) else None

    def text(self) -> str:
        """Return the content of the lock file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def is_local(self) -> bool:
        """Return whether this process can see whether the holder runs."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    def has_ended(self) -> bool:
        """Return whether a local holder has ended; its number may belong to a later process."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # a process of another user
            pass
        state, start = _status(self.pid)
        return state in ("Z", "X") or (start != "" and start != self.start)


class Claim:
    """Ownership of a directory, kept by a thread until `release`.

    Args:
      path: The lock file, which `holder` has created; None for a claim of nothing.
      holder: This process.
      created: Directories that were created for it. They are removed at the end if they are empty.
    """

    def __init__(
        self, path: Path | None = None, holder: Holder | None = None, created: tuple[Path, ...] = ()
    ):
        self._path = path
        self._holder = holder
        self._created = created
        self._problem = ""
        self._checked = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="aim_jax owner", daemon=True)
        if path is not None:
            self._thread.start()

    def check(self) -> None:
        """Check that the directory is still owned; call it before writing. It is cheap.

        Raises:
          OwnershipError: The lock file was removed, or another run has taken the directory over.
        """
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self._beat()
        if self._problem:
            raise OwnershipError(self._problem)

    def release(self) -> None:
        """Give the directory back."""
        if self._path is None or self._holder is None:
            return
        self._ended.set()
        self._thread.join()
        _remove(self._path, self._holder)
        for directory in self._created:
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        """Touch the lock file, or note that it is lost."""
        if self._path is None or self._holder is None:
            return
        with contextlib.suppress(OSError):  # the file system may fail for a moment
            seen = _look(self._path)
            if seen is not None and seen.text == self._holder.text():
                os.utime(self._path)
                self._checked = time.monotonic()
                return
            event = "was removed" if seen is None else f"was taken over by {seen.holder}"
            self._problem = (
                f"{self._path} {event}, so this run no longer owns the directory and ends without "
                "writing to it. Let one run at a time write there."
            )


NO_CLAIM = Claim()


@contextlib.contextmanager
def owned(directory: str | os.PathLike, part: tuple[int, int] = (0, 1)) -> Iterator[Claim]:
    """Own a directory during the block; it is created if it is missing.

    All processes of a run must call this. Process 0 claims the directory for all of them.

    Args:
      directory: The directory.
      part: (i, n) shares the directory with the other of n parts, which are runs of their own.

    Raises:
      OwnershipError: Another run owns the directory, or it cannot be written.
    """
    claim = NO_CLAIM

    def claim_it() -> str:
        nonlocal claim
        try:
            claim = _claim(Path(directory).absolute(), part)
        except OwnershipError as error:
            return str(error)
        return ""

    try:
        if problem := text_of_first(claim_it):
            raise OwnershipError(problem)
        yield claim
    finally:
        claim.release()


def _claim(directory: Path, part: tuple[int, int]) -> Claim:
    mine = Holder.this_process()
    name = LOCK if part[1] == 1 else f".owner-{part[0] + 1}-of-{part[1]}.json"
    path = directory / name
    created = tuple(p for p in (directory, *directory.parents) if not p.exists())
    try:
        _acquire(path, mine)
        try:
            others = [directory / LOCK] if part[1] > 1 else sorted(directory.glob(".owner-*.json"))
            for other in others:
                if _left_behind(other) is not None and part[1] == 1:
                    other.unlink(missing_ok=True)
        except BaseException:
            _remove(path, mine)
            raise
    except OwnershipError:
        raise
    except OSError as error:
        raise OwnershipError(
            f"{directory} cannot be written ({error.strerror}); name a directory that this user "
            "can write, on a disk with free space."
        ) from error
    return Claim(path, mine, created)


class _Seen(NamedTuple):
    """Content and time stamp of a lock file."""

    text: str
    mtime: int

    @property
    def holder(self) -> Holder | str:
        return Holder.parse(self.text) or "another process"


def _look(path: Path) -> _Seen | None:
    """Read a lock file; None if there is none. Network file systems read it afresh when opened."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES).decode(errors="replace")
            return _Seen(text, os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _acquire(path: Path, mine: Holder) -> None:
    """Create a lock file, or take it over from a holder that is gone.

    Raises:
      OwnershipError: Its holder is alive.
      OSError: The directory cannot be written.
    """
    while not _create(path, mine):
        old = _left_behind(path)
        if old is None:  # released meanwhile
            time.sleep(0.05)
            continue
        # Of those who come to the same result, only the holder of this second lock may act on it.
        turn = path.with_name(f"{path.name}.takeover")
        _acquire(turn, mine)
        try:
            now = _look(path)
            if now == old:  # it did not come back meanwhile
                with replacing(path) as partial:
                    partial.write_text(mine.text())
                say(f"{path.parent}: taken over from {old.holder}, which is gone")
                return
        finally:
            _remove(turn, mine)


def _create(path: Path, mine: Holder) -> bool:
    """Create a lock file and return whether it did not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            try:
                file.write(mine.text())
                file.flush()
            except OSError:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        return False
    return True


def _remove(path: Path, mine: Holder) -> None:
    """Remove a lock file if this process holds it."""
    with contextlib.suppress(OSError):
        seen = _look(path)
        if seen is not None and seen.text == mine.text():
            path.unlink()


def _left_behind(path: Path) -> _Seen | None:
    """Return a lock file whose holder is gone, or None if there is no lock file.

    Raises:
      OwnershipError: Its holder is alive.
    """
    while (seen := _look(path)) is not None:
        holder = Holder.parse(seen.text)
        # Without the start time, as on macOS, the number may be that of a later process.
        if holder is not None and holder.is_local() and (holder.has_ended() or holder.start):
            is_gone = holder.has_ended()
        else:
            later = _watch(path, seen)
            if later is None or later.text != seen.text:
                continue
            is_gone = later == seen
        if is_gone:
            return seen
        raise OwnershipError(
            f"{path.parent} is in use by {seen.holder}. Name another directory, or wait until that "
            f"process has ended; if there is no such process, delete {path}."
        )
    return None


def _watch(path: Path, seen: _Seen) -> _Seen | None:
    """Return how a lock file looks when it changes, or after `PATIENCE_SECONDS`."""
    say(
        f"{path.parent} is claimed by {seen.holder}; watching for up to {PATIENCE_SECONDS:.0f} s "
        "whether it is alive"
    )
    end = time.monotonic() + PATIENCE_SECONDS
    while (later := _look(path)) == seen and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return later


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _machine() -> str:
    """Return a name for this boot and process namespace, which two containers do not share."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return ""


def _status(pid: int) -> tuple[str, str]:
    """Return the state and start time of a process; "" where they cannot be read."""
    try:
        # The name of the program before them may hold any characters.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
