"""A Hugging Face hub on this machine, and fresh processes that take it for the real one."""

import base64
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.commands import LIMIT, ROOT

REVISION = "0123456789abcdef0123456789abcdef01234567"


def child(code: str, *arguments, **environment) -> list:
    """What a fresh process prints as JSON: huggingface_hub reads its environment when it is
    imported.
    """
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=LIMIT,
        env=kept | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for, and an upload by the commit API.

    Repositories: what their folder in ``root`` holds; "gated", "broken" and "secret" have their
    ways. Writing takes the token hf_test; a card with the licence "unknown" is refused.
    """

    root: Path
    asked: list

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        folder = self.root / name
        self.asked.append((parts[-1], self.headers.get("Authorization")))
        if name.endswith("broken"):
            return self.answer(500)
        if (
            not folder.is_dir()
            or name.endswith("secret")
            and self.headers.get("Authorization") != ("Bearer hf_test")
        ):
            return self.answer(404 if folder.is_dir() else 401, {"X-Error-Code": "RepoNotFound"})
        files = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        if api:
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": path.replace("/", "_")}
                for path, data in files.items()
            ]
            info = {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": REVISION,
                "siblings": [{"rfilename": path} for path in files],
                "private": False,
                "tags": [],
            }
            return self.answer(
                200,
                {"Content-Type": "application/json"},
                json.dumps(tree if "tree" in parts else info).encode(),
                body,
            )
        if name.endswith("gated"):
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        path = "/".join(parts[4:])
        self.answer(
            200,
            {"ETag": f'"{path.replace("/", "_")}"', "X-Repo-Commit": REVISION},
            files[path],
            body,
        )

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer_json(401, {"error": "Invalid username or password."})
        parts = self.path.partition("?")[0].strip("/").split("/")
        self.asked.append((parts[-1], self.headers.get("Authorization")))
        if parts[1] == "repos":
            return self.create(json.loads(content))
        if parts[1] == "validate-yaml":
            errors = []
            if "license: unknown" in json.loads(content)["content"]:
                errors = [{"message": '"license" must be one of those that the hub knows'}]
            return self.answer_json(400 if errors else 200, {"errors": errors, "warnings": []})
        if parts[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            return self.answer_json(200, {"files": files})
        return self.commit(self.root / parts[2] / parts[3], content.splitlines())

    def create(self, repository: dict):
        name = f"{repository['organization']}/{repository['name']}"
        is_there = (self.root / name).is_dir()
        (self.root / name).mkdir(parents=True, exist_ok=True)
        self.answer_json(409 if is_there else 200, {"url": f"http://{self.headers['Host']}/{name}"})

    def commit(self, folder: Path, lines: list[bytes]):
        """lines: of JSON, each an operation."""
        for operation in map(json.loads, lines):
            value = operation["value"]
            if operation["key"] == "file":
                path = folder / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "deletedFile":
                (folder / value["path"]).unlink()
        address = f"http://{self.headers['Host']}/{folder.parent.name}/{folder.name}/commit/1"
        self.answer_json(200, {"commitUrl": address, "commitOid": REVISION})

    def answer_json(self, status: int, content: dict):
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self, status, headers=None, data=b"", body=True):
        self.send_response(status)
        for key, value in ((headers or {}) | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_arguments):
        pass


@contextmanager
def serve(root: Path):
    """(address, requests) of a hub whose repositories lie in ``root``."""
    handler = type("OwnHub", (Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def hub_options(address: str) -> dict:
    """Environment of a process that is to use the hub at an address."""
    return dict(
        HF_ENDPOINT=address,
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_ETAG_TIMEOUT="2",
    )
