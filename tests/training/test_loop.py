"""The loop: what is called after which step, with what, and in which order."""

import contextlib
import functools
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
from aim_jax.parallel import ownership
from aim_jax.parallel.ownership import NO_CLAIM
from aim_jax.parallel.sharding import make_mesh
from aim_jax.training import aim, checkpoint, loop, monitor, tokenizer
from aim_jax.training.checkpoint import RunCheckpoints
from aim_jax.training.loop import Every, Stage
from aim_jax.training.state import TrainState
from tests.conftest import ROOT, TINY_AIM, TINY_VQ
from tests.training.test_aim import records


class Batches:
    """Counts the batches it gives; batch number `stop_at` sends this process signals first."""

    def __init__(self, stop_at=None, *numbers):
        self.given = 0
        self._stop_at = stop_at
        self._numbers = numbers or (signal.SIGTERM,)

    def __next__(self):
        self.given += 1
        if self.given == self._stop_at:
            for number in self._numbers:
                os.kill(os.getpid(), number)
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

    def run(batches, *callbacks, claim=NO_CLAIM):
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
            config, tmp_path / "run", make_mesh(devices=jax.devices()[:1]), state, stage, claim
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
    assert steps == 4 and called == [2, 4]
    assert events[-2:] == [("save", 4), ("export", 4)]  # a model for the next stage
    called.clear()
    assert run(Batches(), *pairs)[0] == 7
    assert called == ["end 5", 6, 7]
    called.clear()
    assert run(Batches(), *pairs) == (7, [("export", 7)]) and not called  # nothing left to do
    config.steps = 9
    steps, events = run(Batches(8, signal.SIGINT), *pairs)
    assert (steps, called, events[-2:]) == (8, [8], [("save", 8), ("export", 8)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_says_at_once_what_it_leads_to(run, tmp_path, capsys, number):
    steps, events = run(Batches(5, number))
    said = capsys.readouterr().err
    name = signal.Signals(number).name
    assert f"{name}: stopping after this step, which is saved" in said
    assert f"{name}: saved step 5; the same command resumes from there." in said
    assert said.index("stopping") < said.index("saved step 5")
    assert steps == 5 and events[-2:] == [("save", 5), ("export", 5)]
    assert run(Batches())[0] == 7


def test_ending_twice_ends_at_once_and_keeps_the_last_save(run, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(Batches(5, signal.SIGINT, signal.SIGINT))
    assert "stopping now; complete checkpoints are kept" in capsys.readouterr().err
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["3"]  # not cut short
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    steps, events = run(Batches())
    assert steps == 7 and events[0] == ("evaluate", 4)  # it resumed from step 3


def test_ending_again_during_the_save_waits_for_it(run, tmp_path, monkeypatch, capsys):
    real = RunCheckpoints.save

    def save(*arguments):
        if arguments[1] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunCheckpoints, "save", save)
        run(Batches(5, signal.SIGINT))
    assert "SIGINT: saved step 5" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "5" / "files.json").is_file()
    assert run(Batches())[0] == 7


def test_ending_again_while_the_model_is_written_loses_nothing(run, tmp_path):
    run(Batches(5, signal.SIGTERM, signal.SIGTERM))  # as some systems send it
    assert (tmp_path / "run" / "checkpoints" / "5").is_dir()


@pytest.fixture
def slow(monkeypatch):
    """Batches that take 100 s each, by the clocks of reports and saves."""
    clock = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    class Slow(Batches):
        def __next__(self):
            clock[0] += 400.0 if self.given == 0 else 100.0
            return super().__next__()

    return Slow


def test_saves_by_time_lose_minutes_only(run, config, slow):
    config.save_every = 0
    config.save_minutes = 3.0
    _, events = run(slow())
    # After 400, 600, 800 and 1000 s; at the end there is one in any event.
    assert [step for name, step in events if name == "save"] == [1, 3, 5, 7]


def test_saves_by_time_and_by_steps_do_not_repeat_each_other(run, config, slow):
    config.save_every = 2
    config.save_minutes = 3.0
    _, events = run(slow())
    assert [step for name, step in events if name == "save"] == [1, 2, 4, 6, 7]
    config.steps = 9
    config.save_minutes = 0.0
    _, events = run(slow())
    assert [step for name, step in events if name == "save"] == [8, 9]


def test_saves_by_time_are_agreed_on_by_all_processes(monkeypatch):
    """The clock of process 0 counts; the others learn when to ask again."""
    clock = [0.0]
    sent = []
    asked = {0: [], 1: []}
    monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    timers = [checkpoint.SaveTimer(10.0, 0) for _ in range(2)]

    def broadcast(process, values):
        sent.extend([values] if process == 0 else [])
        asked[process].append(step)
        return sent[-1]

    saves = []
    for step in range(1, 2001):
        clock[0] += 1.0
        decisions = []
        for process, timer in enumerate(timers):
            exchange = functools.partial(broadcast, process)
            monkeypatch.setattr(checkpoint.multihost_utils, "broadcast_one_to_all", exchange)
            clock[0] += 5000.0 * process  # another clock
            decisions.append(timer.due(step))
            clock[0] -= 5000.0 * process
        assert decisions[0] == decisions[1]
        if decisions[0]:
            saves.append(step)
            for timer in timers:
                timer.saved()
    assert asked[0] == asked[1] and len(asked[0]) < 60
    assert saves == [600, 1200, 1800]


def test_a_run_tells_its_eta_from_the_second_report_on(run, config, slow, capsys):
    config.log_every = 3
    config.eval_every = config.sample_every = config.save_every = 0
    config.save_minutes = 0.0
    run(slow())
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step ")]
    # A line at least every 30 s, that is after every step; the first one took 400 s.
    assert [line.split()[1] for line in lines] == [f"{i}/7" for i in range(1, 8)]
    assert "first step, with compilation: 6:40" in lines[0] and "ETA" not in lines[0]
    assert lines[1].endswith("ETA 8:20") and lines[2].endswith("ETA 6:40")
    assert lines[-1].endswith("ETA 0:00")


def test_a_resumed_run_tells_the_time_of_its_compilation_too(run, config, slow, tmp_path, capsys):
    config.log_every = 3
    run(Batches(stop_at=4))
    capsys.readouterr()
    run(slow())
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step 5/7")]
    assert "first step, with compilation: " in lines[0] and "ETA" not in lines[0]
    # What is written depends on steps alone.
    steps = [row["step"] for row in records(tmp_path / "run") if "loss" in row]
    assert steps == [1, 3, 6, 7]


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


class Mlflow(types.ModuleType):
    """Stands in for MLflow."""

    run = None

    @contextlib.contextmanager
    def start_run(self, run_name):
        self.run, self.logged = {"name": run_name}, []
        yield
        self.run = self.run | {"ended": True}

    def active_run(self):
        return self.run

    def log_dict(self, dictionary, artifact_file):
        self.run["config"] = dictionary

    def log_metrics(self, metrics, step):
        self.logged.append((step, metrics))


@pytest.mark.parametrize("logger", [Wandb("wandb"), Mlflow("mlflow")], ids=lambda x: x.__name__)
def test_the_examples_send_scalars_to_loggers(
    logger, picture_folder, tiny_model_dir, tmp_path, monkeypatch
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
    monkeypatch.setitem(sys.modules, logger.__name__, logger)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "training.md").read_text()
    (example,) = re.findall(rf"```python\n(import {logger.__name__}\n.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/training.md", "exec"), {})
    assert logger.run["config"]["steps"] == 5
    assert logger.run.get("ended") == (True if logger.__name__ == "mlflow" else None)
    assert [step for step, _ in logger.logged] == [2, 4, 5]
    assert all(np.isfinite(scalars["loss"]) for _, scalars in logger.logged)
    assert ["val_loss" in scalars for _, scalars in logger.logged] == [False, True, True]
    assert (tmp_path / "runs" / "fashion_mnist" / "model").is_dir()


def test_training_of_the_tokenizer_takes_callbacks_too(picture_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(loop, "run", lambda *args: given.append(args[4]))
    state = types.SimpleNamespace(params={})
    monkeypatch.setattr(tokenizer, "create_sharded", lambda *_: state)
    small = vq_defaults()
    small.batch_size = 8
    small.model.update(vars(TINY_VQ))
    small.data.update(name="folder", dir=str(picture_folder), image_size=4, channels=1)
    mine = Every(3, print)
    tokenizer.train(small, tmp_path / "run", [mine])
    assert given[0].callbacks[-1] is mine and len(given[0].callbacks) == 4


def test_a_run_that_lost_its_workdir_writes_no_more(run, tmp_path, monkeypatch):
    """Neither a checkpoint nor the model, whoever removed its lock or took it over."""
    monkeypatch.setattr(ownership, "CHECK_SECONDS", 0.0)
    seen = []

    def lose(info):
        seen.append(info.step)
        if info.step == 4:
            (tmp_path / "run" / ownership.LOCK).unlink()

    lost = pytest.raises(ownership.OwnershipError, match="was removed, so this run no longer owns")
    with lost, ownership.owned(tmp_path / "run") as claim:
        run(Batches(), Every(1, lose), claim=claim)
    assert seen == [1, 2, 3, 4]
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["3"]
