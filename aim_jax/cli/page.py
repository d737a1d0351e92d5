"""A page to sample in a browser; Gradio comes with the extra `page`."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from aim_jax.cli.page_actions import (
    COLUMNS,
    MOST_IMAGES,
    MOST_PIXELS,
    Actions,
    class_names,
    most_rows,
    sliders_of,
)
from aim_jax.sampling.config import SamplingConfig
from aim_jax.weights.pretrained import Pretrained

QUEUE = 16  # requests that may wait
MOST_BYTES = 4 * 2**20  # of a request, and so of an upload
KEPT_SECONDS = 3600  # pictures that were shown or uploaded


def build(models: Mapping[str, Pretrained]) -> Any:
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
    name, first = next(iter(models.items()))
    actions, build_tabs = Actions(models), (_sample_tab, _compare_tab, _complete_tab)
    cleaning = (KEPT_SECONDS // 6, KEPT_SECONDS)
    with gr.Blocks(title="aim_jax", analytics_enabled=False, delete_cache=cleaning) as page:
        gr.Markdown("# AiM: images from a state-space model")
        chosen = gr.Dropdown([*models], value=name, label="model")
        follow: list = []  # (components, model -> their updates), for when the model changes
        for build_tab in build_tabs:
            follow += build_tab(gr, actions, chosen, first)
        outputs = [component for components, _ in follow for component in components]
        chosen.change(
            lambda name: [new for _, update in follow for new in update(models[name])],
            chosen, outputs,
        )  # fmt: skip
    # What shares a concurrency_id has the device one after the other. What does not fit in the
    # queue is told so.
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def _sample_tab(
    gr: ModuleType, actions: Actions, model_name: Any, model: Pretrained
) -> list[tuple]:
    with gr.Tab("Sample"), gr.Row():
        with gr.Column():
            name, count = _class_choice(gr, model), _image_count(gr)
            settings = _sliders(gr, model)
            inputs = [model_name, name, count, _seed_box(gr), *settings]
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        shown = _grid(gr, "images", "drawn")
    button.click(actions.draw, inputs, shown, api_name="draw", concurrency_id="device")
    return _followers(gr, name, settings)


def _compare_tab(
    gr: ModuleType, actions: Actions, model_name: Any, model: Pretrained
) -> list[tuple]:
    with gr.Tab("Compare"):
        name, count = _class_choice(gr, model), _image_count(gr)
        inputs = [model_name, name, count, _seed_box(gr)]
        with gr.Row():
            with gr.Column():
                left = _sliders(gr, model)
            with gr.Column():
                right = _sliders(gr, model)
        button = gr.Button("Draw both", variant="primary", elem_id="compare")
        shown = _grid(gr, "left and right settings", "compared")
    inputs += [*left, *right]
    button.click(actions.compare, inputs, shown, api_name="compare", concurrency_id="device")
    return _followers(gr, name, left, right)


def _complete_tab(
    gr: ModuleType, actions: Actions, model_name: Any, model: Pretrained
) -> list[tuple]:
    with gr.Tab("Complete"):
        with gr.Row():
            uploaded = gr.Image(label="picture", sources=["upload"], type="numpy", elem_id="upload")
            sketched = gr.Sketchpad(
                label="or draw one", type="numpy", image_mode="RGB", elem_id="sketch"
            )
            for component in (uploaded, sketched):
                _read_no_addresses(component)
        with gr.Row():
            with gr.Column():
                name = _class_choice(gr, model)
                rows = gr.Slider(1, step=1, label="rows of codes to keep", **_rows(model))
                count = gr.Slider(1, COLUMNS, 4, step=1, label="completions")
                settings = _sliders(gr, model)
                inputs = [model_name, name, uploaded, sketched, rows, count, _seed_box(gr)]
                button = gr.Button("Complete", variant="primary", elem_id="complete")
            shown = _grid(gr, "picture, kept, completions", "completed")
    inputs += settings
    button.click(actions.complete, inputs, shown, api_name="complete", concurrency_id="device")
    return [*_followers(gr, name, settings), ([rows], lambda model: [gr.Slider(**_rows(model))])]


def _grid(gr: ModuleType, caption: str, name: str) -> Any:
    with gr.Column():
        gr.Markdown(caption)  # the label of a picture would lie on its first corner
        return gr.Image(label=caption, show_label=False, elem_id=name, interactive=False)


def _class_choice(gr: ModuleType, model: Pretrained) -> Any:
    names = class_names(model)
    return gr.Dropdown(names, value=names[0], label="class", elem_id="class")


def _image_count(gr: ModuleType) -> Any:
    return gr.Slider(1, MOST_IMAGES, 8, step=1, label="images")


def _seed_box(gr: ModuleType) -> Any:
    return gr.Number(0, label="seed", precision=0, minimum=0)


def _sliders(gr: ModuleType, model: Pretrained) -> list:
    own = SamplingConfig(**model.sampling).numbers()
    return [
        gr.Slider(least, most, own[key], step=step, label=label, elem_id=key)
        for key, least, most, step, label in sliders_of(model)
    ]


def _rows(model: Pretrained) -> dict[str, int]:
    most = most_rows(model)
    return {"maximum": max(most, 2), "value": most // 2 + 1}


def _followers(gr: ModuleType, name: Any, *settings: list) -> list[tuple]:
    """What of a tab changes with the model: its classes, and any number of rows of sliders."""
    return [
        ([name], lambda model: [_class_choice(gr, model)]),
        *((part, lambda model: _sliders(gr, model)) for part in settings),
    ]


def serve(models: Mapping[str, Pretrained], host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves the page until it is interrupted; see `launch`."""
    launch(build(models), server_name=host, server_port=port)


def launch(page: Any, **options: Any) -> Any:
    """`page.launch`, with its limits: it reads nothing but uploads, of `MOST_BYTES` at most.

    Pillow refuses, in the whole process, to decode files of more than `MOST_PIXELS`.
    """
    from starlette.middleware import Middleware  # which comes with Gradio
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # it warns from here on, and refuses the double
    # Gradio's limit is for its upload route alone, and pictures may also come inside of JSON.
    whole = Middleware(RequestBodyLimitMiddleware, max_body_size=MOST_BYTES + 2**16)
    return page.launch(
        max_file_size=MOST_BYTES, allowed_paths=[], show_error=True,
        app_kwargs={"middleware": [whole]}, **options,
    )  # fmt: skip


def _read_no_addresses(component: Any) -> None:
    """A request may name an address instead of an upload, which Gradio would download."""
    keep = component.async_move_resource_to_block_cache

    async def keep_uploads(path: str | Path) -> Any:
        if str(path).lower().startswith(("http:", "https:")):
            raise ValueError("Upload the picture; addresses are not read.")
        return await keep(path)

    component.async_move_resource_to_block_cache = keep_uploads


def _import_gradio() -> ModuleType:
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs Gradio: pip install 'aim_jax[page]'.") from None
    return gradio
