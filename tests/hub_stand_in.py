"""A stand-in for the Hub on this machine: what huggingface_hub asks to make a repository, commit to it and read it.

GOOD is the token that may write, READS one that may not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

GOOD, READS = "hf_good", "hf_reads"
LARGE = (".safetensors", ".gguf")


class Repository:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class Hub:
    """The state: repositories by id, large files by their SHA-256, and every request by method and path."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []

    def serve(self) -> ThreadingHTTPServer:
        return ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Handler,), {"state": self}))


class Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        self.state.requests.append(f"{self.command} {self.path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = self.path.partition("?")[0]
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                if method in WRITING and token != GOOD:
                    return self.answer(401 if token != READS else 403, {"error": "not allowed"})
                return method(self, body, token, *found.groups())
        return self.answer(404, {"error": f"no {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def chunks(self) -> bytes:
        """A body that comes in chunks."""
        found = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return found

    # --- who, and what there is ---

    def who(self, body: bytes, token: str) -> None:
        if token not in (GOOD, READS):
            return self.answer(401, {"error": "Invalid credentials"})
        access = {"accessToken": {"role": "write" if token == GOOD else "read"}}
        orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "watched", "roleInOrg": "read"}]
        return self.answer(200, {"name": "me", "orgs": orgs, "auth": access})

    def repository(self, name: str, token: str) -> Repository | None:
        found = self.state.repositories.get(name)
        if found and (not found.private or token == GOOD):
            return found
        self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return None

    def info(self, body: bytes, token: str, name: str) -> None:
        if found := self.repository(name, token):
            files = [{"rfilename": file} for file in sorted(found.files)]
            self.answer(200, {"id": name, "sha": found.sha, "private": found.private, "siblings": files, "tags": []})

    def tree(self, body: bytes, token: str, name: str) -> None:
        if found := self.repository(name, token):
            rows = [{"type": "file", "path": p, "size": len(b), "oid": blob(b)} for p, b in found.files.items()]
            self.answer(200, json.dumps(rows).encode())

    def resolve(self, body: bytes, token: str, name: str, file: str) -> None:
        if not (found := self.repository(name, token)):
            return
        if file not in found.files:
            self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=found.sha)
        else:
            self.answer(200, found.files[file], ETag=f'"{blob(found.files[file])}"', X_Repo_Commit=found.sha)

    # --- writing ---

    def create(self, body: bytes, token: str) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        status = 409 if name in self.state.repositories else 200
        private = asked.get("visibility") == "private"
        self.state.repositories.setdefault(name, Repository(private))
        self.answer(status, {"url": f"http://{self.headers['Host']}/{name}", "error": "it is there"})

    def validate(self, body: bytes, token: str) -> None:
        """As far as it is known what the Hub asks for: YAML, a licence as text, an id as base_model, a whole index."""
        front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        errors = []
        for base in [front["base_model"]] if isinstance(front.get("base_model"), str) else []:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                errors.append({"message": f'"base_model" with value "{base}" is not valid'})
        for result in [r for model in front.get("model-index", []) for r in model["results"]]:
            if not {"type", "name"} <= result["dataset"].keys() or not result["task"]["type"]:
                errors.append({"message": '"model-index" is not valid'})
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, token: str, name: str) -> None:
        asked = json.loads(body)["files"]
        modes = [("lfs" if each["path"].endswith(LARGE) else "regular", each["path"]) for each in asked]
        self.answer(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for m, p in modes]})

    def batch(self, body: bytes, token: str, name: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            href = f"http://{self.headers['Host']}/large/{each['oid']}"
            missing = each["oid"] not in self.state.large
            objects.append(each | ({"actions": {"upload": {"href": href}}} if missing else {}))
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, token: str, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.large[oid] = body
        self.answer(200)

    def commit(self, body: bytes, token: str, name: str) -> None:
        repository = self.state.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.state.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/x", "commitOid": repository.sha})


def blob(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Any] = {
    "GET /api/whoami-v2": Handler.who, f"GET /api/models/{NAME}(?:/revision/[^/]+)?": Handler.info,
    f"GET /api/models/{NAME}/tree/[^/]+": Handler.tree, rf"(?:GET|HEAD) /{NAME}/resolve/[^/]+/(.+)": Handler.resolve,
    "POST /api/repos/create": Handler.create, "POST /api/validate-yaml": Handler.validate,
    f"POST /api/models/{NAME}/preupload/main": Handler.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Handler.batch, r"PUT /large/(\w+)": Handler.store,
    f"POST /api/models/{NAME}/commit/main": Handler.commit,
}  # fmt: skip
WRITING = (Handler.create, Handler.preupload, Handler.batch, Handler.commit)
