"""A model hub on this machine: as much of the hub's HTTP interface as a download of one model asks for."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

OWNER_AND_NAME = "some-owner/some-model"
_COMMIT = "0" * 40


@dataclass
class ModelHub:
    """Where the hub is, and what was asked for: a line `METHOD path` for each request, in order."""

    endpoint: str
    asked: list[str] = field(default_factory=list)

    def environ(self, home: Path) -> dict[str, str]:
        """Return the environment of a process that has this hub, and an empty cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def model_hub(model: Path, *, seconds: float = 0.0, slow: str = "model_index.json") -> Iterator[ModelHub]:
    """Give out a pipeline folder as `some-owner/some-model`; the file called `slow` takes so many seconds."""
    files = {path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()}

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            if path.startswith(f"/api/models/{OWNER_AND_NAME}/tree/"):
                listed = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": name}
                    for name, file in files.items()
                ]
                return self._send(json.dumps(listed).encode(), with_body)
            if path.startswith(f"/api/models/{OWNER_AND_NAME}"):
                siblings = [{"rfilename": name} for name in files]
                told = {"id": OWNER_AND_NAME, "modelId": OWNER_AND_NAME, "sha": _COMMIT, "siblings": siblings}
                return self._send(json.dumps(told | {"private": False, "tags": [], "downloads": 0}).encode(), with_body)
            name = path.removeprefix(f"/{OWNER_AND_NAME}/resolve/").partition("/")[2]
            if name not in files:
                return self.send_error(404)
            return self._send(files[name].read_bytes(), with_body, seconds if with_body and name == slow else 0.0)

        def _send(self, content: bytes, with_body: bool, seconds: float = 0.0) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", _COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(content[:1])
                self.wfile.flush()
                time.sleep(seconds)
                self.wfile.write(content[1:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    hub = ModelHub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
