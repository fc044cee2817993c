"""What the target holds already: chunks to reference instead of storing them again."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.convert.artifact import RECORD, read_chunk_map
from imgsnap.digest import ChunkId
from imgsnap.errors import IntegrityError, NotFound, UnsupportedFormat
from imgsnap.formats.chunk_map import ChunkMap, ChunkPlace, PackRef
from imgsnap.oci import media_types
from imgsnap.oci.manifest import parse_manifest
from imgsnap.oci.repository import Repository

log = logging.getLogger(__name__)

SYNC_THREADS = 8


def artifact_name(repository: Repository, tag: str) -> str:
    """What the chunk index calls a layer artefact; one index may know several repositories."""
    return f"{repository.name} {tag}"


def sync_chunk_index(repository: Repository, index: ChunkIndex) -> int:
    """Takes every layer artefact of the repository that the index has not seen into it.

    Returns how many were new. One request lists the tags, whatever their number; artefacts seen
    before cost nothing. One that is damaged, half deleted or of another format version is left
    out: its chunks are then stored again.
    """
    new = {
        name: tag
        for tag in repository.tags(media_types.LAYER_TAG_PREFIX)
        if not index.has_artifact(name := artifact_name(repository, tag))
    }
    taken = 0
    with ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="imgsnap-sync") as pool:
        found = pool.map(lambda tag: _read(repository, tag), new.values())
        for name, chunk_map in zip(new, found, strict=True):
            if chunk_map is not None:
                index.add(chunk_map, name)
                taken += 1
    return taken


def _read(repository: Repository, tag: str) -> ChunkMap | None:
    try:
        manifest = parse_manifest(repository.manifest(tag).raw, record=RECORD)
        if manifest.artifact_type != media_types.ARTIFACT_LAYER:
            return None
        return read_chunk_map(repository, manifest)
    except (NotFound, IntegrityError, UnsupportedFormat) as error:
        log.warning("leaving out layer artefact tag=%s: %s", tag, error)
        return None


class Known:
    """Places of chunks: of this conversion's layers first, then of the target's chunk index.

    Packs that only the index speaks of are asked for once before they are relied upon.
    """

    def __init__(self, index: ChunkIndex, has_pack: Callable[[PackRef], bool]) -> None:
        self._index = index
        self._has_pack = has_pack
        self._learned: dict[ChunkId, ChunkPlace] = {}
        self._packs: dict[PackRef, bool] = {}

    def find(self, chunk: ChunkId) -> ChunkPlace | None:
        place = self._learned.get(chunk)
        if place is not None:
            return place
        place = self._index.get(chunk)
        if place is None or not self._usable(place.pack):
            return None
        return place

    def _usable(self, pack: PackRef) -> bool:
        usable = self._packs.get(pack)
        if usable is None:
            usable = self._packs[pack] = self._has_pack(pack)
            if not usable:
                log.warning("the target no longer has pack=%s; its chunks are stored anew", pack)
                self._index.forget_packs((pack.digest,))
        return usable

    def learn(self, chunk: ChunkId, place: ChunkPlace) -> None:
        self._learned[chunk] = place

    def learn_all(self, chunk_map: ChunkMap) -> None:
        """Takes in a layer that was converted before."""
        for extent in chunk_map.extents:
            for row in range(len(extent)):
                place = chunk_map.place(extent, row)
                if place is not None:
                    self.learn(extent.chunk_id(row), place)
