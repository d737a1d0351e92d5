"""Checkpoints of training runs, with Orbax: a resumed run repeats an uninterrupted one exactly.

A workdir holds `run.json` (the configuration) and `checkpoints/<step>`.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from aim_jax.data.loader import ORDER, Prefetched, check_order
from aim_jax.models.config import HOW_COMPUTED, AiMConfig, VQConfig
from aim_jax.parallel.processes import is_failed_step, text_of_first
from aim_jax.sampling.config import SETTINGS
from aim_jax.utils.checks import shortened, shown
from aim_jax.utils.checksums import differences
from aim_jax.utils.files import DiskFullError, full_disk, write_json
from aim_jax.utils.json_files import anything, dict_of, integer, list_of, read_json, record, text
from aim_jax.utils.logging import say
from aim_jax.utils.names import short_list
from aim_jax.weights.pretrained import flatten

RUN_FILE = "run.json"
# Entries of the run file beside the settings.
DATA_KEY = "learned_from"
ORDER_KEY = "order"
FILES = "files.json"  # in a checkpoint: sizes and CRC-32 of its files
LISTED = {"listed": True}  # metadata of checkpoints that have their list from the start
# Settings by name, as far as this module reads them; `claim_workdir` compares all of them.
RUN = record(
    {"model": dict_of(anything)},
    {DATA_KEY: record({"class_names": list_of(text())}), ORDER_KEY: text()},
)
FILE_LIST = dict_of(list_of(integer(), 2, 2), least=1)  # size and CRC-32 by name
MOST_VALUE = 200  # characters of a setting in a message
CHUNK_BYTES = 8 * 2**20  # size of a read
UNREADABLE = [-1, -1]  # in place of size and CRC-32; differs from any list
# Settings that may change when a run resumes: its length, reports, paths, devices, the method of
# computation, and the two settings that help against loss spikes (optimizer.lr and
# optimizer.clip_norm). Settings that decide what a model learns may not change. `accumulate` does
# affect a tokenizer's batch norm, adaptive weight and entropy, which are computed per micro-batch;
# it may change because a run may have to resume with less memory.
RESUMABLE = (
    "steps", "budget_minutes", "log_every", "eval_every", "sample_every", "save_every",
    "save_minutes", "export_every", "keep", "profile", "codes", "text_tokenizer",
    "caption_features",
    "data.dir", "data.workers",
    "inception", "lpips", "init", "export_dtype",
    "sample.images", "sample.per_class", "sample.classes",
    *(f"sample.{name}" for name in SETTINGS),
    "optimizer.skip_limit", "optimizer.lr", "optimizer.clip_norm", "accumulate",
    *(f"model.{name}" for name in HOW_COMPUTED),
    "mesh.slices", "mesh.data", "mesh.model", "mesh.fsdp",
)  # fmt: skip


class SaveError(OSError):
    """A run could not write its checkpoint or another file."""


def _save_error(checkpoints: Path, path: str | os.PathLike, reason: str) -> SaveError:
    """Return the error of a run that cannot write `path`; it names the newest checkpoint."""
    complete = [int(p.name) for p in checkpoints.glob("*") if p.name.isdecimal()]
    newest = f"that of step {max(complete)}" if complete else "none yet"
    return SaveError(
        f"cannot write {path} ({reason}). The newest whole checkpoint: {newest}. Free disk space "
        "or fix the disk, and run the same command again."
    )


@contextlib.contextmanager
def naming_newest_checkpoint(
    workdir: Path, finish: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Name the newest checkpoint of a run in the error if the disk is full.

    Args:
      workdir: Directory of the run.
      finish: Waits for work in the background, such as a save; its errors come second.

    Raises:
      SaveError: The disk is full.
    """
    try:
        yield
    except SaveError:
        raise
    except Exception as error:
        reason = full_disk(error)
        if not reason:
            raise
        with contextlib.suppress(Exception):
            finish()
        path = error.path if isinstance(error, DiskFullError) else workdir
        raise _save_error(Path(workdir) / "checkpoints", path, reason) from error


class ListedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Temporary directory of a checkpoint, which is listed before it gets its final name.

    Orbax finalizes the items of a checkpoint and then the checkpoint, on process 0, when all
    processes have written their parts. It changes files until its rename. So it renames to another
    temporary name here; the list is written there, and the final name comes last.
    """

    async def finalize(self) -> None:
        """Complete the directory, write the list of its files, and rename it."""
        if not self.get_final().name.isdecimal():  # an item, such as the state
            await super().finalize()
            return
        complete = self.get().with_name(f"{self.get().name}-complete")
        await ocp.path.atomicity.AtomicRenameTemporaryPath(
            self.get(), complete, checkpoint_metadata_store=self._checkpoint_metadata_store
        ).finalize()
        write_list(Path(complete))
        os.replace(complete, self.get_final())


class RunCheckpoints:
    """Checkpoints of one training run: state and data iterator, the newest `keep` of them.

    Each checkpoint has a list of its files with sizes and CRC-32, without which it does not get its
    name. `restore_newest` verifies the list before any process reads the checkpoint.
    """

    def __init__(self, workdir: Path, keep: int):
        self.directory = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            temporary_path_class=ListedPath,
            lightweight_initialize=True,  # reads no file of a checkpoint, before it is verified
        )
        with self._save_errors():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: Prefetched) -> None:
        """Save in the background; a checkpoint is valid only once it is completely written.

        Raises:
          SaveError: This or the previous save failed; older checkpoints are unchanged.
        """
        if step == self.latest_step():
            return
        # The iterator's state does not depend on the number of processes, so one state is enough.
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(iterator.get_state())
        )
        with self._save_errors():
            self._manager.save(step, args=args, custom_metadata=LISTED)

    def wait(self) -> None:
        """Wait for the last save.

        Raises:
          SaveError: The save failed.
        """
        with self._save_errors():
            self._manager.wait_until_finished()

    def restore_newest(self, state: Any, iterator: Prefetched) -> tuple[int, Any]:
        """Restore the newest intact checkpoint; return its step and state.

        Without any checkpoint, step 0 and the `state` argument are returned. The iterator is moved
        to its saved position. Damaged checkpoints are reported and moved to `damaged/` in the
        workdir.

        Args:
          state: State of the same shapes; the result takes its shardings. If there is a checkpoint,
            the arrays of `state` are freed to make room for the restored ones.
          iterator: The run's data iterator.

        Raises:
          ValueError: There are checkpoints, but all of them are damaged.
        """
        damaged = {}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            if problem := self._problem(step, oldest=step == steps[-1]):
                damaged[step] = problem
                self._set_aside(step, problem)
                continue
            jax.tree.map(lambda x: x.delete(), state)
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            )
            try:
                restored = self._manager.restore(step, args=args)
            except jax.errors.JaxRuntimeError:  # a failure of the device, not of the files
                raise
            except Exception as error:  # TensorStore raises many kinds
                # Files with a list are known to be intact. With several processes, others wait.
                if (self.directory / str(step) / FILES).exists() or jax.process_count() > 1:
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                damaged[step] = f"step {step}: unreadable: {reason}"
                self._set_aside(step, damaged[step])
                continue
            iterator.set_state(restored["data"])
            self._list_if_missing(step)
            say(f"resumed from step {step} in {self.directory.parent}")
            return step, restored["state"]
        if damaged:
            raise ValueError(
                f"every checkpoint in {self.directory} is damaged "
                f"({'; '.join(damaged.values())}). They were moved to damaged/ beside it; the same "
                "command starts from the beginning."
            )
        return 0, state

    def close(self) -> None:
        """Stop the background work; a failure of the last save is not reported here."""
        self._manager.close()

    def _problem(self, step: int, oldest: bool) -> str:
        """Return a description of damaged or missing files, or ""; all processes get the same."""
        return text_of_first(lambda: self._find_problem(step, oldest))

    def _find_problem(self, step: int, oldest: bool) -> str:
        """Verify the files of a checkpoint.

        A checkpoint without a list cannot be verified. It is a problem, unless an older version
        saved it, which could be killed before it wrote the list, and there is none before it.
        """
        path = self.directory / str(step)
        if (path / FILES).exists():
            wrong = _wrong_files(path)
        else:
            wrong = [] if oldest and not _saved_with_list(path) else [f"missing: {FILES}"]
        more = f" and {len(wrong) - 1} more files" if wrong[1:] else ""
        return f"step {step}: {wrong[0]}{more}" if wrong else ""

    def _list_if_missing(self, step: int) -> None:
        path = self.directory / str(step)
        if jax.process_index() == 0 and not (path / FILES).exists():
            write_list(path)
            say(
                f"checkpoint step {step} of an older version had no checksums ({FILES}), so it "
                "could not be verified; it has them from now on"
            )

    def _set_aside(self, step: int, problem: str) -> None:
        say(f"skipping checkpoint {problem}; trying the previous one")
        if jax.process_index() == 0:
            target = self.directory.with_name("damaged") / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            os.replace(self.directory / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            full = full_disk(error)
            if not full and is_failed_step(error):  # the steps before it, or a lost process
                raise
            reason = full or str(error).strip() or type(error).__name__
            raise _save_error(self.directory, self.directory, reason.splitlines()[0]) from error


class SaveTimer:
    """Timer that tells all processes, after the same step, that a save is due by time.

    The clock of process 0 decides. Several processes exchange its decision after steps that they
    have agreed on before, more often as the time comes closer.

    Args:
      minutes: Minutes between two saves; 0 disables the timer.
      step: Step from which the run starts or resumes.
    """

    MOST_STEPS = 10_000  # between two exchanges

    def __init__(self, minutes: float, step: int):
        self._seconds = 60 * minutes
        self._saved = time.monotonic()
        self._asked = step, self._saved
        self._next = step + 1

    def saved(self) -> None:
        """Start the time anew, after a save for any reason."""
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether to save now; call it after every step, on all processes."""
        if not self._seconds or step < self._next:
            return False
        now = time.monotonic()
        remaining = self._seconds - (now - self._saved)
        if jax.process_count() == 1:
            return remaining <= 0
        before, then = self._asked
        self._asked = step, now
        steps_per_second = (step - before) / max(now - then, 1e-9)
        pause = int(np.clip(remaining * steps_per_second / 2, 1, self.MOST_STEPS))
        answer = multihost_utils.broadcast_one_to_all(np.array([remaining <= 0, pause], np.int32))
        self._next = step + int(answer[1])
        return bool(answer[0])


def write_list(checkpoint: Path) -> None:
    """Write the sizes and CRC-32 of a checkpoint's files into its directory."""
    write_json(checkpoint / FILES, _checksums(checkpoint))


def _wrong_files(checkpoint: Path) -> list[str]:
    """Return what differs from the list of a checkpoint's files, sorted."""
    try:
        listed = read_json(checkpoint / FILES, FILE_LIST)
    except ValueError:
        return [f"damaged: {FILES}"]
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return [f"unreadable: {FILES}"]
    return differences(listed, _checksums(checkpoint))


def _saved_with_list(checkpoint: Path) -> bool:
    """Return whether the version that saved a checkpoint lists files before the last rename."""
    try:
        metadata = read_json(checkpoint / "_CHECKPOINT_METADATA", dict_of(anything))
    except (OSError, ValueError):  # damaged as well
        return True
    return metadata.get("custom_metadata") == LISTED


def _checksums(path: Path) -> dict[str, list[int]]:
    """Return the size and CRC-32 of every file under a directory but the list."""
    sums = {}
    for file in filter(Path.is_file, path.rglob("*")):
        if file == path / FILES:
            continue
        try:
            sums[str(file.relative_to(path))] = _size_and_crc(file)
        except OSError as error:
            if error.errno != errno.EIO:  # a bad sector is damage; other errors concern all files
                raise
            sums[str(file.relative_to(path))] = UNREADABLE
    return sums


def _size_and_crc(file: Path) -> list[int]:
    size = crc = 0
    with file.open("rb") as opened:
        while data := opened.read(CHUNK_BYTES):
            size += len(data)
            crc = zlib.crc32(data, crc)
    return [size, crc]


def read_run_file(workdir: Path) -> dict[str, Any]:
    """Read the settings that a run began with.

    Raises:
      OSError: There is no run.json, or it cannot be read.
      ValueError: It is damaged.
    """
    return read_json(Path(workdir) / RUN_FILE, RUN)


def has_checkpoint(workdir: Path) -> bool:
    """Return whether a run in this directory would resume from a checkpoint.

    Complete checkpoints are named by their step; an interrupted save leaves a longer name.
    """
    return any(path.name.isdecimal() for path in (Path(workdir) / "checkpoints").glob("*"))


def _check_data(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if a run would resume on other classes or examples than it began with."""
    if before == now:
        return
    old = before.get("class_names", [])
    new = now["class_names"]
    lines = [
        f"class {i}: {shown(a)} -> {shown(b)}"
        for i, (a, b) in enumerate(itertools.zip_longest(old, new))
        if a != b
    ]
    if not lines:
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                lines.append(f"{name}: {_short(before.get(name))} -> {_short(now.get(name))}")
    raise ValueError(
        f"{workdir} is the workdir of a run on other data (its value -> yours): "
        f"{short_list(lines)}. Use another --workdir, or the data of that run."
    )


def _short(value: Any) -> str:
    return shortened(repr(value), MOST_VALUE)


def claim_workdir(workdir: Path, config: ConfigDict, data: dict[str, Any]) -> None:
    """Mark a workdir as that of this run, or check that it already is.

    A run without a checkpoint starts from the beginning, with any settings.

    Args:
      workdir: Directory of the run.
      config: Configuration of the run.
      data: What the run learns from, as JSON: its "class_names", and fingerprints.

    Raises:
      ValueError: The directory has checkpoints of a run with other settings or data (each
        difference is named), or of an unknown run.
    """
    workdir = Path(workdir)
    file = workdir / RUN_FILE
    new = json.loads(config.to_json_best_effort()) | {DATA_KEY: data}
    resumes = has_checkpoint(workdir)
    if resumes and file.exists():
        old = read_run_file(workdir)
        # Before any checkpoint is judged.
        check_order(old.pop(ORDER_KEY, None), run=f"the run of {file}")
        # Older versions recorded only those fields of the model that differ from the defaults.
        shape = {"aim": AiMConfig, "vq": VQConfig}[new["stage"]]
        old["model"] = json.loads(json.dumps(dataclasses.asdict(shape()))) | old["model"]
        _check_data(workdir, old.pop(DATA_KEY, {}), new.pop(DATA_KEY))
        before = flatten(old)
        after = flatten(new)
        changed = {
            key: f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}"
            for key in sorted(before.keys() | after.keys())
            # Older versions have no entry for a setting that is off by default.
            if (before.get(key) or None) != (after.get(key) or None)
        }
        other = [line for key, line in changed.items() if key not in RESUMABLE]
        if other:
            raise ValueError(
                f"{workdir} is the workdir of another run; settings that differ (its value -> "
                f"yours): {'; '.join(other)}. Use another --workdir, or the settings of that run."
            )
        if changed:
            say(f"the run resumes with changed settings: {'; '.join(changed.values())}")
    elif resumes:
        raise ValueError(
            f"{workdir} holds checkpoints but no {RUN_FILE}, so the run they belong to is unknown; "
            "use another --workdir."
        )
    if jax.process_index() == 0:
        with naming_newest_checkpoint(workdir):
            write_json(file, new | {DATA_KEY: data, ORDER_KEY: ORDER})
