"""A repository in memory that keeps a request log and can fail in the ways registries do."""

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

from imgsnap.digest import Digest
from imgsnap.errors import DigestMismatch, LimitExceeded, NotFound, Unavailable
from imgsnap.oci.cancellation import Cancellation
from imgsnap.oci.repository import (
    ByteStream,
    Descriptor,
    RangeBytes,
    RangeStream,
    RangeUnsupported,
    RawManifest,
)
from tests.support.snapshots import BuiltSnapshot


class Faults:
    """Switches in shared memory, so that they also reach a repository in a forked process."""

    _NAMES = ("away", "corrupt", "truncate", "no_ranges", "latency_ms", "corrupt_next")

    def __init__(self) -> None:
        self.__dict__["_memory"] = mmap.mmap(-1, mmap.PAGESIZE)

    def __getattr__(self, name: str) -> int:
        if name not in self._NAMES:
            raise AttributeError(name)
        return self.__dict__["_memory"][self._NAMES.index(name)]

    def __setattr__(self, name: str, value: int) -> None:
        self.__dict__["_memory"][self._NAMES.index(name)] = int(value)


class MemoryRepository:
    """Implements `imgsnap.oci.repository.Repository` over dictionaries."""

    def __init__(self, *snapshots: BuiltSnapshot, name: str = "registry.test/app") -> None:
        self._name = name
        self.blobs: dict[Digest, bytes] = {}
        self.manifests: dict[str, RawManifest] = {}
        self.subjects: dict[Digest, list[Descriptor]] = {}
        self.faults = Faults()
        self.vanish_after: int | None = None
        self.gate: threading.Event | None = None
        self._lock = threading.Lock()
        self.log: list[tuple[str, str, int, int]] = []
        for snapshot in snapshots:
            self.add(snapshot)

    def add(self, snapshot: BuiltSnapshot, *, tag: str = "latest", subject: Digest = "") -> None:
        self.blobs.update(snapshot.blobs)
        self.add_manifest(snapshot.manifest, tag)
        if subject:
            self.subjects.setdefault(subject, []).append(snapshot.manifest.descriptor)

    def add_manifest(self, manifest: RawManifest, tag: str = "") -> None:
        self.manifests[manifest.descriptor.digest] = manifest
        if tag:
            self.manifests[tag] = manifest

    @property
    def ranges(self) -> list[tuple[str, int, int]]:
        """The range requests so far: digest, offset, length."""
        with self._lock:
            return [entry[1:] for entry in self.log if entry[0] == "range"]

    def count(self, kind: str) -> int:
        with self._lock:
            return sum(entry[0] == kind for entry in self.log)

    def _request(self, kind: str, what: str, offset: int = 0, length: int = 0) -> None:
        with self._lock:
            self.log.append((kind, what, offset, length))
            if self.vanish_after is not None:
                self.vanish_after -= 1
                if self.vanish_after < 0:
                    self.faults.away = 1
        if self.gate is not None:
            self.gate.wait(20)
        if self.faults.latency_ms:
            time.sleep(self.faults.latency_ms / 1000)
        if self.faults.away:
            raise Unavailable(f"{self._name} does not answer")

    @property
    def name(self) -> str:
        return self._name

    def expect(self, requests: int) -> None:
        """Nothing is far away."""

    def manifest(self, reference: str) -> RawManifest:
        self._request("manifest", reference)
        if reference not in self.manifests:
            raise NotFound(f"{self._name}: no manifest {reference}")
        return self.manifests[reference]

    def blob(self, descriptor: Descriptor, *, size_max: int) -> bytes:
        self._request("blob", descriptor.digest)
        if descriptor.size > size_max:
            raise LimitExceeded("blob", descriptor.size, size_max, where=self._name)
        data = self._damaged(self._get(descriptor))
        if data != self.blobs[descriptor.digest]:
            raise DigestMismatch("blob", descriptor.digest, "something else")
        return data

    @contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[ByteStream]:
        self._request("open", descriptor.digest)
        yield BytesIO(self._damaged(self._get(descriptor)))

    def read_range(self, descriptor: Descriptor, offset: int, length: int) -> bytes:
        self._request("range", descriptor.digest, offset, length)
        if self.faults.no_ranges:
            raise RangeUnsupported(f"{self._name} ignores ranges")
        data = self._get(descriptor)
        if offset + length > len(data):
            raise AssertionError("a range outside of its blob")
        return self._damaged(data[offset : offset + length])

    @contextmanager
    def open_range(
        self,
        descriptor: Descriptor,
        offset: int,
        length: int,
        *,
        cancellation: Cancellation | None = None,
        second: bool = False,
    ) -> Iterator[RangeStream]:
        yield RangeBytes(self._name, self.read_range(descriptor, offset, length))

    def has_blob(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self.blobs

    def tags(self, prefix: str = "") -> list[str]:
        return sorted(t for t in self.manifests if t.startswith(prefix) and ":" not in t)

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        self._request("referrers", subject)
        found = self.subjects.get(subject, [])
        return [d for d in found if artifact_type in ("", d.artifact_type)]

    def close(self) -> None:
        pass

    def _get(self, descriptor: Descriptor) -> bytes:
        if descriptor.digest not in self.blobs:
            raise NotFound(f"{self._name}: no blob {descriptor.digest}")
        return self.blobs[descriptor.digest]

    def _damaged(self, data: bytes) -> bytes:
        if self.faults.corrupt_next:
            self.faults.corrupt_next -= 1
        elif not self.faults.corrupt:
            return data[:-1] if self.faults.truncate else data
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]
