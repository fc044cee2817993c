"""Answers a registry's WWW-Authenticate challenges: Basic, and bearer tokens per scope.

Follows the Docker token specification (distribution, docs/spec/auth) and RFC 7235 for the
grammar of challenges. One Authenticator serves all threads of a process.
"""

import base64
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlencode, urlsplit

from imgsnap.errors import AccessDenied, FormatError
from imgsnap.oci.credentials import Credentials
from imgsnap.oci.manifest import parse_json_object
from imgsnap.oci.redirects import absolute_url

TOKEN_ANSWER_MAX = 256 << 10
"""Bytes of a token server's answer; real tokens are below 16 KiB."""
TOKEN_LIFETIME_DEFAULT_S = 60
"""What the token specification says to assume when `expires_in` is absent."""
TOKEN_LIFETIME_MAX_S = 24 * 3600
REFRESH_AT = 0.75
"""A token is renewed after this part of its life, so that it does not die in mid-transfer."""
HEADER_LENGTH_MAX = 16 << 10
TOKENS_MAX = 4096
"""Cached tokens, one per (registry, scope); beyond this the cache starts anew."""

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105
_CHALLENGE = re.compile(rf"\s*,?\s*({_TOKEN})(?=\s|,|\Z)(?!\s*=)")
_PARAMETER = re.compile(rf'\s*,?\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}|[^\s,"]+))')


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header; scheme and parameter names in lower case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What to send to a token server. `form` is the body of a POST; None means GET."""

    url: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    form: bytes | None = field(default=None, repr=False)


FetchToken = Callable[[TokenRequest], bytes]
"""Sends a token request and returns the body of a 200 answer, or raises."""


class CredentialLookup(Protocol):
    """Where credentials come from; see CredentialSource."""

    def lookup(self, registry: str, repository: str = "") -> Credentials | None: ...


@dataclass(frozen=True, slots=True)
class Scope:
    """What a request needs: repositories with the actions on each, in the token server's words."""

    items: tuple[str, ...] = ()

    @staticmethod
    def pull(repository: str) -> "Scope":
        """Reading one repository."""
        return Scope((f"repository:{repository}:pull",))

    @staticmethod
    def push(repository: str) -> "Scope":
        """Writing one repository; distribution wants pull beside push."""
        return Scope((f"repository:{repository}:pull,push",))

    @staticmethod
    def delete(repository: str) -> "Scope":
        """Deleting manifests of one repository."""
        return Scope((f"repository:{repository}:delete,pull",))

    def __or__(self, other: "Scope") -> "Scope":
        return Scope(tuple(dict.fromkeys((*self.items, *other.items))))

    @property
    def repository(self) -> str:
        """The first repository named, "" without; picks path-specific credentials."""
        return self.items[0].split(":")[1] if self.items else ""


@dataclass(frozen=True, slots=True)
class _Cached:
    header: str = field(repr=False)
    refresh_at_s: float


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of a WWW-Authenticate header, in order.

    A malformed tail is dropped: servers send odd headers, and what could be read still counts.
    """
    header = header[:HEADER_LENGTH_MAX]
    challenges: list[Challenge] = []
    position = 0
    while match := _CHALLENGE.match(header, position):
        position = match.end()
        challenge = Challenge(match[1].lower())
        challenges.append(challenge)
        while parameter := _PARAMETER.match(header, position):
            position = parameter.end()
            text = parameter[3] if parameter[2] is None else re.sub(r"\\(.)", r"\1", parameter[2])
            challenge.parameters.setdefault(parameter[1].lower(), text)
    return challenges


class Authenticator:
    """Caches Authorization headers per (registry, scope) and renews them.

    `clock` returns seconds, monotonic. Thread safe: of many threads that need the same token,
    one asks and the others wait for it.
    """

    def __init__(
        self, credentials: CredentialLookup, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._credentials = credentials
        self._clock = clock
        self._lock = threading.Lock()
        self._cached: dict[tuple[str, Scope], _Cached] = {}
        self._bearer: dict[str, Challenge] = {}
        self._in_flight: dict[tuple[str, Scope], threading.Lock] = {}

    def header(self, registry: str, scope: Scope, fetch: FetchToken) -> str | None:
        """The Authorization header to send at once, or None before the first challenge.

        A registry that has asked for bearer tokens before is given one for a new scope without
        another refused request. Raises AccessDenied when the token server refuses.
        """
        key = (registry, scope)
        with self._lock:
            cached = self._cached.get(key)
            challenge = self._bearer.get(registry)
        if cached is not None and self._clock() < cached.refresh_at_s:
            return cached.header
        if challenge is None:
            return cached.header if cached is not None else None
        return self._renew(key, challenge, cached.header if cached else None, fetch)

    def answer(
        self,
        registry: str,
        scope: Scope,
        www_authenticate: str,
        used: str | None,
        fetch: FetchToken,
    ) -> str | None:
        """The header to try after a 401 to a request that carried `used`.

        None when there is nothing new to try. Raises AccessDenied when the token server refuses.
        """
        challenges = {item.scheme: item for item in reversed(parse_challenges(www_authenticate))}
        key = (registry, scope)
        bearer = challenges.get("bearer")
        if bearer is not None and bearer.parameters.get("realm"):
            with self._lock:
                self._bearer[registry] = bearer
            return self._renew(key, bearer, used, fetch)
        if "basic" in challenges:
            return self._basic(key, used)
        return None

    def _basic(self, key: tuple[str, Scope], used: str | None) -> str | None:
        credentials = self._credentials.lookup(key[0], key[1].repository)
        if credentials is None or not credentials.username:
            return None
        header = basic_header(credentials)
        if header == used:
            return None  # The registry has refused exactly these credentials.
        self._store(key, _Cached(header, float("inf")))
        return header

    def _renew(
        self, key: tuple[str, Scope], challenge: Challenge, used: str | None, fetch: FetchToken
    ) -> str:
        with self._lock:
            gate = self._in_flight.setdefault(key, threading.Lock())
        with gate:
            with self._lock:
                cached = self._cached.get(key)
            if cached and cached.header != used and self._clock() < cached.refresh_at_s:
                return cached.header  # Another thread has renewed it meanwhile.
            credentials = self._credentials.lookup(key[0], key[1].repository)
            request = token_request(challenge, key[1], credentials)
            token, lifetime_s = parse_token_answer(fetch(request), realm=request.url)
            header = f"Bearer {token}"
            self._store(key, _Cached(header, self._clock() + REFRESH_AT * lifetime_s))
            return header

    def _store(self, key: tuple[str, Scope], cached: _Cached) -> None:
        with self._lock:
            if len(self._cached) >= TOKENS_MAX:
                self._cached.clear()
                self._in_flight.clear()
            self._cached[key] = cached


def basic_header(credentials: Credentials) -> str:
    """The Authorization header of RFC 7617."""
    pair = f"{credentials.username}:{credentials.password}".encode()
    return "Basic " + base64.b64encode(pair).decode("ascii")


def token_request(
    challenge: Challenge, scope: Scope, credentials: Credentials | None
) -> TokenRequest:
    """The request that turns a bearer challenge into a token.

    GET, with Basic credentials if there are any; POST with the refresh token for an identity
    token (docs/spec/auth/oauth.md). Raises AccessDenied for a realm that is no http(s) URL.
    """
    realm = challenge.parameters["realm"]
    parts = urlsplit(absolute_url("", realm) or "")
    if not parts.hostname or parts.username is not None:
        raise AccessDenied(f"the registry's token server {realm[:200]!r} is not an http(s) URL")
    items = scope.items or tuple(challenge.parameters.get("scope", "").split())
    fields = [("service", challenge.parameters.get("service", ""))]
    if credentials is not None and credentials.identity_token:
        fields += [("scope", " ".join(items)), ("grant_type", "refresh_token")]
        fields += [("client_id", "imgsnap"), ("refresh_token", credentials.identity_token)]
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return TokenRequest(realm, headers, urlencode(fields).encode())
    fields += [("scope", item) for item in items]
    query = urlencode([pair for pair in fields if pair[1]])
    url = realm + ("&" if parts.query else "?") + query if query else realm
    if credentials is None or not credentials.username:
        return TokenRequest(url)
    return TokenRequest(url, {"Authorization": basic_header(credentials)})


def parse_token_answer(raw: bytes, *, realm: str) -> tuple[str, float]:
    """The token and its lifetime in seconds.

    Raises FormatError when the answer holds no token that could be sent in a header.
    """
    record = f"token server {realm.partition('?')[0]}"
    answer = parse_json_object(raw, record=record, size_max=TOKEN_ANSWER_MAX)
    token = answer.get("token") or answer.get("access_token")
    # A line break in a token would let its server write headers of our requests.
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise FormatError(record, "token", 0, "is missing or not printable ASCII")
    lifetime = answer.get("expires_in")
    if not isinstance(lifetime, int | float) or isinstance(lifetime, bool) or lifetime <= 0:
        lifetime = TOKEN_LIFETIME_DEFAULT_S
    return token, float(min(lifetime, TOKEN_LIFETIME_MAX_S))
