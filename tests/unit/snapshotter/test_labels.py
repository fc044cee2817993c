"""Labels as hostile input."""

import pytest

from imgsnap.errors import InvalidArgument, LimitExceeded
from imgsnap.snapshotter import labels
from imgsnap.snapshotter.labels import check_labels, check_name, digest_label, mapped_root

DIGEST = "sha256:" + "a" * 64


def test_labels_are_limited():
    fits = {"a": "b" * (labels.LABEL_BYTES_MAX - 1)}
    assert check_labels(fits) == fits
    for bad in ({"aa": fits["a"]}, {"a": "é" * 2048}, {str(n): "" for n in range(1025)}):
        with pytest.raises(LimitExceeded):
            check_labels(bad)


def test_names_are_limited():
    assert check_name("k8s.io/1/x") == "k8s.io/1/x"
    for bad in ("", "a\0b"):
        with pytest.raises(InvalidArgument):
            check_name(bad)
    with pytest.raises(LimitExceeded):
        check_name("é" * 2049)


def test_digests_are_digests():
    assert digest_label({}, labels.TARGET) is None
    assert digest_label({labels.TARGET: DIGEST}, labels.TARGET) == DIGEST
    for bad in ("", "/etc/passwd", "sha256:../../x", DIGEST.upper(), DIGEST + "\n"):
        with pytest.raises(InvalidArgument):
            digest_label({labels.TARGET: bad}, labels.TARGET)


@pytest.mark.parametrize(
    ("uids", "gids", "root"),
    [
        ("0:100000:65536", "0:200000:65536", (100000, 200000)),
        ("1:5:1,0:7:1", "0:0:1", (7, 0)),
        ("0:4294967294:1", "0:1:1", (4294967294, 1)),
    ],
)
def test_mapped_root(uids: str, gids: str, root: tuple[int, int]):
    assert mapped_root({labels.UID_MAPPING: uids, labels.GID_MAPPING: gids}) == root


@pytest.mark.parametrize(
    "bad",
    [
        *("", "0", "0:1", "0:1:2:3", "a:b:c", "0:-1:1", "0: 1:1", "0:1:0", "1:1:1", "0:1:1,"),
        *(
            "0:4294967295:1",
            "0:0:4294967296",
            "0:٣:1",
            "0:99999999999:1",
            ",".join(["0:1:1"] * 341),
        ),
    ],
)
def test_mappings_that_are_refused(bad: str):
    with pytest.raises((InvalidArgument, LimitExceeded)):
        mapped_root({labels.UID_MAPPING: bad, labels.GID_MAPPING: "0:1:1"})
    with pytest.raises((InvalidArgument, LimitExceeded)):
        mapped_root({labels.GID_MAPPING: bad})


def test_no_mapping():
    assert mapped_root({}) is None
