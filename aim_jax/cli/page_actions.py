"""Actions behind the buttons of the web page: from untrusted values to images."""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from aim_jax.cli.page_requests import RefusedError
from aim_jax.data import decode_image
from aim_jax.data.captions import MOST_CAPTION
from aim_jax.sampling import grids
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.generate import Samples, generate
from aim_jax.utils.images import framed, make_grid, side_by_side
from aim_jax.utils.names import short_list
from aim_jax.weights.pretrained import Pretrained

Number = float | None  # value of a slider or a number box, which may be empty

MOST_IMAGES = 16
COLUMNS = 4
MOST_PIXELS = 4096 * 4096
MOST_RATIO = 16  # maximum ratio of the sides, since images are scaled by their shorter side


def sliders_of(model: Pretrained) -> list[tuple]:
    """Return (name, minimum, maximum, step, label) of a slider for every numeric setting.

    The range includes the default of the model.
    """
    vocabulary = model.aim()[0].vocab_size
    defaults = SamplingConfig(**model.sampling).numbers()
    sliders = []
    for name, setting in SETTINGS.items():
        minimum, maximum, step = setting.slider
        maximum = vocabulary if maximum is None else maximum
        minimum = min(minimum, defaults[name])
        maximum = max(maximum, defaults[name])
        label = f"{name}: {setting.help}"
        sliders.append((name, minimum, maximum, step, label))
    return sliders


def other_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings to compare others with: without guidance, or with guidance if they have none.

    Args:
      settings: numeric settings by name.
    """
    return {**settings, "cfg_scale": 1.0 if settings["cfg_scale"] != 1 else 3.0}


def takes_text(model: Pretrained) -> bool:
    """Return whether a model generates from captions instead of classes.

    Raises:
      ValueError: if it takes features of another encoder, which the page has not.
    """
    config, _ = model.aim()
    if config.caption_features:
        raise ValueError(f"{model.name} takes features of captions; the page has text alone.")
    return config.is_text


def class_names(model: Pretrained) -> list[str]:
    """Return a name for every class: its id as text if the model has no names."""
    config, _ = model.aim()
    return [grids.class_name(model, i) for i in range(config.num_classes)]


def most_rows(model: Pretrained) -> int:
    """Return the maximum number of rows of tokens that a completion may keep."""
    return round(model.aim()[0].num_tokens ** 0.5) - 1


@dataclasses.dataclass(frozen=True)
class Actions:
    """Generation, comparison and completion with one of several models.

    In all methods, `values` are those of the sliders, in their order. A value that the page does
    not offer raises RefusedError, whose message is shown to visitors.

    Attributes:
      models: models by the name that is shown.
    """

    models: Mapping[str, Pretrained]

    def draw(
        self, name: str, chosen: str, count: Number, seed: Number, *values: Number
    ) -> Iterator[Image.Image]:
        """Yield the grid of partial images after every row of tokens, and the final grid."""
        model, labels, settings = self._validated(name, chosen, *values)
        count = _integer(count, 1, MOST_IMAGES, "the number of images")
        for images in drawn(model, labels * count, _seed(seed), **settings):
            yield make_grid(images, min(count, COLUMNS), min_side=128)

    def compare(
        self, name: str, chosen: str, count: Number, seed: Number, *values: Number
    ) -> Image.Image:
        """Return two framed grids with the same seed.

        `values` are those of the left grid, then those of the right one.
        """
        half = len(values) // 2
        count = _integer(count, 1, MOST_IMAGES, "the number of images")
        seed = _seed(seed)
        grids = []
        sides = [self._validated(name, chosen, *part) for part in (values[:half], values[half:])]
        for model, labels, settings in sides:
            images = generate(model, labels * count, seed, **settings).images
            grid = make_grid(np.asarray(images), min(count, COLUMNS), min_side=96)
            grids.append(framed(grid))
        return side_by_side(grids)

    def complete(
        self,
        name: str,
        chosen: str,
        uploaded: str | np.ndarray | None,
        sketched: dict | None,
        rows: Number,
        count: Number,
        seed: Number,
        *values: Number,
    ) -> Image.Image:
        """Return a grid with an image, its kept part, and completions.

        Args:
          name: name of the model.
          chosen: name of the class, or caption.
          uploaded: path of a file, decoded like the images of a dataset; or uint8 (H, W, 3); or
            None.
          sketched: value of Gradio's sketchpad, with the drawing as "composite"; or None.
          rows: rows of tokens to keep.
          count: number of completions.
          seed: random seed.
          *values: values of the sliders.
        """
        model, labels, settings = self._validated(name, chosen, *values)
        drawing = None if sketched is None else sketched["composite"]
        if drawing is not None and np.ptp(drawing) == 0:  # the sketchpad is empty
            drawing = None
        if isinstance(uploaded, str):
            uploaded = _decoded(uploaded)
        image = drawing if uploaded is None else uploaded
        if image is None:
            raise RefusedError("Upload an image or draw one.")
        if image.shape[0] * image.shape[1] > MOST_PIXELS:
            raise RefusedError(f"The image has more than {MOST_PIXELS:,} pixels; make it smaller.")
        if max(image.shape[:2]) > MOST_RATIO * min(image.shape[:2]):
            raise RefusedError(f"One side is over {MOST_RATIO} times the other; crop the image.")
        return grids.complete(
            model, [image[..., :3]], labels, _integer(count, 1, COLUMNS, "the completions"),
            rows=_integer(rows, 1, most_rows(model), "the rows to keep"), seed=_seed(seed),
            min_side=128, **settings,
        )  # fmt: skip

    def _validated(
        self, name: str, chosen: str, *values: Number
    ) -> tuple[Pretrained, list[int] | list[str], dict]:
        """Return the model, a list of the class id or caption, and the settings.

        Raises:
          RefusedError: the page does not offer one of them.
        """
        if name not in self.models:
            raise RefusedError(f"Unknown model; the models are {short_list([*self.models])}.")
        model = self.models[name]
        settings = {}
        for (key, minimum, maximum, *_), value in zip(sliders_of(model), values, strict=True):
            if value is None or not minimum <= value <= maximum:
                raise RefusedError(f"{key} must be from {minimum} to {maximum}.")
            settings[key] = SETTINGS[key].kind(value)
        if takes_text(model):
            chosen = chosen or ""
            if len(chosen) > MOST_CAPTION:
                raise RefusedError(f"The caption has more than {MOST_CAPTION:,} characters.")
            return model, [chosen], settings
        classes = class_names(model)
        if chosen not in classes:
            raise RefusedError(f"Unknown class; the classes of {name} are {short_list(classes)}.")
        return model, [classes.index(chosen)], settings


def drawn(
    model: Pretrained, labels: Sequence[int] | Sequence[str], seed: int, **settings: Any
) -> Iterator[np.ndarray]:
    """Yield partial images uint8 (b, H, W, c) after every row of tokens, then the final images.

    If the caller stops iterating, generation stops after the current row.
    """
    results: queue.Queue = queue.Queue()
    closed = threading.Event()

    def watch(samples: Samples) -> None:
        if closed.is_set():
            raise InterruptedError
        results.put(np.asarray(samples.images))

    def work() -> None:
        try:
            images = generate(model, labels, seed, callback=watch, **settings).images
            results.put(np.asarray(images))
        except Exception as error:  # raised again in the thread of the caller
            results.put(error)
        results.put(None)

    worker = threading.Thread(target=work, name="aim_jax generation", daemon=True)
    worker.start()
    try:
        while (item := results.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        # Wait, so that the next request has the device to itself.
        closed.set()
        worker.join()


def _decoded(path: str) -> np.ndarray:
    try:
        return decode_image(path, path)
    except ValueError:  # it names the path
        raise RefusedError("The upload is not an image that can be read here.") from None


def _integer(value: Number, minimum: int, maximum: int, name: str) -> int:
    if value is None or not minimum <= value <= maximum or value != int(value):
        raise RefusedError(f"{name} must be an integer from {minimum} to {maximum}.")
    return int(value)


def _seed(value: Number) -> int:
    return _integer(value, 0, 2**31 - 1, "the seed")
