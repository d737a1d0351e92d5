"""A stand-in of the Hugging Face hub on this machine, which serves folders as repositories.

It answers what huggingface_hub asks before and during a download: the list of files, their sizes
and checksums, and their bytes. Names of repositories decide what else happens: "gated/...", and
"broken/...", whose files end in the middle.
"""

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection for each request, so none outlives `close`

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def log_message(self, *_):
        pass

    def answer(self, body):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), parts[4:], body)
        elif "resolve" in parts:
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self.fail(404, "EntryNotFound", body)

    def root(self, repository, revision, body):
        """The folder of a repository, or None after an answer that refuses it."""
        root = Path(self.server.folder) / repository
        if repository.startswith("gated/"):
            self.fail(403, "GatedRepo", body)
        elif not root.is_dir():
            self.fail(401, "RepoNotFound", body)
        elif revision not in ("main", "v1", COMMIT):
            self.fail(404, "RevisionNotFound", body)
        else:
            return root
        return None

    def describe(self, repository, parts, body):
        revision = parts[1] if len(parts) > 1 else "main"
        root = self.root(repository, revision, body)
        if root is None:
            return
        files = sorted(file for file in root.rglob("*") if file.is_file())
        names = [file.relative_to(root).as_posix() for file in files]
        if parts[:1] == ["tree"]:
            content = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": checksum(f)[:40]}
                for n, f in zip(names, files, strict=True)
            ]
        else:
            content = {
                "id": repository, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                "siblings": [{"rfilename": name} for name in names],
            }  # fmt: skip
        self.send(200, json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def file(self, repository, revision, name, body):
        root = self.root(repository, revision, body)
        if root is None:
            return
        if not (root / name).is_file():
            self.fail(404, "EntryNotFound", body)
            return
        data = (root / name).read_bytes()
        headers = {"ETag": f'"{checksum(root / name)}"', "X-Repo-Commit": COMMIT}
        cut = repository.startswith("broken/") and body
        self.send(200, data, body, headers, data[: len(data) // 2] if cut else data)

    def fail(self, status, code, body):
        headers = {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT}
        self.send(status, b"{}", body, headers)

    def send(self, status, data, body, headers, sent=None):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data if sent is None else sent)
            if sent is not None and len(sent) < len(data):
                self.close_connection = True


def checksum(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Hub:
    """A running stand-in: its address, the folder of its repositories, and the paths asked for."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.folder, self._server.asked = folder, []
        self.asked = self._server.asked
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
