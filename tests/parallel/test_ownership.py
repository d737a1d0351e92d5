"""One owner of a directory: who is refused, who takes over, and how an owner learns of its loss."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aim_jax.configs.defaults import eval_defaults, vq_defaults
from aim_jax.evaluation.evaluate import evaluate
from aim_jax.evaluation.sweep import sweep
from aim_jax.parallel import ownership
from aim_jax.parallel.ownership import LOCK, Holder, OwnershipError, owned
from aim_jax.weights.directories import save_model
from aim_jax.weights.load import load_pretrained
from tests import programs


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds become hundredths."""
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(ownership, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(ownership, "CHECK_SECONDS", 0.0)


def left(directory, name=LOCK, **changes):
    """A lock file as another process left it."""
    directory.mkdir(exist_ok=True)
    holder = dataclasses.replace(Holder.this_process(), **changes)
    (directory / name).write_text(holder.text())
    return directory / name


def test_a_second_claim_is_refused_in_one_line_that_names_the_holder(tmp_path):
    directory = tmp_path / "runs" / "a"
    with owned(directory) as claim:
        claim.check()
        lock = json.loads((directory / LOCK).read_text())
        with pytest.raises(OwnershipError) as refused, owned(directory):
            pass
        message = str(refused.value)
        assert f"{directory} is in use by process {os.getpid()} on {lock['host']}" in message
        assert "\n" not in message and str(directory / LOCK) in message
        claim.check()  # the holder has lost nothing
        (directory / "kept").touch()
    assert os.listdir(directory) == ["kept"]
    with pytest.raises(ZeroDivisionError), owned(directory):
        raise ZeroDivisionError
    assert os.listdir(directory) == ["kept"]


def test_nothing_is_left_of_an_unused_directory(tmp_path):
    with owned(tmp_path / "runs" / "a"):
        pass
    assert not any(tmp_path.iterdir())


def test_another_program_is_refused_until_it_ends_or_is_killed(tmp_path, capsys):
    """A process that was killed holds nothing, even before its parent has noticed."""
    program = (
        "import sys\nfrom aim_jax.parallel.ownership import owned\n"
        "with owned(sys.argv[1]):\n    print('owned', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "run"]
    holder = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert holder.stdout.readline() == b"owned\n"
        with (
            pytest.raises(OwnershipError, match=f"process {holder.pid} on"),
            owned(tmp_path / "run"),
        ):
            pass
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # leaves a zombie
        with owned(tmp_path / "run") as claim:
            claim.check()
        assert f"taken over from process {holder.pid} on" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.communicate()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_later_process_with_the_same_number_is_no_holder(tmp_path):
    if not Path("/proc/self/stat").exists():
        pytest.skip("start times of processes are read from Linux's /proc")
    left(tmp_path / "run", start="1")
    with owned(tmp_path / "run") as claim:
        claim.check()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"machine": "another container"}, None])
def test_a_holder_elsewhere_is_taken_over_when_it_shows_no_life(tmp_path, capsys, other):
    """Its process cannot be seen, whatever its number; a lock without content is as good."""
    lock = left(tmp_path / "run", **(other or {}))
    if other is None:
        lock.write_text("")
    os.utime(lock, (2e9, 2e9))  # no clocks are compared
    with owned(tmp_path / "run") as claim:
        claim.check()
    said = capsys.readouterr().err
    assert "watching for up to" in said and "taken over from" in said
    assert said.count("\n") == 2


def test_a_holder_elsewhere_that_is_alive_keeps_its_directory(tmp_path):
    lock = left(tmp_path / "run", host="elsewhere")
    before = lock.read_text()
    beat = threading.Timer(0.1, os.utime, [lock, (1, 1)])
    beat.start()
    with (
        pytest.raises(OwnershipError, match=r"in use by process .* on elsewhere"),
        owned(lock.parent),
    ):
        pass
    beat.join()
    assert lock.read_text() == before and os.listdir(lock.parent) == [LOCK]


def test_of_many_who_take_over_one_wins(tmp_path):
    """All of them saw the same lock of a process that is gone."""
    left(tmp_path / "run", start="1")
    start, done = threading.Barrier(8), threading.Barrier(8)
    won, refused = [], []

    def take():
        start.wait()
        try:
            with owned(tmp_path / "run") as claim:
                won.append(claim)
                done.wait()
                claim.check()
        except OwnershipError as error:
            refused.append(str(error))
            done.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 7
    assert not (tmp_path / "run" / LOCK).exists()


def test_an_owner_learns_that_its_lock_was_taken_or_removed(tmp_path):
    with owned(tmp_path) as claim:
        taken = left(tmp_path, host="elsewhere").read_text()
        with pytest.raises(OwnershipError, match=r"taken over by process .* on elsewhere"):
            claim.check()
    assert (tmp_path / LOCK).read_text() == taken  # the other's lock is left alone
    (tmp_path / LOCK).unlink()
    with owned(tmp_path / "run") as claim:
        (tmp_path / "run" / LOCK).unlink()
        with pytest.raises(OwnershipError, match="was removed, so this run no longer owns"):
            claim.check()


def test_the_lock_is_touched_while_its_owner_works(tmp_path):
    with owned(tmp_path) as claim:
        os.utime(tmp_path / LOCK, (1, 1))
        deadline = threading.Event()
        while (tmp_path / LOCK).stat().st_mtime == 1:
            assert not deadline.wait(0.01)
        claim.check()


def test_parts_share_a_directory_with_each_other_alone(tmp_path):
    with owned(tmp_path, (0, 2)), owned(tmp_path, (1, 2)):
        with pytest.raises(OwnershipError, match="in use by"), owned(tmp_path, (1, 2)):
            pass
        with pytest.raises(OwnershipError, match="in use by"), owned(tmp_path):
            pass
        assert sorted(os.listdir(tmp_path)) == [".owner-1-of-2.json", ".owner-2-of-2.json"]
    refused = pytest.raises(OwnershipError, match="in use by")
    with owned(tmp_path), refused, owned(tmp_path, (0, 2)):
        pass
    left(tmp_path, ".owner-2-of-3.json", start="1")
    with owned(tmp_path):
        assert os.listdir(tmp_path) == [LOCK]
    left(tmp_path, start="1")
    with owned(tmp_path, (0, 2)) as claim:
        claim.check()


def test_a_directory_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OwnershipError, match=r"file cannot be written .*name a directory"),
        owned(tmp_path / "file"),
    ):
        pass


@pytest.mark.parametrize("stage", [("train", "fashion_mnist"), ("train_vq", "fashion_mnist_vq")])
def test_trainings_are_refused_before_they_read_anything(tmp_path, stage):
    program, config = stage
    with owned(tmp_path / "run"):
        ended = programs.run(program, "--config", config, "--workdir", tmp_path / "run")
        assert os.listdir(tmp_path / "run") == [LOCK]
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on ")


def test_a_token_cache_has_one_writer_of_each_part(tiny_model, picture_folder, tmp_path):
    data = vq_defaults().data.to_dict() | {"name": "folder", "image_size": 4, "channels": 1}
    tokenizer = save_model(tmp_path / "vq", dataclasses.replace(tiny_model, info={"data": data}))
    out = tmp_path / "codes"

    def extract(*options):
        return programs.run(
            "extract_codes", "--tokenizer", tokenizer, "--data", picture_folder, "--out", out,
            *options,
        )  # fmt: skip

    with owned(out / "validation"):
        ended = extract()
        assert ended.returncode == 1 and "validation is in use by process" in ended.stderr
        assert os.listdir(out) == ["validation"]  # nothing is left of the split that was free
    with owned(out / "train", (1, 2)), owned(out / "validation", (1, 2)):
        assert "is in use by process" in extract().stderr
        assert "is in use by process" in extract("--part", "2/2").stderr
        assert os.listdir(out / "train") == [".owner-2-of-2.json"]


def test_results_of_evaluations_have_one_writer(tiny_model_dir, tmp_path):
    model = load_pretrained(tiny_model_dir)
    rest = "cifar10:test", {}, eval_defaults(), tmp_path / "out", tmp_path / "cache"
    with owned(tmp_path / "out"):
        with pytest.raises(OwnershipError, match="out is in use by"):
            evaluate(model, "", *rest)
        with pytest.raises(OwnershipError, match="out is in use by"):
            sweep(model, {"cfg_scale": [1.0]}, *rest)
        assert os.listdir(tmp_path / "out") == [LOCK]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"", b"{}"])
def test_a_damaged_lock_is_watched_like_that_of_a_stranger(tmp_path, monkeypatch, content, capsys):
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 0.1)
    (tmp_path / LOCK).write_bytes(content)
    with owned(tmp_path) as claim:
        claim.check()
        (tmp_path / LOCK).write_bytes(content)
        claim._beat()
        with pytest.raises(OwnershipError, match="was taken over by another process"):
            claim.check()
    assert "taken over from another process" in capsys.readouterr().err
