"""A small server that answers as the hub does, and what huggingface_hub asks it for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def hub(models: dict[str, dict[str, Path]]) -> Iterator[tuple[str, list[str]]]:
    """Serves folders as models: name -> revision -> folder. The first revision is main; a gated
    model has none.

    Yields:
        The endpoint, and the requests so far.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, _, _ = self.path.partition("?")
            asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.about("/".join(parts[2:4]), *parts[4:6])
            elif parts[2:3] == ["resolve"]:
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.reply(404, b"{}")

        def about(self, name: str, what: str = "revision", revision: str = "main") -> None:
            folder = self.folder(name, revision)
            if folder is None:
                return
            files = sorted(file for file in folder.iterdir() if file.is_file())
            if what == "tree":
                rows = [
                    {
                        "type": "file",
                        "path": f.name,
                        "size": f.stat().st_size,
                        "oid": digest(f.read_bytes()),
                    }
                    for f in files
                ]
                self.reply(200, json.dumps(rows).encode())
                return
            facts = {
                "id": name,
                "modelId": name,
                "sha": digest(str(folder).encode()),
                "siblings": [{"rfilename": file.name} for file in files],
                "tags": [],
            }
            self.reply(200, json.dumps(facts).encode())

        def file(self, name: str, revision: str, file: str) -> None:
            folder = self.folder(name, revision)
            if folder is None:
                return
            if not (folder / file).is_file():
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = (folder / file).read_bytes()
            headers = {
                "ETag": f'"{digest(content)}"',
                "X-Repo-Commit": digest(str(folder).encode()),
            }
            self.reply(200, content, headers)

        def folder(self, name: str, revision: str) -> Path | None:
            revisions = models.get(name)
            if revisions is None:
                self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
                return None
            if not revisions:
                self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
                return None
            known = {digest(str(folder).encode()): folder for folder in revisions.values()}
            known |= {"main": next(iter(revisions.values())), **revisions}
            if revision not in known:
                self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return None
            return known[revision]

        def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            all_headers = {"Content-Type": "application/json", **(headers or {})}
            for key, value in (all_headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
