"""A Hub on loopback for the tests: what huggingface_hub's client asks for, with the real Hub's checks and answers.

Everything lives in memory. Honest about: tokens (unknown, read-only, foreign), private repositories, hashes and sizes
of every LFS object, LFS pointers to what was never uploaded, parent commits (412), paths that leave the repository,
names that exist already (409), deletions of what is not there, the metadata of model cards, and an Authorization header
that reaches the file server, which is another host (`localhost`) as the Hub's is. Large uploads go in parts.

Tests read `requests`, and make trouble with `fail` (an answer with a status), `cut` (a connection that breaks) and
`lose_answer` (it breaks when all is done).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_FROM = 10_000_000  # bytes; what is smaller and text goes into the commit itself
MULTIPART = 25_000_000
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".model", ".onnx")
PIPELINE_TAGS = {
    "text-generation", "text-classification", "token-classification", "fill-mask", "question-answering",
    "translation", "summarization", "multiple-choice", "feature-extraction", "sentence-similarity",
}  # fmt: skip


@dataclass
class Blob:
    """Where a file's content is: its key in `Hub.objects`, its size, its git or LFS id."""

    oid: str
    size: int
    lfs: bool


@dataclass
class Commit:
    """One state of a repository."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A model repository."""

    owner: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, title: str, files: dict[str, Blob], parent: str | None) -> Commit:
        """Add a commit on `ref`."""
        content = json.dumps([parent, title, sorted((p, b.oid) for p, b in files.items()), len(self.commits)])
        made = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, files)
        self.commits[made.sha] = made
        self.refs[ref] = made.sha
        return made

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a tag, a pull request or a (shortened) hash."""
        sha = self.refs.get(revision, revision)
        return self.commits.get(sha)


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str = "", code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def git_oid(content: bytes) -> str:
    """Return the id of a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server: `with Hub() as hub:` starts it; `hub.endpoint` goes into HF_ENDPOINT."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.files_at = f"http://localhost:{self.server_address[1]}"
        self.tokens: dict[str, tuple[str, str]] = {}  # token: (user, "write" or "read")
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.trouble: list[dict[str, Any]] = []
        self.errors: list[Exception] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the server's."""

    def fail(self, method: str, path: str, status: int, *, times: int = 1, after: int = 0, **headers: str) -> None:
        """Answer `times` requests of `method` to a matching path with `status`, `after` so many have gone through."""
        self.trouble.append(
            {"method": method, "path": path, "status": status, "times": times, "after": after, "headers": headers}
        )

    def cut(self, method: str, path: str, read: int = 0, *, times: int = 1, after: int = 0) -> None:
        """Read `read` bytes of the body of a matching request and break the connection."""
        self.trouble.append(
            {"method": method, "path": path, "cut": read, "times": times, "after": after, "headers": {}}
        )

    def lose_answer(self, method: str, path: str, *, times: int = 1) -> None:
        """Do what a matching request asks, and break the connection instead of answering."""
        self.trouble.append({"method": method, "path": path, "lose": True, "times": times, "after": 0, "headers": {}})

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        """Return a published file."""
        found = self.repos[repo].find(revision)
        assert found is not None, revision
        return self.objects[found.files[path].oid]

    def paths(self, repo: str, revision: str = "main") -> set[str]:
        """Return the names of the published files."""
        found = self.repos[repo].find(revision)
        assert found is not None, revision
        return set(found.files)

    def history(self, repo: str, revision: str = "main") -> list[str]:
        """Return the titles of a revision's commits, newest first."""
        titles, commit = [], self.repos[repo].find(revision)
        while commit is not None:
            titles.append(commit.title)
            commit = self.repos[repo].commits.get(commit.parent or "")
        return titles


ROUTES: list[tuple[str, str, Callable[..., None]]] = []


def route(methods: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a handler's function for paths; named groups become arguments."""
    named = {"{id}": r"(?P<id>[\w.-]+/[\w.-]+|[\w.-]+)", "{rev}": r"(?P<rev>[^/]+)", "{path}": r"(?P<path>.*)"}
    for name, group in named.items():
        pattern = pattern.replace(name, group)

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for method in methods.split():
            ROUTES.append((method, pattern + "$", function))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: tests read `Hub.requests`."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        status, self.loses = 0, False
        self.at_file_server = (self.headers.get("Host") or "").startswith("localhost")
        try:
            self._make_trouble(url.path)
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length)
            if len(self.body) != length:
                raise ConnectionError("the client went away")
            for method, pattern, function in ROUTES:
                if method == self.command and (match := re.match(pattern, url.path)):
                    # A path keeps its slashes quoted until here: a branch may be called refs/pr/1.
                    status = self._run(function, {k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                    break
            else:
                status = self._answer_refused(Refused(404, f"no such endpoint: {self.command} {url.path}"))
        except ConnectionError:
            self.close_connection = True
        except Refused as refused:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status = self._answer_refused(refused)
        finally:
            self.server.requests.append((self.command, self.path, status))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _run(self, function: Callable[..., None], groups: dict[str, str]) -> int:
        self.status = 200
        try:
            with self.server.lock:
                function(self, **groups)
        except Refused as refused:
            return self._answer_refused(refused)
        except ConnectionError:
            raise
        except Exception as error:
            self.server.errors.append(error)  # a request that this server does not understand fails the test
            return self._answer_refused(Refused(500, f"{type(error).__name__}: {error}"))
        return self.status

    def _make_trouble(self, path: str) -> None:
        with self.server.lock:
            for rule in self.server.trouble:
                if rule["method"] == self.command and re.search(rule["path"], path) and rule["times"]:
                    if rule["after"]:
                        rule["after"] -= 1
                        continue
                    rule["times"] -= 1
                    break
            else:
                return
        if "lose" in rule:
            self.loses = True
            return
        if "cut" in rule:
            self.rfile.read(min(rule["cut"], int(self.headers.get("Content-Length") or 0)))
            self.connection.close()
            raise ConnectionError("cut")
        raise Refused(rule["status"], f"trouble on demand: {rule['status']}", **rule["headers"])

    # ------------------------------------------------------------------------------------------------------ answers

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        """Send a whole answer."""
        self.status = status
        if self.loses:
            self.connection.close()
            raise ConnectionError("lost")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        """Send an answer in JSON."""
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _answer_refused(self, refused: Refused) -> int:
        headers = dict(refused.headers)
        if refused.code:
            headers["X_Error_Code"] = refused.code
        if refused.message:
            headers["X_Error_Message"] = refused.message
        self.json({"error": refused.message}, refused.status, **headers)
        return refused.status

    # ------------------------------------------------------------------------------------------------------ who may

    def user(self) -> tuple[str, str] | None:
        """Return (name, role) of the request's token; None without a token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        found = self.server.tokens.get(header.removeprefix("Bearer "))
        if found is None or not header.startswith("Bearer "):
            raise Refused(401, "Invalid credentials in Authorization header")
        return found

    def repo(self, name: str, write: bool = False) -> Repo:
        """Return a repository that the request may see (or write to)."""
        who, repo = self.user(), self.server.repos.get(name)
        if repo is None or (repo.private and (who is None or who[0] != repo.owner)):
            raise Refused(401 if who is None else 404, "Repository not found", "RepoNotFound")
        if write and who is None:
            raise Refused(401, "You need to log in")
        if write and who is not None and (who[1] != "write" or who[0] != repo.owner):
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    def commit(self, name: str, revision: str) -> Commit:
        """Return a commit that the request may see."""
        found = self.repo(name).find(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # ----------------------------------------------------------------------------------------------- repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        """Answer `hf auth whoami`."""
        who = self.user()
        if who is None:
            raise Refused(401, "Invalid username or password.")
        self.json({"type": "user", "name": who[0], "orgs": [], "auth": {"accessToken": {"role": who[1]}}})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        """Make a repository, with its first commit."""
        who, asked = self.user(), json.loads(self.body)
        if who is None:
            raise Refused(401, "You need to log in")
        owner = asked.get("organization") or who[0]
        if who[1] != "write" or owner != who[0]:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{name}", "name": name}
        if name in self.server.repos:
            return self.json({"error": "You already created this model repo", **url}, 409)
        repo = self.server.repos[name] = Repo(owner, asked.get("private") or asked.get("visibility") == "private")
        repo.commit("main", "initial commit", {".gitattributes": self._put(b"*.safetensors filter=lfs\n")}, None)
        self.json(url)

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        """Delete a repository."""
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or (self.user() or [''])[0]}/{asked['name']}"
        self.repo(name, write=True)
        del self.server.repos[name]
        self.json({})

    @route("GET", "/api/models/{id}")
    def info(self, id: str) -> None:
        """Describe a model."""
        self.info_at(id, "main")

    @route("GET", "/api/models/{id}/revision/{rev}")
    def info_at(self, id: str, rev: str) -> None:
        """Describe a model at a revision."""
        commit, blobs = self.commit(id, rev), "blobs" in self.query
        siblings: list[dict[str, Any]] = []
        for path, blob in commit.files.items():
            lfs = {"lfs": {"sha256": blob.oid, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
            siblings.append({"rfilename": path, **({"size": blob.size, "blobId": blob.oid, **lfs} if blobs else {})})
        repo = self.server.repos[id]
        self.json({"id": id, "sha": commit.sha, "private": repo.private, "siblings": siblings, "tags": []})

    @route("GET", "/api/models/{id}/refs")
    def refs(self, id: str) -> None:
        """List the branches and pull requests."""
        refs = [(ref, sha) for ref, sha in self.repo(id).refs.items()]
        split: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, sha in refs:
            kind, full = ("pullRequests", ref) if ref.startswith("refs/pr/") else ("branches", f"refs/heads/{ref}")
            split[kind].append({"name": ref, "ref": full, "targetCommit": sha})
        self.json(split)

    @route("GET", "/api/models/{id}/commits/{rev}")
    def commits(self, id: str, rev: str) -> None:
        """List the commits of a revision."""
        commit: Commit | None = self.commit(id, rev)
        listed = []
        while commit is not None:
            date = "2026-01-01T00:00:00.000Z"
            listed.append({"id": commit.sha, "title": commit.title, "message": "", "date": date, "authors": []})
            commit = self.server.repos[id].commits.get(commit.parent or "")
        self.json(listed)

    @route("POST", "/api/models/{id}/branch/{rev}")
    def branch(self, id: str, rev: str) -> None:
        """Make a branch."""
        repo = self.repo(id, write=True)
        if rev in repo.refs:
            raise Refused(409, f"Reference refs/heads/{rev} already exists")
        start = repo.find(json.loads(self.body or b"{}").get("startingPoint") or "main")
        if start is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        repo.refs[rev] = start.sha
        self.json({})

    # --------------------------------------------------------------------------------------------------- reading

    @route("GET", "/api/models/{id}/tree/{rev}(?:/{path})?")
    def tree(self, id: str, rev: str, path: str = "") -> None:
        """List a folder."""
        commit = self.commit(id, rev)
        prefix = f"{path.rstrip('/')}/" if path else ""
        inside = {name: blob for name, blob in commit.files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound", X_Repo_Commit=commit.sha)
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        listed = {}
        for name, blob in sorted(inside.items()):
            rest = name.removeprefix(prefix)
            if "/" in rest and not recursive:
                folder = prefix + rest.partition("/")[0]
                listed[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            else:
                listed[name] = self._entry(name, blob)
        self.json(list(listed.values()))

    @route("POST", "/api/models/{id}/paths-info/{rev}")
    def paths_info(self, id: str, rev: str) -> None:
        """Describe files by name."""
        commit = self.commit(id, rev)
        try:
            asked = json.loads(self.body)["paths"]
        except ValueError:
            asked = parse_qs(self.body.decode())["paths"]
        self.json([self._entry(name, commit.files[name]) for name in asked if name in commit.files])

    def _entry(self, name: str, blob: Blob) -> dict[str, Any]:
        lfs = {"lfs": {"oid": blob.oid, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
        return {"type": "file", "path": name, "oid": blob.oid, "size": blob.size, **lfs}

    @route("GET HEAD", "/{id}/resolve/{rev}/{path}")
    def resolve(self, id: str, rev: str, path: str) -> None:
        """Send a small file, or the address of a large one."""
        commit = self.commit(id, rev)
        blob = commit.files.get(path)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
        headers = {"X_Repo_Commit": commit.sha, "ETag": f'"{blob.oid}"', "Accept_Ranges": "bytes"}
        if not blob.lfs:
            content = self.server.objects[blob.oid]
            return self.send(b"" if self.command == "HEAD" else content, Content_Length=str(len(content)), **headers)
        headers |= {"X_Linked_Etag": f'"{blob.oid}"', "X_Linked_Size": str(blob.size)}
        self.send(b"", 302, Location=f"{self.server.files_at}/objects/{blob.oid}", **headers)

    @route("GET", "/objects/(?P<oid>[0-9a-f]{64})")
    def download(self, oid: str) -> None:
        """Send a large file, or a part of it. The file server takes no tokens."""
        self._only_at_file_server()
        content = self.server.objects.get(oid)
        if content is None:
            raise Refused(404, "no such object")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return self.send(content, ETag=f'"{oid}"')
        start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if start > end:
            raise Refused(416, "Requested range not satisfiable", Content_Range=f"bytes */{len(content)}")
        where = f"bytes {start}-{end}/{len(content)}"
        self.send(content[start : end + 1], 206, Content_Range=where, ETag=f'"{oid}"')

    def _only_at_file_server(self) -> None:
        if not self.at_file_server:
            raise Refused(404, "no such endpoint")
        if self.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed: the token must not reach the file server")

    # --------------------------------------------------------------------------------------------------- writing

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        """Check the metadata of a model card."""
        import yaml

        content = json.loads(self.body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
        if match is None:
            return self.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        errors = []
        try:
            data = yaml.safe_load(match[1]) or {}
            for key in ("license", "pipeline_tag", "library_name"):
                if not isinstance(data.get(key, ""), str):
                    errors.append(f'"{key}" must be a string')
            if data.get("pipeline_tag", "text-generation") not in PIPELINE_TAGS:
                errors.append(f'"pipeline_tag" must be one of {sorted(PIPELINE_TAGS)}')
            if not all(isinstance(tag, str) for tag in data.get("tags") or []):
                errors.append('"tags" must be an array of strings')
            if not re.fullmatch(r"[a-z0-9.-]+", data.get("license", "other")):
                errors.append('"license" must be an identifier')
            for language in [data["language"]] if isinstance(data.get("language"), str) else data.get("language", []):
                if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)*|code|multilingual", language):
                    errors.append(f'"language" must only contain ISO 639 codes, not {language!r}')
            for model in data.get("model-index", []):
                for result in model["results"]:
                    ok = result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
                    if not ok or not all("type" in m and "value" in m for m in result["metrics"]):
                        errors.append('"model-index" needs task.type, dataset.type, dataset.name and metrics')
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        self.json({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    @route("POST", "/api/models/{id}/preupload/{rev}")
    def preupload(self, id: str, rev: str) -> None:
        """Say which files go by LFS, and what is there already."""
        repo, commit = self.repo(id, write="create_pr" not in self.query), self.commit(id, rev)
        assert repo is not None
        answers = []
        for asked in json.loads(self.body)["files"]:
            base64.b64decode(asked["sample"], validate=True)
            lfs = asked["size"] >= LFS_FROM or asked["path"].endswith(LFS_SUFFIXES)
            known = commit.files.get(asked["path"])
            answers.append(
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    **({"oid": known.oid} if known else {}),
                }
            )
        self.json({"files": answers})

    @route("POST", r"/{id}\.git/info/lfs/objects/batch")
    def lfs_batch(self, id: str) -> None:
        """Say where LFS objects go; those that are here already go nowhere."""
        if id not in self.server.repos or self.user() is None:
            self.repo(id, write=True)
        asked, answers = json.loads(self.body), []
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise Refused(400, "only uploads by sha256")
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            answer = {"oid": oid, "size": size, "authenticated": True}
            if oid not in self.server.objects:
                href, upload = f"{self.server.files_at}/upload/{oid}/{size}", {}
                if size > MULTIPART and "multipart" in asked["transfers"]:
                    count = -(-size // MULTIPART)
                    parts = {str(n): f"{self.server.files_at}/part/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {"header": {"chunk_size": str(MULTIPART), **parts}}
                    href = f"{self.server.endpoint}/api/complete/{oid}/{size}"
                verify = {"href": f"{self.server.endpoint}/api/verify/{oid}/{size}", "header": {}}
                answer["actions"] = {"upload": {"href": href, **upload}, "verify": verify}
            answers.append(answer)
        self.json({"transfer": "basic", "objects": answers})

    @route("PUT", r"/upload/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)")
    def upload(self, oid: str, size: str) -> None:
        """Take an LFS object, if it is what it says."""
        self._only_at_file_server()
        self._keep(oid, int(size), self.body)
        self.send(b"", ETag=f'"{oid}"')

    @route("PUT", r"/part/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)")
    def part(self, oid: str, number: str) -> None:
        """Take a part of an LFS object."""
        self._only_at_file_server()
        self.server.parts[oid, int(number)] = self.body
        self.send(b"", ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    @route("POST", r"/api/complete/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)")
    def complete(self, oid: str, size: str) -> None:
        """Put the parts together."""
        content = b""
        for part in json.loads(self.body)["parts"]:
            piece = self.server.parts.pop((oid, part["partNumber"]), b"")
            if part["etag"] != f'"{hashlib.md5(piece).hexdigest()}"':
                raise Refused(400, f"part {part['partNumber']} is missing or another")
            content += piece
        self._keep(oid, int(size), content)
        self.json({})

    @route("POST", r"/api/verify/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)")
    def verify(self, oid: str, size: str) -> None:
        """Confirm that an object has arrived."""
        if len(self.server.objects.get(oid, b"")) != int(size):
            raise Refused(404, "the object is not here")
        self.json({})

    def _keep(self, oid: str, size: int, content: bytes) -> None:
        if len(content) != size:
            raise Refused(400, f"{len(content)} bytes came, {size} were announced")
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content has another sha256 than announced")
        self.server.objects[oid] = content

    def _put(self, content: bytes) -> Blob:
        oid = git_oid(content)
        self.server.objects[oid] = content
        return Blob(oid, len(content), lfs=False)

    @route("POST", "/api/models/{id}/commit/{rev}")
    def make_commit(self, id: str, rev: str) -> None:
        """Make a commit of NDJSON: all of it or nothing."""
        as_pr = "create_pr" in self.query
        repo, commit = self.repo(id, write=not as_pr), self.commit(id, rev)
        if as_pr and self.user() is None:
            raise Refused(401, "You need to log in")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, operations = lines[0], lines[1:]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refused(400, "the first line must be a header with a summary")
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != commit.sha:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        if not as_pr and rev not in repo.refs:
            raise Refused(400, "a commit goes onto a branch")
        files = dict(commit.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if path.startswith(("/", "./")) or not set(path.split("/")).isdisjoint({"..", "", ".git"}):
                raise Refused(400, f"invalid path: {path}")
            if key == "file":
                content = base64.b64decode(value["content"], validate=True)
                if len(content) >= LFS_FROM:
                    raise Refused(413, f"{path} is too large for a commit: use LFS")
                files[path] = self._put(content)
            elif key == "lfsFile":
                stored = self.server.objects.get(value["oid"])
                if value["algo"] != "sha256" or stored is None or len(stored) != value["size"]:
                    raise Refused(400, f"LFS pointer to an object that is not here: {path}")
                files[path] = Blob(value["oid"], value["size"], lfs=True)
            elif key == "deletedFile" and path in files:
                del files[path]
            elif key == "deletedFolder" and any(name.startswith(f"{path}/") for name in files):
                files = {name: blob for name, blob in files.items() if not name.startswith(f"{path}/")}
            else:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}" if as_pr else rev
        made = repo.commit(ref, header["value"]["summary"], files, commit.sha)
        answer = {"commitUrl": f"{self.server.endpoint}/{id}/commit/{made.sha}", "commitOid": made.sha}
        if as_pr:
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{id}/discussions/{quote(ref.rpartition('/')[2])}"
        self.json({"success": True, **answer})
