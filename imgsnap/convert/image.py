"""The converted image of a snapshot: what a container runtime pulls to get the snapshot.

The source image's config with one stub layer in place of its layers. It is an ordinary image to
everybody else, so registries keep it, CRI pulls it and `FROM` names it.
"""

from typing import Any

from imgsnap.convert.artifact import put_raw
from imgsnap.convert.snapshot import Snapshot
from imgsnap.convert.source import CONFIG, SourceImage
from imgsnap.digest import Digest
from imgsnap.errors import FormatError
from imgsnap.formats.stub_layer import ANNOTATION, MEDIA_TYPE, stub_layer
from imgsnap.oci import media_types
from imgsnap.oci.manifest import (
    ImageManifest,
    canonical_json,
    parse_json_object,
    parse_manifest,
    raw_manifest,
)
from imgsnap.oci.published import RULES, SOURCE
from imgsnap.oci.repository import Descriptor, RawManifest, WritableRepository


def put_image(target: WritableRepository, image: SourceImage, snapshot: Snapshot) -> RawManifest:
    """Stores a snapshot's converted image by digest, untagged.

    The same bytes for the same source and snapshot. Raises FormatError for a config that cannot
    be written again, and what the repository raises.
    """
    digest = snapshot.manifest.descriptor.digest
    stub = stub_layer(digest)
    put_raw(target, stub.blob, MEDIA_TYPE)
    config = converted_config(image.config_raw, stub.diff_id, digest)
    source = parse_manifest(image.manifest.raw, media_type=image.manifest.descriptor.media_type)
    manifest = raw_manifest(
        ImageManifest(
            config=put_raw(target, config, media_types.OCI_CONFIG),
            layers=(Descriptor(MEDIA_TYPE, stub.digest, len(stub.blob), {ANNOTATION: digest}),),
            annotations={
                **source.annotations,
                SOURCE: image.manifest.descriptor.digest,
                RULES: snapshot.config.rules,
            },
        )
    )
    target.put_manifest(manifest)
    return manifest


def converted_config(raw: bytes, diff_id: Digest, snapshot: Digest) -> bytes:
    """The image config `raw` for the stub layer alone; all else is kept.

    The steps of the history made layers that are no longer there, and tools count them against
    the layers (image-spec, config.md, "history"): they become empty ones, and the stub's is added.
    Raises FormatError.
    """
    value = parse_json_object(raw, record=CONFIG)
    value["rootfs"] = {"type": "layers", "diff_ids": [diff_id]}
    value["history"] = [
        *({**step, "empty_layer": True} for step in _history(value)),
        {"created_by": "imgsnap convert", "comment": f"snapshot {snapshot}"},
    ]
    try:
        return canonical_json(value)
    except (ValueError, RecursionError) as error:  # half a surrogate pair, 1e999
        raise FormatError(CONFIG, "document", 0, f"cannot be written: {error}") from error


def _history(config: dict[str, Any]) -> list[dict[str, Any]]:
    steps = config.get("history") or []
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise FormatError(CONFIG, "history", 0, "is not a list of objects")
    return steps
