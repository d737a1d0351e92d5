"""Model directories: what is written comes back, and what does not fit is refused."""

import dataclasses
import errno
import json
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax.models import VQConfig
from aim_jax.training import checkpoint
from aim_jax.training.checkpoint import RunCheckpoints
from aim_jax.utils.files import replacing
from aim_jax.weights import seal
from aim_jax.weights.directories import bundled_models, save_model
from aim_jax.weights.load import load_pretrained


def edited(model_dir, tmp_path, **changes):
    """A copy of a model directory whose sealed model.json has other top-level or aim fields."""
    copy = tmp_path / "edited"
    shutil.copytree(model_dir, copy)
    content = json.loads((copy / "model.json").read_text())
    for name, value in changes.items():
        (content if name in content else content["aim"])[name] = value
    seal.write_description(copy / "model.json", content)
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
        ({"version": 99}, "version 99; this library reads 1 and 2"),
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


class Position:
    """Stands for a run's data iterator."""

    def get_state(self):
        return {"next": 5}

    def set_state(self, state):
        assert state == {"next": 5}


STATE = {"w": np.arange(4.0, dtype=np.float32), "n": np.arange(3)}


def restore(workdir):
    """The step from which a run in this directory resumes, whose state must be the saved one."""
    checkpoints = RunCheckpoints(workdir, keep=3)
    try:
        step, state = checkpoints.restore_newest(jax.tree.map(jnp.zeros_like, STATE), Position())
    finally:
        checkpoints.close()
    chex.assert_trees_all_equal(state, jax.tree.map(lambda x: x * step, STATE))
    return step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = RunCheckpoints(workdir, keep=3)
    for step in (1, 2):
        checkpoints.save(
            step, jax.tree.map(lambda x, n=step: jnp.asarray(x * n), STATE), Position()
        )
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def as_of_an_older_version(checkpoint):
    """What was left by a kill between the rename and the list."""
    (checkpoint / "files.json").unlink()
    file = checkpoint / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    assert content.pop("custom_metadata")
    file.write_text(json.dumps(content))


def flip(file, index):
    content = bytearray(file.read_bytes())
    content[index] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
def test_damage_to_any_file_falls_back(workdir, listed, tmp_path):
    intact = shutil.copytree(workdir / "checkpoints" / "2", tmp_path / "intact")
    names = [file.relative_to(intact) for file in intact.rglob("*") if file.is_file()]
    assert len(names) > 10
    damages = (
        lambda file: flip(file, 0),
        lambda file: flip(file, file.stat().st_size // 2),
        lambda file: flip(file, -1),
        lambda file: os.truncate(file, file.stat().st_size // 2),
        os.remove,
    )
    for i, name in enumerate(names):
        # All damages to the largest files and the list; one to each of the others.
        chosen = damages if name.name == "files.json" or "d" in name.parts else [damages[i % 5]]
        for damage in chosen:
            checkpoint = workdir / "checkpoints" / "2"
            damage(checkpoint / name)
            if not listed:
                (checkpoint / "files.json").unlink(missing_ok=True)
            assert restore(workdir) == 1, name
            shutil.copytree(intact, checkpoint)
    (checkpoint / "state" / "more").touch()
    assert restore(workdir) == 1
    shutil.copytree(intact, checkpoint)
    assert restore(workdir) == 2


def test_a_bad_sector_is_damage(workdir, monkeypatch):
    """And no reason to end the run; another error of reading concerns all files."""
    read = checkpoint._size_and_crc

    def fail(file):
        if file.is_relative_to(workdir / "checkpoints" / "2" / "state"):
            raise OSError(number, os.strerror(number), str(file))
        return read(file)

    monkeypatch.setattr(checkpoint, "_size_and_crc", fail)
    number = errno.EACCES
    with pytest.raises(PermissionError):
        restore(workdir)
    number = errno.EIO
    assert restore(workdir) == 1


def test_a_missing_list_is_damage(workdir):
    for step in ("1", "2"):
        (workdir / "checkpoints" / step / "files.json").unlink()
    message = r"damaged \(step 2: missing: files\.json; step 1: missing: files\.json\)"
    with pytest.raises(ValueError, match=message):
        restore(workdir)


def test_a_checkpoint_of_an_older_version_is_listed_when_it_is_accepted(workdir, capsys):
    for step in (2, 1):
        as_of_an_older_version(workdir / "checkpoints" / str(step))
        assert restore(workdir) == 1
        said = capsys.readouterr().err
        assert ("skipping checkpoint step 2: missing: files.json" in said) == (step == 2)
        assert ("step 1 of an older version had no checksums" in said) == (step == 1)
    assert restore(workdir) == 1
    assert capsys.readouterr().err.startswith("resumed from step 1")
    flip(workdir / "checkpoints" / "1" / "state" / "manifest.ocdbt", 20)
    with pytest.raises(ValueError, match=r"step 1: damaged: state/manifest\.ocdbt"):
        restore(workdir)


def test_an_unreadable_checkpoint_of_an_older_version_is_not_accepted(workdir):
    shutil.rmtree(workdir / "checkpoints" / "2")
    as_of_an_older_version(workdir / "checkpoints" / "1")
    for file in (workdir / "checkpoints" / "1" / "state").glob("**/d/*"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"every .* is damaged \(step 1: unreadable: "):
        restore(workdir)


def test_a_checkpoint_has_its_list_before_its_name(tmp_path, monkeypatch):
    final = tmp_path / "checkpoints" / "1"
    write_list = checkpoint.write_list

    def listed(path):
        assert not final.exists()
        write_list(path)
        assert (path / "files.json").is_file()
        raise OSError("killed")

    checkpoints = RunCheckpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoint, "write_list", listed)
    checkpoints.save(1, {"x": jnp.ones(4)}, Position())
    with pytest.raises(checkpoint.SaveError, match="killed"):
        checkpoints.wait()
    monkeypatch.undo()
    assert not final.exists() and len(list(final.parent.iterdir())) == 1
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    assert checkpoints.latest_step() is None
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.ones(4)}, Position())
    checkpoints.close()
    assert [path.name for path in final.parent.iterdir()] == ["2"]
    assert (final.with_name("2") / "files.json").is_file()
