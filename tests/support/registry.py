"""A registry in this process, over real HTTP on loopback, whose faults are switches.

::

    with ScriptedRegistry() as registry:
        digest = registry.add_blob("team/app", b"bytes")
        registry.switches.ignore_ranges = True
        ...                                  # talk to registry.host
        assert [entry.method for entry in registry.log] == ["GET"]

Each switch stands for something that a real server does; see the comments. Redirect targets are
served from a second port, which is another origin as far as HTTP is concerned.
"""

import hashlib
import json
import ssl
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.registry_http import Answer, Handler, LogEntry, QuietServer, error

OCI_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass
class Switches:
    """What the registry does wrong; the defaults are a well-behaved OCI 1.1 registry."""

    ignore_ranges: bool = False  # 200 with the whole blob: Artifactory, Harbor's proxy cache
    refuse_open_ranges: bool = True  # 416 for "bytes=5-": crane registry serve
    shift_range: int = 0  # sends another part than asked, and says so
    content_range: str | None = None  # right bytes under this Content-Range; "" leaves it out
    truncate_times: int = 0  # a shorter body with a Content-Length to match
    drop_times: int = 0  # closes the connection in the middle of a body
    drop_after: int = 10  # bytes sent before that
    stall_times: int = 0  # sends nothing, …
    stall_after: int | None = None  # … after these bytes of the body; None: not even headers
    corrupt: set[str] = field(default_factory=set)  # digests whose bytes are wrong
    redirect_blobs: bool = False  # to signed URLs on another host: GHCR, ECR, Docker Hub
    redirect_uses: int | None = None  # a signed URL dies after so many requests
    redirect_ttl_s: float | None = None  # or after so many seconds
    redirect_dead_status: int = 403
    redirect_location: str | None = None  # sends everybody here instead
    auth: str = ""  # "", "basic" or "token"
    token_uses: int | None = None  # a token dies after so many requests
    token_expires_in: int = 300
    realm: str | None = None  # another token server than our own
    fail_times: int = 0  # answers fail_status first
    fail_status: int = 503
    fail_body: bytes = b'{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}'
    retry_after: str | None = None
    referrers: str = "api"  # "api", "404", "html", "html200", "400", "405", "501"
    referrers_page: int | None = None
    filters: bool = True  # applies artifactType and says OCI-Filters-Applied
    drop_artifact_types: bool = False  # lists referrers without their artifactType
    mounts: bool = True  # ?mount= works
    relative_location: bool = False  # upload sessions have a relative Location
    location_query: bool = True  # … and a query that must survive
    null_tags: bool = False  # {"tags": null}
    tag_page: int | None = None
    set_cookie: bool = False  # Harbor's session cookie
    warning: str | None = None
    lose_tag_writes: int = 0  # another writer overwrites the tag right after us
    content_digest: str | None = None  # a false Docker-Content-Digest


@dataclass
class _Repository:
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def digest_of(data: bytes) -> str:
    """The sha256 OCI digest."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


class ScriptedRegistry:
    """The registry; a context manager. `tls` is (certificate file, key file) for https."""

    username, password = "user", "pass word:1"

    def __init__(self, *, tls: tuple[str, str] | None = None) -> None:
        self.switches = Switches()
        self.log: list[LogEntry] = []
        self.connections = 0
        self._lock = threading.RLock()
        self._repositories: dict[str, _Repository] = {}
        self._sessions: dict[str, bytes] = {}
        self._tokens: dict[str, int] = {}
        self._signed: dict[str, tuple[str, int, float]] = {}
        self.stalled = threading.Semaphore(0)  # released once per stall
        self._closing = threading.Event()
        self.faults: deque[str] = deque()  # of FAULTS: one for each blob that is asked for, in turn
        self._tls = tls
        self._servers = [self._server("registry"), self._server("storage")]
        self._threads: list[threading.Thread] = []

    @property
    def host(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage_host(self) -> str:
        """Where redirects lead."""
        return f"127.0.0.1:{self._servers[1].server_address[1]}"

    def add_blob(self, repository: str, data: bytes) -> str:
        """Puts a blob there; returns its digest."""
        self._repository(repository).blobs[digest_of(data)] = data
        return digest_of(data)

    def add_manifest(self, repository: str, raw: bytes, media_type: str, *tags: str) -> str:
        """Puts a manifest there under tags; returns its digest."""
        place = self._repository(repository)
        place.manifests[digest_of(raw)] = (media_type, raw)
        place.tags.update(dict.fromkeys(tags, digest_of(raw)))
        return digest_of(raw)

    def blob(self, repository: str, digest: str) -> bytes | None:
        """A blob's bytes, None when it is not there."""
        return self._repository(repository).blobs.get(digest)

    def tag(self, repository: str, tag: str) -> bytes | None:
        """The manifest under a tag."""
        place = self._repository(repository)
        found = place.manifests.get(place.tags.get(tag, ""))
        return found[1] if found else None

    def kill_redirects(self) -> None:
        """Every signed URL given out so far stops working."""
        with self._lock:
            self._signed.clear()

    def requests(self, method: str = "", part: str = "", server: str = "") -> list[LogEntry]:
        """The log, filtered by method, by a part of the path and by server."""
        with self._lock:
            return [
                entry
                for entry in self.log
                if method in ("", entry.method)
                and part in entry.path
                and server in ("", entry.server)
            ]

    def __enter__(self) -> "ScriptedRegistry":
        for server in self._servers:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    # Serving -----------------------------------------------------------------------------------

    def _server(self, kind: str) -> ThreadingHTTPServer:
        registry = self

        class Bound(Handler):
            scripted = registry
            server_kind = kind

        server = QuietServer(("127.0.0.1", 0), Bound)
        server.daemon_threads = True
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._tls)
            # The handshake belongs into the connection's thread, not into accept().
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        return server

    def _repository(self, name: str) -> _Repository:
        with self._lock:
            return self._repositories.setdefault(name, _Repository())

    def next_fault(self, request: "Handler") -> str:
        """What happens to this request, if it asks for a blob; called with the lock held."""
        if request.command != "GET" or not self.faults:
            return ""
        if "/blobs/" not in request.path and request.server_kind != "storage":
            return ""
        fault = self.faults.popleft()
        if fault == "token expired":
            self._tokens.clear()
        if fault == "redirects expired":
            self._signed.clear()
        return fault

    def answer(self, request: "Handler", body: bytes) -> Answer:
        """Decides what a request gets; called with the lock held."""
        url = urlsplit(request.path)
        query = parse_qs(url.query, keep_blank_values=True)
        if request.server_kind == "storage":
            return self._signed_blob(url.path, request)
        if url.path == "/token":
            return self._token(request, query, body)
        if self.switches.fail_times > 0:
            self.switches.fail_times -= 1
            extra = {"Retry-After": self.switches.retry_after} if self.switches.retry_after else {}
            return Answer(self.switches.fail_status, extra, self.switches.fail_body)
        refused = self._refused(request)
        if refused is not None:
            return refused
        return self._route(request, url.path, query, body)

    def _route(
        self, request: "Handler", path: str, query: dict[str, list[str]], body: bytes
    ) -> Answer:
        parts = path.strip("/").split("/")
        if parts == ["v2"]:
            return Answer(200, {}, b"{}")
        for kind in ("blobs", "manifests", "tags", "referrers"):
            if kind in parts[2:]:
                at = len(parts) - 1 - parts[::-1].index(kind)
                name, item = "/".join(parts[1:at]), "/".join(parts[at + 1 :])
                method = getattr(self, f"_{kind}")
                return method(request, name, item, query, body)
        return error(404, "NAME_UNKNOWN")

    def _refused(self, request: "Handler") -> Answer | None:
        said = request.headers.get("Authorization", "")
        if self.switches.auth == "basic":
            import base64

            pair = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
            if said != f"Basic {pair}":
                return error(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="here"')
        if self.switches.auth == "token":
            token = said.removeprefix("Bearer ")
            if self._tokens.get(token, 0) <= 0:
                realm = self.switches.realm or f"{self._scheme}://{self.host}/token"
                return error(
                    401,
                    "UNAUTHORIZED",
                    WWW_Authenticate=f'Bearer realm="{realm}",service="scripted",scope="x"',
                )
            self._tokens[token] -= 1
        return None

    @property
    def _scheme(self) -> str:
        return "https" if self._tls else "http"

    def _token(self, request: "Handler", query: dict[str, list[str]], body: bytes) -> Answer:
        import base64

        form = parse_qs(body.decode())
        said = request.headers.get("Authorization", "").removeprefix("Basic ")
        right = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        identity = form.get("refresh_token") == ["identity"]
        if said != right and not identity:
            return error(401, "UNAUTHORIZED", "wrong password")
        token = f"token-{time.monotonic_ns()}"
        uses = self.switches.token_uses
        self._tokens[token] = 1 << 30 if uses is None else uses
        value = {"token": token, "expires_in": self.switches.token_expires_in}
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    # Blobs -------------------------------------------------------------------------------------

    def _blobs(
        self,
        request: "Handler",
        name: str,
        item: str,
        query: dict[str, list[str]],
        body: bytes,
    ) -> Answer:
        if item.startswith("uploads"):
            return self._upload(request, name, item, query, body)
        data = self._repository(name).blobs.get(item)
        if data is None:
            return error(404, "BLOB_UNKNOWN")
        if self.switches.redirect_location:
            return Answer(307, {"Location": self.switches.redirect_location})
        if self.switches.redirect_blobs:
            path = f"/signed/{len(self.log)}-{time.monotonic_ns()}"
            uses = self.switches.redirect_uses
            ttl_s = self.switches.redirect_ttl_s
            expires = float("inf") if ttl_s is None else time.monotonic() + ttl_s
            self._signed[path] = (f"{name}@{item}", 1 << 30 if uses is None else uses, expires)
            return Answer(
                307, {"Location": f"{self._scheme}://{self.storage_host}{path}?signature=secret"}
            )
        return self._blob_answer(request, data, item)

    def _signed_blob(self, path: str, request: "Handler") -> Answer:
        target, uses, expires = self._signed.get(path, ("", 0, 0.0))
        # GHCR's storage refuses HEAD, and every signed URL refuses a foreign Authorization.
        if uses <= 0 or time.monotonic() > expires or request.command != "GET":
            return Answer(self.switches.redirect_dead_status, {}, b"<Error>expired</Error>")
        if "Authorization" in request.headers:
            return Answer(400, {}, b"<Error>two kinds of credentials</Error>")
        self._signed[path] = (target, uses - 1, expires)
        name, _, digest = target.partition("@")
        return self._blob_answer(request, self._repository(name).blobs[digest], digest)

    def _blob_answer(self, request: "Handler", data: bytes, digest: str) -> Answer:
        if digest in self.switches.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": digest}
        wanted = request.headers.get("Range")
        whole = self.faults and self.faults[0] == "whole blob"
        if not wanted or self.switches.ignore_ranges or whole:
            return Answer(200, headers, data)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        if not last and self.switches.refuse_open_ranges:
            return error(416, "BLOB_UNKNOWN", "open range")
        start, end = int(first), int(last or len(data) - 1)
        if start >= len(data):
            return error(416, "BLOB_UNKNOWN", "range past the end")
        start, end = start + self.switches.shift_range, end + self.switches.shift_range
        said = f"bytes {start}-{end}/{len(data)}"
        if self.switches.content_range is not None:
            said = self.switches.content_range
        if said:
            headers["Content-Range"] = said
        return Answer(206, headers, data[start : end + 1])

    def _upload(
        self,
        request: "Handler",
        name: str,
        item: str,
        query: dict[str, list[str]],
        body: bytes,
    ) -> Answer:
        place = self._repository(name)
        if request.command == "PATCH":
            # ECR keeps the first chunk only, without a word; Artifact Registry refuses.
            return error(405, "UNSUPPORTED", "no chunked uploads here")
        if request.command == "POST":
            return self._begin_upload(name, query)
        if request.command == "DELETE":
            found = self._sessions.pop(item.removeprefix("uploads/"), None)
            return Answer(204) if found is not None else error(404, "BLOB_UPLOAD_UNKNOWN")
        session = item.removeprefix("uploads/")
        if session not in self._sessions:
            return error(404, "BLOB_UPLOAD_UNKNOWN")
        if self.switches.location_query and query.get("_state") != ["a b+c"]:
            return error(400, "BLOB_UPLOAD_INVALID", "the session's query is lost")
        digest = query.get("digest", [""])[0]
        if digest_of(body) != digest:
            return error(400, "DIGEST_INVALID")
        del self._sessions[session]
        place.blobs[digest] = body
        return Answer(
            201, {"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest}
        )

    def _begin_upload(self, name: str, query: dict[str, list[str]]) -> Answer:
        if "mount" in query and self.switches.mounts:
            digest = query["mount"][0]
            data = self._repository(query.get("from", [""])[0]).blobs.get(digest)
            if data is not None:
                self._repository(name).blobs[digest] = data
                return Answer(201, {"Location": f"/v2/{name}/blobs/{digest}"})
        session = f"s{len(self.log)}-{time.monotonic_ns()}"
        self._sessions[session] = b""
        base = "" if self.switches.relative_location else f"{self._scheme}://{self.host}"
        state = "?_state=a%20b%2Bc" if self.switches.location_query else ""
        return Answer(202, {"Location": f"{base}/v2/{name}/blobs/uploads/{session}{state}"})

    # Manifests, tags, referrers ----------------------------------------------------------------

    def _manifests(
        self,
        request: "Handler",
        name: str,
        item: str,
        query: dict[str, list[str]],
        body: bytes,
    ) -> Answer:
        place = self._repository(name)
        if request.command == "PUT":
            return self._put_manifest(request, name, item, body)
        digest = item if item.startswith("sha256:") else place.tags.get(item, "")
        if digest not in place.manifests:
            return error(404, "MANIFEST_UNKNOWN")
        media_type, raw = place.manifests[digest]
        claimed = self.switches.content_digest or digest
        if digest in self.switches.corrupt:
            raw += b"\n"
        return Answer(200, {"Content-Type": media_type, "Docker-Content-Digest": claimed}, raw)

    def _put_manifest(self, request: "Handler", name: str, item: str, body: bytes) -> Answer:
        place = self._repository(name)
        value = json.loads(body)
        digest = digest_of(body)
        if item.startswith("sha256:") and item != digest:
            return error(400, "DIGEST_INVALID")
        for blob in [*value.get("layers", []), *([value["config"]] if "config" in value else [])]:
            if blob["digest"] not in place.blobs:
                return error(400, "MANIFEST_BLOB_UNKNOWN")
        place.manifests[digest] = (request.headers.get("Content-Type", ""), body)
        if not item.startswith("sha256:"):
            before = place.tags.get(item)
            place.tags[item] = digest
            if self.switches.lose_tag_writes > 0:
                self.switches.lose_tag_writes -= 1
                if before is None:
                    del place.tags[item]
                else:
                    place.tags[item] = before
        headers = {"Docker-Content-Digest": digest}
        if "subject" in value and self.switches.referrers == "api":
            headers["OCI-Subject"] = value["subject"]["digest"]
        return Answer(201, headers)

    def _tags(
        self,
        request: "Handler",
        name: str,
        item: str,
        query: dict[str, list[str]],
        body: bytes,
    ) -> Answer:
        if name not in self._repositories:
            return error(404, "NAME_UNKNOWN")
        names: list[str] | None = sorted(self._repositories[name].tags)
        headers = {"Content-Type": "application/json"}
        if self.switches.null_tags:
            names = None
        elif self.switches.tag_page and names:
            last = query.get("last", [""])[0]
            left = [tag for tag in names if tag > last]
            names = left[: self.switches.tag_page]
            if len(left) > len(names):
                headers["Link"] = f'</v2/{name}/tags/list?n=1&last={names[-1]}>; rel="next"'
        return Answer(200, headers, json.dumps({"name": name, "tags": names}).encode())

    def _referrers(
        self,
        request: "Handler",
        name: str,
        item: str,
        query: dict[str, list[str]],
        body: bytes,
    ) -> Answer:
        mode = self.switches.referrers
        if mode.startswith("html"):
            status = 200 if mode == "html200" else 404
            return Answer(status, {"Content-Type": "text/html"}, b"<html>no such page</html>")
        if mode != "api":
            return error(int(mode), "UNSUPPORTED" if mode in ("405", "501") else "NOT_FOUND")
        entries = self._referring(name, item)
        headers = {"Content-Type": OCI_INDEX}
        if "artifactType" in query and self.switches.filters:
            entries = [e for e in entries if e.get("artifactType") == query["artifactType"][0]]
            headers["OCI-Filters-Applied"] = "artifactType"
        if self.switches.drop_artifact_types:
            entries = [{k: v for k, v in e.items() if k != "artifactType"} for e in entries]
        if self.switches.referrers_page:
            start = int(query.get("page", ["0"])[0])
            end = start + self.switches.referrers_page
            if end < len(entries):
                headers["Link"] = f'<{urlsplit(request.path).path}?page={end}>; rel="next"'
            entries = entries[start:end]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        return Answer(200, headers, json.dumps(index).encode())

    def _referring(self, name: str, subject: str) -> list[dict[str, Any]]:
        entries = []
        for digest, (media_type, raw) in self._repository(name).manifests.items():
            value = json.loads(raw)
            if value.get("subject", {}).get("digest") == subject:
                entry = {"mediaType": media_type, "digest": digest, "size": len(raw)}
                kind = value.get("artifactType") or value.get("config", {}).get("mediaType")
                entries.append(entry | {"artifactType": kind})
        return entries


FAULTS = (
    *("delay", "hang up", "no HTTP", "stall", "stall in the middle", "drop"),
    *("truncate", "wrong range", "wrong bytes", "whole blob", "no such range"),
    *("too many requests", "unavailable", "token expired", "redirects expired"),
)
"""What can happen to one request for a blob."""
