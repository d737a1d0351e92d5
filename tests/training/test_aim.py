"""Both training programs on small real files: learning, resuming, stopping, refusing."""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from aim_jax.cli.common import errors_in_one_line
from aim_jax.configs.defaults import aim_defaults, vq_defaults
from aim_jax.data import CacheWriter, extract_codes, identity_of, make_views, open_images
from aim_jax.data.preprocessing import image_spec
from aim_jax.models.layers import group_to_layer
from aim_jax.training import aim as train
from aim_jax.training import loop
from aim_jax.training import optimizer as optim
from aim_jax.training import tokenizer as train_vq
from aim_jax.training.checkpoint import RunCheckpoints, claim_workdir
from aim_jax.training.inputs import open_codes
from aim_jax.training.monitor import BadStepsError, Profiler
from aim_jax.training.optimizer import accumulated_grads, decay_mask, learning_rate, update_ema
from aim_jax.training.state import TrainState
from aim_jax.weights import convert
from aim_jax.weights.directories import save_model
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import Pretrained
from aim_jax.weights.tokenizer import local_encoder, tokenizer_fingerprint
from tests.conftest import TINY_AIM, TINY_VQ

pytestmark = pytest.mark.usefixtures("start_once")


def small(config, folder):
    config.steps, config.batch_size, config.log_every = 6, 8, 1
    config.eval_every = config.save_every = config.sample_every = 3
    config.optimizer.lr = 1e-2
    config.ema_decay = 0.5
    config.data.update(name="folder", dir=str(folder), image_size=4, channels=1)
    return config


@pytest.fixture
def vq_config(picture_folder):
    config = small(vq_defaults(), picture_folder)
    config.model.update({k: v for k, v in vars(TINY_VQ).items()})
    config.sample.images = 4
    return config


@pytest.fixture(scope="session")
def codes(picture_folder, tiny_model, tmp_path_factory):
    """Token caches of the picture folder under the tiny tokenizer."""
    root = tmp_path_factory.mktemp("codes")
    spec = image_spec(small(vq_defaults(), picture_folder).data)
    encode, devices = local_encoder(tiny_model)
    for split in ("train", "validation"):
        source = open_images("folder", split, picture_folder)
        views = make_views("centre_flip" if split == "train" else "centre", spec)
        writer = CacheWriter(
            root / split, tokenizer=tokenizer_fingerprint(tiny_model),
            vocab_size=16, grid=(2, 2), class_names=source.class_names, views=views.names,
            num_examples=len(source),
        )  # fmt: skip
        extract_codes(encode, source, views, writer, devices)
        assert not writer.finish()
    return root


@pytest.fixture
def aim_config(picture_folder, codes, tiny_model_dir):
    config = small(aim_defaults(), picture_folder)
    config.tokenizer, config.codes = str(tiny_model_dir), str(codes)
    config.model.update({k: v for k, v in vars(TINY_AIM).items()})
    config.sample.per_class = 2
    return config


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Makes a run once; returns (its workdir, its final state)."""
    made = {}

    def make(config):
        if not made:
            workdir = tmp_path_factory.mktemp("finished") / "run"
            made["run"] = (workdir, train.train(config, workdir))
        return made["run"]

    return make


def records(workdir):
    """Loss by step, and evaluation records, of a run's metrics file."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("examples_per_second", "input_wait")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def assert_same_run(workdir_a, a, workdir_b, b):
    assert records(workdir_a) == records(workdir_b)
    chex.assert_trees_all_equal(a, b)


def interrupt(monkeypatch, at, action):
    """Runs `action` when the loop takes its `at`-th batch."""
    calls = []

    def shard_batch(batch, mesh):
        if "weights" not in batch:  # a training batch
            calls.append(None)
            if len(calls) == at:
                action()
        return original(batch, mesh)

    original = loop.shard_batch
    monkeypatch.setattr(loop, "shard_batch", shard_batch)


@pytest.mark.parametrize(
    ("remat", "unroll", "platform", "chosen"),
    [
        ("auto", 1, "cpu", "dots"),
        ("auto", 2, "cpu", "none"),
        ("auto", 1, "cuda", "none"),
        ("auto", 1, "tpu", "none"),
        ("none", 1, "cpu", "none"),
        ("full", 2, "tpu", "full"),
    ],
)
def test_rematerialization_follows_the_devices(remat, unroll, platform, chosen):
    model = dataclasses.replace(TINY_AIM, n_layer=2, remat=remat, scan_unroll=unroll)
    expected = dataclasses.replace(model, remat=chosen)
    assert train.with_remat(model, platform) == expected


def test_a_setup_chooses_the_rematerialization(aim_config):
    setup = train.Setup(aim_config)
    assert (setup.model.remat, setup.trained.remat) == ("auto", "dots")
    aim_config.model.remat = "none"
    flops = [
        x.train_step.lower(*x.abstract_arguments()).compile().cost_analysis()["flops"]
        for x in (setup, train.Setup(aim_config))
    ]
    assert flops[0] > 1.02 * flops[1]  # the scan is computed twice


def test_killed_aim_run_resumes_exactly_from_the_last_save(
    aim_config, finished_run, tmp_path, monkeypatch
):
    workdir, whole = finished_run(aim_config)

    def die():
        raise KeyboardInterrupt  # nothing of the loop's own saving runs

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 5, die)
        train.train(aim_config, tmp_path / "b")
    saves = tmp_path / "b" / "checkpoints"
    assert sorted(p.name for p in saves.iterdir()) == ["3"]
    (saves / "5.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # a save that was cut short
    fresh = []
    restore = RunCheckpoints.restore_newest

    def noted(checkpoints, state, iterator):
        fresh.append(state)
        return restore(checkpoints, state, iterator)

    monkeypatch.setattr(RunCheckpoints, "restore_newest", noted)
    again = train.train(aim_config, tmp_path / "b")
    assert sorted(p.name for p in saves.iterdir()) == ["3", "6"]
    assert len(fresh) == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(fresh))  # not twice in memory
    assert_same_run(workdir, whole, tmp_path / "b", again)
    assert load_pretrained(tmp_path / "b").aim_config == TINY_AIM


def spoil_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def cut_without_a_list(checkpoint):
    for file in filter(Path.is_file, (checkpoint / "state").rglob("*")):
        cut(file)
    (checkpoint / "files.json").unlink()


def largest(checkpoint):
    """The largest file of array values and their index: a restore reads all of those alone."""
    return max(checkpoint.glob("state/**/d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "choose", "said"),
    [
        (spoil_bit, largest, "damaged: state/"),
        (cut, largest, "damaged: state/"),
        (cut_without_a_list, Path, "missing: files.json"),
        (os.remove, largest, "missing: state/"),
        (cut, lambda checkpoint: checkpoint / "files.json", "damaged: files.json"),
    ],
    ids=["bit", "cut", "unlisted", "removed", "list"],
)
def test_damaged_checkpoint_falls_back_to_the_one_before(
    aim_config, finished_run, tmp_path, capsys, damage, choose, said
):
    workdir, whole = finished_run(aim_config)
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "6"
    damage(choose(newest))
    again = train.train(aim_config, tmp_path / "run")
    output = capsys.readouterr().err
    assert f"checkpoint step 6: {said}" in output and "resumed from step 3" in output
    assert_same_run(workdir, whole, tmp_path / "run", again)
    assert (tmp_path / "run" / "damaged" / "6").is_dir() and newest.is_dir()


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(aim_config, finished_run, tmp_path):
    shutil.copytree(finished_run(aim_config)[0], tmp_path / "run")
    for step in ("3", "6"):
        for file in (tmp_path / "run" / "checkpoints" / step / "data").glob("*"):
            file.unlink()
    with pytest.raises(ValueError, match=r"every .* is damaged \(step 6: missing: data/"):
        train.train(aim_config, tmp_path / "run")


@pytest.mark.filterwarnings(
    "error::pytest.PytestUnraisableExceptionWarning",
    "error::pytest.PytestUnhandledThreadExceptionWarning",
)
def test_full_disk_ends_the_run_and_keeps_the_last_save(aim_config, finished_run, tmp_path, capsys):
    """No file may grow to the size of a checkpoint's; the program says so and loses nothing."""
    workdir, whole = finished_run(aim_config)
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, hard))
    try:
        with pytest.raises(SystemExit) as ended, errors_in_one_line():
            train.train(aim_config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert ended.value.code == 1, said
    line = f"error: cannot write {tmp_path / 'run' / 'checkpoints'} (File too large). The newest "
    assert f"{line}whole checkpoint: that of step 3. Free disk space" in said
    assert "Traceback" not in said
    again = train.train(aim_config, tmp_path / "run")
    assert_same_run(workdir, whole, tmp_path / "run", again)


def test_pictures_are_encoded_on_the_way_to_the_same_codes(aim_config, finished_run, tmp_path):
    workdir, cached = finished_run(aim_config)
    aim_config.codes = ""
    encoded = train.train(aim_config, tmp_path / "b")
    a, b = records(workdir), records(tmp_path / "b")
    assert int(cached.step) == int(encoded.step) == aim_config.steps
    # The cache draws flipped views and pictures were not flipped here; validation is the same data.
    assert abs(a[-1]["val_loss"] - b[-1]["val_loss"]) < 0.05
    for name, value, message in (
        ("channels", 3, "channels=3, but the tokenizer has in_channels=1"),
        ("image_size", 5, "image_size=5 is not a multiple of the tokenizer's downsampling 2"),
    ):
        other = aim_config.copy_and_resolve_references()
        other.data[name] = value
        with pytest.raises(ValueError, match=message):
            train.train(other, tmp_path / "c")
    aim_config.log_every = 0
    with pytest.raises(ValueError, match="log_every=0; expected 1 or more"):
        train.train(aim_config, tmp_path / "c")
    aim_config.log_every, aim_config.keep = 1, 0
    with pytest.raises(ValueError, match="keep=0; expected 1 or more"):
        train.train(aim_config, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_caches_are_mixed_for_training_alone(aim_config, codes, tiny_model, tmp_path):
    shutil.copytree(codes, tmp_path / "more")
    aim_config.codes = f"{codes},{tmp_path / 'more'}:2"
    data = open_codes(aim_config, tiny_model, (0, 1))
    assert (data.train_size, data.validation_size) == (96, 12)
    assert next(data.train_batches())["codes"].shape == (8, 4)
    assert sum(len(batch["labels"]) for batch in data.validation_batches()) == 12
    manifest = tmp_path / "more" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("boat", "ship"))
    with pytest.raises(ValueError, match="cannot be mixed: their class_names differ"):
        open_codes(aim_config, tiny_model, (0, 1))


def test_model_learns_a_small_batch_by_heart():
    optimizer = optim.skip_bad_steps(optax.adam(1e-2), spike_factor=0.0)
    model = TINY_AIM.__class__(**{**vars(TINY_AIM), "class_dropout": 0.0})
    state = jax.jit(lambda: nn.unbox(train.create_train_state(model, optimizer, 0)))()
    rng = np.random.default_rng(0)
    batch = {"codes": rng.integers(0, 16, (6, 4)), "labels": np.arange(6) % 3}
    step = jax.jit(lambda s, b: train.train_step(s, b, config=model, optimizer=optimizer))
    losses = []
    for _ in range(150):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    # Two sequences share a label, so half of the first codes stay a coin toss: log(2) / 4.
    assert losses[0] > 2.5 and losses[-1] < np.log(2) / 4 + 0.03


def test_steps_that_cannot_be_used_end_the_run(aim_config, tmp_path):
    aim_config.optimizer.update(lr=1e30, skip_limit=2)
    with pytest.raises(BadStepsError, match=r"step [345] is the last of 2 .* not finite"):
        train.train(aim_config, tmp_path / "run")
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_bad_steps_change_nothing_and_are_counted(monkeypatch):
    monkeypatch.setattr(optim, "GUARD_WARMUP", 3)
    guarded = optim.skip_bad_steps(optax.adam(0.1), spike_factor=4.0)
    plain = optax.adam(0.1)
    params = other = {"w": jnp.ones(3)}
    state, expected = guarded.init(params), plain.init(params)
    update = jax.jit(guarded.update)
    norms = [1.0, 2.0, jnp.nan, 3.0, 100.0, 9.0, jnp.inf, jnp.nan, 2.0]
    used = [True, True, False, True, False, False, False, False, True]
    for norm, good in zip(norms, used, strict=True):
        grads = {"w": jnp.full(3, norm / 3**0.5)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if good:
            updates, expected = plain.update(grads, expected, other)
            other = optax.apply_updates(other, updates)
        chex.assert_trees_all_equal((params, state.inner), (other, expected))
    assert (int(state.used), int(state.skipped), int(state.in_a_row)) == (4, 5, 0)
    np.testing.assert_allclose(state.usual_norm, 2.0)
    state = guarded.init(params)
    for factor, skipped in ((0.0, 0), (4.0, 1)):  # without a factor only what is not finite
        guarded = optim.skip_bad_steps(optax.sgd(0.1), factor)
        state = guarded.init(params)
        for norm in (1.0, 1.0, 1.0, 100.0):
            _, state = guarded.update({"w": jnp.full(3, norm)}, state, params)
        assert int(state.skipped) == skipped


def test_a_skipped_step_moves_the_schedule_but_not_the_average():
    optimizer = optim.skip_bad_steps(
        optax.adamw(lambda count: 1.0 + count, weight_decay=0.0), spike_factor=0.0
    )
    params = {"w": jnp.float32(1.0)}
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {"w": jnp.float32(3.0)}, None)
    apply = jax.jit(lambda state, w: optim.apply_gradients(state, {"w": w}, optimizer, 0.9)[0])
    skipped = apply(state, jnp.float32(jnp.nan))
    chex.assert_trees_all_equal((skipped.params, skipped.ema), (params, state.ema))
    # The first used step of Adam moves by the learning rate, here that of the second step.
    used = apply(skipped, jnp.float32(1.0))
    np.testing.assert_allclose(used.params["w"], 1.0 - 2.0, rtol=1e-4)
    np.testing.assert_allclose(used.ema["w"], 3.0 + (1 - 2 / 11) * (-1.0 - 3.0), rtol=1e-4)


def test_profile_of_the_steps_that_are_named(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for steps, expected in (("1:2", [0, 2]), ("3:3", [2, 3]), ("9:9", []), ("", [])):
        profiler, seen = Profiler(steps, tmp_path), []
        for step in range(1, 6):
            profiler.before(step, None)
            seen += [step - 1] * len(calls)
            calls.clear()
            profiler.after(step, None)
            seen += [step] * len(calls)
            calls.clear()
        assert seen == expected, steps
    for steps in ("x", "5", "5:3", "0:3", "-1:3"):
        with pytest.raises(ValueError, match="expected FIRST:LAST"):
            Profiler(steps, tmp_path)


def test_workdir_of_another_run_is_refused(aim_config, finished_run, tmp_path):
    shutil.copytree(finished_run(aim_config)[0], tmp_path / "run")
    aim_config.optimizer.b1 = 0.5
    with pytest.raises(ValueError, match=r"another run.*optimizer.b1: 0.9 -> 0.5"):
        train.train(aim_config, tmp_path / "run")
    (tmp_path / "other" / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match="the run they belong to is unknown"):
        train.train(aim_config, tmp_path / "other")


def test_identity_a_run_on_other_tokens_is_refused(aim_config, finished_run, codes, tmp_path):
    """Class names and tokens belong to a run; a copy of them elsewhere does not change it."""
    shutil.copytree(finished_run(aim_config)[0], tmp_path / "run")
    shutil.copytree(codes, tmp_path / "codes")
    aim_config.codes = str(tmp_path / "codes")
    data = open_codes(aim_config, load_pretrained(aim_config.tokenizer), (0, 1))
    claim_workdir(tmp_path / "run", aim_config, data.identity)
    for split in ("train", "validation"):
        manifest = tmp_path / "codes" / split / "manifest.json"
        manifest.write_text(manifest.read_text().replace("boat", "ship"))
    with pytest.raises(ValueError, match=r"other data .*class 0: 'boat' -> 'ship'"):
        train.train(aim_config, tmp_path / "run")
    other = data.identity | {"validation": "0" * 64}
    with pytest.raises(ValueError, match=r"other data .*validation: .* -> '0000"):
        claim_workdir(tmp_path / "run", aim_config, other)


def test_identity_a_run_on_renamed_or_other_images_is_refused(picture_folder, tmp_path):
    images = shutil.copytree(picture_folder, tmp_path / "images")
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    config = vq_defaults()

    def claim():
        sources = (open_images("folder", split, images) for split in ("train", "validation"))
        claim_workdir(tmp_path / "run", config, identity_of(sources))

    run_file = tmp_path / "run" / "run.json"
    run_file.write_text(config.to_json_best_effort())
    with pytest.raises(ValueError, match="another version of aim_jax, which shuffles"):
        claim()
    run_file.unlink()
    (tmp_path / "run" / "checkpoints" / "1").rmdir()
    claim()
    (tmp_path / "run" / "checkpoints" / "1").mkdir()
    claim()
    for split in ("train", "validation"):
        (images / split / "boat").rename(images / split / "yacht")
    with pytest.raises(ValueError, match="class 0: 'boat' -> 'house', class 1"):
        claim()
    for split in ("train", "validation"):
        (images / split / "yacht").rename(images / split / "boat")
    claim()
    (images / "train" / "boat" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"train: .*'images': 48.* -> .*'images': 47"):
        claim()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 32, "vocab_size=32, but the tokenizer's codebook has 16"),
        ("num_tokens", 16, "num_tokens=16, but the data has 4"),
        ("num_classes", 10, "num_classes=10, but the data has 3"),
        ("headdim", 7, "not a multiple of headdim=7"),
    ],
)
def test_model_that_does_not_fit_is_refused(aim_config, tmp_path, field, value, message):
    aim_config.model[field] = value
    with pytest.raises(ValueError, match=message):
        train.train(aim_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", 2**31, "seed=2147483648; expected 0 to"),
        ("export_dtype", "float12", "export_dtype='float12'; expected one of float32"),
        ("sample.classes", 0, "sample.classes=0; expected 1"),
        ("sample.top_p", 0.0, "top_p=0.0: expected in"),
    ],
)
def test_what_samples_and_exports_need_is_checked_first(aim_config, tmp_path, name, value, message):
    aim_config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        train.train(aim_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_or_foreign_tokenizer_is_refused(aim_config, tiny_model, tmp_path):
    other = jax.tree.map(lambda x: x + 0.1, tiny_model.vq_params["encoder"])
    other = dataclasses.replace(tiny_model, vq_params=tiny_model.vq_params | {"encoder": other})
    aim_config.tokenizer = str(save_model(tmp_path / "vq", other))
    with pytest.raises(ValueError, match="was made with the tokenizer"):
        train.train(aim_config, tmp_path / "run")
    aim_config.tokenizer = ""
    with pytest.raises(ValueError, match=r"config.tokenizer is empty"):
        train.train(aim_config, tmp_path / "run")


def test_pictures_of_a_wrong_size_are_refused(vq_config, tmp_path):
    vq_config.data.image_size = 5
    with pytest.raises(ValueError, match="image_size=5 is not a multiple"):
        train_vq.train(vq_config, tmp_path / "run")
    vq_config.data.update(image_size=4, channels=3)
    with pytest.raises(ValueError, match="channels=3"):
        train_vq.train(vq_config, tmp_path / "run")


def test_schedules():
    optimizer = aim_defaults().optimizer
    optimizer.update(lr=1.0, end_lr=0.1, warmup_steps=10)
    for name, middle in (("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)):
        optimizer.schedule = name
        schedule = learning_rate(optimizer, 110)
        np.testing.assert_allclose(
            [schedule(i) for i in (0, 5, 10, 60)], [0, 0.5, 1, middle], atol=1e-6
        )
    optimizer.schedule = "step"
    with pytest.raises(ValueError, match="'step'; expected one of"):
        learning_rate(optimizer, 110)
    optimizer.update(schedule="linear", warmup_steps=200)
    with pytest.raises(ValueError, match=r"exceeds the 110 steps .* --config\.optimizer\.warm"):
        learning_rate(optimizer, 110)


def test_decay_mask_names_matrices_and_tables(tiny_model):
    mask = decay_mask(tiny_model.aim_params)
    decayed = {
        jax.tree_util.keystr(path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if on
    }
    assert "['layers']['mixer']['out_proj']['kernel']" in decayed
    assert "['token_embedding']['embedding']" in decayed and "['adaln']['table']" in decayed
    kinds = {name.split("'")[-2] for name in decayed}
    assert kinds == {"kernel", "embedding", "table"}


def test_accumulated_gradients_and_ema():
    def loss(p, batch, rng):
        rows = batch["x"] * p["w"]
        return jnp.mean(rows**2), ({"mean": rows.mean()}, rows)

    params, batch = {"w": jnp.float32(2.0)}, {"x": jnp.arange(8.0)}
    one = accumulated_grads(loss, params, batch, jax.random.key(0), 1)
    four = accumulated_grads(loss, params, batch, jax.random.key(0), 4)
    chex.assert_trees_all_close(one, four, rtol=1e-6)
    assert update_ema(None, params, 0.9, 0) is None
    np.testing.assert_allclose(update_ema({"w": 1.0}, params, 0.75, 100)["w"], 1.25)
    np.testing.assert_allclose(update_ema({"w": 1.0}, params, 0.75, 0)["w"], 1.9)


@pytest.mark.slow
def test_training_starts_from_converted_weights(
    aim_config, vq_config, tiny_model, tmp_path, monkeypatch
):
    """Official weights, converted, as the start: another adaLN arrangement, the same tokenizer."""
    monkeypatch.setattr(loop, "run", lambda config, workdir, mesh, state, *_: state)
    ours = save_model(tmp_path / "ours", tiny_model)
    official = convert.to_torch(ours, tmp_path / "w.safetensors")
    start = convert.to_jax(official, tmp_path / "start")
    aim_config.init = vq_config.init = str(start)
    aim_config.model.update(adaln="layer")
    state = train.train(aim_config, tmp_path / "aim")
    expected = tiny_model.aim_params | {"adaln": group_to_layer(tiny_model.aim_params["adaln"])}
    for params in (state.params, state.ema):
        chex.assert_trees_all_equal(params, expected)
    state = train_vq.train(vq_config, tmp_path / "vq")
    for params in (state.params, state.ema):
        chex.assert_trees_all_equal(params, tiny_model.vq_params)

    # Going on from a checkpoint needs the start no more; a new run does.
    shutil.rmtree(start)
    cut_short = tmp_path / "aim" / "checkpoints" / "3.orbax-checkpoint-tmp-1"
    cut_short.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no model"):
        train.train(aim_config, tmp_path / "aim")
    cut_short.rename(cut_short.with_name("3"))
    train.train(aim_config, tmp_path / "aim")
    with pytest.raises(FileNotFoundError, match="no model"):
        train.train(aim_config, tmp_path / "new")

    vq_config.model.n_embed, vq_config.init = 8, str(ours)
    with pytest.raises(ValueError, match="n_embed: 16 in the weights, 8 in the model"):
        train_vq.train(vq_config, tmp_path / "new")
    alone = Pretrained("t", vq_config=TINY_VQ, vq_params=state.params)
    aim_config.init = str(save_model(tmp_path / "alone", alone))
    with pytest.raises(ValueError, match="holds no AiM"):
        train.train(aim_config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
