"""Configurations that are chosen from a folder of pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from aim_jax.configs import from_folder as own_images
from aim_jax.configs.from_folder import (
    Survey,
    aim_config,
    caption_length,
    describe,
    survey,
    vq_config,
)
from aim_jax.models import AiMConfig, VQConfig


@pytest.mark.parametrize(
    ("side", "images", "size", "factor", "codes"),
    [
        (8, 1_000, 16, 2, 256),
        (28, 60_000, 32, 4, 1024),
        (64, 4_999, 64, 4, 256),
        (100, 100_000, 128, 8, 4096),
        (500, 2_000_000, 256, 16, 16384),
    ],
)
def test_sizes_follow_the_pictures(side, images, size, factor, codes):
    found = Survey("pictures", images, 3, 3, side)
    assert (found.image_size, found.downsampling, found.codes) == (size, factor, codes)


@pytest.fixture(params=["L", "RGB"])
def folder(request, tmp_path):
    """Two classes of pictures of several sizes, the median of the shorter sides 60."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i, side in enumerate((40, 60, 60, 90)):
            shape = (side, side + 10) + ((3,) if request.param == "RGB" else ())
            pixels = rng.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path, {"L": 1, "RGB": 3}[request.param]


def test_both_stages_fit_the_folder_and_each_other(folder, monkeypatch):
    path, channels = folder
    monkeypatch.delenv("AIM_JAX_LPIPS", raising=False)
    found = survey(str(path))
    assert found == Survey(str(path), 6, 2, channels, 60)
    tokenizer, aim = vq_config(str(path)), aim_config(str(path))
    said = describe(tokenizer)
    assert "6 " in said and "2 classes, about 60 pixels -> 64" in said and "without LPIPS" in said
    vq, model = VQConfig(**tokenizer.model), AiMConfig(**aim.model)
    assert vq.downsampling == 4 and vq.in_channels == vq.out_channels == channels
    assert model.num_tokens == (64 // 4) ** 2 and model.num_classes == 2
    assert model.vocab_size == vq.n_embed == 256
    for config in (tokenizer, aim):
        assert config.data.image_size == 64 and config.data.channels == channels
        assert config.data.dir == str(path) and config.data.name == "folder"
    assert (aim.steps, aim.eval_every, aim.save_every) == (600, 200, 200)
    monkeypatch.setattr(own_images, "survey", lambda *_: found._replace(images=1_000_000))
    assert vq_config(str(path)).eval_every == 200_000 // 50  # most of the time is for training
    monkeypatch.setenv("AIM_JAX_LPIPS", "lpips.safetensors")
    assert vq_config(str(path)).loss.perceptual == 1.0


def test_a_run_tells_the_values_after_changes_by_the_user(folder, capsys, monkeypatch):
    path, channels = folder
    monkeypatch.delenv("AIM_JAX_LPIPS", raising=False)
    tokenizer, aim = vq_config(str(path)), aim_config(str(path))
    assert capsys.readouterr() == ("", "")  # nothing before the changes are known
    for config in (tokenizer, aim):
        config.steps, config.batch_size, config.data.image_size = 77, 5, 32
    tokenizer.model.update(n_embed=99, ch_mult=(1, 1, 1, 1))
    tokenizer.loss.perceptual = 1.0
    aim.model.update(n_layer=3, d_model=48, num_tokens=16)
    aim.tokenizer = "runs/other"
    said = describe(tokenizer)
    assert "pixels -> 32; tokenizer f8 with 99 codebook entries, 77 steps of 5 images" in said
    assert said.endswith("with LPIPS")
    said = describe(aim)
    assert "AiM with 3 layers of width 48 on 16 tokens, 77 steps of 5 images" in said
    assert said.endswith("tokenizer of runs/other")
    aim.data.channels = 4 - channels
    assert f"-> 32 in {'grey' if channels == 3 else 'colour'}" in describe(aim)


def test_a_missing_folder_is_said():
    with pytest.raises(ValueError, match=r"--config folder_vq:DIR"):
        vq_config("")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        aim_config("/nowhere")


@pytest.fixture
def captioned(tmp_path):
    """Three captioned images, and the same captions in another field."""
    lines = []
    for i in range(3):
        Image.new("RGB", (30, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"t {i}", "prompt": f"p {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return str(tmp_path)


@pytest.mark.parametrize(("field", "name"), [("", "captions"), ("prompt", "captions:prompt")])
def test_captioned_images_get_a_model_of_text(captioned, field, name):
    found = survey(captioned, field)
    assert found == Survey(captioned, 2, 1, 3, 30, name) and found.captioned
    tokenizer, aim = vq_config(captioned, field), aim_config(captioned, field)
    assert tokenizer.data.name == aim.data.name == name
    model = AiMConfig(**aim.model)
    assert (model.condition, model.num_classes, model.caption_vocab) == ("text", 0, 2048)
    aim.model.max_caption = 24
    said = describe(aim)
    assert "2 colour images with captions, about 30 pixels -> 32" in said
    assert "on 64 tokens, after up to 24 of text, 600 steps of 64 images" in said
    assert "2 colour images with captions" in describe(tokenizer)


def test_lengths_of_captions_leave_few_cut():
    lengths = np.repeat([3, 17, 90], [500, 497, 3])
    assert caption_length(lengths) == 24
    assert caption_length(np.array([200])) == 128
    assert caption_length(np.array([])) == caption_length(np.array([8])) == 8
