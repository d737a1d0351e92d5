"""Requests to the page: no error shows a path or an object, no absent reader holds up the queue."""

import http.client
import json
import re
import threading
import time
from urllib.parse import urlsplit

import pytest

gradio = pytest.importorskip("gradio", reason="the page requires pip install 'aim_jax[page]'")

from aim_jax.cli import page_requests  # noqa: E402
from aim_jax.cli.page import build, launch  # noqa: E402
from aim_jax.sampling import SamplingConfig  # noqa: E402

# Paths of a server, objects, stacks and modules.
INTERNAL = re.compile(
    r"object at 0x|Traceback|<class|/(home|root|tmp|usr|var|etc)\b|site-packages|\.py\b|gradio\.|"
    r"aim_jax|Error\b.*:|\(.*\)|[{\[].*[{\[]"
)
QUIETLY = {"server_name": "127.0.0.1", "prevent_thread_lock": True, "quiet": True}


def connect(address, method, path, body=None, kind="application/json"):
    """An open connection and the answer on it."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request(method, f"/gradio_api/{path}", body, {"Content-Type": kind} if body else {})
    return connection, connection.getresponse()


def ask(address, method, path, body=None, kind="application/json"):
    connection, answer = connect(address, method, path, body, kind)
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def post(address, name, data) -> str:
    status, text = ask(address, "POST", f"call/{name}", json.dumps({"data": data}))
    assert status == 200, text
    return json.loads(text)["event_id"]


@pytest.fixture(scope="module")
def page_address(tiny_model):
    page = build({"tiny": tiny_model})
    yield launch(page, **QUIETLY)[1]
    page.close(verbose=False)


WRONG = (
    [], {"a": 1}, "x", -1, 10**400, float("nan"), "\0",
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"path": None, "url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}},
)  # fmt: skip


def test_no_wrong_value_shows_the_inside(page_address, tiny_model):
    values = list(SamplingConfig(**tiny_model.sampling).numbers().values())
    offered = {
        "draw": ["tiny", "boat", 1, 0, *values],
        "complete": ["tiny", "boat", None, None, 1, 1, 0, *values],
    }
    requests = [("draw", [1])]
    for name, place in (("draw", 1), ("draw", 2), ("complete", 2), ("complete", 3)):
        for value in WRONG:
            data = list(offered[name])
            data[place] = value
            requests.append((name, data))
    for name, data in requests:
        _, text = ask(page_address, "GET", f"call/{name}/{post(page_address, name, data)}")
        shown = json.loads(text.partition("event: error\ndata: ")[2])["error"]
        assert shown.endswith(".") and not INTERNAL.search(shown), (name, data, shown)


@pytest.mark.parametrize(
    "method, path, body, kind",
    [
        ("POST", "call/draw", "{", "application/json"),
        ("POST", "call/draw", '{"data": 1}', "application/json"),
        ("POST", "call/draw", "[" * 10_000, "application/json"),
        ("POST", "call/nothing", '{"data": []}', "application/json"),
        ("POST", "run/draw", '{"data": []}', "application/json"),
        ("POST", "queue/join", '{"data": [], "fn_index": 99, "session_hash": "a"}', "text/plain"),
        ("POST", "component_server", "{}", "application/json"),
        ("POST", "upload", "x", "text/plain"),
        ("POST", "upload", "x", "multipart/form-data; boundary=x"),
        ("GET", "file=/etc/passwd", None, ""),
        ("GET", "file=%00", None, ""),
        ("GET", "nothing", None, ""),
        ("GET", "queue/data", None, ""),
        ("PUT", "call/draw", "{}", "application/json"),
    ],
)
def test_no_malformed_request_shows_the_inside(page_address, method, path, body, kind):
    status, text = ask(page_address, method, path, body, kind)
    assert status >= 400
    if status != 500:
        text = json.loads(text)["detail"]
        assert text.endswith(".")
    assert len(text) < 80 and not INTERNAL.search(text)


@pytest.fixture
def slow_page():
    """A page with a stand-in action, which notes its number and waits for the gate."""
    started = []
    gate = threading.Event()

    def slow(number):
        started.append(number)
        assert gate.wait(60)
        return number

    with gradio.Blocks(analytics_enabled=False) as page:
        number = gradio.Number()
        gradio.Button().click(slow, number, number, api_name="slow", concurrency_id="device")
    page.queue(default_concurrency_limit=1)
    address = launch(page, **QUIETLY)[1]
    yield page, address, started, gate
    gate.set()
    page.close(verbose=False)


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_without_a_reader_do_not_hold_up_the_next(slow_page):
    page, address, started, gate = slow_page
    post(address, "slow", [0])
    wait_until(lambda: started == [0])
    streams = []
    for number in range(1, 11):
        event = post(address, "slow", [number])
        streams.append(connect(address, "GET", f"call/slow/{event}"))
    assert len(page._queue) == 10
    for connection, answer in streams:
        answer.close()
        connection.close()
    wait_until(lambda: len(page._queue) == 0)
    eleventh = post(address, "slow", [11])
    gate.set()
    _, text = ask(address, "GET", f"call/slow/{eleventh}")
    assert "event: complete\ndata: [11]" in text
    assert started == [0, 11]


def test_requests_that_nobody_reads_are_dropped(slow_page, monkeypatch):
    page, address, started, gate = slow_page
    post(address, "slow", [0])
    wait_until(lambda: started == [0])
    read = post(address, "slow", [1])
    connection, answer = connect(address, "GET", f"call/slow/{read}")
    unread = post(address, "slow", [2])
    monkeypatch.setattr(page_requests, "UNREAD_SECONDS", 0.1)
    wait_until(lambda: len(page._queue) == 1)
    _, text = ask(address, "GET", f"call/slow/{unread}")
    assert page_requests.UNREAD in text
    gate.set()
    assert b"event: complete\ndata: [1]" in answer.read()
    connection.close()
    assert started == [0, 1]
