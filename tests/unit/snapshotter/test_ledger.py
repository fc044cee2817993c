"""The ledger: atomic, unique, readable from elsewhere, and suspicious of its own file."""

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from imgsnap.errors import ImgsnapError, IntegrityError, NotFound, Unsupported
from imgsnap.snapshotter.ledger import FILE_NAME, Ledger
from imgsnap.snapshotter.rows import Claim, Kind, Row, Usage
from tests.support.remote_parts import image_of

LAYER = image_of("base").layers[0]
ROW = Row(0, "key", "", Kind.COMMITTED, 1, 2, {"a": "é"}, Usage(3, 4))


def test_rows_come_back(root: Path):
    ledger = Ledger.open(root)
    claimed = replace(ROW, name="claimed", parent="key", claim=Claim("r/x", LAYER, LAYER.digest))
    with ledger.change() as changes:
        first, second = changes.insert(ROW), changes.insert(claimed)
    ledger.close()
    ledger = Ledger.open(root)
    assert ledger.scan() == [first, second]
    assert list(ledger.chain("claimed")) == [second, first]
    assert ledger.claimed(LAYER.chain_id, "key") == second
    assert ledger.claimed(LAYER.chain_id, "") is None
    assert ledger.uses_device(LAYER.digest)
    assert (ledger.has_children("key"), ledger.has_children("claimed")) == (True, False)
    with pytest.raises(NotFound):
        ledger.get("nothing")
    ledger.close()


def test_all_or_nothing(root: Path):
    ledger = Ledger.open(root)
    with pytest.raises(RuntimeError), ledger.change() as changes:
        changes.insert(ROW)
        raise RuntimeError
    assert ledger.scan() == []
    with pytest.raises(ImgsnapError), ledger.change() as changes:
        changes.insert(ROW)
        changes.insert(ROW)  # the name is taken
    assert ledger.scan() == []
    ledger.close()


def test_two_claims_of_one_layer_on_one_parent_are_refused(root: Path):
    ledger = Ledger.open(root)
    one = replace(ROW, claim=Claim("r/x", LAYER))
    with ledger.change() as changes:
        changes.insert(one)
        changes.insert(replace(one, name="elsewhere", parent="key"))
    with pytest.raises(ImgsnapError), ledger.change() as changes:
        changes.insert(replace(one, name="twice"))
    assert len(ledger.scan()) == 2
    ledger.close()


def test_an_id_is_never_used_twice(root: Path):
    ledger = Ledger.open(root)
    with ledger.change() as changes:
        first = changes.insert(ROW)
    with ledger.change() as changes:
        changes.delete(first)
    with ledger.change() as changes:
        assert changes.insert(ROW).id > first.id
    ledger.close()


def test_another_process_reads_meanwhile(root: Path):
    ledger = Ledger.open(root)
    with ledger.change() as changes:
        changes.insert(ROW)
    with ledger.change() as changes:
        changes.insert(replace(ROW, name="not yet"))
        script = (
            "import sys; from pathlib import Path; from imgsnap.snapshotter.ledger import Ledger;"
            "print([row.name for row in Ledger.read(Path(sys.argv[1])).scan()])"
        )
        command = [sys.executable, "-c", script, str(root)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
        )
    assert done.stdout == "['key']\n"
    reader = Ledger.read(root)
    with pytest.raises(ImgsnapError), reader.change() as changes:
        changes.insert(replace(ROW, name="by a reader"))
    reader.close()
    ledger.close()
    assert len(Ledger.read(root).scan()) == 2  # also when nobody has it open


def test_durable(root: Path):
    """What a power cut would show cannot be tried here; that it was asked for can."""
    ledger = Ledger.open(root)
    connection = ledger._connection
    assert connection.execute("pragma synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    ledger.close()


@pytest.mark.parametrize(
    "body", ["", "{}", "[]", '{"kind":"x"}', "[" * 100000, '{"kind":1}', '{"kind":"view"}']
)
def test_damaged_rows_are_errors(root: Path, body: str):
    ledger = Ledger.open(root)
    with ledger.change() as changes:
        changes.insert(ROW)
    ledger.close()
    with sqlite3.connect(root / FILE_NAME) as connection:
        connection.execute("update rows set body = ?", (body,))
    connection.close()
    with pytest.raises(IntegrityError):
        Ledger.read(root).scan()


def test_other_files_are_errors(root: Path):
    with pytest.raises(NotFound):
        Ledger.read(root)
    (root / FILE_NAME).write_bytes(b"not a database" * 1000)
    for opening in (Ledger.open, Ledger.read):
        with pytest.raises(IntegrityError):
            opening(root)


def test_a_newer_ledger_is_refused(root: Path):
    Ledger.open(root).close()
    with sqlite3.connect(root / FILE_NAME) as connection:
        connection.execute("pragma user_version = 99")
    connection.close()
    with pytest.raises(Unsupported):
        Ledger.open(root)


def test_a_cycle_is_an_error(root: Path):
    ledger = Ledger.open(root)
    with ledger.change() as changes:
        changes.insert(replace(ROW, parent="key"))
    with pytest.raises(IntegrityError):
        list(ledger.chain("key"))
    ledger.close()
