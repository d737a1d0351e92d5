"""The loop: what is called after which step, with what, and in which order."""

import os
import re
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax.configs import fashion_mnist
from aim_jax.configs.defaults import aim_defaults, vq_defaults
from aim_jax.parallel.sharding import make_mesh
from aim_jax.training import aim, loop, monitor, tokenizer
from aim_jax.training.checkpoint import RunCheckpoints
from aim_jax.training.loop import Every, Stage
from aim_jax.training.state import TrainState
from tests.conftest import ROOT, TINY_AIM, TINY_VQ
from tests.training.test_aim import records


class Batches:
    """Counts the batches it gives; batch number `stop_at` sends this process a signal first."""

    def __init__(self, stop_at=None, number=signal.SIGTERM):
        self.given = 0
        self._stop_at = stop_at
        self._number = number

    def __next__(self):
        self.given += 1
        if self.given == self._stop_at:
            os.kill(os.getpid(), self._number)
        return {"x": np.full(8, self.given, np.float32)}

    def get_state(self):
        return {"given": self.given}

    def set_state(self, state):
        self.given = state["given"]


@jax.jit
def step_on(state, batch):
    zero = jnp.zeros((), jnp.int32)
    metrics = {"loss": batch["x"].mean(), "grad_norm": jnp.ones(())}
    metrics |= {"skipped": zero, "skipped_in_a_row": zero}
    return state.replace(step=state.step + 1), metrics


@pytest.fixture
def config():
    config = aim_defaults()
    config.batch_size, config.steps, config.log_every = 8, 7, 2
    config.save_every, config.eval_every, config.sample_every, config.export_every = 3, 2, 4, 3
    return config


@pytest.fixture
def run(config, tmp_path, monkeypatch):
    """Runs the loop on a step that does nothing; returns what was done, in order."""
    events = []
    save = RunCheckpoints.save

    def noted(checkpoints, step, state, iterator):
        if step != checkpoints.latest_step():
            events.append(("save", step))
        save(checkpoints, step, state, iterator)

    monkeypatch.setattr(RunCheckpoints, "save", noted)

    def run(batches, *callbacks):
        events.clear()
        note = lambda name: lambda state, *_: events.append((name, int(state.step)))  # noqa: E731
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, {"w": jnp.ones(3)}, {}, None, jax.random.PRNGKey(0))
        reports = loop.run_callbacks(
            config,
            lambda state: note("evaluate")(state) or {"val_loss": 10 * int(state.step)},
            note("sample"),
            note("export"),
        )
        stage = Stage(step_on, batches, [*reports, *callbacks], note("export"))
        state = loop.run(
            config, tmp_path / "run", make_mesh(devices=jax.devices()[:1]), state, stage
        )
        return int(state.step), list(events)

    return run


def test_checkpoint_evaluation_export_samples_and_then_callbacks_of_the_user(run):
    order = []
    steps, events = run(Batches(), Every(4, lambda info: order.append(info.step)))
    assert steps == 7 and order == [4, 7]
    assert events == [
        ("evaluate", 2),
        ("save", 3), ("export", 3),
        ("evaluate", 4), ("sample", 4),
        ("save", 6), ("evaluate", 6), ("export", 6),
        ("save", 7), ("evaluate", 7), ("sample", 7), ("export", 7),
    ]  # fmt: skip


def test_callbacks_see_what_was_written_since_their_last_call(run, tmp_path):
    seen = {}

    def note(info):
        assert info.workdir == tmp_path / "run" and int(info.state.step) == info.step
        seen[info.step] = (info.last, info.scalars)
        info.write({"twice": np.float32(2 * info.step)})

    run(Batches(), Every(3, note))
    assert seen.keys() == {3, 6, 7}
    assert [last for last, _ in seen.values()] == [False, False, True]
    # Reports after 1, 2, 4, 6 and 7; evaluations after 2, 4, 6 and 7.
    losses = [scalars["loss"] for _, scalars in seen.values()]
    assert losses == [2, 5.5, 7]
    assert [scalars["val_loss"] for _, scalars in seen.values()] == [20, 60, 70]
    assert [scalars.get("twice") for _, scalars in seen.values()] == [None, 6, 12]
    assert "examples_per_second" in seen[7][1]
    written = [row for row in records(tmp_path / "run") if "twice" in row]
    assert written == [{"step": step, "twice": 2.0 * step} for step in (3, 6, 7)]


def test_a_resumed_run_calls_them_after_the_same_steps(run, config):
    called = []
    pairs = (
        Every(2, lambda info: called.append(info.step)),
        Every(5, lambda info: called.append(f"end {info.step}"), at_end=False),
        Every(0, lambda info: called.append("never")),
    )
    steps, events = run(Batches(stop_at=4), *pairs)
    assert steps == 4 and called == [2, 4] and events[-1] == ("save", 4)  # not "export"
    called.clear()
    assert run(Batches(), *pairs)[0] == 7
    assert called == ["end 5", 6, 7]
    called.clear()
    assert run(Batches(), *pairs) == (7, [("export", 7)]) and not called  # nothing left to do
    config.steps = 9
    steps, events = run(Batches(stop_at=8, number=signal.SIGINT), *pairs)
    assert (steps, called, events[-2:]) == (8, [8], [("save", 8), ("export", 8)])


def test_the_training_rate_leaves_their_time_out(run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])
    rates = []

    class Slow(Batches):
        def __next__(self):
            clock[0] += 1.0
            return super().__next__()

    def wait(info):
        rates.append(info.scalars["examples_per_second"])
        clock[0] += 1000.0

    run(Slow(), Every(2, wait))
    assert rates == [8.0] * 4


def test_an_error_of_a_callback_ends_the_run_and_loses_no_checkpoint(run, tmp_path):
    def fail(info):
        raise RuntimeError("the disk of the user is full")

    with pytest.raises(RuntimeError, match="of the user"):
        run(Batches(), Every(3, fail))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    called = []
    assert run(Batches(), Every(3, lambda info: called.append(info.step)))[0] == 7
    assert called == [6, 7]  # it resumed from step 3


class Wandb(types.ModuleType):
    """Stands in for Weights & Biases."""

    run = None

    def init(self, **settings):
        self.run, self.logged = settings, []

    def log(self, scalars, step):
        self.logged.append((step, scalars))


def test_the_example_sends_scalars_to_weights_and_biases(
    picture_folder, tiny_model_dir, tmp_path, monkeypatch
):
    """The page's own code, on a small model and one device, for which programs compile sooner."""
    monkeypatch.setattr(aim, "make_mesh", lambda *_: make_mesh(devices=jax.devices()[:1]))
    small = aim_defaults()
    small.steps, small.batch_size, small.log_every = 5, 8, 2
    small.eval_every = small.save_every = 4
    small.sample_every = 0
    small.tokenizer = str(tiny_model_dir)
    small.model.update(vars(TINY_AIM))
    small.data.update(name="folder", dir=str(picture_folder), image_size=4, channels=1)
    monkeypatch.setattr(fashion_mnist, "get_config", lambda: small)
    wandb = Wandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(import wandb\n.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/training.md", "exec"), {})
    assert wandb.run["config"]["steps"] == 5
    assert [step for step, _ in wandb.logged] == [2, 4, 5]
    assert all(np.isfinite(scalars["loss"]) for _, scalars in wandb.logged)
    assert ["val_loss" in scalars for _, scalars in wandb.logged] == [False, True, True]
    assert (tmp_path / "runs" / "fashion_mnist" / "model").is_dir()


def test_training_of_the_tokenizer_takes_callbacks_too(picture_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(loop, "run", lambda *args: given.append(args[-1]))
    state = types.SimpleNamespace(params={})
    monkeypatch.setattr(tokenizer, "create_sharded", lambda *_: state)
    small = vq_defaults()
    small.batch_size = 8
    small.model.update(vars(TINY_VQ))
    small.data.update(name="folder", dir=str(picture_folder), image_size=4, channels=1)
    mine = Every(3, print)
    tokenizer.train(small, tmp_path / "run", [mine])
    assert given[0].callbacks[-1] is mine and len(given[0].callbacks) == 4
