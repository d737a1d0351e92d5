"""What the buttons of the page do: values that anybody may send in, pictures out."""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from aim_jax.sampling import grids
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.generate import Samples, generate
from aim_jax.utils.images import make_grid, side_by_side
from aim_jax.weights.pretrained import Pretrained

Number = float | None  # of a slider or a box, which may be empty

MOST_IMAGES = 16
COLUMNS = 4
MOST_PIXELS = 4096 * 4096
MOST_RATIO = 16  # of the sides: the shorter one is what a picture is scaled by


def sliders_of(model: Pretrained) -> list[tuple]:
    """(name, least, most, step, label) of a slider per setting, wide enough for the model's own."""
    vocabulary = model.aim()[0].vocab_size
    own = SamplingConfig(**model.sampling).numbers()
    sliders = []
    for name, setting in SETTINGS.items():
        least, most, step = setting.slider
        most = vocabulary if most is None else most
        label = f"{name}: {setting.help}"
        sliders.append((name, min(least, own[name]), max(most, own[name]), step, label))
    return sliders


def class_names(model: Pretrained) -> list[str]:
    """A name for every class, its number where the model has none."""
    return [grids.class_name(model, i) for i in range(model.aim()[0].num_classes)]


def most_rows(model: Pretrained) -> int:
    """The most rows of codes that a completion may keep."""
    return round(model.aim()[0].num_tokens ** 0.5) - 1


@dataclasses.dataclass(frozen=True)
class Actions:
    """Draws, compares and completes with one of several models.

    `values` are those of the sliders, in their order. All raise ValueError, with a text for people,
    where a value is none that the page offers.

    Args:
      models: by the name that is shown.
    """

    models: Mapping[str, Pretrained]

    def draw(
        self, name: str, chosen: str, count: Number, seed: Number, *values: Number
    ) -> Iterator[Image.Image]:
        """A grid after every row of codes."""
        model, label, settings = self._asked(name, chosen, *values)
        count = _whole(count, 1, MOST_IMAGES, "the number of images")
        for images in drawn(model, np.full(count, label), _seed(seed), **settings):
            yield make_grid(images, min(count, COLUMNS), min_side=128)

    def compare(
        self, name: str, chosen: str, count: Number, seed: Number, *values: Number
    ) -> Image.Image:
        """Two grids of the same seeds; values are those of the left one, then of the right one."""
        half = len(values) // 2
        count = _whole(count, 1, MOST_IMAGES, "the number of images")
        seed = _seed(seed)
        grids = []
        asked = [self._asked(name, chosen, *part) for part in (values[:half], values[half:])]
        for model, label, settings in asked:
            images = generate(model, np.full(count, label), seed, **settings).images
            grids.append(make_grid(np.asarray(images), min(count, COLUMNS), min_side=96))
        return side_by_side(grids)

    def complete(
        self,
        name: str,
        chosen: str,
        uploaded: np.ndarray | None,
        sketched: dict | None,
        rows: Number,
        count: Number,
        seed: Number,
        *values: Number,
    ) -> Image.Image:
        """A picture, what is kept of it, and completions.

        Args:
          uploaded: uint8 (H, W, 3) or None.
          sketched: what Gradio's sketchpad gives, with the drawing as "composite"; or None.
        """
        model, label, settings = self._asked(name, chosen, *values)
        drawing = None if sketched is None else sketched["composite"]
        if drawing is not None and np.ptp(drawing) == 0:  # nothing was drawn
            drawing = None
        picture = drawing if uploaded is None else uploaded
        if picture is None:
            raise ValueError("Upload a picture, or draw one.")
        if picture.shape[0] * picture.shape[1] > MOST_PIXELS:
            raise ValueError(f"The picture has more than {MOST_PIXELS:,} pixels; make it smaller.")
        if max(picture.shape[:2]) > MOST_RATIO * min(picture.shape[:2]):
            raise ValueError(f"One side is over {MOST_RATIO} times the other; cut a part out.")
        return grids.complete(
            model, [picture[..., :3]], [label], _whole(count, 1, COLUMNS, "the completions"),
            rows=_whole(rows, 1, most_rows(model), "the rows to keep"), seed=_seed(seed),
            min_side=128, **settings,
        )  # fmt: skip

    def _asked(self, name: str, chosen: str, *values: Number) -> tuple[Pretrained, int, dict]:
        if name not in self.models:
            raise ValueError(f"There is no model {name!r}.")
        model, settings = self.models[name], {}
        for (key, least, most, *_), value in zip(sliders_of(model), values, strict=True):
            if value is None or not least <= value <= most:
                raise ValueError(f"{key} must be from {least} to {most}.")
            settings[key] = SETTINGS[key].kind(value)
        if chosen not in class_names(model):
            raise ValueError(f"{name} knows no class {chosen!r}.")
        return model, class_names(model).index(chosen), settings


def drawn(
    model: Pretrained, labels: np.ndarray, seed: int, **settings: Any
) -> Iterator[np.ndarray]:
    """The images uint8 (b, H, W, c) after every row of codes, and at last the finished ones.

    Where the reader leaves before the end, drawing ends with the row at hand.
    """
    done: queue.Queue = queue.Queue()
    left = threading.Event()

    def watch(samples: Samples) -> None:
        if left.is_set():
            raise InterruptedError
        done.put(np.asarray(samples.images))

    def work() -> None:
        try:
            images = generate(model, labels, seed, callback=watch, **settings).images
            done.put(np.asarray(images))
        except Exception as error:  # is raised where the images are waited for
            done.put(error)
        done.put(None)

    worker = threading.Thread(target=work, name="aim_jax drawing", daemon=True)
    worker.start()
    try:
        while (item := done.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        # Whoever draws next has the device alone.
        left.set()
        worker.join()


def _whole(value: Number, least: int, most: int, what: str) -> int:
    if value is None or not least <= value <= most or value != int(value):
        raise ValueError(f"{what} must be a whole number from {least} to {most}.")
    return int(value)


def _seed(value: Number) -> int:
    return _whole(value, 0, 2**31 - 1, "the seed")
