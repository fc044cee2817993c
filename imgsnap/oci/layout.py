"""An OCI image layout on a local disk: blobs, manifests, tags and referrers.

image-spec 1.1, image-layout.md. The local store is one of these. Every file is written beside its
place and renamed; `index.json` is replaced under a lock after what it names is there, so that a
reader, or a crash, sees the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from imgsnap.digest import Digest, digest_hex, parse_digest, sha256_digest
from imgsnap.errors import (
    AccessDenied,
    DigestMismatch,
    ImgsnapError,
    IntegrityError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    ResourceExhausted,
)
from imgsnap.oci import media_types
from imgsnap.oci.manifest import (
    ImageIndex,
    document_bytes,
    parse_document,
    parse_index,
    parse_json_object,
    referrer_descriptor,
)
from imgsnap.oci.repository import (
    MANIFEST_SIZE_MAX,
    ByteStream,
    Descriptor,
    RawManifest,
    Repository,
)
from imgsnap.units import MIB

LAYOUT_VERSION = "1.0.0"
MARKER = "oci-layout"
INDEX = "index.json"
INDEX_SIZE_MAX = 16 * MIB
LOCK = ".imgsnap.lock"
EMPTY_INDEX = ImageIndex(())


class LayoutRepository:
    """A layout directory as a repository. Safe for threads and for several processes."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Raises NotFound when there is no layout and `create` is false, or its errors."""
        self.path = path
        self._blobs = path / "blobs" / "sha256"
        self._parsed: dict[Digest, tuple[Digest | None, Descriptor]] = {}
        self._lock = threading.Lock()
        try:
            if create:
                self._create()
            self._check_marker()
        except OSError as error:
            raise _translate(error, f"{self.name}") from error

    @property
    def name(self) -> str:
        return f"oci:{self.path}"

    def close(self) -> None:
        """Nothing is held open."""

    def _create(self) -> None:
        self._blobs.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if not (self.path / INDEX).exists():
                self._replace(self.path / INDEX, document_bytes(EMPTY_INDEX))
            if not (self.path / MARKER).exists():
                version = f'{{"imageLayoutVersion":"{LAYOUT_VERSION}"}}'
                self._replace(self.path / MARKER, version.encode())

    def _check_marker(self) -> None:
        try:
            raw = (self.path / MARKER).read_bytes()[:4096]
        except FileNotFoundError:
            raise NotFound(
                f"{self.path} is no OCI image layout: it has no file {MARKER}",
                hint="a layout is a directory with oci-layout, index.json and blobs",
            ) from None
        version = parse_json_object(raw, record=MARKER).get("imageLayoutVersion")
        if version != LAYOUT_VERSION:
            raise IntegrityError(f"{self.path}: image layout version {str(version)[:40]!r}")

    # Reading -----------------------------------------------------------------------------------

    def manifest(self, reference: str) -> RawManifest:
        if reference.startswith("sha256:"):
            descriptor = Descriptor("", parse_digest(reference), 0)
        else:
            descriptor = self._tagged(reference)
        path = self._path(descriptor.digest)
        try:
            with path.open("rb") as file:
                raw = file.read(MANIFEST_SIZE_MAX + 1)
        except FileNotFoundError:
            raise NotFound(f"{self.name}: no manifest {descriptor.digest}") from None
        except OSError as error:
            raise _translate(error, str(path)) from error
        if len(raw) > MANIFEST_SIZE_MAX:
            raise LimitExceeded("manifest-size", len(raw), MANIFEST_SIZE_MAX, where=self.name)
        _verify(raw, descriptor.digest, f"{self.name}: manifest")
        document = parse_document(raw, media_type=descriptor.media_type)
        media_type = descriptor.media_type or document.media_type
        return RawManifest(Descriptor(media_type, descriptor.digest, len(raw)), raw)

    def _tagged(self, tag: str) -> Descriptor:
        entries = self._index().manifests
        found = [e for e in entries if e.annotations.get(media_types.REF_NAME) == tag]
        if found:
            return found[-1]
        names = sorted(filter(None, (e.annotations.get(media_types.REF_NAME) for e in entries)))
        shown = [name for name in names if not name.startswith("imgsnap-layer-")][:20]
        # An unnamed image that is alone is what everyone means by the layout's name.
        if tag == "latest" and len(entries) == 1 and not names:
            return entries[0]
        raise NotFound(
            f"{self.name}: no tag {tag!r}",
            hint=f"it has: {', '.join(shown)}" if shown else "it has no tags",
        )

    def blob(self, descriptor: Descriptor, *, size_max: int) -> bytes:
        path = self._path(descriptor.digest)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > size_max:
                    raise LimitExceeded("blob-size", size, size_max, where=str(path))
                raw = file.read(size_max + 1)
        except FileNotFoundError:
            raise NotFound(f"{self.name}: no blob {descriptor.digest}") from None
        except OSError as error:
            raise _translate(error, str(path)) from error
        _verify(raw, descriptor.digest, f"{self.name}: blob")
        return raw

    @contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[ByteStream]:
        with self._open(descriptor) as file:
            yield file

    def read_range(self, descriptor: Descriptor, offset: int, length: int) -> bytes:
        with self._open(descriptor) as file:
            try:
                data = os.pread(file.fileno(), length, offset)
            except OSError as error:
                raise _translate(error, str(self._path(descriptor.digest))) from error
        if len(data) != length:
            raise IntegrityError(
                f"{self.name}: blob {descriptor.digest} ends before {offset + length}"
            )
        return data

    def _open(self, descriptor: Descriptor) -> BinaryIO:
        path = self._path(descriptor.digest)
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise NotFound(f"{self.name}: no blob {descriptor.digest}") from None
        except OSError as error:
            raise _translate(error, str(path)) from error

    def has_blob(self, descriptor: Descriptor) -> bool:
        return self._path(descriptor.digest).is_file()

    def tags(self, prefix: str = "") -> list[str]:
        names = (entry.annotations.get(media_types.REF_NAME) for entry in self._index().manifests)
        return sorted({name for name in names if name and name.startswith(prefix)})

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        found: dict[Digest, Descriptor] = {}
        for entry in self._index().manifests:
            stated, descriptor = self._subject(entry)
            if stated == subject and descriptor.artifact_type == artifact_type:
                found[descriptor.digest] = descriptor
        return list(found.values())

    def _subject(self, entry: Descriptor) -> tuple[Digest | None, Descriptor]:
        """The subject of a manifest and its entry in a list of referrers; read once."""
        with self._lock:
            known = self._parsed.get(entry.digest)
        if known is not None:
            return known
        try:
            raw = self.manifest(entry.digest).raw
            document = parse_document(raw, media_type=entry.media_type)
            subject = document.subject.digest if document.subject else None
            known = subject, referrer_descriptor(raw, document)
        except ImgsnapError:
            known = None, entry  # damaged or missing: nobody's referrer
        with self._lock:
            self._parsed[entry.digest] = known
        return known

    def _index(self) -> ImageIndex:
        path = self.path / INDEX
        try:
            with path.open("rb") as file:
                raw = file.read(INDEX_SIZE_MAX + 1)
        except OSError as error:
            raise _translate(error, str(path)) from error
        if len(raw) > INDEX_SIZE_MAX:
            raise LimitExceeded("index-size", len(raw), INDEX_SIZE_MAX, where=str(path))
        return parse_index(raw, media_type=media_types.OCI_INDEX, record=str(path))

    def _path(self, digest: Digest) -> Path:
        # Digests are checked hex, so that no content of a layout can name another file.
        return self._blobs / digest_hex(parse_digest(digest))

    # Writing -----------------------------------------------------------------------------------

    def put_blob(self, descriptor: Descriptor, path: Path) -> None:
        if self.has_blob(descriptor):
            return
        with self._new_blob(descriptor.digest) as temporary:
            _take_file(path, temporary)

    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        if self.has_blob(descriptor):
            return
        _verify(data, descriptor.digest, "blob to store")
        with self._new_blob(descriptor.digest) as temporary, temporary.open("xb") as file:
            file.write(data)

    def mount_blob(self, descriptor: Descriptor, source: Repository) -> bool:
        if not isinstance(source, LayoutRepository) or not source.has_blob(descriptor):
            return False
        path = source._path(descriptor.digest)
        if _file_digest(path) != descriptor.digest:
            return False
        self.put_blob(descriptor, path)
        return True

    def put_manifest(
        self,
        manifest: RawManifest,
        tags: Sequence[str] = (),
        *,
        subject: Digest | None = None,
    ) -> None:
        """As `WritableRepository.put_manifest`; referrers are found through index.json, where
        every manifest is listed."""
        self.put_bytes(manifest.descriptor, manifest.raw)
        document = parse_document(manifest.raw, media_type=manifest.descriptor.media_type)
        plain = replace(
            manifest.descriptor,
            media_type=document.media_type,
            artifact_type=document.artifact_type,
            platform=None,
            annotations={},
        )
        entries = [
            replace(plain, annotations={media_types.REF_NAME: tag}) for tag in dict.fromkeys(tags)
        ]
        with self._locked():
            index = self._index()
            kept = [
                e for e in index.manifests if e.annotations.get(media_types.REF_NAME) not in tags
            ]
            if not entries and all(entry.digest != plain.digest for entry in kept):
                entries = [plain]
            if entries:
                # What loses its last tag stays listed: it may be somebody's referrer.
                listed = {entry.digest for entry in (*kept, *entries)}
                lost = {e.digest: e for e in index.manifests if e.digest not in listed}
                untagged = [replace(entry, annotations={}) for entry in lost.values()]
                changed = replace(index, manifests=(*kept, *untagged, *entries))
                self._replace(self.path / INDEX, document_bytes(changed))

    @contextmanager
    def _new_blob(self, digest: Digest) -> Iterator[Path]:
        """A path to write; synced and renamed into place when the block ends well."""
        temporary = self._blobs / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            try:
                yield temporary
                _sync(temporary)
                temporary.rename(self._path(digest))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
        except OSError as error:
            raise _translate(error, f"{self.name}: cannot store {digest}") from error

    def _replace(self, path: Path, raw: bytes) -> None:
        temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
        try:
            temporary.write_bytes(raw)
            _sync(temporary)
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _translate(error, f"{self.name}: cannot write {path.name}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer of index.json at a time, among threads and processes."""
        try:
            fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _translate(error, f"{self.name}: cannot lock") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _take_file(path: Path, place: Path) -> None:
    """Links the file's bytes to a new name where the file systems allow it, else copies them."""
    try:
        place.hardlink_to(path)
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES):
            raise
    with path.open("rb") as source, place.open("xb") as target:
        size = os.fstat(source.fileno()).st_size
        done = 0
        while done < size:
            copied = os.copy_file_range(source.fileno(), target.fileno(), size - done)
            if not copied:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            done += copied


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _file_digest(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())


def _verify(raw: bytes, digest: Digest, what: str) -> None:
    got = sha256_digest(raw)
    if got != digest:
        raise DigestMismatch(what, digest, got, hint="the layout is damaged; copy it again")


def _translate(error: OSError, what: str) -> ImgsnapError:
    """An operating system error as one of ours."""
    reason = f"{what}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceExhausted(reason, hint="free disk space, or name another directory")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(reason, hint="run as root, or name a directory of your own")
    if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST):
        return InvalidArgument(reason)
    return ImgsnapError(reason)
