"""Prints as JSON the CPU time of flatten and emit of a made-up image, in a fresh interpreter."""

import json
import sys
import time

from imgsnap.convert.erofs_write import emit
from imgsnap.convert.flatten import flatten
from imgsnap.formats.layer_index import LayerIndex
from tests.support.layers import Layer, Node, build, directory, regular, symlink

FILES_PER_DIRECTORY = 12
CONTENTS = 2000
"""Distinct file contents a layer: the builder's time grows with their square."""


def made_up_image(inodes: int, layers: int) -> list[LayerIndex]:
    """Layers of packages: a directory of a dozen files each, one of them a symlink."""
    return [build(_layer(number, inodes // layers)).index for number in range(layers)]


def _layer(number: int, inodes: int) -> Layer:
    layer = Layer(label=f"layer {number}")
    owner = "usr/lib/python3/dist-packages"
    for row in range(inodes):
        package, rest = divmod(row, FILES_PER_DIRECTORY)
        path = f"{owner}/layer{number}-package{package:05}"
        entry: Node
        if rest == 0:
            entry = directory(mtime=1_700_000_000)
        elif rest == 1:
            path, entry = f"{path}/link", symlink(b"../target")
        else:
            content = f"{number} {row % CONTENTS}".encode()
            path, entry = f"{path}/module{rest:02}.py", regular(content, mtime=row)
        layer.entries[path.encode()] = entry
    return layer


def main(inodes: int, layers: int, rounds: int) -> None:
    indexes = made_up_image(inodes, layers)
    samples = []
    for _ in range(rounds):
        started = time.process_time()
        metadata = emit(flatten(indexes))
        samples.append(time.process_time() - started)
    result = {"cpu_s": samples, "inodes": metadata.inode_count, "bytes": len(metadata.metadata)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
