"""Finds and records the referrers of a manifest, with and without the registry's API.

distribution-spec 1.1: "Listing Referrers", "Pushing Manifests with Subject" and the referrers
tag schema. Without the API (Docker's registry, Docker Hub, GHCR) the list is an index under the
tag ``sha256-<hex>``, which clients keep up to date themselves.
"""

import logging
import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from imgsnap.digest import Digest, digest_hex
from imgsnap.errors import FormatError, ImgsnapError, NotFound, Unavailable
from imgsnap.oci import index_edit, registry_upload
from imgsnap.oci.auth import Scope
from imgsnap.oci.http_message import Request, Response
from imgsnap.oci.manifest import (
    Document,
    ImageIndex,
    describe,
    parse_document,
    parse_index,
    referrer_descriptor,
)
from imgsnap.oci.media_types import OCI_INDEX
from imgsnap.oci.repository import MANIFEST_SIZE_MAX, Descriptor, RawManifest

if TYPE_CHECKING:
    from imgsnap.oci.registry import RegistryRepository

REFERRER_PAGES_MAX = 1000
UPDATE_ATTEMPTS_MAX = 8
"""Rounds of read, modify, write, read back. Registries offer no compare-and-swap for tags."""
NO_API_STATUSES = frozenset({400, 404, 405, 501})

_log = logging.getLogger(__name__)


def fallback_tag(subject: Digest) -> str:
    """The tag of the referrers tag schema for a subject."""
    return f"sha256-{digest_hex(subject)}"


class ReferrerLists:
    """The referrers of one repository's manifests. Thread safe as far as the registry is."""

    def __init__(self, repository: "RegistryRepository") -> None:
        self._repository = repository
        self._has_api: bool | None = None

    def of(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """Referrers of a type ("" for all), in the registry's order, without duplicates.

        Filters here as well: OCI-Filters-Applied is a courtesy, and some servers that send it
        filter by the config's media type only.
        """
        entries = self._entries(subject, artifact_type)
        found: dict[Digest, Descriptor] = {}
        for entry in entries:
            typed = entry if entry.artifact_type else self._with_type(entry)
            if not artifact_type or typed.artifact_type == artifact_type:
                found.setdefault(typed.digest, typed)
        return list(found.values())

    def add(self, subject: Digest, raw: bytes, document: Document) -> None:
        """Enters a manifest into the fallback tag's index, keeping all other entries.

        Raises Unavailable when other writers keep undoing the entry.
        """
        entry = referrer_descriptor(raw, document)
        tag = fallback_tag(subject)
        for _ in range(UPDATE_ATTEMPTS_MAX):
            value = self._tag_index(tag)
            if index_edit.has_digest(value, entry.digest):
                return
            index_edit.add(value, entry)
            updated = index_edit.to_bytes(value, size_max=MANIFEST_SIZE_MAX)
            index = parse_index(updated, record=f"index {tag}")
            registry_upload.put_manifest(
                self._repository, RawManifest(describe(updated, index), updated), tag
            )
            # Another writer may have read before and written after us: look again.
        if not index_edit.has_digest(self._tag_index(tag), entry.digest):
            raise Unavailable(
                f"{self._repository.name}:{tag}: other writers keep replacing the list",
                hint="push one referrer at a time, or use a registry with the referrers API",
            )

    def remove(self, subject: Digest, gone: Collection[Digest]) -> None:
        """Takes manifests out of the fallback tag's index; an entry that another writer brings
        back at the same time leads to a manifest that is not found, which readers bear."""
        tag = fallback_tag(subject)
        value = self._tag_index(tag)
        left = [entry for entry in value["manifests"] if entry["digest"] not in gone]
        if len(left) == len(value["manifests"]):
            return
        value["manifests"] = left
        updated = index_edit.to_bytes(value, size_max=MANIFEST_SIZE_MAX)
        index = parse_index(updated, record=f"index {tag}")
        manifest = RawManifest(describe(updated, index), updated)
        registry_upload.put_manifest(self._repository, manifest, tag)

    def _entries(self, subject: Digest, artifact_type: str) -> Sequence[Descriptor]:
        """From the API where the registry has it, else from the tag; asks for both at once while
        that is not known, since a start may be waiting for the answer."""
        if self._has_api is False:
            return self._from_tag(subject)
        if self._has_api:
            known = self._from_api(subject, artifact_type)
            return self._from_tag(subject) if known is None else known
        tagged: list[Sequence[Descriptor] | BaseException] = []

        def ask_tag() -> None:
            try:
                tagged.append(self._from_tag(subject))
            except BaseException as error:
                tagged.append(error)

        thread = threading.Thread(target=ask_tag, name="referrers", daemon=True)
        thread.start()
        listed = self._from_api(subject, artifact_type)
        self._has_api = listed is not None
        if listed is not None:
            return listed
        thread.join()
        if isinstance(tagged[0], BaseException):
            raise tagged[0]
        return tagged[0]

    def _from_api(self, subject: Digest, artifact_type: str) -> list[Descriptor] | None:
        """All pages of the API's answer; None when the registry lacks the API."""
        repository = self._repository
        target = repository.url("referrers", subject)
        if artifact_type:
            target += "?" + urlencode({"artifactType": artifact_type})
        entries: list[Descriptor] = []
        for _ in range(REFERRER_PAGES_MAX):
            request = Request(
                "GET",
                target,
                Scope.pull(repository.scoped),
                headers={"Accept": OCI_INDEX},
                accept=NO_API_STATUSES | {200},
            )
            page, following = repository.transport.exchange(request, _page_answer)
            if page is None:
                return None
            entries.extend(page.manifests)
            if following is None or following == target:
                break
            target = following
        return entries

    def _from_tag(self, subject: Digest) -> Sequence[Descriptor]:
        tag = fallback_tag(subject)
        try:
            _, document = self._repository.manifest_document(tag)
        except NotFound:
            return ()
        if not isinstance(document, ImageIndex):
            # The tag schema's name taken by an image: it refers to nothing.
            _log.warning("%s:%s is no index of referrers", self._repository.name, tag)
            return ()
        return document.manifests

    def _with_type(self, entry: Descriptor) -> Descriptor:
        """The entry with its artifact type read from the manifest itself.

        skopeo up to 1.9 drops artifactType from the entries of an index that it copies.
        """
        try:
            raw, document = self._repository.manifest_document(entry.digest)
        except (NotFound, FormatError) as error:
            _log.warning("referrer %s of %s: %s", entry.digest, self._repository.name, error)
            return entry
        return referrer_descriptor(raw.raw, document)

    def _tag_index(self, tag: str) -> dict[str, Any]:
        """The fallback index as JSON values, an empty one when there is none."""
        try:
            raw, document = self._repository.manifest_document(tag)
        except NotFound:
            return index_edit.empty()
        if not isinstance(document, ImageIndex):
            raise FormatError(f"{self._repository.name}:{tag}", "manifests", 0, "is missing")
        return index_edit.from_bytes(raw.raw, record=tag)


def _page_answer(response: Response) -> tuple[ImageIndex | None, str | None]:
    from imgsnap.oci.registry import next_page

    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if response.status != 200 or kind in ("text/html", "text/plain"):
        response.read_up_to(65536)
        return None, None
    raw = response.body(MANIFEST_SIZE_MAX)
    try:
        document = parse_document(raw, media_type=OCI_INDEX, record="list of referrers")
    except ImgsnapError:
        if raw.lstrip()[:1] == b"<":  # A portal's page with a 200.
            return None, None
        raise
    if not isinstance(document, ImageIndex):
        raise FormatError("list of referrers", "manifests", 0, "is missing")
    return document, next_page(response)
