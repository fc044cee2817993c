"""The program that starts a command in a guest: it becomes who the image wants and executes it.

busybox has no tool that sets supplementary groups and then a user, and a shell would take words and
variables apart again. So one is written for each command: a static ELF program for x86-64, straight
system calls with every argument a constant. Its calling convention is that of the kernel
(x86-64 psABI, A.2.1); instructions are named beside their bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from imgsnap.mount.container import Command

NOT_EXECUTABLE = 126
NOT_FOUND = 127
"""Exit statuses as shells have them."""
_WRITE, _EXECVE, _EXIT, _CHDIR, _MKDIR, _FCHOWN = 1, 59, 60, 80, 83, 93
_SETUID, _SETGID, _SETGROUPS, _CHROOT = 105, 106, 116, 161
_EACCES = 13
_ERROR_FD = 2
_BASE = 0x40_0000
_HEADERS = 64 + 56


_ARGUMENTS = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba")
"""movabs to rdi, rsi and rdx."""


class _Assembler:
    """Code, and the data that it points to."""

    def __init__(self, data_address: int) -> None:
        self._data_address = data_address
        self.code = bytearray()
        self.data = bytearray()

    def bytes_at(self, value: bytes) -> int:
        """The address of a copy of these bytes."""
        self.data += bytes(-len(self.data) % 8)
        address = self._data_address + len(self.data)
        self.data += value
        return address

    def text_at(self, text: str) -> int:
        return self.bytes_at(text.encode("utf-8", "surrogateescape") + b"\0")

    def list_at(self, texts: Sequence[str]) -> int:
        """The address of a list of pointers that ends with NULL."""
        pointers = [*(self.text_at(text) for text in texts), 0]
        return self.bytes_at(b"".join(pointer.to_bytes(8, "little") for pointer in pointers))

    def call(self, number: int, *arguments: int) -> None:
        """A system call."""
        for register, value in zip(
            (b"\x48\xbf", b"\x48\xbe", b"\x48\xba"), arguments, strict=False
        ):
            self.code += register + value.to_bytes(8, "little")
        self.code += b"\xb8" + number.to_bytes(4, "little")  # mov eax
        self.code += b"\x0f\x05"  # syscall

    def must(self, what: str, number: int, *arguments: int) -> None:
        """A system call whose failure ends the program."""
        self.call(number, *arguments)
        self.code += b"\x48\x85\xc0"  # test rax, rax
        self._unless(b"\x79", lambda: self.give_up(what, NOT_EXECUTABLE))  # jns

    def give_up(self, why: str, status: int) -> None:
        said = f"imgsnap: {why}\n".encode("utf-8", "surrogateescape")
        self.call(_WRITE, _ERROR_FD, self.bytes_at(said), len(said))
        self.call(_EXIT, status)

    def if_denied(self, why: str) -> None:
        """Gives up if the last call's answer was EACCES."""
        self.code += b"\x48\x83\xf8" + (-_EACCES).to_bytes(1, "little", signed=True)  # cmp rax
        self._unless(b"\x75", lambda: self.give_up(why, NOT_EXECUTABLE))  # jne

    def _unless(self, jump: bytes, write: Callable[[], None]) -> None:
        """Writes code that the jump skips."""
        self.code += jump + b"\0"
        start = len(self.code)
        write()
        self.code[start - 1] = len(self.code) - start  # give_up is 54 bytes


def launcher(command: Command) -> bytes:
    """A program that runs a command in its working directory's tree, as root's child.

    Its standard output becomes the user's, so that programs may open /dev/stdout. It exits with 127
    when there is no such program, with 126 when it may not be executed or the user not become.
    """
    # How long the code is does not depend on addresses: the first pass finds out.
    length = len(_assemble(command, 0).code)
    done = _assemble(command, _BASE + _HEADERS + length)
    return _elf(bytes(done.code + done.data))


def _assemble(command: Command, data_address: int) -> _Assembler:
    out = _Assembler(data_address)
    who = command.identity
    out.must("cannot enter the image", _CHROOT, out.text_at("."))
    for path in _parents(command.cwd):
        out.call(_MKDIR, out.text_at(path), 0o755)  # as runc does
    out.must(f"cannot enter {command.cwd}", _CHDIR, out.text_at(command.cwd))
    out.call(_FCHOWN, 1, who.uid, who.gid)
    groups = b"".join(group.to_bytes(4, "little") for group in who.groups)
    out.must("cannot set the groups", _SETGROUPS, len(who.groups), out.bytes_at(groups))
    out.must("cannot set the group", _SETGID, who.gid)
    out.must("cannot set the user", _SETUID, who.uid)
    arguments, environment = out.list_at(command.args), out.list_at(command.env)
    for path in _candidates(command):
        out.call(_EXECVE, out.text_at(path), arguments, environment)
    out.if_denied(f"{command.args[0]}: permission denied")
    out.give_up(f"{command.args[0]}: not found", NOT_FOUND)
    return out


def _parents(cwd: str) -> list[str]:
    path = PurePosixPath(cwd)
    return [str(parent) for parent in (*reversed(path.parents), path)][1:]


def _candidates(command: Command) -> Iterator[str]:
    """The paths that a program's name may stand for, by PATH."""
    name = command.args[0]
    if "/" in name:
        yield name
        return
    path = dict(item.split("=", 1) for item in command.env).get("PATH", "")
    for directory in path.split(":"):
        yield f"{directory or '.'}/{name}"


def _elf(program: bytes) -> bytes:
    """An ELF64 program of one segment, entered at its beginning (System V gABI, chapter 4)."""
    size = _HEADERS + len(program)
    entry = _BASE + _HEADERS
    words = (
        (b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), None),
        (2, 2), (62, 2), (1, 4),  # executable, x86-64, version
        (entry, 8), (64, 8), (0, 8), (0, 4),  # entry, program headers, no sections, no flags
        (64, 2), (56, 2), (1, 2), (64, 2), (0, 2), (0, 2),  # sizes and counts of headers
        (1, 4), (7, 4), (0, 8),  # PT_LOAD, rwx, from offset 0
        (_BASE, 8), (_BASE, 8), (size, 8), (size, 8), (0x1000, 8),
    )  # fmt: skip
    header = b"".join(
        word if isinstance(word, bytes) else word.to_bytes(length or 0, "little")
        for word, length in words
    )
    return header + program
