"""A page to sample in a browser; Gradio comes with the extra `page`."""

import queue
import threading
from collections.abc import Iterator, Mapping

import numpy as np

from aim_jax import gallery
from aim_jax.pictures import make_grid, side_by_side
from aim_jax.pretrained import Pretrained
from aim_jax.sampling import generate

MOST_IMAGES = 16
COLUMNS = 4
QUEUE = 16  # requests that may wait
# Nothing is read but uploads of this size; why one is refused is shown.
LIMITS = {"max_file_size": "4mb", "allowed_paths": [], "show_error": True}
MOST_PIXELS = 4096 * 4096
# (name, least, most, step, label) of the sliders; the model's own values come first. The most of
# top_k is the model's vocabulary.
SLIDERS = (
    ("cfg_scale", 1.0, 8.0, 0.25, "guidance (cfg_scale)"),
    ("temperature", 0.1, 2.0, 0.05, "temperature"),
    ("top_k", 0, None, 1, "top_k (0: off)"),
    ("top_p", 0.05, 1.0, 0.05, "top_p (1: off)"),
)


def drawn(model: Pretrained, labels: np.ndarray, seed: int, **settings) -> Iterator[np.ndarray]:
    """The images uint8 (b, H, W, c) after every row of codes, and at last the finished ones."""
    done: queue.Queue = queue.Queue()

    def work():
        try:
            watch = lambda samples: done.put(np.asarray(samples.images))  # noqa: E731
            images = generate(model, labels, seed, callback=watch, **settings).images
            done.put(np.asarray(images))
        except Exception as error:  # is raised where the images are waited for
            done.put(error)
        done.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (item := done.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


def build(models: Mapping[str, Pretrained]):
    """The page as `gradio.Blocks`, with its queue; `launch` serves it.

    Args:
      models: by the name to show, each with an AiM and a tokenizer, on one device.

    Raises:
      ValueError: Gradio is not installed, or a model lacks a part.
    """
    gr = _import_gradio()
    lacking = [name for name, m in models.items() if m.aim_params is None or m.vq_params is None]
    if lacking:
        raise ValueError(f"{', '.join(lacking)}: the page needs both an AiM and a tokenizer.")
    first = next(iter(models))

    def names(model: Pretrained) -> list[str]:
        return [gallery.class_name(model, i) for i in range(model.aim_config.num_classes)]

    def most_rows(model: Pretrained) -> int:
        return round(model.aim_config.num_tokens**0.5) - 1

    def sliders_of(model: Pretrained) -> list[tuple]:
        return [
            (key, least, model.aim_config.vocab_size if most is None else most, step, label)
            for key, least, most, step, label in SLIDERS
        ]

    def asked(name, chosen, *values) -> tuple[Pretrained, int, dict]:
        model, settings = models[name], {}
        for (key, least, most, step, _), value in zip(sliders_of(model), values, strict=True):
            if value is None or not least <= value <= most:
                raise gr.Error(f"{key} must be from {least} to {most}.")
            settings[key] = int(value) if step == 1 else float(value)
        if chosen not in names(model):
            raise gr.Error(f"{name} knows no class {chosen!r}.")
        return model, names(model).index(chosen), settings

    def whole(value, least, most, what) -> int:
        if value is None or not least <= value <= most or value != int(value):
            raise gr.Error(f"{what} must be a whole number from {least} to {most}.")
        return int(value)

    def draw(name, chosen, count, seed, *values):
        model, label, settings = asked(name, chosen, *values)
        count = whole(count, 1, MOST_IMAGES, "the number of images")
        seed = whole(seed, 0, 2**31 - 1, "the seed")
        for images in drawn(model, np.full(count, label), seed, **settings):
            yield make_grid(images, min(count, COLUMNS), min_side=128)

    def compare(name, chosen, count, seed, *values):
        half, count = len(values) // 2, whole(count, 1, MOST_IMAGES, "the number of images")
        seed, pictures = whole(seed, 0, 2**31 - 1, "the seed"), []
        for part in (values[:half], values[half:]):
            model, label, settings = asked(name, chosen, *part)
            images = generate(model, np.full(count, label), seed, **settings).images
            pictures.append(make_grid(np.asarray(images), min(count, COLUMNS), min_side=96))
        return side_by_side(pictures)

    def complete(name, chosen, uploaded, sketched, rows, count, seed, *values):
        model, label, settings = asked(name, chosen, *values)
        drawing = None if sketched is None else sketched["composite"]
        if drawing is not None and np.ptp(drawing) == 0:  # nothing was drawn
            drawing = None
        picture = drawing if uploaded is None else uploaded
        if picture is None:
            raise gr.Error("Upload a picture, or draw one.")
        if picture.shape[0] * picture.shape[1] > MOST_PIXELS:
            raise gr.Error(f"The picture has more than {MOST_PIXELS:,} pixels; make it smaller.")
        rows = whole(rows, 1, most_rows(model), "the rows to keep")
        count = whole(count, 1, COLUMNS, "the number of completions")
        seed = whole(seed, 0, 2**31 - 1, "the seed")
        try:
            return gallery.complete(
                model, [picture[..., :3]], [label], count,
                rows=rows, seed=seed, min_side=128, **settings,
            )  # fmt: skip
        except ValueError as error:
            raise gr.Error(str(error)) from None

    def sliders(model: Pretrained = models[first]) -> list:
        return [
            gr.Slider(least, most, model.sampling[key], step=step, label=label, elem_id=key)
            for key, least, most, step, label in sliders_of(model)
        ]

    def choice():
        classes = names(models[first])
        return gr.Dropdown(classes, value=classes[0], label="class", elem_id="class")

    def seed_box():
        return gr.Number(0, label="seed", precision=0, minimum=0)

    with gr.Blocks(title="aim_jax", analytics_enabled=False) as page:
        gr.Markdown("# AiM: images from a state-space model")
        name = gr.Dropdown([*models], value=first, label="model")
        with gr.Tab("Sample"):
            with gr.Row():
                with gr.Column():
                    chosen, count = choice(), gr.Slider(1, MOST_IMAGES, 8, step=1, label="images")
                    upper = sliders()
                    inputs = [name, chosen, count, seed_box(), *upper]
                    button = gr.Button("Draw", variant="primary", elem_id="draw")
                shown = gr.Image(label="images", elem_id="drawn", interactive=False)
            button.click(draw, inputs, shown, api_name="draw", concurrency_id="device")
        with gr.Tab("Compare"):
            other, count = choice(), gr.Slider(1, MOST_IMAGES, 8, step=1, label="images")
            shared = [name, other, count, seed_box()]
            with gr.Row():
                with gr.Column():
                    left = sliders()
                with gr.Column():
                    right = sliders()
            button = gr.Button("Draw both", variant="primary", elem_id="compare")
            both = gr.Image(label="left and right settings", elem_id="compared", interactive=False)
            inputs = [*shared, *left, *right]
            button.click(compare, inputs, both, api_name="compare", concurrency_id="device")
        with gr.Tab("Complete"):
            with gr.Row():
                uploaded = gr.Image(
                    label="picture", sources=["upload"], type="numpy", elem_id="upload"
                )
                sketched = gr.Sketchpad(
                    label="or draw one", type="numpy", image_mode="RGB", elem_id="sketch"
                )
            with gr.Row():
                with gr.Column():
                    third = choice()
                    most = most_rows(models[first])
                    rows = gr.Slider(
                        1, max(most, 2), most // 2 + 1, step=1, label="rows of codes to keep"
                    )
                    count = gr.Slider(1, COLUMNS, 4, step=1, label="completions")
                    lower = sliders()
                    more = [rows, count, seed_box(), *lower]
                    button = gr.Button("Complete", variant="primary", elem_id="complete")
                result = gr.Image(
                    label="picture, kept, completions", elem_id="completed", interactive=False
                )
            inputs = [name, third, uploaded, sketched, *more]
            button.click(complete, inputs, result, api_name="complete", concurrency_id="device")

        def other_model(name):
            classes = names(models[name])
            most = most_rows(models[name])
            rows = gr.Slider(maximum=max(most, 2), value=most // 2 + 1)
            changed = [gr.Dropdown(classes, value=classes[0])] * 3
            return [*changed, rows, *sliders(models[name]) * 4]

        settings = [*upper, *left, *right, *lower]
        name.change(other_model, name, [chosen, other, third, rows, *settings])
    # What shares a concurrency_id has the device one after the other. What does not fit in the
    # queue is told so.
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def serve(models: Mapping[str, Pretrained], host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves the page until it is interrupted. It reads no files but what is uploaded to it."""
    page = build(models)
    page.launch(server_name=host, server_port=port, **LIMITS)


def _import_gradio():
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs Gradio: pip install -e '.[page]'.") from None
    return gradio
