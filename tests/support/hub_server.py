"""A Hub on loopback: it takes the Hub's commits into git repositories, and olah serves them.

Uploads are answered here, as no server on PyPI takes them; whatever reads a repository is passed to olah.
Also here, because olah has neither: private repositories, the error of a revision that is not there, search.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_ada"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
CONFIG = """
[basic]
host = "127.0.0.1"
port = {port}
mirrors-path = ["./mirrors"]
[accessibility]
offline = true
[[accessibility.proxy]]
repo = "*/*"
allow = true
"""


class Hub(ThreadingHTTPServer):
    """The Hub, on a free port. `log` has the requests that it got."""

    def __init__(self, root: Path, olah: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.mirrors, self.olah = root / "mirrors/models", olah
        self.private: set[str] = set()
        self.log: list[str] = []
        self.down = self.damaged = False
        self.broken: set[str] = set()  # repositories to which commits fail
        self.cuts = 0  # downloads of weights that still end in the middle
        self.meanwhile: Callable[[], object] | None = None  # called once, before a card that was read is sent
        self.url = f"http://127.0.0.1:{self.server_port}"

    def git(self, repository: str, *words: str, data: bytes = b"") -> str:
        """Return what a command of Git prints about a repository."""
        return self.run_git(repository, *words, data=data).decode().strip()

    def raw(self, repository: str, path: str, revision: str = "main") -> bytes:
        """Return the content of a file."""
        return self.run_git(repository, "show", f"{revision}:{path}")

    def run_git(self, repository: str, *words: str, data: bytes = b"") -> bytes:
        who = {f"GIT_{role}_{key}": "ada" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        command = ["git", "-C", str(self.mirrors / repository), *words]
        done = subprocess.run(command, input=data, capture_output=True, check=True, env={**os.environ, **who})
        return done.stdout

    def has(self, repository: str, revision: str = "main") -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            return bool(self.git(repository, "rev-parse", "--verify", f"{revision}^{{commit}}"))
        return False

    def create(self, repository: str, private: bool) -> None:
        (self.mirrors / repository).mkdir(parents=True)
        self.git(repository, "init", "-q", "-b", "main")
        self.commit(repository, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.private |= {repository} if private else set()

    def commit(self, repository: str, branch: str, files: dict[str, bytes], message: str, mode: str = "100644") -> str:
        parent = ["-p", branch] if self.has(repository, branch) else []
        self.git(repository, "read-tree", *([branch] if parent else ["--empty"]))
        for path, content in files.items():
            blob = self.git(repository, "hash-object", "-w", "--stdin", data=content)
            self.git(repository, "update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}")
        commit = self.git(repository, "commit-tree", self.git(repository, "write-tree"), *parent, "-m", message)
        self.git(repository, "update-ref", f"refs/heads/{branch}", commit)
        return commit


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def reply(self, status: int, content: object = None, error: str = "", headers: dict[str, str] | None = None):
        content = {"error": error or "refused"} if content is None and status >= 400 else content
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.log.append(f"{self.command} {path}")
        writer = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = re.match(r"/(?:api/models/|lfs/)?([^/]+/[^/]+?)(?:\.git|/|$)(.*)", path)
        repository, rest = (found[1], found[2]) if found else ("", "")
        if self.server.down:
            self.reply(503)
        elif path == "/api/models":
            self.search(query)
        elif self.command in ("GET", "HEAD") and (
            not self.server.has(repository) or (repository in self.server.private and not writer)
        ):
            self.reply(401, error="RepoNotFound")
        elif self.command in ("GET", "HEAD"):
            self.read(repository, rest, "blobs" in query)
        elif not writer and not path.startswith("/lfs/"):  # whose addresses are signed
            self.reply(403 if "Authorization" in self.headers else 401)
        else:
            self.write(path, repository, rest, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def tags(self, repository: str) -> list[str]:
        """Return the tags of a repository, which the Hub takes from the head of its README.md."""
        if "README.md" not in self.server.git(repository, "ls-tree", "--name-only", "main").split():
            return []
        text = self.server.git(repository, "show", "main:README.md")
        head = yaml.safe_load(text.split("---\n")[1])
        own = [head.get("library_name"), head.get("pipeline_tag"), *head.get("tags", [])]
        pairs = [f"dataset:{name}" for name in head.get("datasets", [])]
        pairs += [f"license:{head['license']}"] if "license" in head else []
        return [tag for tag in (*own, *pairs) if tag]

    def search(self, query: dict[str, list[str]]) -> None:
        assert query["filter"][0] == "bayeslayers"
        wanted = query.get("search", [""])[0]
        names = sorted(str(p.parent.relative_to(self.server.mirrors)) for p in self.server.mirrors.glob("*/*/.git"))
        shown = [name for name in names if wanted in name and name not in self.server.private]
        tags = {name: self.tags(name) for name in shown}
        shown = [name for name in shown if {*query["filter"]} <= {*tags[name]}]
        facts = {"downloads": 3, "likes": 1, "lastModified": "2026-01-02T03:04:05.000Z", "private": False}
        found = [{"_id": name, "id": name, "tags": tags[name], **facts} for name in shown]
        self.reply(200, found[: int(query["limit"][0])])

    def files(self, repository: str, revision: str) -> list[dict[str, object]]:
        """Return the files of a revision with their sizes and hashes, those of LFS by what their pointers say."""
        found = []
        for line in self.server.git(repository, "ls-tree", "-r", "-l", revision).splitlines():
            (_, _, blob, size), path = line.split("\t")[0].split(), line.split("\t")[1]
            file: dict[str, object] = {"rfilename": path, "blobId": blob, "size": int(size)}
            if path.endswith(".safetensors"):
                oid, length = re.findall(r"sha256:(\w+)\nsize (\d+)", self.server.git(repository, "show", blob))[0]
                file |= {"size": int(length), "lfs": {"sha256": oid, "size": int(length), "pointerSize": int(size)}}
            found.append(file)
        return found

    def read(self, repository: str, rest: str, hashes: bool) -> None:
        revision = re.match(r"(?:revision|tree|resolve)/([^/]+)", rest)
        if revision and not self.server.has(repository, unquote(revision[1])):
            self.reply(404, error="RevisionNotFound")
        elif rest == "" or hashes:
            told: dict[str, object] = {"_id": "1", "id": repository, "private": repository in self.server.private}
            if hashes:
                name = unquote(revision[1]) if revision else "main"
                told |= {"sha": self.server.git(repository, "rev-parse", name)}
                told |= {"siblings": self.files(repository, name)}
            self.reply(200, told)
        else:
            upstream = http.client.HTTPConnection("127.0.0.1", self.server.olah)
            sent = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
            upstream.request(self.command, self.path, headers=sent)
            answer = upstream.getresponse()
            content = answer.read()
            if self.server.damaged and rest.endswith("model.safetensors") and self.command == "GET":
                content = content[:-1] + bytes([content[-1] ^ 1])
            dropped = ("transfer-encoding", "connection", "date", "server")
            kept = {key.title(): value for key, value in answer.getheaders() if key.lower() not in dropped}
            upstream.close()
            if self.server.cuts and rest.endswith("model.safetensors") and self.command == "GET":
                self.server.cuts -= 1
                self.close_connection = True
                whole = kept | {"Content-Length": str(len(content))}
                return self.reply(answer.status, content[: len(content) // 2], headers=whole)
            if self.server.meanwhile and rest.endswith("config.json") and self.command == "GET":
                called, self.server.meanwhile = self.server.meanwhile, None
                called()
            self.reply(answer.status, content, headers=kept)

    def write(self, path: str, repository: str, rest: str, body: bytes) -> None:
        server, kind = self.server, rest.partition("/")[0]
        branch = unquote(rest.rpartition("/")[2])
        objects = server.mirrors / repository / ".git/lfs/objects"
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "ada":
                return self.reply(403)
            if server.has(name):
                return self.reply(409, {"error": "it exists", "url": f"{server.url}/{name}"})
            server.create(name, asked.get("private") or asked.get("visibility") == "private")
            return self.reply(200, {"url": f"{server.url}/{name}"})
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.reply(200, {"errors": [], "warnings": []})
        if kind == "branch":
            if server.has(repository, branch):
                return self.reply(409)
            server.git(repository, "branch", branch, "main")
            return self.reply(200, {})
        if kind == "preupload":
            mode = {False: "regular", True: "lfs"}
            files = [(file["path"], file["path"].endswith(".safetensors")) for file in json.loads(body)["files"]]
            return self.reply(
                200, {"files": [{"path": p, "uploadMode": mode[big], "shouldIgnore": False} for p, big in files]}
            )
        if rest.endswith("info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            action = {"href": f"{server.url}/lfs/{repository}/{asked[0]['oid']}"}
            return self.reply(200, {"transfer": "basic", "objects": [{**asked[0], "actions": {"upload": action}}]})
        if path.startswith("/lfs/"):
            oid = path.rpartition("/")[2]
            (objects / oid[:2] / oid[2:4]).mkdir(parents=True, exist_ok=True)
            (objects / oid[:2] / oid[2:4] / oid).write_bytes(body)
            return self.reply(200)
        assert kind == "commit", path
        if repository in server.broken:
            return self.reply(500)
        items = {line["key"]: [] for line in map(json.loads, body.splitlines())}
        for line in map(json.loads, body.splitlines()):
            items[line["key"]].append(line["value"])
        files = {file["path"]: base64.b64decode(file["content"]) for file in items.get("file", [])}
        files |= {file["path"]: POINTER.format(**file).encode() for file in items.get("lfsFile", [])}
        oid = server.commit(repository, branch, files, items["header"][0]["summary"])
        return self.reply(200, {"commitUrl": f"{server.url}/{repository}/commit/{oid}", "commitOid": oid})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def running(root: Path):
    """Start olah and the Hub before it, and stop both."""
    (root / "mirrors/models").mkdir(parents=True)
    port = free_port()
    (root / "olah.toml").write_text(CONFIG.format(port=port))
    command = shutil.which("olah-cli", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert command is not None
    with (root / "olah.txt").open("w") as log:
        olah = subprocess.Popen([command, "-c", "olah.toml"], cwd=root, stdout=log, stderr=log)
    hub = Hub(root, port)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert olah.poll() is None and time.monotonic() < deadline, (root / "olah.txt").read_text()
            time.sleep(0.05)
        thread.start()
        yield hub
    finally:
        if thread.ident is not None:
            hub.shutdown()
            thread.join()
        hub.server_close()
        olah.terminate()
        olah.wait(10)
