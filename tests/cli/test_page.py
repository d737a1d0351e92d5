"""The page over HTTP, and in a real browser: it draws, completes an upload, refuses the rest.

  pip install '.[test]' && python -m pytest tests/cli/test_page.py

with Chromium or Chrome on the PATH (apt-get install chromium), or the one that playwright installs.
Without a browser the tests that drive one are skipped.
"""

import base64
import dataclasses
import io
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the page requires pip install 'aim_jax[page]'")

from aim_jax.cli.page import MOST_BYTES, build, launch  # noqa: E402
from aim_jax.configs.defaults import vq_defaults  # noqa: E402
from aim_jax.sampling import SamplingConfig  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
# It asks nothing of the network, and shares a machine with other tests.
BROWSER_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model):
    """It knows how its images, 4 x 4 and grey, were fitted."""
    data = vq_defaults().data.to_dict() | {"name": "folder", "image_size": 4, "channels": 1}
    return dataclasses.replace(tiny_model, info={"data": data})


@pytest.fixture(scope="module")
def address(model, text_model):
    sampling = model.sampling | {"cfg_scale": 5.0, "top_k": 12}
    other = dataclasses.replace(model, sampling=sampling)
    app = build({"tiny": model, "other": other, "words": text_model})
    quietly = {"prevent_thread_lock": True, "quiet": True}
    _, address, _ = launch(app, server_name="127.0.0.1", server_port=None, **quietly)
    yield address
    app.close()


@pytest.fixture(scope="module")
def browser_page(address):
    driving = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with driving.sync_playwright() as driver:
        browsers = [*map(shutil.which, NAMES), driver.chromium.executable_path]
        found = next((path for path in browsers if path and Path(path).exists()), None)
        if not found:
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=found, args=BROWSER_OPTIONS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        yield page
        browser.close()


def ask(address, path, data=None, kind="application/json"):
    """Status and text of an answer; 0 where the connection was cut off."""
    headers = {"Content-Type": kind} if data else {}
    request = urllib.request.Request(f"{address}gradio_api/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError:
        return 0, ""


def complete(address, model, image: dict):
    """Return the page's answer to a request to complete an image."""
    settings = list(SamplingConfig(**model.sampling).numbers().values())
    given = [
        "tiny",
        model.class_names[0],
        {"meta": {"_type": "gradio.FileData"}, **image},
        None,
        1,
        1,
        0,
    ]
    status, text = ask(address, "call/complete", json.dumps({"data": given + settings}).encode())
    if status != 200:
        return status, text
    return ask(address, f"call/complete/{json.loads(text)['event_id']}")


def as_address(image: Image.Image, **options) -> str:
    """A image inside of a request."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_nothing_is_read_but_small_uploads(address, model, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    noise = Image.fromarray(noise)
    small = complete(address, model, {"path": None, "url": as_address(noise.resize((30, 40)))})
    assert "event: complete" in small[1], small

    noise.save(tmp_path / "private.png")
    for path in ("/etc/passwd", tmp_path / "private.png"):
        assert ask(address, f"file={path}")[0] in (403, 404)
        _, text = complete(address, model, {"path": str(path)})
        assert "event: error" in text and "event: complete" not in text
    _, text = complete(address, model, {"path": f"{address}favicon.ico"})
    assert "event: error" in text and "URLs are not supported" in text

    large = as_address(noise)
    assert len(large) > MOST_BYTES
    assert complete(address, model, {"path": None, "url": large})[0] in (0, 413)
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    body += bytes(2 * MOST_BYTES) + b"\r\n--x--\r\n"
    assert ask(address, "upload", body, "multipart/form-data; boundary=x")[0] in (0, 413)
    bomb = as_address(Image.new("1", (5000, 5000)), optimize=True)
    assert len(bomb) < MOST_BYTES
    assert "event: error" in complete(address, model, {"path": None, "url": bomb})[1]


def test_the_interface_for_programs_names_what_it_offers(address):
    status, text = ask(address, "info")
    assert status == 200
    assert set(json.loads(text)["named_endpoints"]) == {"/draw", "/compare", "/complete"}
    assert not json.loads(text)["unnamed_endpoints"]


def test_images_are_sent_without_loss(address, model):
    """The grid as PNG, pixel by pixel; and an upload keeps its transparency on the way in."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[4:, :, 3] = 0
    files = []
    for image in (Image.fromarray(pixels), on_white(Image.fromarray(pixels))):
        status, text = complete(address, model, {"path": None, "url": as_address(image)})
        assert status == 200 and "event: complete" in text, text
        (result,) = json.loads(text.partition("event: complete\ndata: ")[2].splitlines()[0])
        assert result["path"].endswith(".png")
        with urllib.request.urlopen(result["url"], timeout=60) as answer:
            files.append(np.asarray(Image.open(io.BytesIO(answer.read()))))
    np.testing.assert_array_equal(*files)


def on_white(image):
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def test_comparisons_start_with_two_settings(model):
    page = build({"tiny": model, "other": model})
    scales = [x.value for x in page.blocks.values() if getattr(x, "elem_id", "") == "cfg_scale"]
    assert len(scales) == 4 and scales[1] == 2.0 and scales[2] != scales[1]  # left and right


def shown(page, element: str) -> bool:
    """Wait for an image inside an element: the page may replace it while it is being decoded."""
    complete = "image => image !== null && image.complete && image.naturalWidth > 50"
    handle = page.wait_for_function(
        f"name => ({complete})(document.querySelector(name))", arg=f"#{element} img"
    )
    return handle.json_value()


def test_clicking_generates_an_image(browser_page):
    browser_page.locator("#draw").click()
    assert shown(browser_page, "drawn")
    browser_page.get_by_role("tab", name="Compare").click()
    browser_page.locator("#compare").click()
    assert shown(browser_page, "compared")


def test_uploads_are_completed_or_refused(browser_page, tmp_path):
    page = browser_page
    page.get_by_role("tab", name="Complete").click()
    page.locator("#complete").click()
    page.get_by_text("Upload an image or draw one.").first.wait_for()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "good.png")
    page.locator("#upload img").first.wait_for(state="visible")
    page.locator("#complete").click()
    assert shown(page, "completed")

    (tmp_path / "bad.png").write_text("this is no image")
    page.reload()
    page.get_by_role("tab", name="Complete").click()
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "bad.png")
    page.locator("#complete").click()
    page.locator(".toast-body.error").first.wait_for()


def test_a_drawing_is_completed(browser_page):
    page = browser_page
    page.reload()
    page.get_by_role("tab", name="Complete").click()
    canvas = page.locator("#sketch canvas").first
    canvas.wait_for(state="visible")
    page.get_by_label("Brush").first.click()  # "select the draw tool to start"
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 40)
    page.mouse.down()
    page.mouse.move(x + 60, y + 40, steps=10)
    page.mouse.up()
    page.locator("#complete").click()
    assert shown(page, "completed")


def test_settings_follow_the_model(browser_page):
    page = browser_page
    page.reload()
    setting = lambda name: page.locator(f"#{name} input[type=number]").first  # noqa: E731
    assert [setting(name).input_value() for name in ("cfg_scale", "top_k")] == ["2", "0"]
    page.get_by_label("model").click()
    page.get_by_role("option", name="other").click()
    expect = pytest.importorskip("playwright.sync_api").expect
    expect(setting("top_k")).to_have_value("12")
    expect(setting("cfg_scale")).to_have_value("5")
    page.locator("#draw").click()
    assert shown(page, "drawn")


def test_captions_are_typed_for_a_model_of_captions(browser_page, address, text_model):
    page = browser_page
    page.reload()
    page.get_by_label("model").click()
    page.get_by_role("option", name="words").click()
    box = page.get_by_label("caption").first
    box.fill("a red boat")
    page.locator("#draw").click()
    assert shown(page, "drawn")
    settings = list(SamplingConfig(**text_model.sampling).numbers().values())
    grids = []
    for caption in ("a red boat", "a blue house", "a" * 2001):
        given = json.dumps({"data": ["words", caption, 8, 0, *settings]}).encode()
        _, text = ask(address, "call/draw", given)
        grids.append(ask(address, f"call/draw/{json.loads(text)['event_id']}")[1])
    assert "more than 2,000 characters" in grids.pop()
    images = []
    for grid in grids:
        (result,) = json.loads(grid.partition("event: complete\ndata: ")[2].splitlines()[0])
        with urllib.request.urlopen(result["url"], timeout=60) as answer:
            images.append(answer.read())
    source = page.locator("#drawn img").get_attribute("src")
    with urllib.request.urlopen(source, timeout=60) as answer:
        typed = answer.read()
    assert images[0] == typed != images[1]
