"""A snapshotter's core with its parts at hand."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgsnap.snapshotter.claims import Claims
from imgsnap.snapshotter.directories import Directories
from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.snapshots import Snapshots
from tests.support.remote_parts import DirectoryDevices, Images, OneFileLayers, image_of

APP = image_of("base", "middle", "app")


@dataclass
class Core:
    root: Path
    ledger: Ledger
    directories: Directories
    images: Images
    devices: DirectoryDevices
    layers: OneFileLayers
    snapshots: Snapshots


@pytest.fixture
def root() -> Iterator[Path]:
    """Short and without blanks, as a snapshotter's directory must be."""
    with tempfile.TemporaryDirectory(prefix="imgsnap-u-") as name:
        yield Path(name)


@pytest.fixture
def core(root: Path) -> Iterator[Core]:
    ledger, directories = Ledger.open(root), Directories(root)
    images, devices, layers = Images([APP]), DirectoryDevices(root / "devices"), OneFileLayers()
    claims = Claims(ledger, directories, images, devices, layers)
    snapshots = Snapshots(ledger, directories, claims)
    yield Core(root, ledger, directories, images, devices, layers, snapshots)
    snapshots.close()
    ledger.close()
