"""Requests to the web page: sentences instead of errors, and a queue without absent readers."""

import asyncio
import json
import time
from collections import Counter
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

UNREAD_SECONDS = 10  # a waiting request whose answer nobody has asked for is dropped after them

FAILED = "The page could not handle the request; reload the page and check the values."
UNREAD = f"Nobody read the answer for {UNREAD_SECONDS} seconds, so the request was dropped."
SENTENCES = {
    HTTPStatus.UNPROCESSABLE_ENTITY: "The request does not have the expected form.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The request or the upload is too large.",
    HTTPStatus.SERVICE_UNAVAILABLE: "The queue is full; try again in a minute.",
}


class RefusedError(ValueError):
    """A value that the page does not offer; the message is shown to visitors."""


def hide_errors(page: Any, shown: Any) -> None:
    """Show visitors the messages of `RefusedError` only, and `FAILED` for every other error.

    Other errors are printed where the server runs. They can hold its paths and objects.

    Args:
      page: the `gradio.Blocks`, which converts the values of a request, calls its action and
        converts the result in `process_api`.
      shown: `gradio.Error`, whose message Gradio shows.
    """
    process = page.process_api

    async def process_api(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await process(*args, **kwargs)
        except RefusedError as error:
            raise shown(str(error), print_exception=False) from None
        except Exception as error:
            raise shown(FAILED) from error

    page.process_api = process_api


class PlainErrors:
    """ASGI middleware that replaces the body of an error by one sentence for its status."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        replaced = False

        async def send_plainly(message: Any) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                replaced = True
                status = HTTPStatus(message["status"])
                body = json.dumps({"detail": SENTENCES.get(status, f"{status.phrase}.")}).encode()
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                ]
                await send({**message, "headers": headers})
                await send({"type": "http.response.body", "body": body})
            elif not replaced:
                await send(message)

        await self.app(scope, receive, send_plainly)


class Readers:
    """ASGI middleware that drops requests from the queue whose readers have gone.

    Gradio reads a stream of answers per browser tab (`queue/data?session_hash=`) or per request of
    a program (`call/NAME/EVENT`). It notices a reader that left only when it next writes to the
    stream, and runs requests that nobody has ever read.
    """

    def __init__(self, app: Any, page: Any):
        self.app = app
        self.page = page
        self.reading: Counter[str] = Counter()
        drop_unread(page._queue, self.reading)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request; if it is for a stream, watch its reader."""
        key = stream_key(scope)
        if key is None:
            await self.app(scope, receive, send)
            return
        self.reading[key] += 1
        answer = asyncio.ensure_future(self.app(scope, receive, send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()  # raises its error
            else:
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)
                if self.reading[key] == 1:  # a browser that reconnects reads twice for a moment
                    await self.page._queue.clean_events(session_hash=key, event_id=key)
        finally:
            gone.cancel()
            answer.cancel()
            self.reading -= Counter([key])


async def disconnected(receive: Any) -> None:
    """Wait until the client of a request has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def stream_key(scope: Any) -> str | None:
    """Return the session or the event whose answers a request reads, or None."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    parts = scope["path"].strip("/").split("/")
    if parts[1:] == ["queue", "data"]:
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0]
    return parts[-1] if parts[1:2] == ["call"] and len(parts) > 3 else None


def drop_unread(queue: Any, reading: Counter[str]) -> None:
    """Drop waiting requests from Gradio's queue that nobody has read for `UNREAD_SECONDS`.

    Args:
      queue: the `gradio.queueing.Queue`; while requests wait, it calls `get_events` many times a
        second.
      reading: number of open streams by session or event; changed by the caller.
    """
    from gradio.server_messages import ProcessCompletedMessage

    get_events = queue.get_events

    def get_read_events() -> Any:
        latest = time.monotonic() - UNREAD_SECONDS
        for waiting in queue.event_queue_per_concurrency_id.values():
            for event in list(waiting.queue):
                read = reading[event.session_hash] or reading[event._id]
                if event.enqueue_time < latest and not read:
                    waiting.queue.remove(event)
                    queue.event_ids_to_events.pop(event._id, None)
                    # For a reader who comes late.
                    message = ProcessCompletedMessage(output={"error": UNREAD}, success=False)
                    queue.send_message(event, message)
        return get_events()

    queue.get_events = get_read_events
