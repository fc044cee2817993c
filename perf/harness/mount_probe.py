"""Prints as JSON how long one `mount_snapshot` takes in an interpreter that has imported its code.

  mount_probe.py STORE CACHE RUN_DIR REFERENCE TARGET

What a long-lived program that mounts would see: a node daemon, a snapshotter. Unmounts again.
"""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "cli")]

import http.client
import ssl

import blake3
import urllib3
import zstandard

from imgsnap.mount import server_process
from imgsnap.mount.session import mount_snapshot, unmount
from imgsnap.oci import locate
from imgsnap_cli.places import Places
from imgsnap_cli.settings import Settings

IMPORTED = (http.client, ssl, blake3, urllib3, zstandard, server_process, locate)
FLAGS = {
    "plain_http": True,
    "insecure": False,
    "ca_file": None,
    "cert_file": None,
    "key_file": None,
    "registry_config": None,
    "headers": (),
}


def main(arguments: list[str]) -> None:
    store, cache, run, reference = arguments[:4]
    target = Path(arguments[4])
    settings = Settings.make(os.environ, store=store, cache=cache, run=run)
    started = time.perf_counter()
    options = Places(settings, FLAGS).mount_arguments(reference, target, None, False)
    mount_snapshot(*options)
    try:
        names = os.listdir(target)  # noqa: PTH208
        wall = time.perf_counter() - started
    finally:
        unmount(target, settings.run)
    assert names, "the mounted root is empty"
    print(json.dumps({"wall_s": wall}))


if __name__ == "__main__":
    main(sys.argv[1:])
