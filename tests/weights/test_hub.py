"""Models from and for the hub: the real client against a stand-in of the hub on this machine."""

import fnmatch
import shutil
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import ModelCard

from aim_jax import load_pretrained
from aim_jax.models import PRESETS, VQConfig
from aim_jax.weights import convert, hub
from aim_jax.weights.convert.official import LEFTOVERS
from aim_jax.weights.fingerprints import parameter_fingerprints
from aim_jax.weights.load import own_directory
from aim_jax.weights.publish import publish
from benchmarks.conversion import write_random_official
from tests.conftest import TINY_AIM, TINY_VQ
from tests.hub_server import Hub
from tests.programs import run
from tests.torch_archives import saved


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A stand-in, which huggingface_hub asks instead of the hub, with an empty cache."""
    made = Hub(tmp_path / "hub")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    template = made.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", tmp_path / "hf")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", made.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield made
    made.close()


@pytest.fixture
def uploads(monkeypatch, server):
    """Uploads, which copy directories into the folder of the stand-in."""

    def matching(folder, patterns):
        """Files by their path, whose patterns match slashes too, as the hub's do."""
        files = {file.relative_to(folder).as_posix(): file for file in Path(folder).rglob("*")}
        return {
            name: file
            for name, file in files.items()
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        }

    def upload_folder(repo_id, folder_path, allow_patterns, delete_patterns):
        target = server.folder / repo_id
        for file in matching(target, delete_patterns).values():
            file.unlink()
        for name, file in matching(folder_path, allow_patterns).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / name)

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, exist_ok: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return server


REPORT = {
    "metrics": {"fid": 12.345678, "kid": [0.1, 0.01]}, "notes": ["Few samples."],
    "settings": {"reference": "cifar10, test"}, "environment": {"commit": "abc"},
}  # fmt: skip


def assert_same(model, other):
    for part in ("aim_params", "vq_params"):
        assert parameter_fingerprints(model) == parameter_fingerprints(other), part
    assert (model.aim_config, model.vq_config) == (other.aim_config, other.vq_config)


def test_published_model_is_loaded_by_its_address(uploads, tiny_model, tiny_model_dir, tmp_path):
    report = REPORT | {"parameters": parameter_fingerprints(tiny_model)}

    def write_samples(model, file):
        file.write_bytes(b"PNG")
        return model.class_names == tiny_model.class_names

    out = publish(
        tiny_model_dir, tmp_path / "out", report, "someone/tiny", licence="mit",
        datasets=["cifar10"], write_samples=write_samples,
    )  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "samples.png",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    for text in (
        "# tiny", 'load_pretrained("hf://someone/tiny")', "| fid | 12.346 |", "0.1 ± 0.01",
        "boat, house, old tree", "4 tokens, vocabulary of 16", "f2, 16 codebook entries",
        "Few samples.", "reference cifar10, test; commit abc", "cfg_scale 2.0", "(samples.png)",
        "aim-jax sample --checkpoint hf://someone/tiny --classes", "## Limits",
    ):  # fmt: skip
        assert text in card, text
    data = ModelCard(card).data
    assert (data.library_name, data.license, data.datasets) == ("aim_jax", "mit", ["cifar10"])
    assert data.pipeline_tag == "unconditional-image-generation" and data.model_name == "tiny"
    scores = {result.metric_type: result.metric_value for result in data.eval_results}
    assert scores == {"fid": 12.345678, "kid": 0.1}
    model = load_pretrained("hf://someone/tiny@v1")
    assert model.name == "hf://someone/tiny@v1" and model.class_names == tiny_model.class_names
    assert_same(model, tiny_model)
    with pytest.raises(FileExistsError, match="another directory"):
        publish(tiny_model_dir, out)
    again = publish(out, tmp_path / "again")
    assert "was not measured" in (again / "README.md").read_text()
    assert_same(load_pretrained(again), tiny_model)


def test_a_newer_model_replaces_what_an_older_one_left(
    uploads, tiny_model, tiny_model_dir, tmp_path
):
    shutil.copytree(tiny_model_dir, uploads.folder / "someone" / "tiny")  # of another layout
    publish(tiny_model_dir, tmp_path / "out", repository="someone/tiny")
    assert_same(load_pretrained("hf://someone/tiny"), tiny_model)


def test_files_that_the_description_does_not_list_are_not_read(
    tiny_model_dir, tiny_model, tmp_path
):
    out = publish(tiny_model_dir, tmp_path / "out")
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"aim.x": "other"}}')
    assert_same(load_pretrained(out), tiny_model)


def test_every_process_converts_for_itself(server, monkeypatch, tmp_path):
    source = official_repository(server.folder / "hp-l33" / "aim-base", "safetensors")
    expected = load_pretrained(convert.to_jax(source, tmp_path / "direct"))
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert_same(load_pretrained(source), expected)


def test_only_models_of_the_user_are_changed(server, tmp_path):
    source = official_repository(server.folder / "hp-l33" / "aim-base", "safetensors")
    load_pretrained(source)
    for name in (source, "cifar10", "hf://hp-l33/aim-base"):
        with pytest.raises(ValueError, match="is read-only; make a copy with aim-jax publish"):
            own_directory(name)
    with pytest.raises(FileNotFoundError, match="no model"):
        own_directory(tmp_path / "nowhere")
    copy = publish(source, tmp_path / "copy")
    assert own_directory(copy) == copy


def test_a_text_model_keeps_its_tokenizer(uploads, text_model, tmp_path):
    from aim_jax.weights.directories import save_model

    source = save_model(tmp_path / "source", text_model)
    publish(source, tmp_path / "out", repository="someone/words")
    model = load_pretrained("hf://someone/words")
    assert model.text.fingerprint == text_model.text.fingerprint
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.pipeline_tag == "text-to-image" and "--captions" in card.content


def test_published_model_keeps_what_the_way_back_needs(tiny_model_dir, tmp_path):
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    (source / LEFTOVERS).write_bytes(b"codebook_used")
    out = publish(source, tmp_path / "out")
    assert (out / LEFTOVERS).read_bytes() == b"codebook_used" and LEFTOVERS in hub.PATTERNS
    # It is of that tokenizer, not of another one.
    assert not (publish(source, tmp_path / "b", tokenizer=tiny_model_dir) / LEFTOVERS).exists()


def official_repository(folder, form, aim=TINY_AIM, vq=TINY_VQ):
    """A repository with random weights under the official keys."""
    folder.mkdir(parents=True)
    write_random_official(folder / "model.safetensors", aim, vq)
    opened = convert.open_weights(folder / "model.safetensors").tensors
    if form == "pickle":
        arrays = {key: np.asarray(tensor) for key, tensor in opened.items()}
        saved(arrays, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    (folder / "model.onnx").write_bytes(b"not downloaded")
    return folder


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_official_weights_in_one_line(form, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    source = official_repository(server.folder / "hp-l33" / "aim-base", form)
    model = load_pretrained("hf://hp-l33/aim-base")
    said = capsys.readouterr().err
    assert "AiM-B with VQ-f16, ImageNet 256, 0.88 GB to download once" in said
    assert said.count("converting official weights of 0.00 GB into") == 1
    assert model.aim_config.position_offset == 1 and model.sampling["top_k"] == 600
    assert not any(path.endswith(".onnx") for path in server.asked)
    direct = load_pretrained(convert.to_jax(source, tmp_path / "direct"))
    assert_same(model, direct)
    assert_same(load_pretrained("hf://hp-l33/aim-base"), direct)
    assert_same(load_pretrained(source), direct)  # the same bytes, so the same conversion
    assert "converting" not in capsys.readouterr().err


def test_a_file_of_a_repository(server, tmp_path):
    folder = server.folder / "FoundationVision" / "LlamaGen"
    folder.mkdir(parents=True)
    write_random_official(tmp_path / "all.safetensors", None, TINY_VQ)
    opened = convert.open_weights(tmp_path / "all.safetensors").tensors
    state = {key.removeprefix("vqvae."): np.asarray(tensor) for key, tensor in opened.items()}
    saved({"model": state}, folder / "vq_ds16_c2i.pt")
    model = load_pretrained("hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt@v1")
    assert model.aim_config is None and model.vq_config.n_embed == TINY_VQ.n_embed
    assert_same(model, load_pretrained(folder / "vq_ds16_c2i.pt"))
    with pytest.raises(FileNotFoundError, match=r"of vq_ds16_c2i\.pt"):
        load_pretrained("hf://FoundationVision/LlamaGen")
    with pytest.raises(FileNotFoundError, match="no such file; see"):
        load_pretrained("hf://FoundationVision/LlamaGen/other.pt")


def test_what_cannot_be_fetched_is_said(server):
    for name in ("someone/tiny", "broken/tiny"):
        (server.folder / name).mkdir(parents=True)
        (server.folder / name / "config.json").write_text("{}" * 100)
    for address, kind, message in (
        ("hf://nobody/nothing", FileNotFoundError, "no such repository"),
        ("hf://someone/tiny@other", FileNotFoundError, "no such repository or revision"),
        ("hf://someone/tiny", FileNotFoundError, "It has no file of weights"),
        ("hf://gated/tiny", PermissionError, "licence has to be accepted first, at https"),
        ("hf://tiny", ValueError, "expected hf://owner/name"),
        ("hf://a/b/../c", ValueError, "expected hf://owner/name"),
        ("hf://some one/tiny", ValueError, "Repo id must use alphanumeric"),
    ):
        with pytest.raises(kind, match=message) as caught:
            load_pretrained(address)
        assert "\n" not in str(caught.value) and address in str(caught.value)


def test_a_download_that_breaks_off_is_said(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's tries
    (server.folder / "broken" / "tiny").mkdir(parents=True)
    (server.folder / "broken" / "tiny" / "config.json").write_text("{}" * 100)
    with pytest.raises(OSError, match=r"the download failed .* Repeat the command"):
        load_pretrained("hf://broken/tiny")


def test_without_a_network_what_was_downloaded_is_used(uploads, tiny_model, tiny_model_dir):
    publish(tiny_model_dir, uploads.folder.parent / "out", repository="someone/tiny")
    load_pretrained("hf://someone/tiny")
    uploads.close()
    assert_same(load_pretrained("hf://someone/tiny"), tiny_model)
    with pytest.raises(FileNotFoundError, match="hf download someone/other"):
        load_pretrained("hf://someone/other")


@pytest.mark.parametrize("damage", ["half", "none", "two"])
def test_directories_that_are_not_one_whole_model(damage, tiny_model_dir, tmp_path):
    out = publish(tiny_model_dir, tmp_path / "out")
    file = out / "model.safetensors"
    if damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        expected = "is not a complete safetensors file|damaged: model"
    elif damage == "none":
        file.unlink()
        expected = "missing: model"
    else:
        shutil.copy(tiny_model_dir / "model.json", out)
        expected = r"holds two models, model\.json and config\.json"
    for verify in (True, False):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_pretrained(out, verify=verify)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=expected):
        load_pretrained(out)


def test_a_large_model_is_in_several_files(tiny_model, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("aim_jax.weights.hub_files.save_params.__defaults__", (20_000,))
    out = publish(tiny_model_dir, tmp_path / "out")
    names = {path.name for path in out.glob("model*")}
    assert "model.safetensors.index.json" in names and "model.safetensors" not in names
    assert len(names) > 3 and all(p.stat().st_size < 60_000 for p in out.glob("model-*"))
    assert_same(load_pretrained(out), tiny_model)
    first = min(out.glob("model-*"))
    first.unlink()
    with pytest.raises(ValueError, match=f"missing: {first.name}"):
        load_pretrained(out)


def test_the_program_samples_from_an_address(uploads, tiny_model_dir, tmp_path):
    publish(tiny_model_dir, tmp_path / "out", repository="someone/tiny")
    done = run(
        "sample", "--checkpoint", "hf://someone/tiny", "--classes", "boat", "--per_class", "1",
        "--out", str(tmp_path / "samples"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples" / "grid.png").is_file()
    for address, message in (
        ("hf://gated/tiny", "licence has to be accepted"), ("hf://no/body", "no such repository"),
    ):  # fmt: skip
        done = run("sample", "--checkpoint", address, "--out", str(tmp_path / "other"))
        assert done.returncode == 1 and message in done.stderr
        assert "Traceback" not in done.stderr


def test_the_program_publishes_a_grid(tiny_model_dir, tmp_path):
    out = tmp_path / "out"
    done = run(
        "publish", "--checkpoint", str(tiny_model_dir), "--out", str(out), "--license", "mit"
    )
    assert done.returncode == 0, done.stderr
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert "license: mit" in (out / "README.md").read_text()


def test_a_failed_upload_says_how_to_continue(uploads, tiny_model_dir, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("connection refused")  # as an HTTP library has it

    monkeypatch.setattr(huggingface_hub, "upload_folder", fail)
    out = tmp_path / "out"
    with pytest.raises(OSError, match=rf"connection refused\. .* hf upload someone/tiny {out}"):
        publish(tiny_model_dir, out, repository="someone/tiny")
    assert load_pretrained(out).class_names
    monkeypatch.setattr(huggingface_hub, "create_repo", fail)
    with pytest.raises(OSError, match=r"someone/tiny: connection refused\. Log in"):
        publish(tiny_model_dir, tmp_path / "other", repository="someone/tiny")
    assert not (tmp_path / "other").exists()


def test_released_models_are_those_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "released_weights.md").read_text()
    for address, released in hub.RELEASED.items():
        assert address in page
        assert 0 < released.bytes < 4e9
    address = hub.parse_address("hf://owner/name/folder/file.pt@refs/pr/1")
    assert address == ("owner/name", "folder/file.pt", "refs/pr/1")


@pytest.mark.slow
def test_official_weights_of_full_size(server):
    """AiM-B with VQ-f16, as the authors' repository holds them: keys and shapes, random values."""
    official_repository(
        server.folder / "hp-l33" / "aim-base", "safetensors", PRESETS["B"], VQConfig()
    )
    model = load_pretrained("hf://hp-l33/aim-base", as_stored=True)
    assert sum(x.size for x in __import__("jax").tree.leaves(model.aim_params)) == 147_622_080
    assert model.class_names[207] == "golden retriever"
