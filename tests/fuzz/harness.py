"""Fuzzing without instruments: mutations of kept inputs, and what a parser may answer.

A target is a function of bytes. It returns something or raises ImgsnapError, within TIME_MAX_S and
without the process growing by more than MEMORY_MAX. Inputs that bring a new answer (another kind of
error, another message) become parents of further ones: a poor man's coverage.

``python -m tests.fuzz --seconds 600`` runs all targets in turn and keeps what breaks one in
``tests/fuzz/corpus/<target>/``, where tests/fuzz/test_fuzz.py finds it again.
"""

import hashlib
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imgsnap.errors import ImgsnapError

CORPUS = Path(__file__).parent / "corpus"
TIME_MAX_S = 5
MEMORY_MAX = 256 << 20
PARENTS_MAX = 300
_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass(frozen=True)
class Target:
    """`seeds` makes valid inputs; `repair` mends checksums, so that mutations get past them."""

    name: str
    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    repair: Callable[[bytes], bytes] = bytes
    words: tuple[bytes, ...] = ()
    size_max: int = 1 << 20
    cost: int = 1  # how many times dearer than the cheap ones; it gets so many times fewer inputs

    def kept(self) -> list[bytes]:
        """The corpus: what once broke something, and what was worth keeping."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).glob("*"))]


class Broken(AssertionError):
    """An input that a target did not survive."""

    def __init__(self, target: Target, data: bytes, problem: str) -> None:
        super().__init__(f"{target.name}: {problem}; input of {len(data)} bytes: {data[:200]!r}")
        self.target = target
        self.data = data

    def keep(self) -> Path:
        directory = CORPUS / self.target.name
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / hashlib.sha256(self.data).hexdigest()[:16]
        path.write_bytes(self.data)
        return path


def attempt(target: Target, data: bytes) -> str:
    """The kind of answer to an input. Raises Broken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _limited():
            target.parse(data)
        answer = "ok"
    except ImgsnapError as error:
        answer = f"{type(error).__name__} {re.sub('[0-9]+|[^ -~]+', '#', str(error))[:80]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Broken(target, data, f"{type(error).__name__}: {error}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if grown > MEMORY_MAX:
        raise Broken(target, data, f"it took {grown >> 20} MiB")
    return answer


def fuzz(target: Target, seed: int, *, count: int = 0, until: float = 0.0) -> int:
    """Tries mutated inputs, `count` of them or until a time; how many. Raises Broken."""
    rng = random.Random(f"{seed} {target.name}")
    parents = [*target.seeds(), *target.kept()]
    seen = {attempt(target, data) for data in parents}
    tried = 0
    while tried < count or time.monotonic() < until:
        data = target.repair(_mutated(rng, parents, target)[: target.size_max])
        tried += 1
        answer = attempt(target, data)
        if answer not in seen:
            seen.add(answer)
            parents.append(data)
            if len(parents) > PARENTS_MAX:
                del parents[rng.randrange(len(parents))]
    return tried


def _mutated(rng: random.Random, parents: list[bytes], target: Target) -> bytes:
    data = bytearray(rng.choice(parents))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(9):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.randrange(256)
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                del data[at : at + rng.choice((1, 2, 4, 16, 256))]
            case 4:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(_NUMBERS) + rng.choice((-1, 0, 0, 1))
                number &= (1 << 8 * width) - 1
                data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 5:
                piece = data[at : at + rng.randrange(1, 65)]
                data[at:at] = piece * rng.choice((1, 1, 2, 50))
            case 6:
                other = rng.choice(parents)
                start = rng.randrange(len(other) + 1)
                data[at:] = other[start:]
            case 7 if target.words:
                data[at : at + rng.choice((0, 1, 4))] = rng.choice(target.words)
            case _:
                del data[at:]
    return bytes(data)


class _Late(BaseException):
    """No parser catches this."""


@contextmanager
def _limited() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise _Late(f"no answer in {TIME_MAX_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, TIME_MAX_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


TARGETS: dict[str, Target] = {}
JSON_WORDS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"null",
    b"1e999",
    b"-1",
    b"\\ud800",
    b"[" * 9000,
)


def target(name: str, **options: object) -> Callable[[Callable[[bytes], object]], None]:
    """Registers a parser; see `Target` for the options."""

    def register(parse: Callable[[bytes], object]) -> None:
        TARGETS[name] = Target(name, parse, **options)  # type: ignore[arg-type]

    return register
