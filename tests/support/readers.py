"""Readers that compare every byte they get."""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path


def tree_files(root: Path) -> list[str]:
    """Relative paths of all regular files."""
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def listing(root: Path) -> dict[str, tuple]:
    """What a tree looks like from outside, without its times."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        target = os.readlink(path) if path.is_symlink() else ""
        size = status.st_size if path.is_file() else 0
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, size, target)
    return found


def compare_in_parallel(expected: Path, actual: Path, *, readers: int = 8, seed: int = 0) -> None:
    """Half of the readers go through all files, half jump about; all must see the same bytes."""
    names = tree_files(expected)
    content = {name: (expected / name).read_bytes() for name in names}

    def sequential(rng: random.Random) -> None:
        order = names[:]
        rng.shuffle(order)
        for name in order:
            assert (actual / name).read_bytes() == content[name], name

    def jumping(rng: random.Random) -> None:
        for _ in range(60):
            name = rng.choice(names)
            data = content[name]
            offset = rng.randrange(len(data) + 1)
            length = rng.choice((1, 100, 4096, 65_536))
            fd = os.open(actual / name, os.O_RDONLY)
            try:
                got = os.pread(fd, length, offset)
            finally:
                os.close(fd)
            assert got == data[offset : offset + length], (name, offset, length)

    run_all([sequential if n % 2 else jumping for n in range(readers)], seed)


def run_all(readers: list[Callable[[random.Random], None]], seed: int) -> None:
    """Runs them at once; raises the first failure."""
    failures: list[BaseException] = []

    def run(number: int, reader: Callable[[random.Random], None]) -> None:
        try:
            reader(random.Random(seed * 1000 + number))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a reader hangs"
    if failures:
        raise failures[0]
