"""Ctrl-C in the programs, as a terminal sends it: to the process and those that it started."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from aim_jax.configs.defaults import vq_defaults
from aim_jax.utils.signals import EXIT_INTERRUPTED, EXIT_STOPPED, RESUMES
from aim_jax.weights.directories import save_model
from tests.conftest import ROOT

LINE = "stopped by Ctrl-C"


def interrupted(command, wait_for, options=(), number=signal.SIGINT):
    """Starts a program and sends a signal, that of Ctrl-C, after `wait_for(process)`.

    Returns its status, and what it wrote to stderr afterwards.
    """
    process = subprocess.Popen(
        [sys.executable, *options, "-m", "aim_jax", *map(str, command)], cwd=ROOT, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(process)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    return process.returncode, said


def until_line(text):
    """Waits until the program writes a line with this text."""

    def wait(process):
        for line in process.stderr:
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}")

    return wait


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "--checkpoint", "cifar10"),
        ("convert", "to-torch", "--checkpoint", "cifar10", "--out", "never.safetensors"),
        ("export", "--checkpoint", "cifar10", "--out", "never"),
        ("evaluate", "--checkpoint", "cifar10"),
    ],
    ids=lambda command: command[0],
)
def test_ending_during_imports(command):
    status, said = interrupted(command, until_line("jax._src"), ("-X", "importtime"))
    others = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert (status, others) == (EXIT_INTERRUPTED, [LINE])


def test_sigterm_during_the_imports_of_training():
    command = ("train", "--config", "fashion_mnist", "--workdir", "never")
    wait = until_line("jax._src")
    status, said = interrupted(command, wait, ("-X", "importtime"), signal.SIGTERM)
    others = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert (status, others) == (EXIT_STOPPED, [f"SIGTERM: stopped; {RESUMES}"])


def test_ending_of_sampling(tiny_model_dir, tmp_path):
    command = ("sample", "--checkpoint", tiny_model_dir, "--per_class", 10**6, "--batch_size", 3)
    out = tmp_path / "out"
    status, said = interrupted([*command, "--out", out], until_line("sampling: "))
    others = [line for line in said.splitlines() if not line.startswith("sampling: ")]
    assert (status, others) == (EXIT_INTERRUPTED, [LINE])
    assert not any(out.iterdir())


def children(pid):
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, file.read_text().split())
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("moment", ["start", "later"])
def test_ending_while_processes_decode_images(tiny_model, picture_folder, tmp_path, moment):
    """From their first moment on, they ignore what is meant for the program, and end with it."""
    data = vq_defaults().data.to_dict() | {"name": "folder", "image_size": 4, "channels": 1}
    tokenizer = save_model(tmp_path / "vq", dataclasses.replace(tiny_model, info={"data": data}))
    started = []

    def workers_started(process):
        while process.poll() is None and len(started) < 3:  # two and Python's tracker of them
            started[:] = children(process.pid)
            time.sleep(0.01)
        time.sleep({"start": 0.2, "later": 4.0}[moment])

    command = ("extract_codes", "--tokenizer", tokenizer, "--data", picture_folder)
    options = ("--out", tmp_path / "codes", "--workers", 2, "--split", "train")
    status, said = interrupted([*command, *options], workers_started)
    if moment == "start":
        layout, *others = said.splitlines()
        assert layout.startswith("train: 48 images")
        assert (status, others) == (EXIT_INTERRUPTED, [LINE])
    assert status in (0, EXIT_INTERRUPTED) and "Traceback" not in said
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}/exe").exists() for child in started):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)


def test_ending_of_the_page(tiny_model_dir):
    pytest.importorskip("gradio", reason="the page requires pip install 'aim_jax[page]'")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def answers(process):
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=10).read()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
            else:
                return

    command = ("demo", "--page", "--checkpoint", tiny_model_dir, "--port", port)
    status, said = interrupted(command, answers)
    assert status == EXIT_INTERRUPTED and said.splitlines()[-1] == LINE
    assert "Traceback" not in said and len(re.findall(LINE, said)) == 1


def test_ending_before_the_first_model_tells_what_to_do(tmp_path):
    from aim_jax.weights.load import load_pretrained

    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no model .*run'.*Repeat its training command"):
        load_pretrained(tmp_path / "run")
