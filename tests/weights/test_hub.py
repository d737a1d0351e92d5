"""Models from and for the hub, whose client is a stand-in that copies directories."""

import json
import shutil
import sys
import types
from pathlib import Path

import chex
import pytest

from aim_jax import load_pretrained
from aim_jax.weights.convert.directories import LEFTOVERS
from aim_jax.weights.fingerprints import parameter_fingerprints
from aim_jax.weights.hub import PATTERNS
from aim_jax.weights.publish import publish


class LocalEntryNotFoundError(Exception):
    pass


class RepositoryNotFoundError(Exception):
    pass


class RevisionNotFoundError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub with repositories in a directory; `calls` records what was asked."""
    store, calls = tmp_path / "hub", []

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision, tuple(allow_patterns)))
        if revision == "offline":
            raise LocalEntryNotFoundError
        if not (store / name).is_dir():
            raise RepositoryNotFoundError
        return str(store / name)

    def upload_folder(repo_id, folder_path, allow_patterns):
        shutil.copytree(folder_path, store / repo_id)

    names = (LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
    errors = types.ModuleType("huggingface_hub.errors")
    for error in names:
        setattr(errors, error.__name__, error)
    module = types.ModuleType("huggingface_hub")
    module.errors, module.snapshot_download = errors, snapshot_download
    module.upload_folder, module.create_repo = upload_folder, lambda name, exist_ok: None
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return calls


def test_published_model_is_loaded_by_its_address(hub, tiny_model, tiny_model_dir, tmp_path):
    report = {
        "metrics": {"fid": 12.345678, "kid": [0.1, 0.01]}, "notes": ["Few samples."],
        "settings": {"reference": "cifar10, test"}, "environment": {"commit": "abc"},
        "parameters": parameter_fingerprints(tiny_model),
    }  # fmt: skip
    out = publish(tiny_model_dir, tmp_path / "out", report, "someone/tiny")
    card = (out / "README.md").read_text()
    for text in (
        "# tiny", 'load_pretrained("hf://someone/tiny")', "| fid | 12.346 |", "0.1 ± 0.01",
        "boat, house, old tree", "4 tokens, vocabulary of 16", "f2, 16 codebook entries",
        "Few samples.", "reference cifar10, test; commit abc", "cfg_scale 2.0",
    ):  # fmt: skip
        assert text in card, text
    model = load_pretrained("hf://someone/tiny@v1")
    assert [call[:2] for call in hub] == [("someone/tiny", "v1")]
    assert model.name == "hf://someone/tiny@v1" and model.class_names == tiny_model.class_names
    chex.assert_trees_all_equal(model.aim_params, tiny_model.aim_params)
    with pytest.raises(FileExistsError, match="another directory"):
        publish(tiny_model_dir, out)
    assert json.loads((out / "model.json").read_text())["version"] == 2


def test_published_model_keeps_what_the_way_back_needs(hub, tiny_model_dir, tmp_path):
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    (source / LEFTOVERS).write_bytes(b"codebook_used")
    out = publish(source, tmp_path / "out")
    assert (out / LEFTOVERS).read_bytes() == b"codebook_used" and LEFTOVERS in PATTERNS
    # It is of that tokenizer, not of another one.
    assert not (publish(source, tmp_path / "b", tokenizer=tiny_model_dir) / LEFTOVERS).exists()


def test_what_cannot_be_fetched_is_said(hub, monkeypatch):
    for address, kind, message in (
        ("hf://nobody/nothing", FileNotFoundError, "no such repository"),
        ("hf://someone/tiny@offline", FileNotFoundError, "hf download someone/tiny"),
        ("hf://tiny", ValueError, "expected hf://owner/name"),
    ):
        with pytest.raises(kind, match=message):
            load_pretrained(address)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"aim_jax\[hub\]"):
        load_pretrained("hf://someone/tiny")


def test_a_failed_upload_says_how_to_go_on(hub, tiny_model_dir, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("connection refused")  # as an HTTP library has it

    client = sys.modules["huggingface_hub"]
    monkeypatch.setattr(client, "upload_folder", fail)
    out = tmp_path / "out"
    with pytest.raises(OSError, match=rf"connection refused\. .* hf upload someone/tiny {out}"):
        publish(tiny_model_dir, out, repository="someone/tiny")
    assert load_pretrained(out).class_names
    monkeypatch.setattr(client, "create_repo", fail)
    with pytest.raises(OSError, match=r"someone/tiny: connection refused\. Log in"):
        publish(tiny_model_dir, tmp_path / "other", repository="someone/tiny")
    assert not (tmp_path / "other").exists()


def test_a_directory_is_published_without_the_hub(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    out = publish(tiny_model_dir, tmp_path / "mine")
    assert {path.name for path in Path(out).iterdir()} >= {"README.md", "model.json", "aim", "vq"}
    assert 'load_pretrained("DIRECTORY")' in (out / "README.md").read_text()
