"""A stand-in for the Hub on this machine: repositories are folders, which huggingface_hub reads as it does the Hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def handler(root: Path) -> type[BaseHTTPRequestHandler]:
    """Answers for OWNER/NAME below a folder: what is in a repository, and its files."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                repository = "/".join(path.split("/")[2:4])
                return self.about(repository, root / repository)
            repository, _, file = path.partition("/resolve/")
            if not (root / repository).is_dir():
                return self.missing("RepoNotFound")
            found = root / repository / file.partition("/")[2]
            return self.send(found.read_bytes()) if found.is_file() else self.missing("EntryNotFound")

        def about(self, repository: str, folder: Path) -> None:
            if not folder.is_dir():
                return self.missing("RepoNotFound")
            names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            siblings = [{"rfilename": name} for name in names]
            about = {"id": repository, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
            return self.send(json.dumps(about | {"siblings": siblings}).encode(), "application/json")

        def send(self, content: bytes, kind: str = "application/octet-stream") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def missing(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextmanager
def serving(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While open, huggingface_hub asks a server that serves the folders OWNER/NAME below `root`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    template = here + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
