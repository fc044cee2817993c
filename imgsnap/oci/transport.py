"""HTTP to one registry: pooled, authenticated, retried, redirected by rules of our own.

Used by many worker threads at once. The rules that matter:

* Authorization and the user's extra headers go to the registry's own origin only. Redirects
  (signed URLs of object stores) get neither. Cookies are never sent: Harbor treats a client
  that returns one as a browser and asks it for a CSRF token.
* A blob's redirect target is remembered for a short time, so that the next range needs one
  round trip; a target that refuses is forgotten and resolved anew once.
* 429, 5xx and broken connections are retried under `RetryPolicy`; 401 renews the token once.
* A registry that has not answered through all retries of a request is away: until it answers again
  each request tries once, so that the next reader does not wait as long for the same news.
* Answers are never decompressed: digests are of the bytes as stored.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit, urlunsplit

from imgsnap.errors import AccessDenied, ImgsnapError, Unavailable
from imgsnap.oci.auth import TOKEN_ANSWER_MAX, Authenticator, TokenRequest
from imgsnap.oci.cancellation import Cancelled, covering
from imgsnap.oci.connections import ConnectionOptions, Connections
from imgsnap.oci.http_errors import (
    ERROR_BODY_MAX,
    RegistryUnavailable,
    connection_error,
    is_plain_text_answer,
    parse_refusal,
    redact,
    refusal_error,
)
from imgsnap.oci.http_message import Body, Request, Response, TransportStats
from imgsnap.oci.redirects import RedirectCache, absolute_url, same_origin
from imgsnap.oci.reference import DOCKER_HUB, DOCKER_HUB_WIRE, is_loopback
from imgsnap.oci.retry import Attempts, RetryPolicy, retry_after_s

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

API = "/v2"
REDIRECTS_MAX = 5
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_TARGET_EXPIRED = frozenset({400, 401, 403, 404, 410})
"""Answers of a redirect target whose signature has run out; Google's storage says 400."""
USER_AGENT = "imgsnap"

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a registry's API is served. `api` is the path in place of ``/v2``; `namespace` names
    the registry to a mirror of several, in the query's ``ns``."""

    host: str
    api: str = API
    namespace: str = ""

    def url(self, origin: str, target: str) -> str:
        """The absolute URL of a request's target."""
        if not target.startswith(f"{API}/"):
            return urljoin(origin, target)
        url = f"{origin}{self.api}{target.removeprefix(API)}"
        if self.namespace:
            url += ("&" if "?" in url else "?") + urlencode({"ns": self.namespace})
        return url

    def repository(self, name: str) -> str:
        """A repository's name in the words of the endpoint's token server: with the part of the
        path that leads to it, such as Harbor's project of a proxy cache."""
        prefix = self.api.partition(f"{API}/")[2]
        return f"{prefix}/{name}" if prefix else name


class Transport:
    """Requests to one registry. Thread safe; close() drops idle connections.

    `registry` is the name in references (``docker.io``, ``host:port``). A mirror of it has another
    `endpoint`; credentials are then those for the mirror's host.
    """

    def __init__(
        self,
        registry: str,
        authenticator: Authenticator,
        options: ConnectionOptions | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        retry: RetryPolicy | None = None,
        stats: TransportStats | None = None,
        endpoint: Endpoint | None = None,
    ) -> None:
        self.registry = registry
        self.retry = retry or RetryPolicy()
        self.stats = stats or TransportStats()
        self._authenticator = authenticator
        self._options = options or ConnectionOptions()
        self._connections = Connections(self._options, environ or {})
        wire = DOCKER_HUB_WIRE if registry == DOCKER_HUB else registry
        self._endpoint = endpoint or Endpoint(wire)
        self._host = self._endpoint.host
        self._plain_http = self._options.plain_http
        self._redirects = RedirectCache(self.retry.clock)
        self._away = False
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    @property
    def origin(self) -> str:
        """``scheme://host[:port]`` of the registry; loopback may turn from https to http once."""
        return f"{'http' if self._plain_http else 'https'}://{self._host}"

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    @property
    def host(self) -> str:
        """``host[:port]`` as it is connected to."""
        return self._host

    def exchange(self, request: Request, consume: Callable[[Response], _Result]) -> _Result:
        """Sends a request and returns what `consume` makes of the answer.

        `consume` gets answers whose status is in `request.accept`, reads the body, and may be
        called again when it raises something retryable. Raises the errors of http_errors for
        every other status.
        """
        attempts = Attempts(self.retry, request.cancellation)
        while True:
            try:
                with self._send_authorized(request) as response:
                    result = consume(response)
                self._away = False
                return result
            except Unavailable as error:
                self.failed(attempts, error, request)

    def open(self, request: Request) -> Response:
        """Sends a request and returns the open answer; the caller closes it and reads the body.

        Retries end with the headers: what breaks later is the caller's to resume. It tells of the
        body by `answered` and `failed`.
        """
        attempts = Attempts(self.retry, request.cancellation)
        while True:
            try:
                return self._send_authorized(request)
            except Unavailable as error:
                self.failed(attempts, error, request)

    def resolve_upload(self, location: str, base: str) -> str:
        """The absolute URL of an upload session from its Location header (often relative).

        A registry behind a TLS proxy may name itself with http://; the request stays on https.
        Raises Unavailable when the answer names no http(s) URL.
        """
        url = absolute_url(base, location)
        if url is None:
            raise Unavailable(f"{redact(base)}: the upload's Location {location[:200]!r} is no URL")
        parts, here = urlsplit(url), urlsplit(base)
        if (parts.scheme, here.scheme) == ("http", "https") and parts.hostname == here.hostname:
            return urlunsplit(("https", here.netloc, parts.path, parts.query, ""))
        return url

    def prepare(self, requests: int) -> None:
        """Opens connections for so many requests at once, in the background."""
        with suppress(ImgsnapError):  # the requests will say it better
            self._connections.prepare(self._endpoint.url(self.origin, f"{API}/"), requests)

    def close(self) -> None:
        """Closes idle connections."""
        self._connections.close()

    def answered(self) -> None:
        """Bytes of a body have come: the registry is not away."""
        self._away = False

    def failed(self, attempts: Attempts, error: Unavailable, request: Request) -> None:
        """Waits before the request is tried again, or raises `error` when there is no use."""
        if isinstance(error, Cancelled):
            raise error
        answered = isinstance(error, RegistryUnavailable) and error.refusal is not None
        if not request.retry or (self._away and not answered):
            raise error
        try:
            attempts.failed(error)
        except Unavailable:
            self._away = not answered
            raise
        self.stats.add("retries")
        _log.debug("retrying %s %s: %s", request.method, redact(request.target), error)

    def _send_authorized(self, request: Request) -> Response:
        """One attempt, with one renewal of the token after a 401."""
        header = self._authenticator.header(self.registry, request.scope, self._fetch_token)
        response = self._send_redirected(request, header)
        if response.status == 401 and same_origin(response.url, self.origin):
            challenge = response.headers.get("www-authenticate", "")
            refusal = self._refusal(response, request)
            renewed = self._authenticator.answer(
                self.registry, request.scope, challenge, header, self._fetch_token
            )
            if renewed is None:
                raise refusal
            response = self._send_redirected(request, renewed)
        if response.status in request.accept:
            self._show_warning(response)
            return response
        raise self._refusal(response, request)

    def _send_redirected(self, request: Request, authorization: str | None) -> Response:
        key = request.redirect_key
        cached = self._redirects.get(key) if key else None
        if cached is not None and key is not None:
            response = self._try_target(request, cached)
            if response is not None:
                return response
            self._redirects.forget(key)
        target = self._follow(request, authorization)
        if key and target.status in _TARGET_EXPIRED and not same_origin(target.url, self.origin):
            # A signed URL that died between being made and being used: ask for another, once.
            target.close()
            target = self._follow(request, authorization)
        if key and target.ok and not same_origin(target.url, self.origin):
            self._redirects.put(key, target.url)
        return target

    def _try_target(self, request: Request, url: str) -> Response | None:
        """The answer of a remembered redirect target, None when it is of no use any more."""
        try:
            response = self._send_once(request, url, None)
        except Unavailable:
            return None
        if response.status in _TARGET_EXPIRED or response.status in _REDIRECT_STATUSES:
            response.close()
            return None
        return response

    def _follow(self, request: Request, authorization: str | None) -> Response:
        url = self._endpoint.url(self.origin, request.target)
        for _ in range(REDIRECTS_MAX + 1):
            header = authorization if same_origin(url, self.origin) else None
            response = self._send_once(request, url, header)
            location = response.headers.get("location")
            status = response.status
            if status not in _REDIRECT_STATUSES or status in request.accept or not location:
                return response
            if status < 307 and request.method not in ("GET", "HEAD"):
                return response
            response.close()
            url = self._checked_redirect(response.url, location)
        raise Unavailable(f"{request.method} {redact(url)}: more than {REDIRECTS_MAX} redirects")

    def _checked_redirect(self, base: str, location: str) -> str:
        url = absolute_url(base, location)
        if url is None:
            raise AccessDenied(
                f"{redact(base)} redirects to {location[:200]!r}, not an http(s) URL"
            )
        downgrade = url.startswith("http:") and urlsplit(base).scheme == "https"
        if downgrade and not self._options.insecure:
            raise AccessDenied(
                f"{redact(base)} redirects from https to {redact(url)}",
                hint="allow it with --insecure if the network between is trusted",
            )
        return url

    def _send_once(self, request: Request, url: str, authorization: str | None) -> Response:
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **request.headers}
        if same_origin(url, self.origin):
            headers.update(self._options.headers)
        if authorization is not None:
            headers["Authorization"] = authorization
        try:
            return self._raw_send(request, url, headers)
        except ImgsnapError:
            raise
        except Exception as error:
            if self._falls_back(error, url):
                # The registry's own URL has changed its scheme; other URLs cannot get here.
                return self._send_once(
                    request, url.replace("https://", "http://", 1), authorization
                )
            if not _is_connection_failure(error):
                raise
            if request.cancellation is not None:
                request.cancellation.check()
            self.stats.add("connection_errors")
            raise connection_error(
                error, method=request.method, url=url, plain_http=url.startswith("http:")
            ) from error

    def _falls_back(self, error: Exception, url: str) -> bool:
        """Turns a loopback registry that speaks plain HTTP to http, as docker does."""
        if not (is_loopback(self._host) and same_origin(url, f"https://{self._host}")):
            return False
        if not is_plain_text_answer(error) and "UNEXPECTED_EOF" not in str(error):
            return False
        self._plain_http = True
        return True

    def _raw_send(self, request: Request, url: str, headers: dict[str, str]) -> Response:
        cancellation = request.cancellation
        if cancellation is not None:
            cancellation.check()
        self.stats.add("requests")
        with covering(cancellation):
            raw = self._urlopen(request, url, headers)
        self.stats.add(f"status_{raw.status}")
        return Response(raw, url, self.stats, cancellation)

    def _urlopen(self, request: Request, url: str, headers: dict[str, str]) -> "BaseHTTPResponse":
        manager = self._connections.manager_for(url)
        method, body = request.method, request.body
        settings = dict(_STREAMED)
        if request.timeout_s is not None:
            settings["timeout"] = self._connections.timeout(request.timeout_s)
        if body is None:
            # POST without a body must still say so: some servers wait for one otherwise.
            extra = {"Content-Length": "0"} if method in ("POST", "PUT") else {}
            return manager.urlopen(method, url, headers=headers | extra, **settings)
        with body.open() as stream:
            length = {"Content-Length": str(body.size)}
            raw = manager.urlopen(method, url, body=stream, headers=headers | length, **settings)
        self.stats.add("bytes_sent", body.size)
        return raw

    def _fetch_token(self, token: TokenRequest) -> bytes:
        secret = token.form is not None or "Authorization" in token.headers
        if secret and token.url.startswith("http:") and self.origin.startswith("https:"):
            raise AccessDenied(
                f"{self.registry}: its token server {redact(token.url)} would get the password "
                "over plain HTTP",
                hint="the registry is misconfigured; tell its administrator",
            )
        body = Body.of_bytes(token.form) if token.form is not None else None
        method = "GET" if body is None else "POST"
        attempts = Attempts(self.retry)
        request = Request(method, token.url, headers=token.headers, body=body)
        while True:
            try:
                with self._send_once(request, token.url, None) as response:
                    if response.status != 200:
                        raise self._refusal(response, request)
                    return response.body(TOKEN_ANSWER_MAX)
            except Unavailable as error:
                self.failed(attempts, error, request)

    def _refusal(self, response: Response, request: Request) -> ImgsnapError:
        body = b""
        with response, suppress(ImgsnapError):
            body = response.read_up_to(ERROR_BODY_MAX)
        wait_s = retry_after_s(response.headers.get("retry-after"))
        refusal = parse_refusal(response.status, body, wait_s)
        return refusal_error(refusal, method=request.method, url=response.url)

    def _show_warning(self, response: Response) -> None:
        """Logs a registry's ``Warning: 299`` once (distribution-spec 1.1, "Warnings")."""
        text = response.headers.get("warning", "")
        if text.startswith("299 "):
            with self._lock:
                new = text not in self._warned and len(self._warned) < 100
                self._warned.add(text)
            if new:
                _log.warning("%s warns: %s", self.registry, text[:1000])


_STREAMED: dict[str, Any] = {"preload_content": False, "decode_content": False, "redirect": False}


def _is_connection_failure(error: Exception) -> bool:
    import http.client

    import urllib3

    kinds = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
    return isinstance(error, kinds)
