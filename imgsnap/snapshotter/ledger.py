"""The rows on disk: SQLite, every change one durable transaction.

WAL with synchronous=FULL: what was acknowledged survives SIGKILL and a power cut, and other
processes may read beside the one that writes. The database itself refuses two rows of one name
and two claims of one chainID on one parent.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from imgsnap.digest import Digest
from imgsnap.errors import ImgsnapError, IntegrityError, NotFound, ResourceExhausted, Unsupported
from imgsnap.snapshotter.rows import Row, decode, encode

FILE_NAME = "ledger.db"
VERSION = 1
LOCK_WAIT_S = 30.0
"""For a reader in another process; ours is the only one that writes."""

_SCHEMA = """
create table rows (
    id integer primary key autoincrement,  -- autoincrement: an id is never used twice
    name text not null unique,
    parent text not null,
    target text,
    device text,
    body text not null
) strict;
create index children on rows (parent);
create unique index claims on rows (target, parent) where target is not null;
create index devices on rows (device) where device is not null;
"""
_COLUMNS = "id, name, parent, body"


class Ledger:
    """All rows. Safe for threads: one connection, one lock."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._lock = threading.RLock()

    @classmethod
    def open(cls, root: Path) -> "Ledger":
        """The ledger in `root`, made when there is none. Raises Unsupported, IntegrityError."""
        with _errors():
            connection = _connect(root / FILE_NAME)
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")
            connection.execute("begin immediate")
            version = _version(connection)
            if not version:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"pragma user_version = {VERSION}")
            connection.execute("commit")
        return cls(connection)

    @classmethod
    def read(cls, root: Path) -> "Ledger":
        """The ledger of a snapshotter that may be running, for reading. Raises NotFound."""
        path = root / FILE_NAME
        if not path.exists():
            raise NotFound(f"{root} is no snapshotter's directory", hint="say which with --root")
        with _errors():
            connection = _connect(path)
            connection.execute("pragma query_only = on")
            _version(connection)
        return cls(connection)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # Reading ---------------------------------------------------------------------------------

    def get(self, name: str) -> Row:
        """Raises NotFound."""
        row = self.find(name)
        if row is None:
            raise NotFound(f"snapshot {name!r} does not exist")
        return row

    def find(self, name: str) -> Row | None:
        rows = self._rows("where name = ?", name)
        return rows[0] if rows else None

    def scan(self) -> list[Row]:
        """All rows, oldest first."""
        return self._rows("order by id")

    def chain(self, name: str) -> Iterator[Row]:
        """The row of that name and all beneath it, from the top down. Raises NotFound."""
        seen: set[int] = set()
        while name:
            row = self.get(name)
            if row.id in seen:
                raise IntegrityError(f"snapshot {name!r} is its own ancestor")
            seen.add(row.id)
            yield row
            name = row.parent

    def has_children(self, name: str) -> bool:
        return bool(self._rows("where parent = ? limit 1", name))

    def claimed(self, target: Digest, parent: str) -> Row | None:
        """The row that stands for the chainID `target` on that parent."""
        rows = self._rows("where target = ? and parent = ?", target, parent)
        return rows[0] if rows else None

    def uses_device(self, snapshot: Digest) -> bool:
        """Whether a row's content is that snapshot."""
        return bool(self._rows("where device = ? limit 1", snapshot))

    def _rows(self, clause: str, *values: str) -> list[Row]:
        with self._lock, _errors():
            query = f"select {_COLUMNS} from rows {clause}"  # noqa: S608
            found = self._connection.execute(query, values).fetchall()
        return [decode(*columns) for columns in found]

    # Writing ---------------------------------------------------------------------------------

    @contextmanager
    def change(self) -> Iterator["Changes"]:
        """All changes of the block, durable when it ends; none when it raises.

        Whatever the block reads stays true until its end: nobody else writes meanwhile.
        """
        with self._lock:
            with _errors():
                self._connection.execute("begin immediate")
            try:
                yield Changes(self._connection)
                with _errors():
                    self._connection.execute("commit")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
                raise


class Changes:
    """What may be changed inside `Ledger.change`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def insert(self, row: Row) -> Row:
        """Adds a row whose `id` is given here."""
        with _errors():
            cursor = self._connection.execute(
                "insert into rows (name, parent, target, device, body) values (?, ?, ?, ?, ?)",
                _values(row),
            )
        if cursor.lastrowid is None:
            raise AssertionError("an insert gives an id")
        return replace(row, id=cursor.lastrowid)

    def update(self, row: Row) -> None:
        """Replaces the row with this id."""
        with _errors():
            self._connection.execute(
                "update rows set name = ?, parent = ?, target = ?, device = ?, body = ?"
                " where id = ?",
                (*_values(row), row.id),
            )

    def delete(self, row: Row) -> None:
        with _errors():
            self._connection.execute("delete from rows where id = ?", (row.id,))


def _values(row: Row) -> tuple[str, str, str | None, str | None, str]:
    return row.name, row.parent, row.target, row.device, encode(row)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False
    )
    connection.execute("pragma trusted_schema = off")
    return connection


def _version(connection: sqlite3.Connection) -> int:
    with closing(connection.execute("pragma user_version")) as cursor:
        version: int = cursor.fetchone()[0]
    if version > VERSION:
        raise Unsupported(
            f"the ledger is of version {version}, this imgsnap knows {VERSION}",
            hint="use the newer imgsnap that wrote it",
        )
    return version


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        text = f"ledger: {error}"
        code = getattr(error, "sqlite_errorcode", None)  # none when it was closed, for example
        if code == sqlite3.SQLITE_FULL:
            raise ResourceExhausted(text) from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise IntegrityError(text) from error
        raise ImgsnapError(text) from error
