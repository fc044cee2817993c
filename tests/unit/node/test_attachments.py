"""Attachment records: found by number and by id, numbers never used twice, damage ignored."""

import json
import threading
from pathlib import Path

import pytest

from imgsnap.blockstore.read_options import ReadOptions
from imgsnap.errors import ImgsnapError, InvalidArgument
from imgsnap.node.attachments import Attachment, AttachmentTable
from imgsnap.node.source import Source
from imgsnap.oci.locate import RegistryOptions

OPTIONS = RegistryOptions(
    plain_http=True, ca_file=Path("/etc/ca.pem"), headers=(("X-Name", "a"), ("X-Other", "b"))
)
SOURCE = Source("registry.example/app:1", Path("/store"), OPTIONS, (("HOME", "/root"),))


def attachment(name="ab" * 32, **changes):
    values = {
        "number": 0,
        "id": name,
        "source": SOURCE,
        "repository": "registry.example/app",
        "manifest_digest": "sha256:" + name,
        "config_digest": "sha256:" + "cd" * 32,
        "size": 4096,
        "local": False,
        "exact": True,
        "options": ReadOptions(readahead_max=0, boot_pack=("a", "b")),
    }
    return Attachment(**(values | changes))


def test_records_and_sources_come_back_as_they_were(tmp_path):
    table = AttachmentTable(tmp_path)
    kept = table.add(attachment())
    assert kept == attachment(number=1)
    again = AttachmentTable(tmp_path)
    assert again.by_number(1) == again.by_id(kept.id) == kept
    assert again.names() == [(1, kept.id)]
    assert Source.from_json(json.loads(json.dumps(SOURCE.to_json()))) == SOURCE


def test_an_id_is_kept_once_and_numbers_only_grow(tmp_path):
    table = AttachmentTable(tmp_path)
    first = table.add(attachment())
    assert table.add(attachment(repository="another")) == first
    second = table.add(attachment("ef" * 32))
    table.detach(second)
    assert table.by_id(second.id) is None
    assert table.by_number(2).detached
    table.remove(2)
    third = AttachmentTable(tmp_path).add(attachment("ef" * 32))
    assert third.number == 3, "the kernel may remember node ids of the second"


def test_an_id_is_free_while_the_kernel_still_reads_its_former_device(tmp_path):
    table = AttachmentTable(tmp_path)
    first = table.add(attachment())
    table.detach(first)
    second = table.add(attachment())
    assert (first.number, second.number) == (1, 2)
    assert [found.number for found in table.all()] == [1, 2]
    assert table.names() == [(2, second.id)]


@pytest.mark.parametrize("name", ["", "../number/1", "a/b", "x" * 300, "1.json/.."])
def test_odd_names_are_not_found(tmp_path, name):
    table = AttachmentTable(tmp_path)
    table.add(attachment())
    assert table.by_id(name) is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 9}', "\0", '{"version": 1, "id": 3}']
)
def test_damaged_records_are_as_if_they_were_not_there(tmp_path, text):
    table = AttachmentTable(tmp_path)
    kept = table.add(attachment())
    (tmp_path / "number/1.json").write_text(text)  # the same file under both names
    assert table.by_number(1) is None and table.by_id(kept.id) is None
    assert list(table.all()) == []
    assert table.add(attachment()).number == 2


def test_threads_share_a_table(tmp_path):
    table = AttachmentTable(tmp_path)
    names = [f"{number:064x}" for number in range(20)] * 3
    threads = [threading.Thread(target=table.add, args=(attachment(name),)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(table.names()) == 20
    assert len({number for number, _ in table.names()}) == 20


def test_what_is_no_source_or_attachment_is_refused():
    with pytest.raises(InvalidArgument):
        Source.from_json({"location": "x"})
    with pytest.raises(InvalidArgument):
        Source.from_json({**SOURCE.to_json(), "options": {"unknown": 1}})
    with pytest.raises(ImgsnapError, match="damaged"):
        Attachment.from_json({"version": 1})
