"""`trustedIdentities` of a Notary Project trust policy: parts of a signing certificate's subject.

notaryproject/specifications, trust-store-trust-policy.md, "Trusted Identities Constraints".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imgsnap.errors import InvalidArgument

PREFIX = "x509.subject:"
NAMES = ("C", "ST", "L", "STREET", "POSTALCODE", "O", "OU", "CN", "SERIALNUMBER")
"""RFC 4514's short names of the attributes that can be asked for."""
REQUIRED = ("C", "ST", "O")
_ESCAPED = ",;\\ "


@dataclass(frozen=True, slots=True)
class TrustedSubject:
    """Attributes that a certificate's subject must have, by short name, each with one value."""

    attributes: tuple[tuple[str, str], ...]

    def matches(self, subject: Mapping[str, Sequence[str]]) -> bool:
        """Whether the subject (short names to values) has them all. One that has two values for
        an attribute that is asked for does not match: which of them was meant?"""
        return all(list(subject.get(name, ())) == [value] for name, value in self.attributes)

    def __str__(self) -> str:
        return f"{PREFIX} " + ", ".join(f"{name}={_escape(v)}" for name, v in self.attributes)


def parse_subject(text: str) -> TrustedSubject:
    """``x509.subject: C=US, ST=WA, O=example``. Raises InvalidArgument."""
    if not text.startswith(PREFIX):
        raise InvalidArgument(f"{text[:100]!r} does not begin with {PREFIX!r}")
    found: dict[str, str] = {}
    for part in _split(text.removeprefix(PREFIX)):
        name, equals, value = part.lstrip(" ").partition("=")
        name = name.strip().upper()
        if not equals or name not in NAMES:
            raise InvalidArgument(f"{part[:100]!r} is not ATTRIBUTE=VALUE of {', '.join(NAMES)}")
        if name in found:
            raise InvalidArgument(f"{name} is there twice")
        found[name] = _unescape(value)
        if not found[name]:
            raise InvalidArgument(f"{name} is empty")
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise InvalidArgument(f"{', '.join(missing)} must be there")
    return TrustedSubject(tuple(found.items()))


def _split(text: str) -> list[str]:
    """At the commas that no backslash precedes."""
    parts, part, escaped = [], "", False
    for char in text:
        if char == "," and not escaped:
            parts.append(part)
            part = ""
            continue
        escaped = char == "\\" and not escaped
        part += char
    return [*parts, part]


def _unescape(value: str) -> str:
    """Without the blanks around it and its backslashes. Raises InvalidArgument."""
    value = value.lstrip(" ")
    found, kept, index = "", 0, 0
    while index < len(value):
        char = value[index]
        if char == "\\":
            index += 1
            if index == len(value) or value[index] not in _ESCAPED:
                raise InvalidArgument(f"{value[:100]!r}: a backslash before nothing to escape")
            char, kept = value[index], len(found) + 1
        elif char == ";":
            raise InvalidArgument(f"{value[:100]!r}: a semicolon needs a backslash before it")
        found += char
        index += 1
    return found[:kept] + found[kept:].rstrip(" ")


def _escape(value: str) -> str:
    text = "".join(f"\\{c}" if c in ",;\\" else c for c in value)
    if text.startswith(" "):
        text = "\\" + text
    return text[:-1] + "\\ " if text.endswith(" ") and len(value) > 1 else text
