"""A Hugging Face Hub on this machine, for models: what huggingface_hub asks of the real one."""

import base64
import hashlib
import json
import re
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


class StandinHub:
    """Repositories by name, each a dict of files; what was asked of it, in ``asked``.

    tokens: of repositories that are private, by name.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.tokens: dict[str, str] = {}
        self.asked: list[str] = []
        self.commits: list[dict] = []
        self.created: list[dict] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloaded(self, pattern: str = "*") -> list[str]:
        """Names of the files that were fetched."""
        names = [path.rpartition("/")[2] for path in self.asked if "/resolve/" in path]
        return sorted({name for name in names if fnmatch(name, pattern)})


class _Handler(BaseHTTPRequestHandler):
    hub: StandinHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._give()

    def do_GET(self):
        self._give()

    def _give(self):
        path = self.path.partition("?")[0]
        self.hub.asked.append(path)
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (listed or file)[1] if listed or file else ""
        files = self.hub.repositories.get(name)
        token = self.hub.tokens.get(name)
        if files is None or (token and self.headers["Authorization"] != f"Bearer {token}"):
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if (listed or file)[3 if listed else 2] not in (None, "main", "v1", SHA):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if listed and listed[2] == "tree":
            entries = [
                {"type": "file", "path": n, "size": len(b), "oid": _digest(b)}
                for n, b in files.items()
            ]
            return self._json(entries)
        if listed:
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": name, "modelId": name, "sha": SHA, "siblings": siblings})
        if file[3] not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = files[file[3]]
        return self._answer(200, content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": SHA})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.hub.asked.append(self.path)
        if self.headers["Authorization"] != "Bearer secret":
            return self._answer(401, b'{"error": "who are you"}', {})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.created.append(asked)
            self.hub.repositories.setdefault(name, {})
            return self._json({"url": f"{self.hub.address}/{name}", "name": name})
        name = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")[0]
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self._json({"files": answer})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "header":
                    self.hub.commits.append(value)
            url = f"{self.hub.address}/{name}/commit/{SHA}"
            return self._json({"commitUrl": url, "commitOid": SHA, "hookOutput": ""})
        return self._answer(404, b"{}", {})

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code, content, headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
