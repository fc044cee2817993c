"""When a start from a boot pack is taken to be over."""

from pathlib import Path

import pytest

from imgsnap.blockstore.boot_stream import BootLoader
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.mount import attach
from imgsnap.mount.boot_phase import READ_AHEAD_AFTER_KB, BootPhase
from tests.support.memory_repository import MemoryRepository


def test_readahead_comes_back_when_the_pack_is_no_longer_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "_BDI", tmp_path / "bdi")
    value = tmp_path / "bdi/erofs-1/read_ahead_kb"
    value.parent.mkdir(parents=True)
    loader = BootLoader(MemoryRepository(), NodeCache(tmp_path / "cache"), ("",))
    phase = BootPhase(loader, "erofs-1")
    assert value.read_text() == "0"
    phase.check()
    phase.check()
    assert value.read_text() == "0"  # the stream goes on
    loader.close()
    loader.buffer.counts.served += 1
    phase.check()
    assert value.read_text() == "0"  # just used
    phase.check()
    assert value.read_text() == str(READ_AHEAD_AFTER_KB)


def test_a_bdi_that_is_gone_only_costs_speed(tmp_path: Path) -> None:
    attach.set_readahead("erofs-0-of-nobody", 0)
