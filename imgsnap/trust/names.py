"""What the user asked for, as policies and signatures name it."""

import os
from dataclasses import dataclass

from imgsnap.digest import as_digest

DOCKER = "docker"
OCI = "oci"
_LOCAL = (OCI, "oci-archive", "docker-archive")


@dataclass(frozen=True, slots=True)
class Name:
    """A repository and what was asked of it: a tag or a digest.

    `transport` is that of containers-transports(5); `repository` is ``host[:port]/path`` for
    "docker", else a path without symlinks.
    """

    transport: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def of(cls, repository: str, reference: str) -> "Name":
        """From `Repository.name` and a reference in it.

        A registry may be called ``oci:5000`` too: only an absolute path is a local one's.
        """
        transport, _, path = repository.partition(":")
        if transport in _LOCAL and path.startswith("/"):
            name = os.path.realpath(path)
        else:
            transport, name = DOCKER, repository
        digest = as_digest(reference) or ""
        return cls(transport, name, "" if digest else reference, digest)

    def __str__(self) -> str:
        tail = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.transport}:{self.repository}{tail}"

    @property
    def is_docker(self) -> bool:
        """Whether it has an identity that signatures may name."""
        return self.transport == DOCKER

    def scopes(self) -> list[str]:
        """The scopes that match it, the narrowest first; the transport's default "" is the last.

        containers-policy.json(5), "Supported transports and their scopes".
        """
        if self.transport == DOCKER:
            return [*self._registry_scopes(), ""]
        if self.transport == OCI:
            return [*self._directory_scopes(), ""]
        return [""]

    def _registry_scopes(self) -> list[str]:
        tail = f"@{self.digest}" if self.digest else f":{self.tag}"
        parts = self.repository.split("/")
        found = [self.repository + tail]
        found += ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
        labels = parts[0].partition(":")[0].split(".")
        return found + ["*." + ".".join(labels[first:]) for first in range(1, len(labels))]

    def _directory_scopes(self) -> list[str]:
        parts = self.repository.split("/")  # the first is empty: "/" is no scope
        found = [f"{self.repository}:{self.tag}"] if self.tag else []
        return found + ["/".join(parts[:count]) for count in range(len(parts), 1, -1)]
