"""A hub on this machine: what downloads and uploads use of its HTTP interface, over folders; can break off."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class StandIn:
    """repositories: (name, revision) to a folder. cut_after: bytes after which the first large file breaks off.

    requests: "METHOD path [range]" in their order.
    inbox: where what is sent lands, by repository; None: nobody may write. Large files (.safetensors) come by LFS.
    """

    repositories: Mapping[tuple[str, str], Path]
    cut_after: int | None = None
    url: str = ""
    requests: list[str] = field(default_factory=list)
    inbox: Path | None = None
    objects: dict[str, bytes] = field(default_factory=dict)

    def find(self, name: str, revision: str) -> Path | None:
        return self.repositories.get((name, revision))


@contextmanager
def serve_hub(
    repositories: Mapping[tuple[str, str], Path], *, cut_after: int | None = None, inbox: Path | None = None
) -> Iterator[StandIn]:
    """The stand-in, listening while open."""
    hub = StandIn(repositories, cut_after, inbox=inbox)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer_upload(hub: StandIn, parts: list[str], body: bytes) -> dict[str, Any]:
    """What the hub says to one step of an upload."""
    if parts[-1] == "create":
        asked = json.loads(body)
        return {"url": f"https://huggingface.co/{asked.get('organization') or 'me'}/{asked['name']}"}
    if "preupload" in parts:
        names = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": name, "uploadMode": _mode(name), "shouldIgnore": False} for name in names]}
    if parts[-1] == "batch":
        objects = json.loads(body)["objects"]
        actions = [{"upload": {"href": f"{hub.url}/objects/{one['oid']}"}} for one in objects]
        return {"objects": [one | {"actions": action} for one, action in zip(objects, actions, strict=True)]}
    if "commit" in parts:
        for line in map(json.loads, body.splitlines()):
            _receive(hub, "/".join(parts[2:4]), line["key"], line["value"])
        return {"commitUrl": f"https://huggingface.co/{'/'.join(parts[2:4])}/commit/1", "commitOid": "1"}
    return {}


def _mode(name: str) -> str:
    return "lfs" if name.endswith(".safetensors") else "regular"


def _receive(hub: StandIn, repository: str, kind: str, value: dict[str, Any]) -> None:
    if kind == "header":
        return
    assert hub.inbox is not None
    path = hub.inbox / repository / value["path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(hub.objects[value["oid"]] if kind == "lfsFile" else base64.b64decode(value["content"]))


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.requests.append(f"POST {self.path}")
            if hub.inbox is None or not self.headers.get("Authorization"):
                return self._write(401, b"{}", {"X-Error-Message": "not logged in"})
            answer = answer_upload(hub, unquote(self.path.partition("?")[0]).strip("/").split("/"), body)
            return self._write(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def do_PUT(self) -> None:
            hub.requests.append(f"PUT {self.path}")
            content = self.rfile.read(int(self.headers["Content-Length"]))
            hub.objects[hashlib.sha256(content).hexdigest()] = content
            self._write(200, b"", {})

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            asked = self.headers.get("Range")
            hub.requests.append(f"{self.command} {self.path}" + (f" {asked}" if asked else ""))
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._tell("/".join(parts[2:4]), parts[-1] if len(parts) > 4 else "main")
            else:
                owner, name, _, revision, *file = parts
                self._send(f"{owner}/{name}", revision, "/".join(file), asked, with_body=with_body)

        def _tell(self, name: str, revision: str) -> None:
            folder = hub.find(name, revision)
            if folder is None:
                return self._missing(name)
            files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
            content = {"id": name, "modelId": name, "sha": revision, "siblings": [{"rfilename": one} for one in files]}
            return self._write(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _send(self, name: str, revision: str, file: str, asked: str | None, *, with_body: bool) -> None:
            folder = hub.find(name, revision)
            if folder is None or not (folder / file).is_file():
                return self._missing(name)
            content = (folder / file).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
            start = 0 if asked is None else int(asked.removeprefix("bytes=").partition("-")[0])
            if asked is not None:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start:] if with_body else b""
            return self._write(206 if asked else 200, body, headers, length=len(content) - start)

        def _missing(self, name: str) -> None:
            known = any(name == one for one, _ in hub.repositories)
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._write(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})

        def _write(self, status: int, body: bytes, headers: Mapping[str, str], length: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if hub.cut_after is not None and len(body) > hub.cut_after:
                body, hub.cut_after = body[: hub.cut_after], None
                self.close_connection = True
            self.wfile.write(body)

    return Handler
