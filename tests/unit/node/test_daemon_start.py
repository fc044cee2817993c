"""A daemon that is slow to come up is waited for, by whoever needs it."""

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsnap.errors import AlreadyExists, Unavailable
from imgsnap.node import daemon, rpc
from imgsnap.node.places import NodePlaces


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """That of a daemon that is coming up: it listens and does not answer yet."""
    path = NodePlaces(tmp_path).control_socket
    path.parent.mkdir(parents=True, exist_ok=True)
    with rpc.listen(path) as found:
        yield found


def answer_later(listener: socket.socket, cache: Path, seconds: float) -> threading.Timer:
    handlers = {"place": lambda _: {"cache": str(cache)}, "status": lambda _: {"pid": 1}}
    timer = threading.Timer(seconds, rpc.Server(listener, handlers).start)
    timer.start()
    return timer


def test_one_that_listens_is_waited_for(listener: socket.socket, tmp_path: Path) -> None:
    timer = answer_later(listener, tmp_path / "cache", 6)
    daemon.ensure_daemon(tmp_path, tmp_path / "cache", None)
    timer.join()


def test_another_ones_is_as_good(listener: socket.socket, tmp_path: Path) -> None:
    """Two callers start one each, and the second daemon ends when it sees the first."""
    timer = answer_later(listener, tmp_path, 2)
    program = [sys.executable, "-c", "", "program"]
    daemon._start(program, NodePlaces(tmp_path).control_socket, 20)
    timer.join()


def test_its_socket_is_not_taken_away(listener: socket.socket, tmp_path: Path) -> None:
    path = NodePlaces(tmp_path).control_socket
    before = path.stat().st_ino
    with pytest.raises(Unavailable, match="did not answer in time"):
        daemon._listener(NodePlaces(tmp_path))
    assert path.stat().st_ino == before


def test_of_those_that_start_together_one_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, won, lost = threading.Barrier(8), [], []
    listen = rpc.listen

    def late(path: Path) -> socket.socket:
        time.sleep(0.1)  # the others have asked by then whether somebody listens
        return listen(path)

    monkeypatch.setattr(rpc, "listen", late)

    def start() -> None:
        together.wait()
        try:
            listener, _ = daemon._listener(NodePlaces(tmp_path))
        except AlreadyExists as error:
            lost.append(error)
        else:
            won.append(listener)
            rpc.Server(listener, {"status": lambda _: {"pid": 1}}).start()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for listener in won:
        listener.close()
    assert (len(won), len(lost)) == (1, 7)


def test_one_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import sys; sys.exit('no room')"]
    with pytest.raises(Unavailable, match="does not start: no room"):
        daemon._start(program, tmp_path / "socket", 20)
