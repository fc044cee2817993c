"""Mounting a complete snapshot without a block server: no process stays behind.

Tried before a server is started. Nothing is asked of the repository until all bytes are known to be
here; then a tag is, so that it means what it means now.
"""

import logging
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from imgsnap.blockstore.cache_pins import Pin, boot_id, snapshot_parts, unpin, write_pin
from imgsnap.blockstore.direct import DirectDevice, open_direct
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.resolve import Admit, remembered_snapshot, resolve_snapshot
from imgsnap.blockstore.snapshot import Snapshot, open_snapshot
from imgsnap.digest import Digest, as_digest, parse_digest
from imgsnap.errors import ImgsnapError, Unavailable
from imgsnap.mount import attach, teardown
from imgsnap.mount.records import MOUNTED, MountRecord, MountRecords
from imgsnap.mount.tree import show_tree
from imgsnap.node.devices import OpenRepository
from imgsnap.node.policies import admission
from imgsnap.node.request import AttachRequest
from imgsnap.node.targets import MountOptions, claim
from imgsnap.oci.cancellation import Cancellation
from imgsnap.oci.locate import repository_name
from imgsnap.oci.reference import parse_location
from imgsnap.oci.repository import (
    ByteStream,
    Descriptor,
    Platform,
    RangeStream,
    RawManifest,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DirectMount:
    """A complete snapshot, verified and ready to be mounted; close it after mounting."""

    snapshot: Snapshot
    device: DirectDevice
    repository: str  # its name

    def close(self) -> None:
        self.device.close()
        self.snapshot.close()

    def record(self, record: MountRecord, cache_dir: str) -> MountRecord:
        """The record of a mount of it: no server, and where its pin is."""
        return replace(
            record,
            repository=self.repository,
            manifest_digest=self.snapshot.manifest.digest,
            config_digest=self.snapshot.manifest.config.digest,
            device=str(self.device.metadata),
            server_pid=0,
            server_start_time=0,
            direct_cache=cache_dir,
        )

    def pin(self, cache: NodeCache, record: MountRecord) -> None:
        """Keeps the parts from eviction while the machine is up or until `release`.

        Raises ImgsnapError when the pin cannot be kept.
        """
        snapshot = self.snapshot
        labels = {"target": record.target}
        write_pin(
            cache,
            Pin(
                snapshot.manifest.digest,
                _holder(record),
                snapshot_parts(snapshot),
                boot_id(),
                labels,
            ),
        )


def mount_direct(options: MountOptions, open_repository: OpenRepository) -> MountRecord | None:
    """Mounts a snapshot that is complete in the cache; None when a server is needed or wanted.

    Raises what claiming the target raises; anything else that goes wrong is left to the server
    to meet and report.
    """
    if options.one_file:
        return None
    try:
        cache = NodeCache(options.cache_dir, quota=options.cache_quota)
        found = find_direct(cache, options.request, open_repository)
    except (ImgsnapError, OSError) as error:
        _log.debug("not mounted directly: %s", error)
        return None
    if found is None:
        return None
    with closing(found):
        options, claimed = claim(options)
        records = MountRecords(options.run_dir)
        record = found.record(claimed, str(options.cache_dir))
        try:
            # While it says STARTING the record names us, so that nobody takes it for abandoned.
            records.update(
                replace(
                    record,
                    server_pid=claimed.server_pid,
                    server_start_time=claimed.server_start_time,
                )
            )
            found.pin(cache, record)
            shown = show_tree(
                record,
                lambda image, target: attach.mount_erofs_devices(
                    image, target, found.device.mount_options
                ),
            )
            shown = replace(shown, state=MOUNTED)
            records.update(shown)
        except BaseException as error:
            teardown.unmount_tree(record, lazy=True)
            release(record)
            teardown.remove_entry(records, record)
            teardown.remove_instance(record)
            if not isinstance(error, ImgsnapError):
                raise
            _log.info("%s is not mounted directly: %s", options.request.reference, error)
            return None
    return shown


def release(record: MountRecord) -> None:
    """Lets the parts of an unmounted snapshot go."""
    try:
        cache = NodeCache(Path(record.direct_cache))
        unpin(cache, parse_digest(record.manifest_digest), _holder(record))
    except ImgsnapError as error:
        _log.info("%s was not pinned: %s", record.target, error)


def _holder(record: MountRecord) -> str:
    return f"mount {record.instance}"


def find_direct(
    cache: NodeCache, request: AttachRequest, open_repository: OpenRepository
) -> DirectMount | None:
    """The snapshot that is asked for, if it can be mounted without a server; else None.

    Everything that goes wrong means None: the server then meets it too, and reports it.
    """
    reference, platform, source = request.reference, request.platform, request.source
    name = repository_name(parse_location(source.location), source.store)
    try:
        digest = _candidate(cache, name, reference, platform)
        if digest is None:
            return None
        with ExitStack() as stack:
            snapshot = open_snapshot(
                _Cached(name), digest, cache, platform=platform, admit=_remembered(request, cache)
            )
            stack.callback(snapshot.close)
            device = open_direct(snapshot, cache)
            if device is None:
                return None
            stack.callback(device.close)
            if reference != digest:
                with closing(open_repository(source)) as repository:
                    named = resolve_snapshot(repository, reference, cache, platform).manifest
                if named.descriptor.digest != digest:
                    return None
            stack.pop_all()
            return DirectMount(snapshot, device, name)
    except (ImgsnapError, OSError) as error:
        _log.info("%s is not mounted directly: %s", reference, error)
        return None


def _remembered(request: AttachRequest, cache: NodeCache) -> Admit:
    """Lets open what the policies have accepted before: there is nobody here to ask."""
    admit = admission(request.policies, cache)
    return lambda repository, _, documents: admit(repository, request.reference, documents)


def _candidate(
    cache: NodeCache, repository: str, reference: str, platform: Platform | None
) -> Digest | None:
    """What the reference is, or was when it was last asked about."""
    digest = as_digest(reference)
    if digest is not None:
        return digest
    found = remembered_snapshot(repository, reference, cache, platform)
    return found.descriptor.digest if found is not None else None


class _Cached:
    """A repository of which only what is in the node cache can be had."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _absent(self) -> NoReturn:
        raise Unavailable(f"{self.name} is not asked: not everything is in the node cache")

    def expect(self, requests: int) -> None:
        """Nothing is asked."""

    def manifest(self, reference: str) -> RawManifest:
        self._absent()

    def blob(self, descriptor: Descriptor, *, size_max: int) -> bytes:
        self._absent()

    def open_blob(self, descriptor: Descriptor) -> AbstractContextManager[ByteStream]:
        self._absent()

    def read_range(self, descriptor: Descriptor, offset: int, length: int) -> bytes:
        self._absent()

    def open_range(
        self,
        descriptor: Descriptor,
        offset: int,
        length: int,
        *,
        cancellation: Cancellation | None = None,
        second: bool = False,
    ) -> AbstractContextManager[RangeStream]:
        self._absent()

    def has_blob(self, descriptor: Descriptor) -> bool:
        self._absent()

    def tags(self, prefix: str = "") -> list[str]:
        self._absent()

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        self._absent()

    def close(self) -> None:
        """There is nothing to close."""
