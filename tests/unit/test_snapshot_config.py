"""The snapshot config: golden bytes and hostile input."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.digest import Digest
from imgsnap.errors import FormatError, ImgsnapError, UnsupportedFormat
from imgsnap.formats.rules import Rules
from imgsnap.formats.snapshot_config import ExtentConfig, SnapshotConfig, parse_config

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


def changed(path: str, value: object) -> bytes:
    document = json.loads(GOLDEN)
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


@given(ANY_JSON, st.sampled_from(PATHS))
def test_any_json_ends_in_a_named_error_or_a_config(value: object, path: str) -> None:
    with contextlib.suppress(ImgsnapError):
        parse_config(changed(path, value))
