"""Where a command's output ends."""

import pytest

from imgsnap.vm.machine import _Until as Until

MARK = b"\0end token\0"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("text", [b"", b"out", b"\0", b"\0end other\0", b"a\0end tok", b"\0\0end "])
def test_all_before_the_mark_and_nothing_of_it(text: bytes, size: int) -> None:
    found: list[bytes] = []
    until = Until(MARK, found.append)
    sent = text + MARK + b"after"
    for at in range(0, len(sent), size):
        until(sent[at : at + size])
    until.close()
    assert until.seen and b"".join(found) == text


def test_what_cannot_be_the_mark_is_not_held_back() -> None:
    found: list[bytes] = []
    until = Until(MARK, found.append)
    until(b"prompt$ ")
    assert found == [b"prompt$ "]
    until(b"\0en")
    assert found == [b"prompt$ "]
    until.close()
    assert not until.seen and b"".join(found) == b"prompt$ \0en"
