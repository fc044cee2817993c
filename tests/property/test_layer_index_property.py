"""The layer index record under generated layers and under damage."""

import random

from hypothesis import HealthCheck, given, settings

from imgsnap.errors import FormatError, UnsupportedFormat
from imgsnap.formats import layer_index_layout as layout
from imgsnap.formats.layer_index_codec import decode, encode
from tests.support.golden import LOWER, UPPER
from tests.support.layers import Layer, build
from tests.support.stacks import layers

quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(layers())
def test_every_layer_survives_the_round_trip(layer: Layer) -> None:
    index = build(layer).index
    data = encode(index)
    assert decode(data) == index
    assert encode(decode(data)) == data
    assert encode(build(layer).index) == data


def judge(data: bytes) -> bool:
    """Decodes damaged bytes: our errors, or a value that has exactly these bytes."""
    try:
        value = decode(data)
    except (FormatError, UnsupportedFormat):
        return False
    words = slice(12, 24)  # the checksum, and the features that a reader ignores
    again = encode(value)
    assert (again[: words.start], again[words.stop :]) == (data[: words.start], data[words.stop :])
    return True


def resealed(data: bytearray) -> bytes:
    data[12:16] = layout.header_checksum(data).to_bytes(4, "little")
    return bytes(data)


def test_truncation_is_always_found() -> None:
    data = encode(build(UPPER).index)
    for length in range(len(data)):
        assert not judge(data[:length])
    assert not judge(data + b"\0")


def test_single_damages_are_found_or_harmless() -> None:
    """Every bit of two records, with a header checksum that an attacker has set right."""
    accepted = 0
    for layer in (LOWER, UPPER):
        data = encode(build(layer).index)
        for bit in range(len(data) * 8):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            if bit < layout.HEADER_SIZE * 8:
                assert not judge(bytes(changed))  # the checksum covers all of the header
            accepted += judge(resealed(changed))
    assert accepted  # such as another uid


def test_many_damages_are_found_or_harmless() -> None:
    chance = random.Random(1)
    data = encode(build(UPPER).index)
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 6)):
            at = chance.choice((chance.randrange(len(data)), chance.randrange(28, 152)))
            changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        judge(resealed(changed))
