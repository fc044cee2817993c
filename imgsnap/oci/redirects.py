"""Where blobs were redirected to, for as long as a signed URL can be expected to live."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

REDIRECT_TTL_S = 120.0
"""GHCR's signed URLs live about 300 s; others 600 s and more. Half of the shortest is safe."""
REDIRECTS_CACHED_MAX = 4096
_DEFAULT_PORTS = {"http": 80, "https": 443}


class RedirectCache:
    """Maps a blob's key to its last redirect target. Thread safe; `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._targets: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def get(self, key: str) -> str | None:
        """The target, or None when there is none or it has grown old."""
        with self._lock:
            url, expires_s = self._targets.get(key, ("", 0.0))
            return url if url and self._clock() < expires_s else None

    def put(self, key: str, url: str) -> None:
        """Remembers a target that has just worked."""
        with self._lock:
            self._targets[key] = (url, self._clock() + REDIRECT_TTL_S)
            self._targets.move_to_end(key)
            if len(self._targets) > REDIRECTS_CACHED_MAX:
                self._targets.popitem(last=False)

    def forget(self, key: str) -> None:
        """Drops a target that has stopped working."""
        with self._lock:
            self._targets.pop(key, None)


def absolute_url(base: str, location: str) -> str | None:
    """What a Location header or a realm means; None when that is no http(s) URL of a host."""
    try:
        url = urljoin(base, location)
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # http://[ and ports beyond 65535
        return None
    return url if usable else None


def same_origin(url: str, other: str) -> bool:
    """Whether two URLs have the same scheme, host and port (RFC 6454)."""
    return _origin(url) == _origin(other)


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme)
