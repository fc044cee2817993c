"""Which boot pack of a snapshot to load: its referrers, and what their annotations say.

Registries copy a manifest's annotations into their lists of referrers, so one request names the
packs with digest and size, and the next one is for the pack itself.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import FormatError, InvalidArgument
from imgsnap.oci.manifest import parse_manifest
from imgsnap.oci.media_types import ARTIFACT_BOOT_PACK, BOOT_PACK
from imgsnap.oci.repository import Descriptor, Repository

RECORD = "boot pack manifest"
NAME = "io.imgsnap.boot-pack.name"
DIGEST = "io.imgsnap.boot-pack.digest"
SIZE = "io.imgsnap.boot-pack.size"
DEFAULT = "io.imgsnap.boot-pack.default"
CREATED = "org.opencontainers.image.created"

AUTO = ""
"""Asked for in the place of a name: the one for the image's own command, else the newest."""
BOOT_PACK_SIZE_MAX = (1 << 30) + (64 << 20)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True, slots=True)
class BootPack:
    """A boot pack as the referrers list it. `blob` is the pack; `created` is RFC 3339 or ""."""

    name: str
    blob: Descriptor
    default: bool  # made for the image's own command
    created: str
    manifest: Digest

    def annotations(self) -> dict[str, str]:
        """Those of the manifest that `listed` reads."""
        found = {
            NAME: self.name,
            DIGEST: self.blob.digest,
            SIZE: str(self.blob.size),
            CREATED: self.created,
        }
        return found | ({DEFAULT: "true"} if self.default else {})


def check_name(name: str) -> str:
    """Raises InvalidArgument for what cannot be a boot pack's name."""
    if not _NAME.fullmatch(name) or name == "none":
        raise InvalidArgument(
            f"{name[:100]!r} cannot name a boot pack",
            hint="letters, digits and . _ + -, at most 64, and not 'none'",
        )
    return name


def name_of_command(arguments: Iterable[str]) -> str:
    """The name for the boot pack of a command: its program's."""
    program = next(iter(arguments), "").rpartition("/")[2]
    return program if _NAME.fullmatch(program) and program != "none" else "default"


def boot_packs(repository: Repository, snapshot: Digest) -> list[BootPack]:
    """The boot packs of a snapshot, the newest of each name, newest first.

    One that describes itself badly is left out. Raises what the repository raises.
    """
    newest: dict[str, BootPack] = {}
    found = [
        pack
        for entry in repository.referrers(snapshot, ARTIFACT_BOOT_PACK)
        if (pack := _listed(repository, entry)) is not None
    ]
    for pack in sorted(found, key=lambda pack: (pack.created, pack.manifest), reverse=True):
        newest.setdefault(pack.name, pack)
    return list(newest.values())


def choose(packs: Iterable[BootPack], wanted: str) -> BootPack | None:
    """By name; for AUTO the default one, else the newest. `packs` are newest first."""
    found = list(packs)
    if wanted != AUTO:
        return next((pack for pack in found if pack.name == wanted), None)
    return next((pack for pack in found if pack.default), found[0] if found else None)


def _listed(repository: Repository, entry: Descriptor) -> BootPack | None:
    try:
        if DIGEST not in entry.annotations:
            return _described(repository, entry)
        return _pack(entry.annotations, entry.digest)
    except (InvalidArgument, FormatError, ValueError):
        return None


def _described(repository: Repository, entry: Descriptor) -> BootPack | None:
    """From the manifest itself, where the list carries no annotations: one more round trip."""
    raw = repository.manifest(entry.digest)
    manifest = parse_manifest(raw.raw, record=RECORD)
    return _pack(manifest.annotations, entry.digest) if DIGEST in manifest.annotations else None


def _pack(annotations: Mapping[str, str], manifest: Digest) -> BootPack:
    size = int(annotations.get(SIZE, "0"))
    if not 0 < size <= BOOT_PACK_SIZE_MAX:
        raise FormatError(RECORD, SIZE, 0, f"{size}")
    digest = parse_digest(annotations[DIGEST], what=DIGEST)
    return BootPack(
        check_name(annotations.get(NAME, "")),
        Descriptor(BOOT_PACK, digest, size),
        annotations.get(DEFAULT) == "true",
        annotations.get(CREATED, ""),
        manifest,
    )
