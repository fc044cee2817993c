"""What the tests of the transport read, and how."""

from tests.support.oci_images import descriptor_of, repository_at

NAME = "team/app"
DATA = bytes(range(256)) * 40
BLOB = descriptor_of(DATA)


def read(registry, **settings):
    """Fifty bytes of the blob through a repository of its own."""
    repository = repository_at(registry.host, NAME, **settings)
    try:
        return repository.read_range(BLOB, 100, 50)
    finally:
        repository.close()
