"""The snapshot config: golden bytes and hostile input."""

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.digest import Digest
from imgsnap.errors import FormatError, ImgsnapError, UnsupportedFormat
from imgsnap.formats.rules import Rules
from imgsnap.formats.snapshot_config import (
    DeviceExtent,
    ExtentConfig,
    SnapshotConfig,
    VerityConfig,
    parse_config,
)

D = Digest("sha256:" + "ab" * 32)
CONFIG = SnapshotConfig(
    os="linux",
    architecture="amd64",
    variant="",
    rules=Rules().text,
    source_manifest=D,
    source_config=D,
    metadata_digest=D,
    metadata_blocks=2,
    total_blocks=7,
    inode_count=3,
    uuid="00" * 16,
    extents=(ExtentConfig(D, D, "cd" * 32, 2, 5),),
)
GOLDEN = (
    '{"erofs":{"inodes":3,"metadataBlocks":2,"metadataDigest":"DIGEST","totalBlocks":7,'
    '"uuid":"00000000000000000000000000000000"},"extents":[{"baseBlock":2,"blocks":5,'
    '"chainID":"DIGEST","diffID":"DIGEST","extentID":"EXTENT"}],"format":{"compat":[],'
    '"incompat":[],"roCompat":[],"version":1},"platform":{"architecture":"amd64","os":"linux",'
    '"variant":""},"rules":"index=1,extent=2,chunk=1,target=262144,min=65536,max=524288",'
    '"source":{"config":"DIGEST","manifest":"DIGEST"}}'
).replace("DIGEST", D).replace("EXTENT", "cd" * 32)  # fmt: skip


def test_golden_bytes() -> None:
    assert CONFIG.to_json().decode() == GOLDEN
    assert parse_config(GOLDEN.encode()) == CONFIG


SEALED = replace(CONFIG, verity=VerityConfig("12" * 32, DeviceExtent("ef" * 32, 7, 2)))


def test_golden_bytes_with_a_hash_tree() -> None:
    plain, text = json.loads(GOLDEN), SEALED.to_json()
    sealed = json.loads(text)
    assert json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode() == text
    assert sealed.pop("verity") == {
        "algorithm": "sha256",
        "rootHash": "12" * 32,
        "dataBlocks": 7,
        "hashOffset": 7 * 4096,
        "extentID": "ef" * 32,
        "blocks": 2,
    }
    plain["format"]["incompat"] = ["verity"]
    assert sealed == plain
    assert parse_config(text) == SEALED
    assert (SEALED.total_blocks, SEALED.device_blocks) == (7, 9)
    assert SEALED.device_extents == (*CONFIG.extents, DeviceExtent("ef" * 32, 7, 2))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("verity", None),
        ("verity.algorithm", "sha1"),
        ("verity.dataBlocks", 6),
        ("verity.hashOffset", 0),
        ("verity.hashOffset", 7 << 12 | 1),
        ("verity.blocks", 3),
        ("verity.blocks", -1),
        ("verity.extentID", ""),
        ("verity.rootHash", "AB" * 32),
        ("erofs.totalBlocks", (1 << 32) - 1),
    ],
)
def test_hash_trees_that_do_not_add_up(path: str, value: object) -> None:
    with pytest.raises(FormatError, match="verity"):
        parse_config(changed(path, value, SEALED.to_json()))


def test_a_hash_tree_and_its_feature_come_together() -> None:
    verity = json.loads(SEALED.to_json())["verity"]
    with pytest.raises(FormatError, match="verity"):
        parse_config(changed("verity", verity))
    with pytest.raises(FormatError, match="verity"):
        parse_config(changed("format.incompat", ["verity"]))
    with pytest.raises(UnsupportedFormat):
        parse_config(changed("format.incompat", ["verity", "shiny"], SEALED.to_json()))


def changed(path: str, value: object, raw: bytes = GOLDEN.encode()) -> bytes:
    document = json.loads(raw)
    place = document
    *parents, last = path.split(".")
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("erofs.metadataBlocks", 0),
        ("erofs.metadataBlocks", 1 << 40),
        ("erofs.totalBlocks", 8),
        ("erofs.totalBlocks", True),
        ("erofs.metadataDigest", "sha256:zz"),
        ("erofs.uuid", "0"),
        ("extents", {}),
        ("extents.0.baseBlock", 3),
        ("extents.0.blocks", -1),
        ("extents.0.extentID", "x" * 64),
        ("extents.0.diffID", None),
        ("platform", []),
        ("rules", 7),
        ("source.manifest", "sha512:" + "0" * 128),
    ],
)
def test_refused_by_name(path: str, value: object) -> None:
    with pytest.raises(FormatError, match=path.rpartition(".")[2]):
        parse_config(changed(path, value))


def test_newer_formats() -> None:
    for raw in (changed("format.version", 2), changed("format.incompat", ["shiny"])):
        with pytest.raises(UnsupportedFormat):
            parse_config(raw)
    assert parse_config(changed("format.compat", ["harmless"])) == CONFIG


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
PATHS = ["format", "erofs", "extents", "platform", "source", "rules", "erofs.uuid"]


@given(ANY_JSON, st.sampled_from([*PATHS, "verity", "verity.blocks", "format.incompat"]))
def test_any_json_ends_in_a_named_error_or_a_config(value: object, path: str) -> None:
    with contextlib.suppress(ImgsnapError):
        parse_config(changed(path, value, SEALED.to_json()))
