"""The EROFS reader on generated and on damaged devices; no root needed."""

import random

from hypothesis import HealthCheck, given, settings

from imgsnap.errors import FormatError, InvalidArgument, NotFound, UnsupportedFormat
from imgsnap.formats import erofs
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.formats.layer_index import Kind
from imgsnap.formats.layer_index_codec import decode, encode
from imgsnap.units import BLOCK_SIZE
from tests.support.golden import LOWER, UPPER
from tests.support.images import Bytes, device, emit_layers, read_everything
from tests.support.layers import Layer, Node, build_all, directory
from tests.support.stacks import stacks


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(stacks)
def test_bytes_depend_on_the_layers_only(layers: list[Layer]) -> None:
    built = build_all(layers)
    first = emit_layers(built)
    for layer in built:
        layer.index = decode(encode(layer.index))
    assert emit_layers(built) == first
    reader = ErofsReader(Bytes(device(layers)))
    for path, inode in reader.walk():
        assert reader.lookup(path) == inode


def judge(data: bytes) -> bool:
    """Reads everything from a damaged device; only our errors may come out."""
    try:
        reader = ErofsReader(Bytes(data))
        found = read_everything(reader)
    except (FormatError, UnsupportedFormat):
        return False
    for path in found:
        try:
            reader.lookup(path)
            reader.resolve(path)
        except (FormatError, UnsupportedFormat, NotFound, InvalidArgument):
            continue
    return True


def resealed(data: bytearray) -> bytes:
    checksum = erofs.superblock_checksum(data)
    data[erofs.SUPER_OFFSET + 4 : erofs.SUPER_OFFSET + 8] = checksum.to_bytes(4, "little")
    return bytes(data)


def sample() -> bytes:
    """Small, with a directory of several blocks, so that every record kind is there."""
    many = {b"big": directory(), **{b"big/" + b"%03d" % n * 40: Node(Kind.FIFO) for n in range(50)}}
    return device([LOWER, UPPER, Layer(many)])


def test_damage_in_metadata_is_found_or_harmless() -> None:
    data = sample()
    used = [at for at in range(4 * BLOCK_SIZE) if data[at]]  # inodes, and blocks of "big"
    chance = random.Random(2)
    accepted = 0
    for _ in range(800):
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            at = min(chance.choice(used) + chance.choice((0, 0, 1, 2, 3)), len(data) - 1)
            changed[at] = chance.choice((changed[at] ^ 1 << chance.randrange(8), 0, 0xFF, 0x80))
        accepted += judge(resealed(changed))
    assert accepted


def test_block_zero_is_covered_by_the_checksum() -> None:
    data = sample()
    for at in range(erofs.SUPER_OFFSET, BLOCK_SIZE, 7):
        changed = bytearray(data)
        changed[at] ^= 0x10
        assert not judge(bytes(changed))


def test_truncation_is_always_found() -> None:
    data = sample()
    for length in [*range(0, len(data), 509), len(data) - 1]:
        assert not judge(data[:length])
