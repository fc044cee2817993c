"""Prints as JSON how long one `mount_snapshot` takes in an interpreter that has imported its code.

  mount_probe STORE CACHE RUN_DIR REFERENCE TARGET

What a long-lived program that mounts would see: a node daemon, a snapshotter. Unmounts again.
"""

import http.client
import json
import os
import ssl
import sys
import time
from pathlib import Path

import blake3
import urllib3
import zstandard

from harness.product import open_places
from imgsnap.node import session
from imgsnap.node.session import mount_snapshot, unmount
from imgsnap.oci import locate

IMPORTED = (http.client, ssl, blake3, urllib3, zstandard, session, locate)


def main(arguments: list[str]) -> None:
    reference, target = arguments[3], Path(arguments[4])
    places, settings = open_places(*arguments[:3])
    started = time.perf_counter()
    mount_snapshot(*places.mount_arguments(reference, target, None, False))
    try:
        names = os.listdir(target)  # noqa: PTH208
        wall = time.perf_counter() - started
    finally:
        unmount(target, settings.run)
    assert names, "the mounted root is empty"
    print(json.dumps({"wall_s": wall}))


if __name__ == "__main__":
    main(sys.argv[1:])
