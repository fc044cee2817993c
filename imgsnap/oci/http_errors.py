"""What a registry's refusals and a connection's failures mean, as errors with hints.

The body of a refusal is ``{"errors": [{"code": …, "message": …}]}`` (distribution-spec 1.1,
"Error Codes"); many servers and every proxy send something else, which is quoted shortened.
"""

import json
import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from imgsnap.errors import (
    AccessDenied,
    ImgsnapError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from imgsnap.oci.repository import RangeUnsupported

ERROR_BODY_MAX = 64 << 10
"""Bytes of an error's body that are read; the same bound as go-containerregistry's."""
MESSAGE_LENGTH_MAX = 300


@dataclass(frozen=True, slots=True)
class Refusal:
    """The facts of an answer that is not what was asked for."""

    status: int
    codes: tuple[str, ...] = ()
    text: str = ""
    retry_after_s: float | None = None

    def __str__(self) -> str:
        codes = f" {'/'.join(self.codes)}" if self.codes else ""
        return f"HTTP {self.status}{codes}" + (f": {self.text}" if self.text else "")


class RegistryDenied(AccessDenied):
    """401 or 403. `refusal` holds the status and the registry's codes."""

    refusal: Refusal | None = None


class RegistryNotFound(NotFound):
    """404. `refusal` holds the status and the registry's codes."""

    refusal: Refusal | None = None


class RegistryUnavailable(Unavailable):
    """429, 5xx, or no usable answer at all (then `refusal` is None)."""

    refusal: Refusal | None = None


class RegistryRejected(InvalidArgument):
    """Another 4xx: the registry understood the request and does not want it."""

    refusal: Refusal | None = None


class RegistryUnsupported(Unsupported):
    """405, 501 or the code UNSUPPORTED."""

    refusal: Refusal | None = None


class RegistryFull(ResourceExhausted):
    """413 or 507: too large for the registry or a proxy before it."""

    refusal: Refusal | None = None


_Refused = (
    RegistryDenied
    | RegistryNotFound
    | RegistryUnavailable
    | RegistryRejected
    | RegistryUnsupported
    | RegistryFull
)


class NotRetried(Unavailable):
    """A failure to connect that trying again at once will not mend: TLS or name errors."""

    retryable = False


def redact(url: str) -> str:
    """The URL without its query, which holds the signature of a pre-signed URL, and user info."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


def parse_refusal(status: int, body: bytes, retry_after_s: float | None = None) -> Refusal:
    """Reads an error body; never raises."""
    text = body[:ERROR_BODY_MAX].decode("utf-8", "replace")
    try:
        errors = json.loads(text)["errors"]
        codes = [str(item["code"])[:60] for item in errors[:5]]
        words = "; ".join(str(item.get("message") or "") for item in errors[:5])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        codes, words = [], re.sub(r"<[^>]*>", " ", text)
    words = re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", words).strip()[:MESSAGE_LENGTH_MAX]
    return Refusal(status, tuple(codes), words, retry_after_s)


def refusal_error(refusal: Refusal, *, method: str, url: str) -> ImgsnapError:
    """The error of the project's tree for a refusal."""
    message = f"{method} {redact(url)}: {refusal}"
    status = refusal.status
    if status in (401, 403):
        return _with(RegistryDenied(message, hint=_denied_hint(refusal, url)), refusal)
    if status in (404, 410):
        hint = "check the name and the tag; registries also answer so to hide private repositories"
        return _with(RegistryNotFound(message, hint=hint), refusal)
    if status == 416:
        return RangeUnsupported(message, hint="the blob is fetched whole instead")
    if status in (405, 501) or "UNSUPPORTED" in refusal.codes:
        hint = "the registry lacks this operation or does not allow writing"
        return _with(RegistryUnsupported(message, hint=hint), refusal)
    if status in (413, 507):
        hint = "raise the limit of the registry or of the proxy before it, or use smaller packs"
        return _with(RegistryFull(message, hint=hint), refusal)
    if status == 429 or status >= 500 or status == 408:
        return _with(RegistryUnavailable(message, hint=_busy_hint(refusal)), refusal)
    return _with(RegistryRejected(message, hint=_rejected_hint(refusal)), refusal)


def connection_error(error: Exception, *, method: str, url: str, plain_http: bool) -> ImgsnapError:
    """The error for a request that got no answer; `error` is what urllib3 raised."""
    text = re.sub(r"\s+", " ", str(error))[:MESSAGE_LENGTH_MAX]
    message = f"{method} {redact(url)}: {text}"
    if is_plain_text_answer(error):
        return NotRetried(message, hint="the server speaks plain HTTP: use --plain-http")
    if "CERTIFICATE_VERIFY_FAILED" in text or "doesn't match" in text:
        return NotRetried(
            message, hint="name the authority's certificate with --ca-file (or use --insecure)"
        )
    if plain_http and is_tls_answer(error):
        return NotRetried(message, hint="the server speaks TLS: remove --plain-http")
    if "NameResolutionError" in type(error).__name__ or "Failed to resolve" in text:
        return NotRetried(message, hint="the registry's host name does not resolve")
    if "SSL" in type(error).__name__:
        return NotRetried(message, hint="the TLS handshake failed; see --ca-file, --cert-file")
    return RegistryUnavailable(message, hint="check the network, the proxy and the registry")


def is_plain_text_answer(error: Exception) -> bool:
    """Whether a TLS handshake failed because the peer speaks plain HTTP."""
    text = str(error)
    return any(
        mark in text for mark in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
    )


def is_tls_answer(error: Exception) -> bool:
    """Whether a plain HTTP request was answered with a TLS alert record (type 21)."""
    text = repr(error)
    return "BadStatusLine" in text and ("\\x15\\x03" in text or "\x15\x03" in text)


def _with(error: _Refused, refusal: Refusal) -> ImgsnapError:
    error.refusal = refusal
    return error


def _denied_hint(refusal: Refusal, url: str) -> str:
    host = urlsplit(url).netloc
    if refusal.status == 401:
        return f"log in with `docker login {host}` (or podman), or pass --registry-config"
    return f"the account you use at {host} lacks the permission, or the repository is private"


def _busy_hint(refusal: Refusal) -> str:
    if refusal.status == 429:
        wait = "" if refusal.retry_after_s is None else f"; it asks for {refusal.retry_after_s:g} s"
        return f"the registry limits your rate{wait}; logging in often raises the limit"
    return "the registry has trouble; try again later"


def _rejected_hint(refusal: Refusal) -> str | None:
    if "HTTPS" in refusal.text.upper() and refusal.status == 400:
        return "the server speaks TLS: remove --plain-http"
    if "MANIFEST_BLOB_UNKNOWN" in refusal.codes or "BLOB_UNKNOWN" in refusal.codes:
        return "a blob that the manifest lists has not arrived; push again"
    if "DIGEST_INVALID" in refusal.codes:
        return "the bytes changed on their way; push again"
    return None
