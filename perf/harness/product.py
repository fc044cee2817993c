"""imgsnap as a library, for probes that run in interpreters of their own."""

import os

from imgsnap_cli.places import Places
from imgsnap_cli.settings import Settings

_FLAGS = {
    "plain_http": True,
    "insecure": False,
    "ca_file": None,
    "cert_file": None,
    "key_file": None,
    "registry_config": None,
    "hosts_dir": None,
    "headers": (),
}


def open_places(store: str, cache: str, run: str) -> tuple[Places, Settings]:
    """What the command line makes of its options."""
    settings = Settings.make(os.environ, store=store, cache=cache, run=run)
    return Places(settings, _FLAGS), settings
