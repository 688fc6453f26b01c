"""A model hub on this machine: the HTTP calls that ``huggingface_hub`` makes to create, upload and download models.

It stores text files with a commit and safetensors through the LFS protocol, and it wants a token for every change.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of-the-tests"


class HubServer:
    """Repositories in memory: ``repos[repo_id][branch or commit][path]`` is the content of a file."""

    def __init__(self, initial: dict[str, bytes]) -> None:
        """``initial``: the files of a new repository."""
        self.initial = initial
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[tuple[str, str], str] = {}
        """The commit of a branch of a repository."""
        self.objects: dict[str, bytes] = {}
        """Files of the LFS protocol by their sha256."""
        self.requests: list[str] = []
        """Method and path of every request but those for ``/_requests``."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo_id: str, branch: str, files: dict[str, bytes]) -> str:
        """Adds files to a branch. Returns the hash of the commit."""
        commits = self.repos[repo_id]
        content = {**commits.get(self.heads.get((repo_id, branch), ""), {}), **files}
        commit = hashlib.sha1(repr((branch, sorted(content.items()), len(commits))).encode()).hexdigest()
        commits[commit], self.heads[repo_id, branch] = content, commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    routes = (
        ("GET", r"/_requests", "count"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>\w+/\w+)/branch/(?P<revision>\w+)", "branch"),
        ("POST", r"/api/models/(?P<repo>\w+/\w+)/preupload/(?P<revision>\w+)", "preupload"),
        ("POST", r"/(?P<repo>\w+/\w+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "put"),
        ("POST", r"/api/models/(?P<repo>\w+/\w+)/commit/(?P<revision>\w+)", "add"),
        ("GET", r"/api/models/(?P<repo>\w+/\w+)(/revision/(?P<revision>\w+))?", "info"),
        ("GET", r"/api/models/(?P<repo>\w+/\w+)/tree/(?P<revision>\w+)", "tree"),
        ("(GET|HEAD)", r"/(?P<repo>\w+/\w+)/resolve/(?P<revision>\w+)/(?P<path>.+)", "file"),
    )

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path != "/_requests":
            self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, name in self.routes:
            if re.fullmatch(method, self.command) and (match := re.fullmatch(pattern, path)):
                if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._answer(401, {"error": "Invalid username or password."})
                return getattr(self, f"_{name}")(body=body, **match.groupdict())
        return self._answer(404, {"error": f"unknown call {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _count(self, body: bytes) -> None:
        self._answer(200, len(self.hub.requests))

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.repos:
            return self._answer(409, {**url, "error": "You already created this model repo"})
        self.hub.repos[repo] = {}
        self.hub.commit(repo, "main", self.hub.initial)
        return self._answer(200, url)

    def _validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\nlicense: ")
        self._answer(200, {"errors": [], "warnings": []})

    def _branch(self, body: bytes, repo: str, revision: str) -> None:
        self.hub.heads.setdefault((repo, revision), self.hub.heads[repo, "main"])
        self._answer(201, {})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer(200, {})

    def _add(self, body: bytes, repo: str, revision: str) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            match line["key"]:
                case "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                case "lfsFile":
                    files[line["value"]["path"]] = self.hub.objects[line["value"]["oid"]]
        commit = self.hub.commit(repo, revision, files)
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def _resolve(self, repo: str, revision: str | None) -> str | None:
        """The commit of a branch or commit; answers if there is none."""
        if repo not in self.hub.repos:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        commit = self.hub.heads.get((repo, revision or "main"), revision)
        if commit not in self.hub.repos[repo]:
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return None
        return commit

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        if commit := self._resolve(repo, revision):
            siblings = [{"rfilename": path} for path in self.hub.repos[repo][commit]]
            self._answer(200, {"id": repo, "modelId": repo, "sha": commit, "tags": [], "siblings": siblings})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        if commit := self._resolve(repo, revision):
            files = self.hub.repos[repo][commit].items()
            oids = {path: hashlib.sha1(content).hexdigest() for path, content in files}
            self._answer(200, [{"type": "file", "path": p, "size": len(c), "oid": oids[p]} for p, c in files])

    def _file(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if not (commit := self._resolve(repo, revision)):
            return
        content = self.hub.repos[repo][commit].get(path)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""
