"""Records of disks."""

import json
from pathlib import Path

import pytest

from imgsnap.blockstore.read_options import ReadOptions
from imgsnap.errors import ImgsnapError
from imgsnap.node.attachments import UBLK, Attachment
from imgsnap.node.source import Source
from imgsnap.node.ublk_devices import DiskRecord, disk_of, read_mark, read_records

ATTACHMENT = Attachment(
    number=3,
    id="ab" * 32 + UBLK,
    source=Source("store:app", Path("/store")),
    repository="app",
    manifest_digest="sha256:" + "ab" * 32,
    config_digest="sha256:" + "cd" * 32,
    size=4096,
    local=False,
    exact=False,
    options=ReadOptions(disk=True),
)


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = DiskRecord(5, ATTACHMENT)
    (tmp_path / "5.json").write_text(json.dumps(record.to_json()))
    leaving = DiskRecord(6, ATTACHMENT, leaving=True)
    (tmp_path / "6.json").write_text(json.dumps(leaving.to_json()))
    assert list(read_records(tmp_path)) == [record, leaving]
    assert disk_of(tmp_path, ATTACHMENT.id) == Path("/dev/ublkb5")
    assert disk_of(tmp_path, "other" + UBLK) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"number": "five"},
        {"attachment": None},
        {"attachment": {}},
        {"attachment": ATTACHMENT.to_json() | {"version": 99}},
    ],
)
def test_a_damaged_record_is_no_record(tmp_path: Path, damage: dict[str, object]) -> None:
    value = DiskRecord(5, ATTACHMENT).to_json() | damage
    with pytest.raises(ImgsnapError, match="damaged"):
        DiskRecord.from_json(value)
    (tmp_path / "5.json").write_text(json.dumps(value))
    (tmp_path / "6.json").write_text("{")
    assert list(read_records(tmp_path)) == []


def test_the_mark_is_made_once(tmp_path: Path) -> None:
    mark = read_mark(tmp_path / "ublk")
    assert 0 <= mark < 1 << 64 and read_mark(tmp_path / "ublk") == mark
    assert read_mark(tmp_path / "other") != mark
