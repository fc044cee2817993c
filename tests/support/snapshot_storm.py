"""Clients that make, commit and remove containerd snapshots while the snapshotter is killed.

Each client keeps an account of its own: what was acknowledged must be there after a kill, the one
call without an answer wholly or not at all, and nothing else.
"""

import itertools
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from imgsnap.containerd.api.services.snapshots.v1 import snapshots_pb2 as messages
from imgsnap.snapshotter.report import check_root
from tests.support.snapshots_client import SnapshotsClient
from tests.support.snapshotter import Snapshotter

VIEW, ACTIVE, COMMITTED = messages.VIEW, messages.ACTIVE, messages.COMMITTED
CUT_OFF = {"UNAVAILABLE", "CANCELLED", "UNKNOWN"}
"""What a client sees of a killed server; UNKNOWN: the stream broke within an answer."""

Rows = dict[str, tuple[int, str]]
"""Name to kind and parent."""


@dataclass
class StormClient:
    name: str
    root: Path
    rng: random.Random
    rows: Rows = field(default_factory=dict)
    maybe: Rows | None = None  # if the call without an answer was done
    written: set[str] = field(default_factory=set)  # those that a file was written to
    calls: int = 0
    numbers: itertools.count = field(default_factory=itertools.count)

    def run(self, socket: Path, end: threading.Event) -> None:
        """Until the server is gone."""
        client = SnapshotsClient(socket)
        try:
            while not end.is_set():
                self._one(client)
                self.calls += 1
        except grpc.RpcError as error:
            if error.code().name not in CUT_OFF:
                raise
        finally:
            client.close()

    def _one(self, client: SnapshotsClient) -> None:
        actives = [n for n, (kind, _) in self.rows.items() if kind == ACTIVE]
        parents = {parent for _, parent in self.rows.values()}
        leaves = [name for name in self.rows if name not in parents]
        chance = self.rng.random()
        if chance < 0.05:
            client.cleanup()
        elif chance < 0.30 and actives:
            self._commit(client, self.rng.choice(actives))
        elif chance < (0.45 if len(self.rows) < 40 else 0.9) and leaves:
            self._remove(client, self.rng.choice(leaves))
        else:
            self._create(client)

    def _create(self, client: SnapshotsClient) -> None:
        name = f"{self.name}/{next(self.numbers)}"
        parent = self.rng.choice(["", *(n for n, (k, _) in self.rows.items() if k == COMMITTED)])
        kind = self.rng.choice((ACTIVE, ACTIVE, VIEW))
        self.maybe = {**self.rows, name: (kind, parent)}
        mounts = (client.prepare if kind == ACTIVE else client.view)(name, parent)
        self._done()
        if kind == ACTIVE:
            options = dict(o.partition("=")[::2] for o in mounts[0].options)
            tree = Path(options.get("upperdir") or mounts[0].source)
            (tree / name.replace("/", "-")).write_text(name)
            self.written.add(name)

    def _commit(self, client: SnapshotsClient, active: str) -> None:
        rows = dict(self.rows)
        name, (_, parent) = f"{active}-c", rows.pop(active)
        self.maybe = {**rows, name: (COMMITTED, parent)}
        client.commit(name, active)
        self._done()

    def _remove(self, client: SnapshotsClient, name: str) -> None:
        self.maybe = {n: row for n, row in self.rows.items() if n != name}
        client.remove(name)
        self._done()

    def _done(self) -> None:
        assert self.maybe is not None
        self.rows, self.maybe = self.maybe, None

    def judge(self, found: Rows, trees: dict[str, Path]) -> None:
        """Compares what is there with the account, and takes it over."""
        mine = {name: row for name, row in found.items() if name.startswith(f"{self.name}/")}
        assert mine in (self.rows, self.maybe), (self.rows, self.maybe, mine)
        for name, (kind, _) in mine.items():
            own = name.removesuffix("-c")
            if kind != VIEW and own in self.written:
                assert (trees[name] / own.replace("/", "-")).read_text() == own
        self.rows, self.maybe = mine, None


def storm(snapshotter: Snapshotter, *, kills: int, clients: int = 4, seed: int = 0) -> int:
    """Kills as often as asked; the number of acknowledged calls. The snapshotter is stopped."""
    rng = random.Random(seed)
    accounts = [
        StormClient(f"client{n}", snapshotter.root, random.Random(seed * 100 + n))
        for n in range(clients)
    ]
    for _ in range(kills):
        snapshotter.start()
        judge_all(snapshotter, accounts)
        end = threading.Event()
        errors: list[BaseException] = []

        def work(account: StormClient, end=end, errors=errors) -> None:
            try:
                account.run(snapshotter.socket, end)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(account,)) for account in accounts]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0, 0.5))
        snapshotter.kill()
        for thread in threads:
            thread.join(60)
        end.set()
        assert not errors, errors
    snapshotter.start()
    judge_all(snapshotter, accounts)
    clear(snapshotter)
    snapshotter.stop()
    return sum(account.calls for account in accounts)


def judge_all(snapshotter: Snapshotter, accounts: list[StormClient]) -> None:
    client = SnapshotsClient(snapshotter.socket)
    found = {info.name: (info.kind, info.parent) for info in client.list()}
    client.close()
    ids = {row.name: row.id for row in snapshotter.rows()}
    trees = {name: snapshotter.root / f"snapshots/{ids[name]}/fs" for name in found}
    for account in accounts:
        account.judge(found, trees)
    assert sum(len(account.rows) for account in accounts) == len(found)
    report = check_root(snapshotter.root)
    assert report.problems == (), report.problems


def clear(snapshotter: Snapshotter) -> None:
    """Removes everything, children first; nothing may be left."""
    client = SnapshotsClient(snapshotter.socket)
    while left := client.list():
        parents = {info.parent for info in left}
        for info in left:
            if info.name not in parents:
                client.remove(info.name)
    client.cleanup()
    client.close()
    assert snapshotter.files() == []
