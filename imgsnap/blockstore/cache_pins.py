"""Pins: records that keep a snapshot's parts in the node cache while somebody may need them.

A pin names its holder and every part of the snapshot, so that it needs no other file to be
understood. It is one line of canonical JSON, and a line with the CRC-32 of that line; the file is
``pins/<hex of the manifest>.<16 hex digits of the holder's sha256>``. A pin with a boot id is one
of a mount or a process, and means nothing after the machine was started again.
"""

import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from imgsnap.blockstore import lease
from imgsnap.blockstore.node_cache import NodeCache, cache_error
from imgsnap.blockstore.snapshot import Snapshot, read_image_config
from imgsnap.digest import Digest, digest_hex, parse_digest
from imgsnap.errors import FormatError, InvalidArgument, NotFound, ResourceExhausted
from imgsnap.formats.chunk_map_codec import encode
from imgsnap.formats.snapshot_config import CONFIG_SIZE_MAX

RECORD = "pin"
PIN_SIZE_MAX = 1 << 20
"""Bytes: names of some 10 000 parts; a snapshot has at most 1024 extents."""
HOLDER_MAX = 255
_VERSION = 1
_KINDS = ("blobs", "chunk-maps", "metadata", "extents", "direct")
_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A name in the node cache: a directory of it, and the file or directory in that."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Who needs which snapshot."""

    manifest: Digest
    holder: str
    parts: frozenset[Part]
    boot: str = ""  # of the only boot it is meant for; "": until it is removed
    labels: Mapping[str, str] = field(default_factory=dict)  # the holder's own, kept as they are

    def to_bytes(self) -> bytes:
        names = {kind: sorted(p.name for p in self.parts if p.kind == kind) for kind in _KINDS}
        value = {
            "version": _VERSION,
            "manifest": self.manifest,
            "holder": self.holder,
            "boot": self.boot,
            "labels": dict(self.labels),
            "parts": names,
        }
        line = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        return b"%b\n%08x\n" % (line, zlib.crc32(line))

    @classmethod
    def parse(cls, raw: bytes) -> "Pin":
        """Raises FormatError."""
        line, _, crc = raw.partition(b"\n")
        if crc != b"%08x\n" % zlib.crc32(line):
            raise FormatError(RECORD, "crc", len(line) + 1, "does not match the record")
        try:
            value = json.loads(line)
            if value["version"] != _VERSION:
                raise FormatError(RECORD, "version", 0, str(value["version"])[:20])
            return cls(
                parse_digest(value["manifest"]),
                str(value["holder"]),
                frozenset(_parts(value["parts"])),
                str(value["boot"]),
                {str(key): str(text) for key, text in value["labels"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, InvalidArgument) as error:
            raise FormatError(RECORD, "record", 0, f"is malformed: {error}") from error


def _parts(value: object) -> Iterator[Part]:
    if not isinstance(value, dict):
        raise TypeError("parts are no object")
    for kind, names in value.items():
        for name in names:
            parse_digest(f"sha256:{name}")  # extent ids are 64 hex digits as well
            yield Part(str(kind), name)


@dataclass(frozen=True, slots=True)
class PinList:
    """What `pins` found."""

    pins: tuple[Pin, ...]
    damaged: tuple[Path, ...]  # records that protect nothing

    @property
    def parts(self) -> frozenset[Part]:
        return frozenset(part for pin in self.pins for part in pin.parts)


def snapshot_parts(snapshot: Snapshot) -> frozenset[Part]:
    """Everything of a snapshot that the cache may hold, packs excepted."""
    manifest, config = snapshot.manifest, snapshot.config
    blobs = [manifest.digest, manifest.config.digest]
    if manifest.image_config is not None:
        blobs.append(manifest.image_config.digest)
    found = {Part("blobs", digest_hex(digest)) for digest in blobs}
    found.add(Part("chunk-maps", digest_hex(manifest.chunk_map.digest)))
    found.add(Part("metadata", digest_hex(config.metadata_digest)))
    found.add(Part("direct", digest_hex(manifest.config.digest)))
    found.update(
        Part("extents", extent.extent_id) for extent in config.device_extents if extent.blocks
    )
    return frozenset(found)


def pin_snapshot(
    cache: NodeCache,
    snapshot: Snapshot,
    holder: str,
    *,
    boot: str = "",
    labels: Mapping[str, str] | None = None,
) -> Pin:
    """Keeps a snapshot's parts from eviction, those that come later too, and fetches the image's
    config, so that the snapshot can be opened without its repository.

    Raises ResourceExhausted when the record or a small part cannot be kept, InvalidArgument for a
    holder that is no name, and what the repository raises.
    """
    if not holder or len(holder) > HOLDER_MAX or not holder.isprintable():
        raise InvalidArgument(f"{holder[:80]!r} is no holder of a pin")
    pin = Pin(snapshot.manifest.digest, holder, snapshot_parts(snapshot), boot, labels or {})
    write_pin(cache, pin)
    try:
        _complete(cache, snapshot)
    except BaseException:
        _path(cache, pin.manifest, holder).unlink(missing_ok=True)
        raise
    return pin


def write_pin(cache: NodeCache, pin: Pin) -> None:
    """Keeps a pin, durably; what is in the cache when this returns, stays.

    Raises ImgsnapError when it cannot be written.
    """
    with cache.new_file(_path(cache, pin.manifest, pin.holder)) as file:
        file.write(pin.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    # An eviction that began before the record was there may still take parts away.
    with maintenance(cache, wait=True):
        pass


def _complete(cache: NodeCache, snapshot: Snapshot) -> None:
    """Sees to it that the parts that are needed to open the snapshot are in the cache."""
    manifest = snapshot.manifest
    if manifest.image_config is not None:
        read_image_config(snapshot, cache)
    if cache.load_blob(manifest.digest) is None:
        raw = snapshot.repository.manifest(manifest.digest)
        cache.store_blob(manifest.digest, raw.raw)
    region = os.pread(snapshot.metadata.fileno(), snapshot.metadata_size, 0)
    if not (cache.root / "metadata" / digest_hex(snapshot.config.metadata_digest)).exists():
        cache.store_metadata(snapshot.config.metadata_digest, region).close()
    if cache.load_blob(manifest.config.digest) is None:
        raw_config = snapshot.repository.blob(manifest.config, size_max=CONFIG_SIZE_MAX)
        cache.store_blob(manifest.config.digest, raw_config)
    if cache.load_chunk_map(manifest.chunk_map.digest) is None:
        cache.store_chunk_map(manifest.chunk_map.digest, encode(snapshot.chunk_map))
    for part in snapshot_parts(snapshot):
        needed = part.kind in ("blobs", "chunk-maps", "metadata")
        if needed and not (cache.root / part.kind / part.name).exists():
            raise ResourceExhausted(
                f"cannot keep {part.kind}/{part.name} of the snapshot in the node cache",
                hint="free disk space or raise the quota (imgsnap cache quota)",
            )


def unpin(cache: NodeCache, manifest: Digest, holder: str) -> None:
    """Removes a pin. Raises NotFound."""
    try:
        _path(cache, manifest, holder).unlink()
    except FileNotFoundError:
        raise NotFound(
            f"{holder} has no pin of {manifest}", hint="list them with `imgsnap cache ls`"
        ) from None


def pins(cache: NodeCache) -> PinList:
    """All pins that are in force, by name; those of an earlier boot are deleted."""
    found: list[Pin] = []
    damaged: list[Path] = []
    for path in _records(cache):
        try:
            with path.open("rb") as file:
                pin = Pin.parse(file.read(PIN_SIZE_MAX + 1))
            if path != _path(cache, pin.manifest, pin.holder):
                raise FormatError(RECORD, "manifest", 0, "is not that of the file's name")
        except FileNotFoundError:
            continue
        except (OSError, FormatError) as error:
            _log.warning("pin %s protects nothing: %s", path, error)
            damaged.append(path)
            continue
        if pin.boot and pin.boot != boot_id():
            with suppress(OSError):
                path.unlink()
            continue
        found.append(pin)
    return PinList(tuple(found), tuple(damaged))


def _records(cache: NodeCache) -> Iterable[Path]:
    try:
        return sorted((cache.root / "pins").iterdir())
    except OSError:
        return ()


def _path(cache: NodeCache, manifest: Digest, holder: str) -> Path:
    name = hashlib.sha256(holder.encode()).hexdigest()[:16]
    return cache.root / "pins" / f"{digest_hex(manifest)}.{name}"


def boot_id() -> str:
    """The kernel's name for the time since the machine was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


@contextmanager
def maintenance(cache: NodeCache, *, wait: bool = False) -> Iterator[bool]:
    """The lock of who evicts: False when another process has it and we do not wait.

    Raises ImgsnapError when the lock file cannot be made.
    """
    path = cache.root / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise cache_error(error, f"cannot open {path}") from error
    try:
        if wait:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield wait or lease.claim(fd)
    finally:
        os.close(fd)
