"""Policies on disk."""

from pathlib import Path

from imgsnap.errors import InvalidArgument, NotFound
from imgsnap.trust.identity import Match, SignedIdentity
from imgsnap.trust.policy import Policy, SigstoreSigned
from imgsnap.trust.policy_parse import KEY, KEY_SIZE_MAX, POLICY_SIZE_MAX, parse_policy

_HINT = "see docs/trust.md"


def load_policy(path: Path) -> Policy:
    """The policy in a file, with the keys that it names; relative ones are beside it.

    Raises NotFound, and what `parse_policy` raises.
    """
    try:
        raw = _read(path, POLICY_SIZE_MAX)
    except OSError as error:
        raise NotFound(f"policy {path}: {error.strerror}", hint=_HINT) from error
    return parse_policy(raw, lambda name: _read(path.parent / name, KEY_SIZE_MAX), file=str(path))


def parse_text(text: str) -> Policy:
    """A policy as `Policy.to_text` has it, from another process. Raises InvalidArgument."""
    return parse_policy(text.encode(), _no_files)


def policy_of_key(path: Path) -> Policy:
    """Asks for a signature by the key in a file, of this manifest, whatever it says besides: what
    `cosign verify --key` asks for. Raises NotFound, InvalidArgument."""
    try:
        key = _read(path, KEY_SIZE_MAX)
    except OSError as error:
        raise NotFound(f"key {path}: {error.strerror}", hint=_HINT) from error
    if len(key) > KEY_SIZE_MAX or f"-----BEGIN {KEY}-----".encode() not in key:
        raise InvalidArgument(f"{path} holds no {KEY} in PEM form", hint="as cosign.pub does")
    return Policy((SigstoreSigned((key,), SignedIdentity(Match.DIGEST_ONLY)),), {})


def _read(path: Path, size_max: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size_max + 1)  # one too many is refused by who parses it


def _no_files(name: str) -> bytes:
    raise InvalidArgument(f"{name[:100]!r}: keys come with the policy here, and not as files")
