"""The ring, on this machine's io_uring."""

import os
from collections.abc import Iterator

import pytest

from imgsnap.errors import Unsupported
from imgsnap.ublk.control import UblkControl
from imgsnap.ublk.ring import Ring


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        made = Ring(4, 64)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    yield made
    made.close()


def test_a_notice_comes_when_the_descriptor_is_readable(ring: Ring) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        ring.poll(event, 2**64 - 1)
        ring.enter(0)
        assert ring.completions() == []
        os.eventfd_write(event, 1)
        ring.enter(1)
        ((user_data, result),) = ring.completions()
        assert user_data == 2**64 - 1 and result & 1
        assert ring.completions() == [], "each once"
    finally:
        os.close(event)


def test_more_submissions_than_the_ring_has_room_for(ring: Ring) -> None:
    event = os.eventfd(1, os.EFD_NONBLOCK)
    try:
        for number in range(30):
            ring.poll(event, number)
        found: list[int] = []
        while len(found) < 30:
            ring.enter(1)
            found += [user_data for user_data, _ in ring.completions()]
        assert sorted(found) == list(range(30))
    finally:
        os.close(event)


def test_a_command_that_the_file_does_not_know_fails(ring: Ring, tmp_path) -> None:
    with open(tmp_path / "file", "wb") as file:
        ring.command(file.fileno(), 1, b"payload", 7)
        ring.enter(1)
        ((user_data, result),) = ring.completions()
    assert user_data == 7 and result < 0


def test_a_kernel_without_the_driver_is_said(tmp_path) -> None:
    with pytest.raises(Unsupported, match="no ublk driver") as caught:
        UblkControl(str(tmp_path / "ublk-control"))
    hint = str(caught.value.hint)
    assert "CONFIG_BLK_DEV_UBLK" in hint and "modprobe ublk_drv" in hint and "--via fuse" in hint


def test_a_file_in_the_drivers_place_is_refused(tmp_path, ring: Ring) -> None:
    (tmp_path / "ublk-control").touch()
    with pytest.raises(Unsupported, match="too old"):
        UblkControl(str(tmp_path / "ublk-control"))
