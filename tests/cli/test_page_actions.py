"""Actions of the page without a browser: images, and one-line refusals."""

import dataclasses
import threading

import numpy as np
import pytest
from PIL import Image

from aim_jax.cli.page_actions import (
    MOST_IMAGES,
    Actions,
    class_names,
    drawn,
    other_settings,
    sliders_of,
    takes_text,
)
from aim_jax.configs.defaults import vq_defaults
from aim_jax.data import decode_image
from aim_jax.sampling import SamplingConfig
from aim_jax.sampling.generate import generate
from aim_jax.utils.images import make_grid

SEED = 3


@pytest.fixture(scope="module")
def model(tiny_model):
    """It knows how its images, 4 x 4 and grey, were fitted."""
    data = vq_defaults().data.to_dict() | {"name": "folder", "image_size": 4, "channels": 1}
    return dataclasses.replace(tiny_model, info={"data": data})


@pytest.fixture(scope="module")
def actions(model):
    return Actions({"tiny": model})


@pytest.fixture(scope="module")
def values(model):
    return list(SamplingConfig(**model.sampling).numbers().values())


def test_rows_appear_one_after_the_other(model):
    seen = list(drawn(model, np.array([0, 1]), SEED, cfg_scale=2.0))
    assert len(seen) == 3 and np.all(seen[0][:, 2:] == 128)
    assert not np.all(seen[1][:, 2:] == 128)
    np.testing.assert_array_equal(seen[-1], seen[-2])
    np.testing.assert_array_equal(seen[-1], generate(model, [0, 1], SEED, cfg_scale=2.0).images)
    reader = drawn(model, np.array([0, 1]), SEED, cfg_scale=2.0)
    next(reader)
    reader.close()  # waits for the thread that draws
    assert not [t for t in threading.enumerate() if t.name.startswith("aim_jax generation")]
    with pytest.raises(ValueError, match="temperature"):
        list(drawn(model, np.array([0]), 0, temperature=0.0))


def test_settings_are_compared_on_the_same_seeds(model, actions, values):
    name = class_names(model)[1]

    def compare(*right):
        both = np.asarray(actions.compare("tiny", name, 2, SEED, *values, *right))
        return np.split(both, 2, axis=1)

    left, right = compare(*values)
    assert np.ptp(left) > 0
    np.testing.assert_array_equal(left, right)
    again, guided = compare(8.0, *values[1:])
    np.testing.assert_array_equal(again, left)
    assert not np.array_equal(guided, left)


def test_comparisons_start_with_two_settings():
    settings = {"cfg_scale": 2.0, "top_k": 3}
    assert other_settings(settings) == {"cfg_scale": 1.0, "top_k": 3}
    assert other_settings(settings | {"cfg_scale": 1.0})["cfg_scale"] != 1.0


def test_halves_of_a_comparison_are_apart(model, actions, values):
    both = np.asarray(actions.compare("tiny", class_names(model)[0], 2, SEED, *values, *values))
    middle = both.shape[1] // 2
    assert (both[:, middle - 8 : middle + 8] == 255).all()
    for line in (both[8:-8, middle - 10 : middle - 8], both[8:-8, middle + 8 : middle + 10]):
        assert (line == 0).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparent_uploads_are_completed_on_white(model, actions, values, tmp_path, kind):
    """As everywhere else; what a file hides under transparent pixels does not show."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[4:, :, 3] = 0
    image = Image.fromarray(pixels)
    options = {}
    if kind == "P":
        image = image.convert("RGB").quantize(16)
        image.putpixel((0, 0), 0)
        options["transparency"] = 0
    elif kind == "LA":
        image = image.convert("LA")
    image.save(tmp_path / "a.png", **options)
    on_white = decode_image(tmp_path / "a.png", "a.png")
    name = class_names(model)[0]

    def complete(uploaded):
        return np.asarray(actions.complete("tiny", name, uploaded, None, 1, 2, SEED, *values))

    done = complete(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(done, complete(on_white))
    opaque = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert (done != complete(opaque)).any()


def test_images_and_drawings_are_completed(actions, values, model):
    name = class_names(model)[0]
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    blank = {"composite": np.full((9, 9, 3), 255, np.uint8)}
    drawing = {"composite": image}

    def complete(uploaded, sketched, rows=1, count=2):
        return actions.complete("tiny", name, uploaded, sketched, rows, count, SEED, *values)

    done = complete(image, None)
    # What is uploaded comes before what is drawn, and a sketchpad without a line is none.
    np.testing.assert_array_equal(done, complete(image, drawing))
    np.testing.assert_array_equal(done, complete(None, drawing))
    with pytest.raises(ValueError, match="Upload an image or draw one"):
        complete(None, blank)
    with pytest.raises(ValueError, match="the rows to keep must be an integer from 1 to 1"):
        complete(image, None, rows=2)
    with pytest.raises(ValueError, match="the completions must be"):
        complete(image, None, count=5)
    large = np.broadcast_to(np.uint8(0), (5000, 5000, 3))
    with pytest.raises(ValueError, match=r"more than 16,777,216 pixels"):
        complete(large, None)
    with pytest.raises(ValueError, match="over 16 times the other"):
        complete(np.zeros((1, 17, 3), np.uint8), None)


def test_a_model_draws_with_its_own_settings(model):
    wide = dataclasses.replace(model, sampling=model.sampling | {"cfg_scale": 10.0})
    values = list(SamplingConfig(**wide.sampling).numbers().values())
    assert sliders_of(wide)[0][1:3] == (1.0, 10.0)
    name = class_names(wide)[0]
    assert next(Actions({"wide": wide}).draw("wide", name, 1, SEED, *values)).width > 100


def test_what_is_not_offered_is_refused(actions, values, model):
    name = class_names(model)[0]

    def draw(model="tiny", chosen=name, count=1, seed=SEED, values=values):
        return next(actions.draw(model, chosen, count, seed, *values))

    refused = {
        "Unknown model; the models are tiny": {"model": "x"},
        "Unknown class; the classes of tiny are boat, house, old tree": {"chosen": "x"},
        "number of images must be an integer from 1 to 16": {"count": MOST_IMAGES + 1},
        "number of images must be": {"count": None},
        "the seed must be": {"seed": -1},
        "seed must be an integer": {"seed": 0.5},
        "cfg_scale must be from 1.0 to 8.0": {"values": [float("nan"), *values[1:]]},
        "top_k must be from 0 to": {"values": [*values[:2], 10**6, values[3]]},
        "temperature must be from 0.1": {"values": [values[0], None, *values[2:]]},
    }
    for message, asked in refused.items():
        with pytest.raises(ValueError, match=message):
            draw(**asked)


def test_captions_are_drawn(text_model, model, capsys):
    text_model = dataclasses.replace(text_model, info=model.info)
    actions = Actions({"words": text_model})
    values = list(SamplingConfig(**text_model.sampling).numbers().values())
    *_, grid = actions.draw("words", "a red boat", 2, SEED, *values)
    images = generate(text_model, ["a red boat"] * 2, SEED, **text_model.sampling).images
    np.testing.assert_array_equal(grid, make_grid(np.asarray(images), 2, min_side=128))
    other = actions.compare("words", "a blue house", 2, SEED, *values, *values)
    assert other.width > grid.width
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    assert actions.complete("words", "a red boat", image, None, 1, 2, SEED, *values).width > 100
    capsys.readouterr()
    next(actions.draw("words", "", 1, SEED, *values))
    assert "the null caption" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"more than 2,000 characters"):
        next(actions.draw("words", "a" * 2001, 1, SEED, *values))


def test_features_of_captions_cannot_be_typed(text_model):
    config = dataclasses.replace(text_model.aim_config, caption_vocab=0, caption_features=4)
    encoded = dataclasses.replace(text_model, aim_config=config, text=None)
    with pytest.raises(ValueError, match="words takes features of captions; the page has text"):
        takes_text(encoded)
