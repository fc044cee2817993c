"""Feature words, as in ext4 and EROFS: three sets of bits that say what a record uses.

compat: a reader may ignore unknown bits. ro_compat: a reader may, a writer must not touch the
record. incompat: a reader must refuse the record.
"""

from imgsnap.errors import UnsupportedFormat


def check_features(record: str, incompat: int, known: int = 0) -> None:
    """Raises UnsupportedFormat for incompatible features outside `known`."""
    unknown = incompat & ~known
    if unknown:
        raise UnsupportedFormat(
            f"{record}: unknown incompatible features {unknown:#x}",
            hint="it was written by a newer imgsnap; upgrade this one",
        )


def check_version(record: str, version: int, known: int) -> None:
    """Raises UnsupportedFormat for a format version above `known`."""
    if version != known:
        raise UnsupportedFormat(
            f"{record}: format version {version}, this imgsnap reads version {known}",
            hint="upgrade imgsnap, or convert the image again",
        )
