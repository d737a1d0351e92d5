"""Checksums of model directories: damage is refused, and an edit is sealed on purpose."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from aim_jax.weights import seal
from aim_jax.weights.directories import bundled_models, save_model
from aim_jax.weights.load import find_model, load_pretrained, seal_model
from tests.programs import run


def flip(file, index, bit=0):
    content = bytearray(file.read_bytes())
    content[index] ^= 1 << bit
    file.write_bytes(content)


DAMAGES = (
    lambda file: flip(file, 0),
    lambda file: flip(file, file.stat().st_size // 2, 3),
    lambda file: flip(file, -1, 7),
    lambda file: os.truncate(file, file.stat().st_size - 1),
    lambda file: os.truncate(file, 0),
    lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    os.remove,
)


@pytest.fixture
def directory(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit(directory, **changes):
    """Changes entries of model.json, as people do; None removes one."""
    file = directory / "model.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_damage_to_any_file_is_refused(directory):
    """All damages to files of parameters; two to each of the small files that describe them."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "model.json"]
    assert len(files) > 15
    for i, file in enumerate(files):
        content = file.read_bytes()
        damages = DAMAGES if len(content) > 10_000 else (DAMAGES[i % 7], DAMAGES[(i + 3) % 7])
        for damage in damages if content else DAMAGES[-2:]:
            damage(file)
            kind = "damaged" if file.exists() else "missing"
            name = file.relative_to(directory)
            with pytest.raises(ValueError, match=rf"damaged or incomplete.*\({kind}: {name}\)"):
                load_pretrained(directory, as_stored=True)
            file.write_bytes(content)
    load_pretrained(directory, as_stored=True)


def test_a_bit_of_the_description_is_never_another_model(directory):
    """Many of its bytes; a bit may change the spelling of the same content, as 1e-05 and 1E-05."""
    file = directory / "model.json"
    content = file.read_bytes()
    meant = json.loads(content)
    refused = 0
    for index in range(0, len(content), 11):
        flip(file, index, index % 8)
        try:
            same = json.loads(file.read_text()) == meant
        except ValueError:
            same = False
        if not same:
            with pytest.raises(ValueError):
                load_pretrained(directory, as_stored=True)
            refused += 1
        file.write_bytes(content)
    assert refused > len(content) // 15


def test_a_bundled_model_has_checksums(tmp_path):
    for name, source in bundled_models().items():
        directory = shutil.copytree(source, tmp_path / name)
        assert {file.name for file in directory.iterdir()} == {
            "README.md", "config.json", "model.safetensors",
        }  # fmt: skip
        file = directory / "model.safetensors"
        flip(file, file.stat().st_size // 3)
        with pytest.raises(ValueError, match=r"damaged: model\.safetensors"):
            load_pretrained(directory)


def test_files_that_the_model_does_not_have_are_refused(directory):
    for name in ("aim/_sharding.old", "vq/d/0123", "aim/d/more/0"):
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("more")
        with pytest.raises(ValueError, match=f"unexpected: {name}"):
            load_pretrained(directory)
        file.unlink()
    for name in ("README.md", "LICENSE", "aim/.DS_Store"):
        (directory / name).write_text("of the user")
    load_pretrained(directory, as_stored=True)


def test_checksums_cannot_be_taken_away(directory, capsys):
    content = json.loads((directory / "model.json").read_text())
    for changes, message in (
        ({"files": None}, "SHA-256 differs"),
        ({"sha256": None}, "SHA-256 differs"),
        ({"files": None, "sha256": None}, "SHA-256 differs"),
        ({"version": 1}, "SHA-256 differs"),
        ({"version": 1, "files": None}, "SHA-256 differs"),
    ):
        edit(directory, **changes)
        with pytest.raises(ValueError, match=message):
            load_pretrained(directory)
        edit(directory, **content)
    del content["files"]
    seal.write_description(directory / "model.json", content)
    with pytest.raises(ValueError, match="lists no files"):
        load_pretrained(directory)
    assert not capsys.readouterr().err


def test_a_model_of_the_first_version_loads_and_can_be_sealed(directory, tiny_model, capsys):
    edit(directory, version=1, files=None, sha256=None)
    assert load_pretrained(directory, as_stored=True).sampling == tiny_model.sampling
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"describe --checkpoint {directory} --seal adds them" in said
    assert run("describe", "--checkpoint", directory, "--seal").returncode == 0
    loaded = load_pretrained(directory, as_stored=True)
    assert not capsys.readouterr().err
    for a, b in zip(*map(jax.tree.leaves, (loaded.aim_params, tiny_model.aim_params)), strict=True):
        np.testing.assert_array_equal(a, b)
    flip(directory / "vq" / "manifest.ocdbt", 20)
    with pytest.raises(ValueError, match=r"damaged: vq/manifest\.ocdbt"):
        load_pretrained(directory)


def test_an_edit_is_sealed_on_purpose(directory):
    edit(directory, class_names=["ship", "house", "old tree"])
    with pytest.raises(ValueError, match=f"describe --checkpoint {directory} --seal"):
        load_pretrained(directory)
    assert load_pretrained(directory, as_stored=True, verify=False).class_names[0] == "ship"
    sealed = run("describe", "--checkpoint", directory, "--seal")
    assert sealed.returncode == 0 and "ship, house, old tree" in sealed.stdout
    assert f"sealed {directory / 'model.json'}" in sealed.stderr
    assert load_pretrained(directory, as_stored=True).class_names == ("ship", "house", "old tree")


def test_damage_and_mistakes_are_not_sealed(directory):
    description = (directory / "model.json").read_bytes()
    edit(directory, version=99)
    refused = run("describe", "--checkpoint", directory, "--seal")
    assert refused.returncode == 1 and "version 99" in refused.stderr
    (directory / "model.json").write_bytes(description)
    metadata = (directory / "aim" / "_METADATA").read_bytes()
    flip(directory / "aim" / "_METADATA", -1)
    refused = run("describe", "--checkpoint", directory, "--seal")
    assert refused.returncode == 1 and "damaged: aim/_METADATA" in refused.stderr
    assert (directory / "model.json").read_bytes() == description
    with pytest.raises(ValueError, match="aim cannot be read"):
        load_pretrained(directory, verify=False)
    (directory / "aim" / "_METADATA").write_bytes(metadata)
    load_pretrained(directory, as_stored=True)
    refused = run("describe", "--checkpoint", "cifar10", "--seal")
    assert refused.returncode == 1 and "cifar10 is read-only" in refused.stderr


def test_further_files_are_listed(tiny_model, tmp_path):
    files = {name: lambda file: file.write_text("text") for name in ("buffers", "README.md")}
    path = save_model(tmp_path / "model", tiny_model, None, files)
    listed = json.loads((path / "model.json").read_text())["files"]
    assert list(listed) == sorted(listed) and "buffers" in listed and "README.md" not in listed
    (path / "buffers").write_text("other")
    with pytest.raises(ValueError, match="damaged: buffers"):
        load_pretrained(path)


def test_files_of_the_user_are_not_sealed(directory):
    """Such as a licence beside a model of the first version; it may change."""
    edit(directory, version=1, files=None, sha256=None)
    (directory / "notes.txt").write_text("first")
    (directory / "aim" / ".DS_Store").write_text("")
    seal_model(directory)
    (directory / "notes.txt").write_text("second")
    (directory / "aim" / ".DS_Store").unlink()
    load_pretrained(directory, as_stored=True)


def test_a_relative_path_is_not_a_bundled_model(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    directory.rename("cifar10")
    assert find_model(find_model("./cifar10")) == directory.parent / "cifar10"
    assert find_model("cifar10") == bundled_models()["cifar10"]
