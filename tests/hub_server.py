"""A small Hub on loopback for the real ``huggingface_hub`` client: ``HF_ENDPOINT`` names it, nothing is patched.

Repositories live in memory: branches, commits, pull requests, large files beside the others, private and gated ones,
and connections that are lost in the middle of a download. Written from the client's requests and the Hub's documented
answers, not from what this package does. ``HF_ENDPOINT`` is read when the client is imported, so whatever uses it runs
in a process of its own: ``Machine``.
"""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
TOKENS = {"hf_owner": "me", "hf_stranger": "stranger"}
"""User names by token. ``stranger`` may read what is public and open pull requests."""


@dataclass
class Commit:
    """One state of a repository: all files of it."""

    sha: str
    files: dict[str, bytes]
    title: str = ""
    description: str = ""


@dataclass
class Repository:
    """Commits by branch; pull requests are the branches ``refs/pr/1``, ``refs/pr/2``, ..."""

    name: str
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches.setdefault("main", [Commit("0" * 40, {})])

    @property
    def pull_requests(self) -> list[str]:
        return [name for name in self.branches if name.startswith("refs/pr/")]

    def at(self, revision: str) -> Commit | None:
        """The last commit of a branch, or any by its sha."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)

    def commit(self, branch: str, files: dict[str, bytes], title: str = "", description: str = "") -> Commit:
        """A new last commit of a branch, with these files added to those that are there."""
        files = {**self.branches[branch][-1].files, **files}
        sha = hashlib.sha1(f"{self.name} {branch} {len(self.branches[branch])} {title}".encode()).hexdigest()
        self.branches[branch].append(Commit(sha, files, title, description))
        return self.branches[branch][-1]


class LoopbackHub:
    """``with LoopbackHub() as hub:`` serves until the end of the block.

    Attributes:
        repositories: by owner/name.
        lost: names of files whose next so many downloads break in the middle.
        lost_before: names of files whose next so many downloads break before their first byte.
        lost_commits: how many of the next commits find no answer.
        pushed_after: repositories and files that are committed there, once, when a file of this name is downloaded.
        log: method and path of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lost: dict[str, int] = {}
        self.lost_before: dict[str, int] = {}
        self.lost_commits = 0
        self.pushed_after: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.log: list[str] = []
        self.large: dict[str, bytes] = {}
        self.large_names: dict[str, str] = {}
        self.connections: list[socket.socket] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = f"http://localhost:{self.server.server_port}"  # where large files are, another host to clients

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # which clients keep open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, name: str, files: dict[str, bytes] | Path | None = None, **about: Any) -> Repository:
        """A repository that is there already, with the files of a folder."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories[name] = Repository(name, **about)
        repository.commit("main", files or {})
        return repository

    def environment(self, home: Path, offline: bool = False, token: str = "hf_owner") -> dict[str, str]:
        """Of a process on a machine whose caches are in ``home``; an empty token: nobody is logged in."""
        own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return {
            **own,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_TOKEN": token,
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }


class Machine:
    """A process with a cache of its own that uses a Hub: ``machine("result = 1 + 1")`` is 2.

    The code finds ``hf_tokenprune``, ``torch`` and ``transformers`` there, and what is given by name; what it leaves in
    ``result`` comes back, as JSON. An error is raised as ``RemoteError``.

    Attributes:
        warnings: of the last call.
    """

    def __init__(self, hub: LoopbackHub, home: Path, offline: bool = False, token: str = "hf_owner") -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.warnings: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            env=hub.environment(home / "hf", offline, token),
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, code: str, **names: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": textwrap.dedent(code), "names": names}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.warnings = answer["warnings"]
        if "error" in answer:
            raise RemoteError(answer["error"], answer["kinds"], answer["trace"])
        return answer["result"]

    def __enter__(self) -> "Machine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


class RemoteError(AssertionError):
    """What code raised on another machine: its message, and the names of its classes."""

    def __init__(self, message: str, kinds: list[str], trace: str) -> None:
        super().__init__(f"{message}\n{trace}")
        self.message, self.kinds = message, kinds


LOOP = """
import json, os, sys, traceback, warnings
answers, sys.stdout = sys.stdout, open(os.devnull, "w")
import torch, transformers, hf_tokenprune
for line in sys.stdin:
    asked = json.loads(line)
    names = {"hf_tokenprune": hf_tokenprune, "torch": torch, "transformers": transformers, **asked["names"]}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            exec(asked["code"], names)
            answer = {"result": names.get("result")}
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"error": str(error), "kinds": kinds, "trace": traceback.format_exc()}
    answer["warnings"] = [str(warning.message) for warning in found]
    print(json.dumps(answer), file=answers, flush=True)
"""


class _RefusalError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append(f"{self.command} {unquote(self.path)}")
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            self._route(parts, "create_pr=1" in url.query)
        except _RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Error-Message": str(refusal)} if str(refusal) else {}
            self._json({"error": str(refusal)}, refusal.status, headers)

    def _route(self, parts: list[str], create_pr: bool) -> None:
        match (self.command, *parts):
            case ("GET", "api", "whoami-v2"):
                self._json({"name": self._user(), "type": "user", "orgs": []})
            case ("POST", "api", "repos", "create"):
                self._create()
            case ("POST", "api", "validate-yaml"):
                self._json({"errors": metadata_errors(json.loads(self.body)["content"]), "warnings": []})
            case ("GET", "api", "models", owner, name):
                self._info(self._repository(owner, name), "main")
            case ("GET", "api", "models", owner, name, "revision", revision):
                self._info(self._repository(owner, name), revision)
            case ("GET", "api", "models", owner, name, "tree", revision, *folder):
                self._tree(self._at(self._repository(owner, name), revision), "/".join(folder))
            case ("GET", "api", "models", owner, name, "refs"):
                repository = self._repository(owner, name)
                refs = [{"name": branch, "ref": f"refs/heads/{branch}"} for branch in repository.branches]
                branches = [{**ref, "targetCommit": repository.branches[ref["name"]][-1].sha} for ref in refs]
                self._json({"branches": branches, "converts": [], "tags": []})
            case ("POST", "api", "models", owner, name, "branch", branch):
                self._branch(self._repository(owner, name), branch)
            case ("POST", "api", "models", owner, name, "preupload", revision):
                self._at(self._repository(owner, name), revision)
                self._json({"files": [_mode(file) for file in json.loads(self.body)["files"]]})
            case ("POST", "api", "models", owner, name, "commit", revision):
                self._commit(self._repository(owner, name), revision, create_pr)
            case ("POST", owner, repo, "info", "lfs", "objects", "batch") if repo.endswith(".git"):
                self._repository(owner, repo.removesuffix(".git"))
                self._json({"transfer": "basic", "objects": [self._place(o) for o in json.loads(self.body)["objects"]]})
            case ("PUT", "large", oid):
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise _RefusalError(400, message="the content has another sha256")
                self.hub.large[oid] = self.body
                self._send(200, b"", {"ETag": f'"{oid}"'})
            case ("GET", "large", oid):
                self._download(self.hub.large_names[oid], self.hub.large[oid], {})
            case (("HEAD" | "GET"), owner, name, "resolve", revision, *path):
                self._resolve(self._repository(owner, name), revision, "/".join(path))
            case _:
                raise _RefusalError(404, message=f"no such page: {self.command} {self.path}")

    # -- who may what ------------------------------------------------------------------------------------------------

    def _user(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise _RefusalError(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(token, "")

    def _repository(self, owner: str, name: str) -> Repository:
        repository, user = self.hub.repositories.get(f"{owner}/{name}"), self._user()
        if repository is None or (repository.private and user != owner):
            # Over https a client takes any 401 for this code, over http it goes by the code alone.
            raise _RefusalError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    def _at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise _RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _must_own(self, owner: str) -> None:
        if self._user() != owner:
            raise _RefusalError(403 if self._user() else 401, message=f"You have no rights in the namespace {owner}")

    # -- answers -----------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self._user()
        self._must_own(owner)
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            self._json({**url, "error": "You already created this model repo"}, 409)
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(name, bool(private))
            self._json(url)

    def _info(self, repository: Repository, revision: str) -> None:
        commit = self._at(repository, revision)
        files = [{"rfilename": name} for name in sorted(commit.files)]
        about = {"id": repository.name, "modelId": repository.name, "sha": commit.sha, "private": repository.private}
        card = _metadata(commit.files.get("README.md", b"").decode())
        self._json(
            {**about, "gated": repository.gated, "siblings": files, "tags": card.get("tags", []), "cardData": card}
        )

    def _tree(self, commit: Commit, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {name: content for name, content in commit.files.items() if name.startswith(prefix)}
        if folder and not inside:
            raise _RefusalError(404, "EntryNotFound", f"{folder} does not exist")
        rows = [{"type": "file", "path": n, "size": len(c), "oid": _blob(c)} for n, c in sorted(inside.items())]
        self._json([row for row in rows if "/" not in str(row["path"]).removeprefix(prefix)])

    def _branch(self, repository: Repository, branch: str) -> None:
        self._must_own(repository.name.split("/")[0])
        if branch in repository.branches:
            raise _RefusalError(409, message=f"Reference already exists: {branch}")
        repository.branches[branch] = [self._at(repository, json.loads(self.body).get("startingPoint", "main"))]
        self._json({})

    def _commit(self, repository: Repository, revision: str, create_pr: bool) -> None:
        if self.hub.lost_commits:
            self.hub.lost_commits -= 1
            self.close_connection = True
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        self._at(repository, revision)
        if create_pr:
            number = len(repository.pull_requests) + 1
            branch = f"refs/pr/{number}"
            repository.branches[branch] = [repository.branches[revision][-1]]
        else:
            self._must_own(repository.name.split("/")[0])
            branch = revision
        files = {}
        for line in lines:
            about = line["value"]
            if line["key"] == "file":
                files[about["path"]] = base64.b64decode(about["content"])
            elif line["key"] == "lfsFile":
                files[about["path"]] = self.hub.large[about["oid"]]
                self.hub.large_names[about["oid"]] = about["path"]
        commit = repository.commit(branch, files, header["summary"], header["description"])
        url = f"{self.hub.endpoint}/{repository.name}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}"}
        self._json({**answer, "pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else answer)

    def _place(self, thing: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.hub.endpoint}/large/{thing['oid']}"}}
        return thing if thing["oid"] in self.hub.large else {**thing, "actions": upload}

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        commit = self._at(repository, revision)
        about = {"X-Repo-Commit": commit.sha}
        if repository.gated and self._user() != repository.name.split("/")[0]:
            words = f"Access to model {repository.name} is restricted and you are not in the authorized list."
            raise _RefusalError(403 if self._user() else 401, "GatedRepo", words)
        if path not in commit.files:
            self._json({"error": "Entry not found"}, 404, {**about, "X-Error-Code": "EntryNotFound"})
            return
        content = commit.files[path]
        oid = hashlib.sha256(content).hexdigest()
        if oid in self.hub.large:  # as on the Hub, a large file is elsewhere
            about |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{oid}"'}
            self._send(302, b"", {**about, "Location": f"{self.hub.elsewhere}/large/{oid}"})
        else:
            self._download(path, content, {**about, "ETag": f'"{_blob(content)}"'})

    def _download(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        """A file or, with the header Range, the rest of it."""
        if self.command == "GET" and (pushed := self.hub.pushed_after.pop(name, None)):
            self.hub.repositories[pushed[0]].commit("main", pushed[1])
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        rest = content[start:]
        if "Range" in self.headers:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        sent = rest
        if self.command == "GET":
            for lost, share in ((self.hub.lost, len(rest) // 2), (self.hub.lost_before, 0)):
                if lost.get(name, 0):
                    lost[name] -= 1
                    sent, self.close_connection = rest[:share], True
        self._send(206 if "Range" in self.headers else 200, sent, headers, len(rest))

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    """Weights are large files, whatever their size."""
    large = file["path"].endswith(".safetensors")
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _metadata(card: str) -> dict[str, Any]:
    """The YAML block that a model card begins with."""
    return yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}


def metadata_errors(card: str) -> list[dict[str, str]]:
    """What the Hub refuses in a card, of what https://github.com/huggingface/hub-docs/blob/main/modelcard.md says."""
    data, found = _metadata(card), []
    for key in ("library_name", "pipeline_tag", "license"):
        if not isinstance(data.get(key, ""), str):
            found.append(f'"{key}" must be a string')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        found.append('"tags" must be an array of strings')
    for model in data.get("model-index", []):
        for result in model["results"]:
            found += [f'"{key}" is required' for key in ("task", "dataset", "metrics") if key not in result]
            found += [f'"dataset.{key}" is required' for key in ("name", "type") if key not in result["dataset"]]
            found += [
                f'"metric.{key}" is required' for m in result["metrics"] for key in ("type", "value") if key not in m
            ]
    return [{"message": message} for message in found]
