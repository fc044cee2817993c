"""`python -m imgsnap_cli`."""

from imgsnap_cli.main import entry

entry()
