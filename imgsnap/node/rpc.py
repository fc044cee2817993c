"""Calls between the node's processes: one JSON line each way over a unix socket.

A request is {"op", "args"}, an answer {"result"} or {"error"}; descriptors may travel with an
answer. Who may connect is decided by the socket's directory, which only its owner may enter.
"""

import contextlib
import errno
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imgsnap import errors
from imgsnap.errors import ImgsnapError, InvalidArgument, Unavailable

MESSAGE_SIZE_MAX = 64 << 20
"""A line; the largest are listings and traces."""
REQUEST_SIZE_MAX = 1 << 20
CONNECTIONS_MAX = 64
DESCRIPTORS_MAX = 16
CALL_TIMEOUT_S = 30.0
_IDLE_S = 60.0
_ACCEPT_AGAIN_S = 0.1
_RECEIVE = 65536
_log = logging.getLogger(__name__)


class NobodyListens(Unavailable):
    """There is no process behind the socket."""


class Interrupted(Unavailable):
    """The process died, or was replaced, before it had answered."""


class Answer(NamedTuple):
    """A result, and open descriptors that the caller gets copies of."""

    result: Any
    descriptors: tuple[int, ...] = ()


Handler = Callable[[dict[str, Any]], Any]


def error_value(error: BaseException) -> dict[str, object]:
    """An error as JSON; `rebuild_error` is its inverse."""
    if isinstance(error, ImgsnapError):
        return {
            "class": type(error).__name__,
            "message": str(error),
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
    message = f"{type(error).__name__}: {error}"
    return {"class": "ImgsnapError", "message": message, "hint": None, "exit_code": 1}


def rebuild_error(value: Mapping[str, Any]) -> ImgsnapError:
    """The error another process met: of the same class, with message, hint and exit code."""
    found: object = getattr(errors, str(value["class"]), ImgsnapError)
    if not (isinstance(found, type) and issubclass(found, ImgsnapError)):
        found = ImgsnapError
    # Some classes compute their message from other arguments; this one is complete.
    error = found.__new__(found)
    ImgsnapError.__init__(error, str(value["message"]), hint=value["hint"])
    error.exit_code = int(value["exit_code"])
    return error


# Addresses ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for the socket that fits in the 108 bytes of a sockaddr_un."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, in the place of one that is there. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        with _short(path) as name:
            listener.bind(name)
        path.chmod(0o600)
        listener.listen(CONNECTIONS_MAX)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: Path, timeout_s: float) -> socket.socket:
    """Raises NobodyListens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        with _short(path) as name:
            connection.connect(name)
    except OSError as error:
        connection.close()
        raise NobodyListens(f"{path} does not answer: {error.strerror or error}") from error
    return connection


# Calling -----------------------------------------------------------------------------------------


def somebody_listens(path: Path) -> bool:
    """Whether a process has the socket open, also one that is too busy to answer now."""
    try:
        with connect(path, 0):
            return True
    except NobodyListens as error:
        return isinstance(error.__cause__, BlockingIOError)


def call(path: Path, operation: str, *, timeout_s: float = CALL_TIMEOUT_S, **args: Any) -> Any:
    """Asks the process at `path`. Raises what it met, Unavailable when it does not answer."""
    answer = call_for_descriptors(path, operation, timeout_s=timeout_s, **args)
    for fd in answer.descriptors:
        os.close(fd)
    return answer.result


def call_again(
    path: Path, operation: str, *, timeout_s: float, attempts: int = 3, **args: Any
) -> Any:
    """As `call` of an operation that may be done twice, where a process is replaced when it dies.

    Raises ImgsnapError when it keeps dying.
    """
    for _ in range(attempts):
        try:
            return call(path, operation, timeout_s=timeout_s, **args)
        except Interrupted as error:
            last = error
    raise ImgsnapError(f"the process behind {path} died {attempts} times doing this") from last


def call_for_descriptors(
    path: Path, operation: str, *, timeout_s: float = CALL_TIMEOUT_S, **args: Any
) -> Answer:
    """As `call`; the descriptors are the caller's to close."""
    with connect(path, timeout_s) as connection:
        try:
            connection.sendall(json.dumps({"op": operation, "args": args}).encode() + b"\n")
            line, descriptors = _receive(connection, MESSAGE_SIZE_MAX)
        except TimeoutError as error:
            raise Unavailable(f"{path} did not answer in time") from error
        except OSError as error:
            raise Interrupted(f"{path} stopped answering: {error.strerror or error}") from error
    try:
        value = json.loads(line)
        if "error" in value:
            raise rebuild_error(value["error"])
        return Answer(value["result"], descriptors)
    except BaseException as error:
        for fd in descriptors:
            os.close(fd)
        if isinstance(error, ValueError | KeyError):
            raise Interrupted(f"{path} stopped in the middle of its answer") from error
        raise


def _receive(connection: socket.socket, size_max: int) -> tuple[bytes, tuple[int, ...]]:
    """One line, and the descriptors that came with it; shorter when the other side closed."""
    buffer = bytearray()
    descriptors: list[int] = []
    while b"\n" not in buffer[-_RECEIVE:]:
        data, fds, _, _ = socket.recv_fds(connection, _RECEIVE, DESCRIPTORS_MAX)
        descriptors += fds
        if not data:
            break
        buffer += data
        if len(buffer) > size_max:
            raise InvalidArgument(f"a message of more than {size_max} bytes")
    return bytes(buffer), tuple(descriptors)


# Answering ---------------------------------------------------------------------------------------


class Server:
    """Answers calls on a listening socket, each connection in a thread of its own."""

    def __init__(self, listener: socket.socket, handlers: Mapping[str, Handler]) -> None:
        self._listener = listener
        self._handlers = handlers
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._draining = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._accept, name="rpc", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                select.select([self._listener], [], [])
                if self._draining.is_set():
                    return
                connection, _ = self._listener.accept()
            except (OSError, ValueError) as error:
                if self._listener.fileno() < 0 or getattr(error, "errno", 0) == errno.EBADF:
                    return  # closed
                _log.error("cannot take a call: %s", error)  # short of descriptors, for instance
                time.sleep(_ACCEPT_AGAIN_S)
                continue
            self._slots.acquire()
            try:
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            except RuntimeError as error:
                _log.error("cannot take a call: %s", error)
                connection.close()
                self._slots.release()

    def drain(self, timeout_s: float) -> bool:
        """Takes no further call and waits for those under way; False when some are left."""
        self._draining.set()
        deadline = time.monotonic() + timeout_s
        for _ in range(CONNECTIONS_MAX):
            if not self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return False
        return True

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(_IDLE_S)
                answer_one(connection, self._handlers)
        except OSError as error:
            _log.debug("a caller went away: %s", error)
        finally:
            self._slots.release()


def answer_one(connection: socket.socket, handlers: Mapping[str, Handler]) -> None:
    """Reads one request and answers it. Raises OSError when the caller is gone."""
    answer = Answer(None)
    try:
        line, descriptors = _receive(connection, REQUEST_SIZE_MAX)
        for fd in descriptors:
            os.close(fd)
        if not line:
            return
        answer = _handle(line, handlers)
        message = json.dumps({"result": answer.result}).encode()
    except OSError as error:
        if isinstance(error, TimeoutError | ConnectionError):
            raise
        message = json.dumps({"error": error_value(error)}).encode()
    except Exception as error:
        if not isinstance(error, ImgsnapError):
            _log.exception("a call failed unexpectedly")
        message = json.dumps({"error": error_value(error)}).encode()
    connection.settimeout(_IDLE_S)
    if answer.descriptors:
        # The first byte carries them; sendall would not.
        socket.send_fds(connection, [message[:1]], list(answer.descriptors))
        message = message[1:]
    connection.sendall(message + b"\n")


def _handle(line: bytes, handlers: Mapping[str, Handler]) -> Answer:
    try:
        request = json.loads(line)
        handler = handlers[request["op"]]
        args = dict(request["args"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"not a request: {line[:200]!r}") from error
    result = handler(args)
    return result if isinstance(result, Answer) else Answer(result)
