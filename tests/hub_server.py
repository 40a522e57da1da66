"""A minimal Hugging Face Hub on localhost: models and data sets with one branch each, all state in memory.

with HubServer(tmp_path) as hub:
    subprocess.run([...], env=os.environ | hub.env, check=True)
    assert hub.repos["org/name"].files["config.json"]
    assert hub.repos["datasets/org/name"].files["manifest.parquet"]
"""

import base64
import json
import re
import secrets
import threading
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npy", ".npz", ".parquet", ".gz")
REPO = r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)"  # a data set is known by its path on the site, as a model is
API = r"/api(?:/models|(?=/datasets/))" + REPO
ROUTES = [  # method, path, method of the handler
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("GET", API + r"/commits/(?P<revision>[^/]+)", "commits"),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", API + r"/commit/main", "commit"),
    ("PUT", API + r"/settings", "settings"),
    ("POST", REPO + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", REPO + r"\.git/info/lfs/objects/verify", "lfs_verify"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET", REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class HubError(Exception):
    """An answer of failure; `code` is what the client makes a RepositoryNotFoundError and the like of."""

    def __init__(self, status, message, code="", **headers):
        super().__init__(message)
        self.reply = status, {"X-Error-Message": message, "X-Error-Code": code, **headers}, {"error": message}


class Repo:
    """Every commit holds all files as of then; the first is the Hub's own and has .gitattributes only."""

    def __init__(self, name, private=False):
        self.name, self.private, self.commits = name, private, []
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.add("initial commit", {".gitattributes": attributes.encode()})

    def add(self, title, files):
        self.commits.append({"id": secrets.token_hex(20), "title": title, "files": files})

    def at(self, revision):
        for commit in reversed(self.commits):
            if revision in ("main", commit["id"]):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    files = property(lambda self: self.commits[-1]["files"])


def is_lfs(path, size):
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > 10_000_000)  # the client never sends an empty one as LFS


def describe(path, data):
    """A file, or a folder, which has no data, as listings have it.

    "oid" is git's, and an LFS file has its sha256 besides.
    """
    if data is None:
        return {"type": "directory", "path": path, "size": 0, "oid": sha1(path.encode()).hexdigest()}
    entry = {"type": "file", "path": path, "size": len(data), "oid": sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    lfs = {"oid": sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {**entry, "lfs": lfs} if is_lfs(path, len(data)) else entry


class Handler(BaseHTTPRequestHandler):
    """The methods that ROUTES names return JSON, or (status, headers, body)."""

    def answer(self):
        hub, url = self.server, urlsplit(self.path)
        self.query, self.body = url.query, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append((self.command, url.path))
        try:
            with hub.lock:
                reply = self.route(hub, "GET" if self.command == "HEAD" else self.command, url.path)
        except HubError as error:
            reply = error.reply
        status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args):
        """Silence: `hub.requests` tells what was asked."""

    def route(self, hub, method, path):
        user = self.headers.get("Authorization")
        hub.tokens |= {user} - {None}
        if user not in (None, f"Bearer {hub.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        matches = ((re.fullmatch(pattern, path), name) for verb, pattern, name in ROUTES if verb == method)
        match, name = next((found for found in matches if found[0]), (None, None))
        if match is None:
            raise HubError(404, f"Not served by the tests' hub: {method} {path}")
        # A PUT brings no token: as with a presigned URL, a batch has granted it.
        if user is None and (method == "POST" or name in ("whoami", "settings")):
            raise HubError(401, "Invalid username or password.")
        args = {key: unquote(value) for key, value in match.groupdict("").items()}
        if "repo" in args:
            args["repo"] = hub.repos.get(args["repo"])
            if args["repo"] is None or (args["repo"].private and user is None):  # the Hub does not tell them apart
                raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return getattr(self, name)(hub, **args)

    def whoami(self, hub):
        return {"type": "user", "name": hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_card(self, hub):
        return {"errors": [], "warnings": []}

    def create_repo(self, hub):
        wanted = json.loads(self.body)
        folder = "datasets/" if wanted.get("type") == "dataset" else ""
        name = f"{folder}{wanted['organization'] or hub.user}/{wanted['name']}"
        reply = {"url": f"{hub.url}/{name}", "name": name.removeprefix("datasets/")}
        if name in hub.repos:
            return 409, {}, {**reply, "error": "You already created this repo"}
        hub.repos[name] = Repo(name, wanted.get("visibility") == "private")
        return reply

    def settings(self, hub, repo):
        repo.private = json.loads(self.body)["visibility"] == "private"
        return {"private": repo.private}

    def info(self, hub, repo, revision):
        commit = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit["files"])]
        return {"id": repo.name, "private": repo.private, "sha": commit["id"], "tags": [], "siblings": siblings}

    def tree(self, hub, repo, revision, folder):
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in repo.at(revision)["files"].items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        folders = {f"{parent}" for path in inside for parent in PurePosixPath(path).parents}
        below = sorted(path for path in inside.keys() | folders if path.startswith(prefix) and path != ".")
        deep = "recursive=true" in self.query.lower()
        return [describe(path, inside.get(path)) for path in below if deep or "/" not in path.removeprefix(prefix)]

    def commits(self, hub, repo, revision):
        found = repo.commits[repo.commits.index(repo.at(revision)) :: -1]
        common = {"message": "", "authors": [{"user": hub.user}], "date": "2026-01-01T00:00:00.000Z"}
        return [{"id": commit["id"], "title": commit["title"], **common} for commit in found]

    def preupload(self, hub, repo, revision):
        """How to send each file, and the oid it has now: the client leaves an unchanged file out."""
        answers, files = [], repo.at(revision)["files"]
        for wanted in json.loads(self.body)["files"]:
            path, mode = wanted["path"], "lfs" if is_lfs(wanted["path"], wanted["size"]) else "regular"
            entry = describe(path, files[path]) if path in files else {"oid": None}
            oid = entry.get("lfs", entry)["oid"]
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, hub, repo):
        """No action for an object that is stored; no chunk size in the others, which makes each a single PUT."""
        wanted = {item["oid"]: item for item in json.loads(self.body)["objects"]}
        for oid in wanted.keys() - hub.objects.keys():
            hub.granted.add(oid)
            verify = {"href": f"{hub.url}/{repo.name}.git/info/lfs/objects/verify"}
            wanted[oid]["actions"] = {"upload": {"href": f"{hub.url}/lfs/{oid}"}, "verify": verify}
        return {"transfer": "basic", "objects": list(wanted.values())}

    def lfs_put(self, hub, oid):
        if oid not in hub.granted or sha256(self.body).hexdigest() != oid:
            raise HubError(403, "Not the object that a batch has granted")
        if hub.fail_after is not None and len(hub.uploads) >= hub.fail_after:
            raise HubError(hub.fail_status, "Failing as the test asked")
        hub.objects[oid] = self.body
        hub.uploads.append(oid)
        return {}

    def lfs_verify(self, hub, repo):
        wanted = json.loads(self.body)
        if len(hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(422, "The object is not stored with this size")
        return {}

    def commit(self, hub, repo):
        """A line of JSON each: the header, then the operations."""
        files, title = dict(repo.files), ""
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
                if not repo.commits[-1]["id"].startswith(value.get("parentCommit", "")):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in hub.objects:
                    raise HubError(400, f"The LFS object of {value['path']} was not uploaded")
                files[value["path"]] = hub.objects[value["oid"]]
            else:  # deletedFile, deletedFolder
                gone = value["path"].rstrip("/")
                files = {path: data for path, data in files.items() if not f"{path}/".startswith(f"{gone}/")}
        repo.add(title, files)
        oid = repo.commits[-1]["id"]
        return {"commitOid": oid, "commitUrl": f"{hub.url}/{repo.name}/commit/{oid}"}

    def resolve(self, hub, repo, revision, path):
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit["id"]}
        if path not in commit["files"]:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)  # the client remembers it per commit
        if self.command == "GET" and hub.busy.get(path, 0) > 0:
            hub.busy[path] -= 1
            raise HubError(503, "Busy as the test asked")
        data = commit["files"][path]
        entry = describe(path, data)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            headers |= {"X-Linked-Size": len(data), "X-Linked-ETag": f'"{entry["lfs"]["oid"]}"'}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            part = data[int(span[1]) : int(span[2] or len(data)) + 1]
            end = int(span[1]) + len(part) - 1
            return 206, {**headers, "Content-Range": f"bytes {span[1]}-{end}/{len(data)}"}, part
        return 200, headers, data


class HubServer(ThreadingHTTPServer):
    """The server with its state. `folder` is for the caches of its clients, by way of `env`."""

    def __init__(self, folder, token="hf_test", user="tester"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.token, self.user = folder, token, user
        self.url, self.lock = f"http://127.0.0.1:{self.server_port}", threading.Lock()
        self.repos, self.objects, self.granted = {}, {}, set()
        self.requests, self.tokens, self.uploads = [], set(), []
        # After this many LFS uploads all others fail. A client tries again for 23 seconds on 500, and gives up on 507.
        self.fail_after, self.fail_status = None, 507
        self.busy = {}  # path of a file: how many of the next times that it is asked for the answer is 503

    @property
    def env(self):
        """For a process of its own: huggingface_hub reads the environment when it is imported, and only then."""
        caches = {"HF_HOME": "", "HF_HUB_CACHE": "/hub", "HF_MODULES_CACHE": "/modules"}
        access = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**access, **proxy, **{name: f"{self.folder}{path}" for name, path in caches.items()}}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()
