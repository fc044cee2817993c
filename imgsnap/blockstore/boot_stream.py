"""Loads a snapshot's boot pack at attach: chooses it, streams it once, verifies it on the way.

Nothing here can fail a mount or a read. A pack that is missing, late, damaged or of another
snapshot costs speed and one line in the log: its blocks are then fetched as any others.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from imgsnap.blockstore.boot_buffer import BootBuffer
from imgsnap.blockstore.boot_choice import BOOT_PACK_SIZE_MAX, boot_packs, choose
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import DigestMismatch, ImgsnapError, IntegrityError, Unavailable
from imgsnap.formats.chunk_map import ChunkMap
from imgsnap.formats.frame import decompress_exact
from imgsnap.oci.media_types import BOOT_PACK
from imgsnap.oci.repository import ByteStream, Descriptor, Repository
from imgsnap.units import BLOCK_SIZE

if TYPE_CHECKING:
    from imgsnap.formats.boot_pack import BootFrame, BootTable

CHOICE_AGE_S = 3600.0
"""A choice older than this is made again, after it was used once more."""
WATCH_S = 0.25
"""How often a stalled stream is looked for."""
_JOIN_S = 2.0

_log = logging.getLogger(__name__)


class BootLoader:
    """One snapshot's boot pack on its way. `start` once the manifest is known, `attach` once the
    chunk map is; in between the network is already at work."""

    def __init__(self, repository: Repository, cache: NodeCache, wanted: Sequence[str]) -> None:
        """`wanted`: names by preference, as `boot_choice.choose` takes them."""
        self.buffer = BootBuffer(cache)
        self._repository = repository
        self._cache = cache
        self._wanted = tuple(wanted)
        self._chosen = threading.Event()
        self._attached = threading.Event()
        self._ended = threading.Event()
        self._found: Descriptor | None = None
        self._chunk_map: ChunkMap | None = None
        self._local: Callable[[BootTable], bool] = lambda table: False
        self._threads: list[threading.Thread] = []

    def start(self, snapshot: Digest, *, ask: bool = True) -> None:
        """Looks for the pack and fetches it, in a thread; a second call does nothing.

        Without `ask` the repository is not asked which packs there are if this node knows: for a
        snapshot whose other parts are all here, so that it needs nobody who may be away.
        """
        if self._threads:
            return
        for name, run in (("boot", lambda: self._run(snapshot, ask)), ("boot-watch", self._watch)):
            thread = threading.Thread(target=run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def attach(self, chunk_map: ChunkMap, local: "Callable[[BootTable], bool]") -> None:
        """The roots to verify by; `local` tells whether all blocks of a table are here anyway."""
        self._chunk_map, self._local = chunk_map, local
        self._attached.set()

    @property
    def started(self) -> bool:
        return bool(self._threads)

    def found(self, timeout_s: float) -> bool:
        """Whether there is a pack; waits so long for the answer."""
        return self.started and self._chosen.wait(timeout_s) and self._found is not None

    def comes(self, timeout_s: float) -> bool:
        """As `found`, of one that this node does not have yet."""
        if not self.found(timeout_s) or self._found is None:
            return False
        return not self._cache.boot_pack_path(self._found.digest).exists()

    @property
    def ended(self) -> bool:
        """Whether the stream is over, well or not."""
        return self._ended.is_set()

    def close(self) -> None:
        """Ends the stream. Call it when nobody reads any more."""
        self._ended.set()
        self._attached.set()
        self.buffer.close()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_S):
            self.buffer.check_progress()

    def _run(self, snapshot: Digest, ask: bool) -> None:
        try:
            known = None if ask else self._known(snapshot)
            self._found = known.pack if known is not None else self._ask(snapshot)
            self._chosen.set()
            if self._found is not None:
                self._load(self._found)
            self.buffer.end()
            if known is not None and known.age_s > CHOICE_AGE_S:
                with suppress(ImgsnapError):
                    self._ask(snapshot)  # for the next time
        except (ImgsnapError, OSError) as error:
            if not self._ended.is_set():
                self.buffer.counts.failures += 1
                _log.warning("boot pack of %s: %s; reading without it", snapshot, error)
        except Exception:
            _log.exception("loading the boot pack of %s failed unexpectedly", snapshot)
        finally:
            self._chosen.set()
            self._ended.set()
            self.buffer.end()

    # Choosing --------------------------------------------------------------------------------

    def _ask(self, snapshot: Digest) -> Descriptor | None:
        """What the repository lists; remembered for `_known`."""
        packs = boot_packs(self._repository, snapshot)
        chosen = next((pack for name in self._wanted if (pack := choose(packs, name))), None)
        self._cache.store_tag(self._key(snapshot), _memory(chosen.blob if chosen else None))
        if chosen is None:
            return None
        _log.info("boot pack %s (%s, %d bytes)", chosen.name, chosen.blob.digest, chosen.blob.size)
        return chosen.blob

    def _known(self, snapshot: Digest) -> "_Known | None":
        """What the repository said before, if that needs nothing from it now."""
        known = _remembered(self._cache.load_tag(self._key(snapshot)))
        if known is None or known.pack is None:
            return known
        return known if self._cache.boot_pack_path(known.pack.digest).exists() else None

    def _key(self, snapshot: Digest) -> str:
        return f"boot-pack\0{self._repository.name}\0{snapshot}\0{json.dumps(self._wanted)}"

    # Loading ---------------------------------------------------------------------------------

    def _load(self, pack: Descriptor) -> None:
        path = self._cache.boot_pack_path(pack.digest)
        try:
            file = path.open("rb")
        except OSError:
            self._fetch(pack)
            return
        with file:
            try:
                self._stream(pack, file)
            except ImgsnapError:
                if not self._ended.is_set():  # else the snapshot was closed, and the file is good
                    path.unlink(missing_ok=True)  # the next attach fetches it again
                raise

    def _fetch(self, pack: Descriptor) -> None:
        with ExitStack() as stack:
            stream = stack.enter_context(self._repository.open_blob(pack))
            kept = _Kept(self._cache, pack, stream, self.buffer)
            stack.callback(kept.close)
            if self._stream(pack, kept):
                kept.finish()

    def _stream(self, pack: Descriptor, stream: ByteStream) -> bool:
        """Reads header, table and frames; False when nothing of it was needed."""
        from imgsnap.formats import boot_pack
        from imgsnap.formats.boot_pack import Header

        header_bytes = _exactly(stream, Header.SIZE)
        header = Header.parse(header_bytes)
        raw = _exactly(stream, header.table_length)
        table = boot_pack.decode_table(header, raw)
        if Header.SIZE + len(raw) + table.frames_length != pack.size:
            raise IntegrityError(f"boot pack {pack.digest} is not as long as its table says")
        self._attached.wait()
        if self._chunk_map is None:
            return False  # closed
        check_table(table, self._chunk_map)
        if self._local(table):
            return False
        self.buffer.open(table)
        sha256 = hashlib.sha256(header_bytes + raw)
        for frame in table.frames:
            if self._ended.is_set():
                return False
            data = _exactly(stream, frame.length)
            sha256.update(data)
            self.buffer.add(frame_content(frame, data))
        # Each block was right by the snapshot; a pack that is not what was asked for all the same
        # is not kept.
        if "sha256:" + sha256.hexdigest() != pack.digest:
            raise DigestMismatch("boot pack", pack.digest, "sha256:" + sha256.hexdigest())
        return True


def check_table(table: "BootTable", chunk_map: ChunkMap) -> None:
    """Compares a table with the block roots of a snapshot. Raises IntegrityError."""
    from imgsnap.formats import block_tree

    stated = {extent.id: extent for extent in chunk_map.extents}
    nodes: list[dict[block_tree.Node, bytes]] = [{} for _ in table.extents]
    for frame in table.frames:
        hashes = iter(frame.nodes)
        for run in frame.runs:
            for node in block_tree.cover(run.first, run.blocks):
                nodes[run.extent][node] = next(hashes)
    for extent, own in zip(table.extents, nodes, strict=True):
        known = stated.get(extent.id)
        if known is None or known.total_blocks != extent.blocks:
            raise IntegrityError(f"extent {extent.id} is not one of this snapshot")
        if block_tree.root_of(extent.blocks, own, extent.proof) != known.block_root:
            raise IntegrityError(f"the proof for extent {extent.id} does not lead to its root")


def frame_content(frame: "BootFrame", raw: bytes) -> bytes:
    """The blocks of a frame, verified by the nodes of a checked table. Raises IntegrityError."""
    from imgsnap.formats import block_tree

    content = decompress_exact(raw, frame.blocks * BLOCK_SIZE, record="boot pack frame")
    leaves = block_tree.leaves(content)
    at = 0
    got: list[bytes] = []
    for run in frame.runs:
        got += block_tree.run_nodes(run.first, leaves[at : at + run.blocks])
        at += run.blocks
    if tuple(got) != frame.nodes:
        raise IntegrityError("a frame holds other blocks than its table says")
    return content


class _Kept:
    """A stream whose bytes also go into the node cache; a full disk only ends that."""

    def __init__(
        self, cache: NodeCache, pack: Descriptor, stream: ByteStream, buffer: BootBuffer
    ) -> None:
        self._path = cache.boot_pack_path(pack.digest)
        self._temporary = cache.temporary_path()
        self._stream = stream
        self._counts = buffer.counts
        self._counts.requests += 1
        self._file: BinaryIO | None = None
        self._budget = cache.budget
        self._size = pack.size
        if self._budget.take(pack.size):
            try:
                self._file = self._temporary.open("wb")
            except OSError:
                self._budget.done(pack.size)

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._counts.bytes += len(data)
        if self._file is not None:
            try:
                self._file.write(data)
            except OSError:
                self.close()
        return data

    def finish(self) -> None:
        """Makes the whole pack the cache's."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
                self._temporary.replace(self._path)
            self._forget()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._forget()
            self._temporary.unlink(missing_ok=True)

    def _forget(self) -> None:
        self._file = None
        self._budget.done(self._size)


def _exactly(stream: ByteStream, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        data = stream.read(size)
        if not data:
            raise Unavailable("the boot pack ended early")
        parts.append(data)
        size -= len(data)
    return b"".join(parts) if len(parts) != 1 else parts[0]


class _Known(NamedTuple):
    """A choice that was made before; `pack` is None when there was none to choose."""

    pack: Descriptor | None
    age_s: float


def _memory(pack: Descriptor | None) -> bytes:
    value = {"digest": pack.digest, "size": pack.size} if pack is not None else None
    return json.dumps({"pack": value, "time": int(time.time())}).encode()


def _remembered(raw: bytes | None) -> _Known | None:
    try:
        value = json.loads(raw or b"")
        pack, age_s = value["pack"], time.time() - float(value["time"])
        if pack is None:
            return _Known(None, age_s)
        digest, size = parse_digest(pack["digest"]), int(pack["size"])
    except (ValueError, KeyError, TypeError, ImgsnapError):
        return None
    if not 0 < size <= BOOT_PACK_SIZE_MAX:
        return None
    return _Known(Descriptor(BOOT_PACK, digest, size), age_s)
