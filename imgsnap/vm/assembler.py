"""Small programs for a guest: static ELF for x86-64, straight system calls.

Every argument is a constant: at run time there is nothing to compute. The calling convention is
that of the kernel (x86-64 psABI, A.2.1); instructions are named beside their bytes. A program says
why it fails on standard error, in one line.
"""

from collections.abc import Callable, Sequence

REFUSED = 126
"""Exit status of a program that could not do something it must; a shell's for what it may not
execute."""
_WRITE, _EXIT = 1, 60
_EACCES = 13
_ERROR_FD = 2
_BASE = 0x40_0000
_HEADERS = 64 + 56
_ARGUMENTS = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba")
"""movabs to rdi, rsi and rdx."""


class Assembler:
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
        for register, value in zip(_ARGUMENTS, arguments, strict=False):
            self.code += register + value.to_bytes(8, "little")
        self.code += b"\xb8" + number.to_bytes(4, "little")  # mov eax
        self.code += b"\x0f\x05"  # syscall

    def must(self, what: str, number: int, *arguments: int) -> None:
        """A system call whose failure ends the program."""
        self.call(number, *arguments)
        self.code += b"\x48\x85\xc0"  # test rax, rax
        self._unless(b"\x79", lambda: self.give_up(what, REFUSED))  # jns

    def give_up(self, why: str, status: int) -> None:
        said = f"imgsnap: {why}\n".encode("utf-8", "surrogateescape")
        self.call(_WRITE, _ERROR_FD, self.bytes_at(said), len(said))
        self.exit(status)

    def exit(self, status: int) -> None:
        """Ends the program."""
        self.call(_EXIT, status)

    def if_denied(self, why: str) -> None:
        """Gives up if the last call's answer was EACCES."""
        self.code += b"\x48\x83\xf8" + (-_EACCES).to_bytes(1, "little", signed=True)  # cmp rax
        self._unless(b"\x75", lambda: self.give_up(why, REFUSED))  # jne

    def _unless(self, jump: bytes, write: Callable[[], None]) -> None:
        """Writes code that the jump skips."""
        self.code += jump + b"\0"
        start = len(self.code)
        write()
        self.code[start - 1] = len(self.code) - start  # give_up is 54 bytes


def program(write: Callable[[Assembler], None]) -> bytes:
    """The ELF file of what `write` writes; it is called twice and must write the same."""
    # How long the code is does not depend on addresses: the first pass finds out.
    draft = Assembler(0)
    write(draft)
    done = Assembler(_BASE + _HEADERS + len(draft.code))
    write(done)
    return _elf(bytes(done.code + done.data))


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
