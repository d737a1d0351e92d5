"""The page in a real browser: it draws, completes an upload, refuses what is no picture."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the page needs pip install -e '.[page]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by playwright: pip install playwright"
)

from aim_jax.config import vq_defaults  # noqa: E402
from aim_jax.page import LIMITS, build  # noqa: E402

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome on the PATH")


@pytest.fixture(scope="module")
def model(tiny_model):
    """It knows how its pictures, 4 x 4 and grey, were fitted."""
    data = vq_defaults().data.to_dict() | {"name": "folder", "image_size": 4, "channels": 1}
    return dataclasses.replace(tiny_model, info={"data": data})


@pytest.fixture(scope="module")
def browser_page(model):
    sampling = model.sampling | {"cfg_scale": 5.0, "top_k": 12}
    app = build({"tiny": model, "other": dataclasses.replace(model, sampling=sampling)})
    _, address, _ = app.launch(
        server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True, **LIMITS
    )  # fmt: skip
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        yield page
        browser.close()
    app.close()


def shown(page, element: str) -> bool:
    """Waits for a picture inside an element."""
    picture = page.locator(f"#{element} img").first
    picture.wait_for(state="visible")
    return picture.evaluate("image => image.decode().then(() => image.naturalWidth > 50)")


def test_clicking_draws_a_picture(browser_page):
    browser_page.locator("#draw").click()
    assert shown(browser_page, "drawn")
    browser_page.get_by_role("tab", name="Compare").click()
    browser_page.locator("#compare").click()
    assert shown(browser_page, "compared")


def test_uploads_are_completed_or_refused(browser_page, tmp_path):
    page = browser_page
    page.get_by_role("tab", name="Complete").click()
    page.locator("#complete").click()
    page.get_by_text("Upload a picture, or draw one.").first.wait_for()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "good.png")
    page.locator("#upload img").first.wait_for(state="visible")
    page.locator("#complete").click()
    assert shown(page, "completed")

    (tmp_path / "bad.png").write_text("this is no picture")
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
    playwright.expect(setting("top_k")).to_have_value("12")
    playwright.expect(setting("cfg_scale")).to_have_value("5")
    page.locator("#draw").click()
    assert shown(page, "drawn")
