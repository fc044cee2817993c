"""Writes a snapshot's device as one plain file: materialise_probe.py STORE CACHE REFERENCE FILE"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "cli")]

from imgsnap.blockstore.materialise import materialise
from imgsnap_cli.places import Places
from imgsnap_cli.settings import Settings

FLAGS = {
    "plain_http": True,
    "insecure": False,
    "ca_file": None,
    "cert_file": None,
    "key_file": None,
    "registry_config": None,
    "headers": (),
}


def main(store: str, cache: str, reference: str, file: Path) -> None:
    settings = Settings.make(os.environ, store=store, cache=cache)
    with ExitStack() as stack:
        materialise(Places(settings, FLAGS).snapshot(stack, reference, None), file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
