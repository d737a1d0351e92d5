"""Model directories: what is written comes back, and what does not fit is refused."""

import dataclasses
import json
import shutil
import threading
import types

import chex
import jax
import jax.numpy as jnp
import pytest

from aim_jax.models import VQConfig
from aim_jax.training import checkpoint
from aim_jax.training.checkpoint import RunCheckpoints
from aim_jax.utils.files import replacing
from aim_jax.weights.pretrained import bundled_models, load_pretrained, save_model


def edited(model_dir, tmp_path, **changes):
    """A copy of a model directory whose model.json has other top-level or aim fields."""
    copy = tmp_path / "edited"
    shutil.copytree(model_dir, copy)
    content = json.loads((copy / "model.json").read_text())
    for name, value in changes.items():
        (content if name in content else content["aim"])[name] = value
    (copy / "model.json").write_text(json.dumps(content))
    return copy


def test_model_directory_round_trip(tiny_model, tiny_model_dir):
    loaded = load_pretrained(tiny_model_dir)
    for field in ("aim_config", "vq_config", "class_names", "sampling", "info"):
        assert getattr(loaded, field) == getattr(tiny_model, field), field
    chex.assert_trees_all_equal(loaded.aim_params, tiny_model.aim_params)
    chex.assert_trees_all_equal(loaded.vq_params, tiny_model.vq_params)


def test_half_precision_storage_loads_as_float32(tiny_model, tmp_path):
    path = save_model(tmp_path / "half", tiny_model, "float16")
    loaded = load_pretrained(path)
    expected = jax.tree.map(
        lambda x: x.astype(jnp.float16).astype(jnp.float32), tiny_model.aim_params
    )
    chex.assert_trees_all_equal(loaded.aim_params, expected, strict=True)


def test_saving_replaces_a_model_and_leaves_nothing_behind(tiny_model, tmp_path):
    path = save_model(tmp_path / "model", tiny_model)
    save_model(path, dataclasses.replace(tiny_model, info={"second": True}))
    assert load_pretrained(path).info == {"second": True}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_failed_save_keeps_the_old_model(tiny_model, tmp_path, monkeypatch):
    path = save_model(tmp_path / "model", tiny_model)
    broken = dataclasses.replace(tiny_model, info={"not json": object()})
    with pytest.raises(TypeError):
        save_model(path, broken)
    assert load_pretrained(path).info == tiny_model.info
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_unknown_model_names_the_bundled_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model 'nothing'.*fashion_mnist"):
        load_pretrained("nothing")
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "version 99; this library reads 1"),
        ({"d_model": 32}, r"does not fit its configuration.*shape"),
        ({"mixer": "mamba1"}, r"does not fit its configuration.*(missing|unexpected)"),
        ({"mixer": "rwkv"}, r"cannot be read as a model.*mixer='rwkv'"),
        ({"colour": "red"}, r"cannot be read as a model.*colour"),
        ({"vocab_size": 32}, r"does not fit its configuration"),
    ],
)
def test_directory_of_another_configuration_is_refused(tiny_model_dir, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(edited(tiny_model_dir, tmp_path, **changes))


def test_incomplete_directory_is_refused(tiny_model_dir, tmp_path):
    copy = edited(tiny_model_dir, tmp_path)
    shutil.rmtree(copy / "vq")
    with pytest.raises(ValueError, match="incomplete"):
        load_pretrained(copy)


def test_parts_that_do_not_belong_together_are_refused(tiny_model):
    other = VQConfig(ch=32, ch_mult=(1,), n_embed=99)
    with pytest.raises(ValueError, match="vocabulary of 16, but the tokenizer has 99"):
        dataclasses.replace(tiny_model, vq_config=other)


def test_bundled_models_load_and_describe_themselves():
    models = bundled_models()
    assert {"fashion_mnist", "cifar10"} <= models.keys()
    for name, path in models.items():
        model = load_pretrained(name)
        assert len(model.class_names) == model.aim_config.num_classes == 10
        side = model.info["data"]["image_size"] // model.vq_config.downsampling
        assert side**2 == model.aim_config.num_tokens
        assert (path / "README.md").read_text().startswith("# ")
    size = sum(file.stat().st_size for path in models.values() for file in path.rglob("*"))
    assert size < 40e6


def test_what_is_replaced_stays_until_the_new_is_whole(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    for path in (file, folder):
        with pytest.raises(RuntimeError), replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError
    with replacing(file) as partial:
        partial.write_text("old")
    with replacing(folder) as partial:
        partial.mkdir()
        (partial / "old").touch()
    for path in (file, folder):
        with pytest.raises(FileNotFoundError), replacing(path):
            pass  # nothing is written, so there is nothing to rename
    assert file.read_text() == "old" and (folder / "old").exists()
    with replacing(folder) as partial:
        partial.mkdir()
    assert sorted(tmp_path.rglob("*")) == [file, folder]


def test_links_are_followed_when_something_is_replaced(tmp_path):
    disk, run = tmp_path / "disk", tmp_path / "run"
    for path in (disk / "model", run):
        path.mkdir(parents=True)
    (run / "model").symlink_to(disk / "model")
    with replacing(run / "model") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert (run / "model").is_symlink() and (disk / "model" / "new").exists()
    assert [*run.iterdir(), *disk.iterdir()] == [run / "model", disk / "model"]


def test_every_checkpoint_is_listed_before_the_next_takes_its_place(tmp_path, monkeypatch):
    """With one kept, the next save deletes it: what waited for it to appear waited for ever."""
    monkeypatch.setattr(RunCheckpoints, "POLL_SECONDS", 0.5)
    iterator = types.SimpleNamespace(get_state=lambda: {"next": 0})
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    listed = []
    monkeypatch.setattr(checkpoint, "_checksums", lambda path: listed.append(int(path.name)) or {})

    def save():
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.ones(4)}, iterator)
        checkpoints.wait()

    saving = threading.Thread(target=save, daemon=True)
    saving.start()
    saving.join(60)
    assert not saving.is_alive() and listed == [1, 2, 3]
    assert [p.name for p in checkpoints.directory.iterdir()] == ["3"]
    checkpoints.close()
