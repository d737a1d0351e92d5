"""The first error wins, in clean-up and in event loops; a full disk has one message."""

import asyncio
import errno
import os
import zipfile
from pathlib import Path

import pytest

from aim_jax.utils.endings import closing_all, patient_event_loops
from aim_jax.utils.files import DiskFullError, replacing, writing

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

FULL_DEVICE = Path("/dev/full")


def failing(text, calls):
    def fail():
        calls.append(text)
        raise OSError(text)

    return fail


@pytest.mark.parametrize("block_fails", [True, False])
def test_first_error_wins_and_all_are_closed(block_fails):
    calls = []
    with pytest.raises(OSError) as caught, closing_all() as at_end:
        at_end(failing("second", calls))
        at_end(failing("first", calls))
        if block_fails:
            raise OSError("block")
    assert str(caught.value) == ("block" if block_fails else "first")
    assert calls == ["first", "second"]


def test_loops_wait_for_the_tasks_beside_the_first_that_fails(caplog):
    """As Orbax runs them: the loop is closed as soon as one of its tasks fails."""
    done = []

    async def write(delay):
        await asyncio.sleep(delay)
        done.append(delay)
        raise OSError(errno.ENOSPC, f"after {delay}")

    async def save():
        await asyncio.gather(*map(write, (0.02, 0.0, 0.05)))

    with patient_event_loops():
        loop = asyncio.new_event_loop()
        with pytest.raises(OSError, match=r"after 0\.0$"):
            loop.run_until_complete(save())
        loop.close()
    assert done == [0.0, 0.02, 0.05] and loop.is_closed()
    assert not caplog.records  # such as "Task exception was never retrieved"
    assert type(asyncio.new_event_loop()) is not type(loop)


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_named_with_the_path(tmp_path):
    message = r"cannot write .*report\.txt \(No space left on device\)\. Free disk space"
    with pytest.raises(DiskFullError, match=message), writing(tmp_path / "report.txt"):
        FULL_DEVICE.write_text("text")
    # Archives replace the first error while they close, libraries in Rust and C++ quote it.
    with pytest.raises(DiskFullError, match=message), replacing(tmp_path / "report.txt") as partial:
        partial.symlink_to(FULL_DEVICE)
        with zipfile.ZipFile(partial, "w") as archive, archive.open("a", "w") as stream:
            stream.write(os.urandom(10**5))
    with pytest.raises(DiskFullError, match=message), replacing(tmp_path / "report.txt"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^other$"), writing(tmp_path):
        raise ValueError("other")
