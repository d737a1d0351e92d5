"""Web page for sampling, built with Gradio from the extra `page`."""

import threading
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
    other_settings,
    sliders_of,
    takes_text,
)
from aim_jax.cli.page_requests import PlainErrors, Readers, RefusedError, hide_errors
from aim_jax.sampling.config import SamplingConfig
from aim_jax.weights.pretrained import Pretrained

QUEUE = 16  # maximum number of waiting requests
MOST_BYTES = 4 * 2**20  # maximum size of an upload
KEPT_SECONDS = 3600  # lifetime of generated and uploaded images
# Gradio remembers the components of this many sessions. A tab of a browser is a session, and so is
# every request of a program.
SESSIONS = 128


def build(models: Mapping[str, Pretrained]) -> Any:
    """Build the page as `gradio.Blocks` with its queue; `launch` serves it.

    Args:
      models: models by the name to show, each with an AiM and a tokenizer, on one device.

    Raises:
      ValueError: if Gradio is not installed, or a model lacks a part.
    """
    gr = _import_gradio()
    incomplete = [name for name, m in models.items() if m.aim_params is None or m.vq_params is None]
    if incomplete:
        raise ValueError(f"{', '.join(incomplete)}: the page requires an AiM and a tokenizer.")
    name, first = next(iter(models.items()))
    actions = Actions(models)
    build_tabs = (_sample_tab, _compare_tab, _complete_tab)
    cleaning = (KEPT_SECONDS // 6, KEPT_SECONDS)
    with gr.Blocks(title="aim_jax", analytics_enabled=False, delete_cache=cleaning) as page:
        gr.Markdown("# AiM: images from a state-space model")
        chosen = gr.Dropdown([*models], value=name, label="model")
        follow: list = []  # (components, function from a model to their updates)
        for build_tab in build_tabs:
            follow += build_tab(gr, actions, chosen, first)
        outputs = [component for components, _ in follow for component in components]
        chosen.change(
            lambda name: [new for _, update in follow for new in update(models[name])],
            chosen, outputs, api_visibility="private",
        )  # fmt: skip
    hide_errors(page, gr.Error)
    # Events with the same concurrency_id use the device one at a time. Requests beyond the queue
    # are rejected with a message, and none can pass it by.
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def _sample_tab(
    gr: ModuleType, actions: Actions, model_name: Any, model: Pretrained
) -> list[tuple]:
    with gr.Tab("Sample"), gr.Row():
        with gr.Column():
            name = _condition(gr, actions, model)
            count = _image_count(gr)
            settings = _sliders(gr, model)
            inputs = [model_name, name, count, _seed_box(gr), *settings]
            button = gr.Button("Generate", variant="primary", elem_id="draw")
        output = _grid(gr, "images", "drawn")
    button.click(actions.draw, inputs, output, api_name="draw", concurrency_id="device")
    return _followers(gr, actions, name, settings)


def _compare_tab(
    gr: ModuleType, actions: Actions, model_name: Any, model: Pretrained
) -> list[tuple]:
    with gr.Tab("Compare"):
        name = _condition(gr, actions, model)
        count = _image_count(gr)
        inputs = [model_name, name, count, _seed_box(gr)]
        with gr.Row():
            with gr.Column():
                gr.Markdown("left")
                left = _sliders(gr, model)
            with gr.Column():
                gr.Markdown("right")
                right = _other_sliders(gr, model)
        button = gr.Button("Generate both", variant="primary", elem_id="compare")
        output = _grid(gr, "left and right settings", "compared")
    inputs += [*left, *right]
    button.click(actions.compare, inputs, output, api_name="compare", concurrency_id="device")
    follow_right = ([*right], lambda model: _other_sliders(gr, model))
    return [*_followers(gr, actions, name, left), follow_right]


def _complete_tab(
    gr: ModuleType, actions: Actions, model_name: Any, model: Pretrained
) -> list[tuple]:
    with gr.Tab("Complete"):
        with gr.Row():
            # The file as it is: `decode_image` treats transparency, rotation and 16 bits.
            uploaded = gr.Image(
                label="image", sources=["upload"], type="filepath", image_mode=None, format="png",
                elem_id="upload",
            )  # fmt: skip
            sketched = gr.Sketchpad(
                label="or draw one", type="numpy", image_mode="RGB", format="png", elem_id="sketch"
            )
            for component in (uploaded, sketched):
                _reject_urls(component)
        with gr.Row():
            with gr.Column():
                name = _condition(gr, actions, model)
                rows = gr.Slider(1, step=1, label="rows of tokens to keep", **_rows(model))
                count = gr.Slider(1, COLUMNS, 4, step=1, label="completions")
                settings = _sliders(gr, model)
                inputs = [model_name, name, uploaded, sketched, rows, count, _seed_box(gr)]
                button = gr.Button("Complete", variant="primary", elem_id="complete")
            output = _grid(gr, "image, kept part, completions", "completed")
    inputs += settings
    button.click(actions.complete, inputs, output, api_name="complete", concurrency_id="device")
    return [
        *_followers(gr, actions, name, settings),
        ([rows], lambda model: [gr.Slider(**_rows(model))]),
    ]


def _grid(gr: ModuleType, caption: str, name: str) -> Any:
    with gr.Column():
        gr.Markdown(caption)  # a label inside the image would cover its corner
        return gr.Image(
            label=caption, show_label=False, elem_id=name, interactive=False, format="png"
        )


def _condition(gr: ModuleType, actions: Actions, model: Pretrained) -> Any:
    """Return the choice of a class, or the box for a caption: a choice without entries.

    Gradio checks the values of a page just loaded with the component of the first model, so one
    model of captions makes it accept any text. `Actions` checks what its model accepts.
    """
    is_text = takes_text(model)
    names = [] if is_text else class_names(model)
    return gr.Dropdown(
        names, value="" if is_text else names[0], label="caption" if is_text else "class",
        allow_custom_value=any(map(takes_text, actions.models.values())), elem_id="class",
    )  # fmt: skip


def _image_count(gr: ModuleType) -> Any:
    return gr.Slider(1, MOST_IMAGES, 8, step=1, label="images")


def _seed_box(gr: ModuleType) -> Any:
    return gr.Number(0, label="seed", precision=0, minimum=0)


def _sliders(gr: ModuleType, model: Pretrained) -> list:
    return _sliders_at(gr, model, SamplingConfig(**model.sampling).numbers())


def _other_sliders(gr: ModuleType, model: Pretrained) -> list:
    return _sliders_at(gr, model, other_settings(SamplingConfig(**model.sampling).numbers()))


def _sliders_at(gr: ModuleType, model: Pretrained, values: Mapping[str, float]) -> list:
    return [
        gr.Slider(minimum, maximum, values[key], step=step, label=label, elem_id=key)
        for key, minimum, maximum, step, label in sliders_of(model)
    ]


def _rows(model: Pretrained) -> dict[str, int]:
    maximum = most_rows(model)
    return {"maximum": max(maximum, 2), "value": maximum // 2 + 1}


def _followers(gr: ModuleType, actions: Actions, name: Any, *settings: list) -> list[tuple]:
    """Return the components of a tab that depend on the model, with functions that update them."""
    return [
        ([name], lambda model: [_condition(gr, actions, model)]),
        *((part, lambda model: _sliders(gr, model)) for part in settings),
    ]


def serve(models: Mapping[str, Pretrained], host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until Ctrl-C, which raises KeyboardInterrupt; see `launch`."""
    page = build(models)
    # Gradio's own wait for Ctrl-C prints lines and ends as if nothing had happened.
    launch(page, server_name=host, server_port=port, prevent_thread_lock=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def launch(page: Any, **options: Any) -> Any:
    """Launch the page with limits: it reads only uploads, of at most `MOST_BYTES`.

    In the entire process, Pillow will refuse to decode images of more than `MOST_PIXELS`.

    Args:
      page: from `build`.
      **options: arguments of `page.launch`.
    """
    from starlette.middleware import Middleware  # a dependency of Gradio
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow warns above it and refuses above its double
    # Gradio's limit covers only its upload route, but images can also be sent inside JSON.
    body_limit = Middleware(RequestBodyLimitMiddleware, max_body_size=MOST_BYTES + 2**16)
    middleware = [Middleware(PlainErrors), body_limit, Middleware(Readers, page=page)]
    return page.launch(
        max_file_size=MOST_BYTES, allowed_paths=[], state_session_capacity=SESSIONS,
        app_kwargs={"middleware": middleware}, **options,
    )  # fmt: skip


def _reject_urls(component: Any) -> None:
    """Reject requests that pass a URL instead of an upload, which Gradio would download."""
    move_to_cache = component.async_move_resource_to_block_cache

    async def move_uploads(path: str | Path) -> Any:
        if str(path).lower().startswith(("http:", "https:")):
            raise RefusedError("URLs are not supported; upload the image.")
        return await move_to_cache(path)

    component.async_move_resource_to_block_cache = move_uploads


def _import_gradio() -> ModuleType:
    try:
        import gradio
    except ImportError:
        raise ValueError("the page requires Gradio; run pip install 'aim_jax[page]'.") from None
    return gradio
