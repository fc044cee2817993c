"""The HTTP side of the scripted registry: sends its answers, with what switches and faults do to
them."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from tests.support.registry import ScriptedRegistry, Switches


@dataclass(frozen=True)
class LogEntry:
    """One request as it arrived; `headers` have lower-case names, `server` is the origin's kind."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    status: int
    server: str  # "registry" or "storage"


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of an answer."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def error(status: int, code: str, message: str = "refused", **headers: str) -> Answer:
    """A refusal as the distribution specification has it."""
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"Content-Type": "application/json", **named}, body)


def spoilt(answer: Answer, fault: str) -> Answer:
    """An answer with what a fault does to it; faults of the connection are not its business."""
    if fault == "truncate":
        return replace(answer, body=answer.body[: len(answer.body) // 2])
    if fault == "wrong range":
        return replace(answer, headers={**answer.headers, "Content-Range": "bytes 1-2/3"})
    if fault == "wrong bytes":
        return replace(answer, body=answer.body[::-1])
    if fault == "no such range":
        return error(416, "BLOB_UNKNOWN")
    if fault == "too many requests":
        return error(429, "TOOMANYREQUESTS", Retry_After="0")
    if fault == "unavailable":
        return error(503, "UNAVAILABLE")
    return answer


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients drop connections on purpose here."""


class Handler(BaseHTTPRequestHandler):
    scripted: "ScriptedRegistry"
    server_kind: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def setup(self) -> None:
        super().setup()
        with self.scripted._lock:
            self.scripted.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        """The log is a list."""

    def _serve(self) -> None:
        registry = self.scripted
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with registry._lock:
            answer = registry.answer(self, body)
            url = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            registry.log.append(
                LogEntry(
                    self.command,
                    url.path,
                    parse_qs(url.query, keep_blank_values=True),
                    headers,
                    answer.status,
                    self.server_kind,
                )
            )
            switches = registry.switches
            body_sent, dropped, stalled = answer.body, False, False
            fault = registry.next_fault(self) if answer.status in (200, 206) else ""
            answer = spoilt(answer, fault)
            is_blob = self.command == "GET" and answer.headers.get("Content-Type") == (
                "application/octet-stream"
            )
            if is_blob and switches.truncate_times > 0:
                switches.truncate_times -= 1
                body_sent = body_sent[:-1]
            elif is_blob and switches.drop_times > 0:
                switches.drop_times -= 1
                dropped = True
            elif is_blob and switches.stall_times > 0:
                switches.stall_times -= 1
                stalled = True
        if fault == "delay":
            time.sleep(0.05)
        if fault == "hang up":
            self.close_connection = True
            return
        if fault == "no HTTP":
            self.wfile.write(b"what is this?\r\n\r\n")
            self.close_connection = True
            return
        if fault == "stall" or (stalled and switches.stall_after is None):
            self._stall()
            return
        if fault in ("drop", "stall in the middle"):
            switches = replace(switches, drop_after=len(answer.body) // 2)
            switches.stall_after = switches.drop_after
            dropped, stalled = fault == "drop", fault != "drop"
        body_sent = answer.body if fault else body_sent
        self._send(answer, body_sent, dropped, switches, stalled)

    def _stall(self) -> None:
        """Holds the connection until the client closes it, the registry ends, or time is up."""
        self.scripted.stalled.release()
        self.close_connection = True
        self.connection.settimeout(0.05)
        for _ in range(600):
            if self.scripted._closing.is_set():
                return
            try:
                self.connection.recv(1)
                return
            except TimeoutError:
                continue
            except OSError:
                return

    def _send(
        self,
        answer: Answer,
        body: bytes,
        dropped: bool,
        switches: "Switches",
        stalled: bool = False,
    ) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if switches.set_cookie:
            self.send_header("Set-Cookie", "sid=harbor; Path=/")
        if switches.warning:
            self.send_header("Warning", switches.warning)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if stalled:
            self.wfile.write(body[: switches.stall_after])
            self.wfile.flush()
            self._stall()
            return
        if dropped:
            self.wfile.write(body[: switches.drop_after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815
