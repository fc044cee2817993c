"""Calls over a unix socket: results, errors, descriptors, and callers that misbehave."""

import os
import socket
import threading

import pytest

from imgsnap.errors import Busy, ImgsnapError, InvalidArgument, LimitExceeded, Unavailable
from imgsnap.node import rpc


@pytest.fixture
def path(tmp_path):
    # Longer than a sockaddr_un takes.
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    return directory / "server.sock"


@pytest.fixture
def serving(path):
    def lend(args):
        reader, writer = os.pipe()
        os.write(writer, b"lent")
        os.close(writer)
        lent.append(reader)
        return rpc.Answer("a pipe", (reader,))

    def fail(args):
        raise Busy("in use", hint="wait")

    def limit(args):
        raise LimitExceeded("size", 5, 4, where="test")

    def bug(args):
        raise ValueError("a bug")

    lent = []
    listener = rpc.listen(path)
    handlers = {"echo": lambda args: args, "lend": lend, "fail": fail, "limit": limit, "bug": bug}
    rpc.Server(listener, handlers).start()
    yield path
    listener.close()
    for fd in lent:
        os.close(fd)


def test_arguments_and_results(serving):
    value = {"text": "ü" * 100_000, "number": 3, "nothing": None}
    assert rpc.call(serving, "echo", **value) == value
    assert serving.stat().st_mode & 0o777 == 0o600


def test_errors_keep_class_hint_and_exit_code(serving):
    with pytest.raises(Busy, match="in use") as caught:
        rpc.call(serving, "fail")
    assert caught.value.hint == "wait" and caught.value.exit_code == 10
    with pytest.raises(LimitExceeded) as caught:
        rpc.call(serving, "limit")
    assert "over the limit" in str(caught.value)
    with pytest.raises(ImgsnapError, match="ValueError: a bug"):
        rpc.call(serving, "bug")
    with pytest.raises(InvalidArgument, match="not a request"):
        rpc.call(serving, "unknown")


def test_descriptors_travel(serving):
    answer = rpc.call_for_descriptors(serving, "lend")
    assert answer.result == "a pipe"
    (fd,) = answer.descriptors
    assert os.read(fd, 10) == b"lent"
    os.close(fd)


def test_nobody_and_those_who_die(path):
    with pytest.raises(rpc.NobodyListens):
        rpc.call(path, "echo")
    listener = rpc.listen(path)
    answered = []

    def die():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            answered.append(connection.recv(10))
            connection.close()

    thread = threading.Thread(target=die)
    thread.start()
    with pytest.raises(rpc.Interrupted):
        rpc.call(path, "echo")
    with pytest.raises(ImgsnapError, match="died 3 times"):
        rpc.call_again(path, "echo", timeout_s=5)
    assert len(answered) == 4
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    with pytest.raises(Unavailable):
        rpc.call(path, "echo")


def test_a_silent_server_is_not_waited_for_for_ever(path):
    listener = rpc.listen(path)
    with pytest.raises(Unavailable, match="in time"):
        rpc.call(path, "echo", timeout_s=0.05)
    listener.close()


@pytest.mark.parametrize("request_", [b"", b"\n", b"[]\n", b"{}\n", b"xx", b"\xff\xfe\n"])
def test_nonsense_is_answered_and_the_server_goes_on(serving, request_):
    with rpc.connect(serving, 5) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(4096)
    assert b'"error"' in answer or not request_
    assert rpc.call(serving, "echo", n=1) == {"n": 1}


def test_a_request_without_end_is_refused(serving):
    with rpc.connect(serving, 5) as connection:
        try:
            for _ in range(rpc.REQUEST_SIZE_MAX // 65536 + 4):
                connection.sendall(b"x" * 65536)
        except OSError:
            pass
    assert rpc.call(serving, "echo", n=1) == {"n": 1}
