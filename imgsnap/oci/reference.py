"""Parses and prints the places that a user can name. Does no I/O.

Forms::

    [docker://]REGISTRY/REPOSITORY[:TAG][@DIGEST]   a registry
    store:NAME[:TAG][@DIGEST]                       the local store
    oci:DIR[:TAG][@DIGEST]                          an OCI image layout
    oci-archive:FILE[:TAG]                          a tar of an OCI image layout
    docker-archive:FILE[:NAME:TAG]                  the output of `docker save`

The grammar of registries, repositories and tags is distribution-spec 1.1's ("Pulling manifests").
DIR and FILE end at the first colon, as in skopeo. For every location `x` that can be made,
``parse_location(str(x)) == x``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import InvalidArgument, InvalidReference

REPOSITORY_LENGTH_MAX = 255
"""Registry host and repository together, as Docker and distribution limit it."""
LAYOUT_TAG_LENGTH_MAX = 512
"""Names in a layout may be whole references, so they are longer than a registry's tags."""
DOCKER_HUB = "docker.io"
DOCKER_HUB_WIRE = "registry-1.docker.io"
DEFAULT_TAG = "latest"

_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*|\[[0-9a-f:.]+\])"
    r"(?::([0-9]{1,5}))?"
)
_LAYOUT_TAG = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._:/+-]*[A-Za-z0-9_])?")
_DIGEST_SUFFIX = re.compile(r"@(sha\d+:[^@/]*)\Z")
_FOREIGN_TRANSPORTS = (
    "docker-daemon:",
    "containers-storage:",
    "containerd:",
    "dir:",
    "sif:",
    "ostree:",
    "http://",
    "https://",
)


@dataclass(frozen=True, slots=True)
class RegistryLocation:
    """A repository of a registry, at a tag, a digest or both (then the digest decides).

    Raises InvalidReference when a part breaks the grammar.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    def __post_init__(self) -> None:
        _check_host(self.registry)
        if not _REPOSITORY.fullmatch(self.repository):
            raise InvalidReference(
                f"{self.repository[:300]!r} is not a repository name",
                hint="lower-case letters, digits, and . _ - between them; parts joined by /",
            )
        if len(self.registry) + 1 + len(self.repository) > REPOSITORY_LENGTH_MAX:
            raise InvalidReference(
                f"{self.registry}/{self.repository[:60]}…: longer than {REPOSITORY_LENGTH_MAX}"
            )
        if self.registry == DOCKER_HUB and "/" not in self.repository:
            raise InvalidReference(
                f"Docker Hub has no repository {self.repository!r}",
                hint=f"its full name is {DOCKER_HUB}/library/{self.repository}",
            )
        _check_tag(self.tag)
        _check_digest(self.digest)

    @property
    def reference(self) -> str:
        """What to ask the registry for: the digest, else the tag, else "latest"."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def host(self) -> str:
        """``host[:port]`` on the wire; differs from `registry` for Docker Hub only."""
        return DOCKER_HUB_WIRE if self.registry == DOCKER_HUB else self.registry

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}" + _suffix(self.tag, self.digest)


@dataclass(frozen=True, slots=True)
class LayoutLocation:
    """An OCI image layout directory, at a name, a digest or both (then the digest decides)."""

    path: Path
    tag: str | None = None
    digest: Digest | None = None

    def __post_init__(self) -> None:
        _check_path(self.path)
        _check_layout_tag(self.tag)
        _check_digest(self.digest)

    @property
    def reference(self) -> str:
        """The digest, else the tag, else "latest"."""
        return self.digest or self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        return f"oci:{self.path}" + _suffix(self.tag, self.digest)


@dataclass(frozen=True, slots=True)
class StoreLocation:
    """A name in the local store."""

    name: str
    tag: str = DEFAULT_TAG
    digest: Digest | None = None

    def __post_init__(self) -> None:
        _check_store_name(self.name)
        _check_tag(self.tag)
        _check_digest(self.digest)

    @property
    def ref_name(self) -> str:
        """The name of this entry in the store's image layout: ``NAME:TAG``."""
        return f"{self.name}:{self.tag}"

    @property
    def reference(self) -> str:
        """The digest, else ``NAME:TAG``."""
        return self.digest or self.ref_name

    def __str__(self) -> str:
        return f"store:{self.name}" + _suffix(self.tag, self.digest)


@dataclass(frozen=True, slots=True)
class OciArchiveLocation:
    """A tar of an OCI image layout."""

    path: Path
    tag: str | None = None

    def __post_init__(self) -> None:
        _check_path(self.path)
        _check_layout_tag(self.tag)

    @property
    def reference(self) -> str:
        """The tag, else "latest"."""
        return self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        return f"oci-archive:{self.path}" + _suffix(self.tag, None)


@dataclass(frozen=True, slots=True)
class DockerArchiveLocation:
    """The output of `docker save`; `name` is ``NAME:TAG`` as `docker images` prints it."""

    path: Path
    name: str | None = None

    def __post_init__(self) -> None:
        _check_path(self.path)
        if self.name is not None:
            name, tag = _split_tag(self.name)
            if tag is None:
                raise InvalidReference(f"docker-archive: {self.name!r} lacks a tag")
            _check_store_name(name)
            _check_tag(tag)

    @property
    def reference(self) -> str:
        """The name, else "latest"."""
        return self.name or DEFAULT_TAG

    def __str__(self) -> str:
        return f"docker-archive:{self.path}" + _suffix(self.name, None)


Location = (
    RegistryLocation | LayoutLocation | StoreLocation | OciArchiveLocation | DockerArchiveLocation
)


def parse_location(text: str) -> Location:
    """The location that `text` names; see the module for the forms.

    Raises InvalidReference when it breaks the grammar, or has no registry host and so could
    mean the local store as well as Docker Hub.
    """
    if not text or "\0" in text:
        raise InvalidReference("empty reference" if not text else "reference with a NUL byte")
    for prefix in _FOREIGN_TRANSPORTS:
        if text.startswith(prefix):
            raise InvalidReference(
                f"{text[:300]!r}: {prefix!r} is not a place we can read",
                hint="use REGISTRY/REPOSITORY, store:, oci:, oci-archive: or docker-archive:",
            )
    if text.startswith("docker://"):
        return _parse_registry(text.removeprefix("docker://"), explicit=True)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in _PARSERS:
        return _PARSERS[scheme](rest)
    return _parse_registry(text, explicit=False)


def parse_tag(text: str) -> str:
    """Checks a registry tag. Raises InvalidReference."""
    _check_tag(text)
    return text


def check_layout_tag(text: str) -> str:
    """Checks a name for an entry of an image layout. Raises InvalidReference."""
    _check_layout_tag(text)
    return text


def normalize_docker_name(name: str) -> str:
    """``docker.io/library/x:1`` for ``x:1``, ``x`` and every other spelling of the same image.

    A name with another registry's host is returned with its tag spelled out.
    """
    base, tag = _split_tag(name)
    first, slash, rest = base.partition("/")
    if not (slash and _is_host(first)):
        first, rest = DOCKER_HUB, base
    registry, repository = _hub_names(first, rest)
    return f"{registry}/{repository}:{tag or DEFAULT_TAG}"


def is_loopback(host: str) -> bool:
    """Whether ``host[:port]`` is this machine (localhost, 127.0.0.0/8, ::1)."""
    if host.startswith("["):
        return host.partition("]")[0] == "[::1"
    bare = host.partition(":")[0]
    return bare == "localhost" or bool(re.fullmatch(r"127(?:\.[0-9]{1,3}){3}", bare))


def _parse_registry(text: str, *, explicit: bool) -> RegistryLocation:
    base, digest = _split_digest(text)
    first, slash, rest = base.partition("/")
    if not (slash and _is_host(first)):
        if not explicit:
            raise _ambiguous(text)
        first, rest = DOCKER_HUB, base
    repository, tag = _split_tag(rest)
    registry, repository = _hub_names(first.lower(), repository)
    return RegistryLocation(registry, repository, tag, digest)


def _parse_layout(rest: str) -> LayoutLocation:
    base, digest = _split_digest(rest)
    path, tag = _split_path(base)
    return LayoutLocation(path, tag, digest)


def _parse_store(rest: str) -> StoreLocation:
    base, digest = _split_digest(rest)
    name, tag = _split_tag(base)
    return StoreLocation(name, DEFAULT_TAG if tag is None else tag, digest)


def _parse_oci_archive(rest: str) -> OciArchiveLocation:
    path, tag = _split_path(rest)
    return OciArchiveLocation(path, tag)


def _parse_docker_archive(rest: str) -> DockerArchiveLocation:
    path, name = _split_path(rest)
    if name is not None and _split_tag(name)[1] is None:
        name = f"{name}:{DEFAULT_TAG}"
    return DockerArchiveLocation(path, name)


_PARSERS: Mapping[str, Callable[[str], Location]] = {
    "oci": _parse_layout,
    "store": _parse_store,
    "oci-archive": _parse_oci_archive,
    "docker-archive": _parse_docker_archive,
}


def _ambiguous(text: str) -> InvalidReference:
    shown = text[:300]
    first, slash, _ = shown.partition("/")
    if not slash and (first.startswith("localhost:") or re.fullmatch(r"[^:]*\.[^:]*:\d+", first)):
        return InvalidReference(
            f"{shown!r} names a registry but no repository", hint=f"for example {first}/NAME:TAG"
        )
    library = "" if slash else "library/"
    return InvalidReference(
        f"{shown!r} is ambiguous: it names no registry",
        hint=f"write store:{shown} for the local store, or {DOCKER_HUB}/{library}{shown}",
    )


def _hub_names(registry: str, repository: str) -> tuple[str, str]:
    """Docker Hub's older host name and short repository names in their full form."""
    if registry == f"index.{DOCKER_HUB}":
        registry = DOCKER_HUB
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return registry, repository


def _is_host(component: str) -> bool:
    return "." in component or ":" in component or component.lower() == "localhost"


def _split_digest(text: str) -> tuple[str, Digest | None]:
    match = _DIGEST_SUFFIX.search(text)
    if not match:
        return text, None
    try:
        return text[: match.start()], parse_digest(match[1])
    except InvalidArgument as error:
        raise InvalidReference(f"{text[:300]!r}: {error}") from error


def _split_tag(text: str) -> tuple[str, str | None]:
    """Splits at the last colon, unless it belongs to a port (a slash follows it)."""
    name, colon, tag = text.rpartition(":")
    if not colon or "/" in tag or "]" in tag:
        return text, None
    return name, tag


def _split_path(text: str) -> tuple[Path, str | None]:
    path, colon, tag = text.partition(":")
    if not path:
        raise InvalidReference("the path is empty")
    return Path(path), tag if colon else None


def _suffix(tag: str | None, digest: Digest | None) -> str:
    return (f":{tag}" if tag is not None else "") + (f"@{digest}" if digest else "")


def _check_host(host: str) -> None:
    match = _HOST.fullmatch(host)
    if not match or not _is_host(host) or int(match[1] or "1") not in range(1, 65536):
        raise InvalidReference(f"{host[:300]!r} is not a registry host")


def _check_store_name(name: str) -> None:
    """A repository name that may begin with a registry's ``host[:port]/``."""
    first, slash, rest = name.partition("/")
    bare = rest if slash and _is_host(first) and _HOST.fullmatch(first) else name
    if len(name) > REPOSITORY_LENGTH_MAX or not _REPOSITORY.fullmatch(bare):
        raise InvalidReference(f"{name[:300]!r} is not an image name")


def _check_tag(tag: str | None) -> None:
    if tag is not None and not _TAG.fullmatch(tag):
        raise InvalidReference(
            f"{tag[:300]!r} is not a tag", hint="at most 128 letters, digits, '_', '.' and '-'"
        )


def _check_layout_tag(tag: str | None) -> None:
    if tag is not None and (len(tag) > LAYOUT_TAG_LENGTH_MAX or not _LAYOUT_TAG.fullmatch(tag)):
        raise InvalidReference(f"{tag[:300]!r} is not a name for an image layout's entry")


def _check_digest(digest: Digest | None) -> None:
    if digest is not None:
        try:
            parse_digest(digest)
        except InvalidArgument as error:
            raise InvalidReference(str(error)) from error


def _check_path(path: Path) -> None:
    """Refuses what could not be printed and parsed back."""
    text = str(path)
    if ":" in text or "\0" in text or re.search(r"@sha\d+\Z", text):
        raise InvalidReference(
            f"the path {text[:300]!r} holds a colon or a NUL, or ends like a digest",
            hint="name it through a symbolic link or a relative path",
        )
