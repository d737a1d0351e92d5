"""Memory of the demo page over many generations.

Example:
  python benchmarks/page_memory.py --model fashion_mnist --requests 500 --out memory.json

The page of one bundled model is served in this process and asked over HTTP, one request after the
other: generate, compare and complete in turn, two images each, with random classes, seeds, settings
and uploads. Completions keep half of the rows. Every number of images and of rows has a compiled
program, so other numbers would add to the memory once. Prints the resident memory and the size of
Gradio's cache of images at the start and after every --every requests (Linux).
"""

import argparse
import base64
import importlib.metadata
import io
import json
import os
import platform
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

MODES = ("draw", "compare", "complete")
IMAGES = 2


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def stored(directory: str) -> float:
    """Return the size of the files in a directory in MB."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()) / 1e6


def random_upload(rng: np.random.Generator) -> dict:
    """Return an image of noise as a value of the page's upload box."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"path": None, "url": url, "meta": {"_type": "gradio.FileData"}}


def random_request(
    rng: np.random.Generator, mode: str, name: str, classes: list[str], sliders: list[tuple], rows
) -> list:
    """Return random arguments of an action of the page."""

    def settings() -> list:
        values = [
            minimum + rng.random() * (maximum - minimum) for _, minimum, maximum, *_ in sliders
        ]
        steps = [step for *_, step, _ in sliders]
        return [round(value / step) * step for value, step in zip(values, steps, strict=True)]

    chosen = str(rng.choice(classes))
    seed = int(rng.integers(2**31))
    if mode == "draw":
        return [name, chosen, IMAGES, seed, *settings()]
    if mode == "compare":
        return [name, chosen, IMAGES, seed, *settings(), *settings()]
    return [name, chosen, random_upload(rng), None, rows, IMAGES, seed, *settings()]


def ask(address: str, mode: str, values: list) -> str:
    """Return the stream of events that answers a request."""
    body = json.dumps({"data": values}).encode()
    headers = {"Content-Type": "application/json"}
    url = f"{address}gradio_api/call/{mode}"
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}") as answer:
        return answer.read().decode()


def main():
    """Serve the page, send the requests and print the memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion_mnist", help="model to serve (fashion_mnist)")
    parser.add_argument("--requests", type=int, default=500, help="number of requests (500)")
    parser.add_argument("--every", type=int, default=50, help="requests between two lines (50)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    args = parser.parse_args()
    cache = tempfile.TemporaryDirectory()
    os.environ["GRADIO_TEMP_DIR"] = cache.name  # read when Gradio is imported

    from aim_jax.cli.page import build, launch
    from aim_jax.cli.page_actions import class_names, most_rows, sliders_of
    from aim_jax.weights.load import load_pretrained

    model = load_pretrained(args.model)
    page = build({args.model: model})
    options = {"server_name": "127.0.0.1", "prevent_thread_lock": True, "quiet": True}
    _, address, _ = launch(page, **options)
    rng = np.random.default_rng(args.seed)
    given = (args.model, class_names(model), sliders_of(model), most_rows(model) // 2)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "gradio")}
    print(f"Python {platform.python_version()}, {versions}", flush=True)
    start = time.monotonic()
    points = []
    for number in range(args.requests + 1):
        if number:
            mode = MODES[number % len(MODES)]
            answer = ask(address, mode, random_request(rng, mode, *given))
            if "event: complete" not in answer:
                raise RuntimeError(f"request {number} ({mode}) failed: {answer}")
        if number % args.every == 0 or number == 1:
            seconds = time.monotonic() - start
            points.append((number, resident(), stored(cache.name)))
            memory, files = points[-1][1:]
            print(
                f"{number:5d} requests: {memory:7.0f} MB resident, {files:6.2f} MB of images, "
                f"{seconds:4.0f} s",
                flush=True,
            )
    page.close(verbose=False)
    if args.out:
        keys = ("requests", "resident_mb", "images_mb")
        args.out.write_text(json.dumps([dict(zip(keys, point, strict=True)) for point in points]))


if __name__ == "__main__":
    main()
