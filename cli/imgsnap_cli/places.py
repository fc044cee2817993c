"""From what the user typed to an open repository; the registry flags that go with it."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS = (
    click.option("--plain-http", is_flag=True, help="Speak http, not https"),
    click.option("--insecure", is_flag=True, help="Do not verify TLS certificates"),
    click.option("--ca-file", metavar="FILE", type=click.Path(), help="Trust these CAs"),
    click.option("--cert-file", metavar="FILE", type=click.Path(), help="Client certificate"),
    click.option("--key-file", metavar="FILE", type=click.Path(), help="Its key"),
    click.option("--registry-config", metavar="FILE", type=click.Path(), help="Credentials"),
    click.option("-H", "--header", "headers", metavar="K: V", multiple=True, help="Extra header"),
)


def registry_flags(function: F) -> F:
    """Adds the registry flags; the command gets them as keyword arguments for `Places`."""
    for option in reversed(_FLAGS):
        function = option(function)
    return function
