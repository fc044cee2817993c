"""containerd's filter language, which selects rows in List.

    filter    := selector ("," selector)*           all must match; of several filters, one
    selector  := fieldpath [operator value]         without an operator: the field is there
    fieldpath := field ("." field)*                 name, parent, kind, labels.NAME
    operator  := "==" | "!=" | "~="                 the last one searches a regular expression
    field     := quoted | [A-Za-z0-9_]+
    value     := quoted | [^,\\s]+                   not beginning with a quote, "." or operator
    quoted    := Go string; "/" and "|" quote as well, but only after ~=

Source: containerd's pkg/filters. containerd itself only sends `==`.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imgsnap.errors import InvalidArgument, LimitExceeded
from imgsnap.snapshotter.rows import Row

FILTERS_MAX = 64
FILTER_CHARS_MAX = 32 << 10
SELECTORS_MAX = 64
PATTERN_CHARS_MAX = 1024
PATTERN_REPEATS_MAX = 1
"""Python's engine backtracks: with more repeats, or with groups, it could take for ever."""

Match = Callable[[Row], bool]

_BLANK = re.compile(r"\s*")
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r"[^,\s]+")
_QUOTED = {
    quote: re.compile(rf"{q}((?:[^\\\n{q}]|\\.)*){q}")
    for quote, q in (('"', '"'), ("/", "/"), ("|", r"\|"))
}
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\\"/|])|([0-7]{3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)",
    re.DOTALL,
)
_LETTERS = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}
_GROUP_OR_REPEAT = re.compile(r"\\.|([()])|([*+?{])", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition; `operator` is empty when the field only has to be there."""

    path: tuple[str, ...]
    operator: str = ""
    value: str = ""

    def matches(self, row: Row, pattern: re.Pattern[str] | None) -> bool:
        found = field_of(row, self.path)
        if self.operator == "==":
            return found == self.value
        if self.operator == "!=":
            return (found or "") != self.value
        if pattern is not None:
            return pattern.search(found or "") is not None
        return found is not None


def parse_filters(filters: Sequence[str]) -> Match:
    """A row matches when one of the filters does, or when there are none.

    Raises InvalidArgument or LimitExceeded.
    """
    if len(filters) > FILTERS_MAX:
        raise LimitExceeded("FILTERS_MAX", len(filters), FILTERS_MAX, where="filters")
    if not filters:
        return lambda row: True
    matches = [_all(parse_filter(text)) for text in filters]
    return lambda row: any(match(row) for match in matches)


def parse_filter(text: str) -> list[Selector]:
    """The selectors of one filter, all of which must match; none for an empty one.

    Raises InvalidArgument or LimitExceeded.
    """
    if len(text) > FILTER_CHARS_MAX:
        raise LimitExceeded("FILTER_CHARS_MAX", len(text), FILTER_CHARS_MAX, where="filter")
    return _Parser(text).selectors() if text else []


def field_of(row: Row, path: tuple[str, ...]) -> str | None:
    """The value of a field; None when there is no such field."""
    match path:
        case ("name", *_):
            return row.name
        case ("parent", *_):
            return row.parent
        case ("kind", *_):
            return row.kind.name.lower()
        case ("labels", *rest):
            return row.labels.get(".".join(rest))
    return None


def _all(selectors: list[Selector]) -> Match:
    compiled = [(one, _pattern(one.value) if one.operator == "~=" else None) for one in selectors]
    return lambda row: all(one.matches(row, pattern) for one, pattern in compiled)


def _pattern(text: str) -> re.Pattern[str]:
    if len(text) > PATTERN_CHARS_MAX:
        raise LimitExceeded("PATTERN_CHARS_MAX", len(text), PATTERN_CHARS_MAX, where="filter")
    found = list(_GROUP_OR_REPEAT.finditer(text))
    repeats = sum(1 for one in found if one[2])
    if any(one[1] for one in found) or repeats > PATTERN_REPEATS_MAX:
        raise InvalidArgument(
            f"filter: {text!r}: groups, and more than {PATTERN_REPEATS_MAX} repeat, are refused"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidArgument(f"filter: {text!r}: {error}") from error


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def selectors(self) -> list[Selector]:
        found = [self._selector()]
        while self._at < len(self._text):
            if self._text[self._at] != ",":
                raise self._error("a comma")
            if len(found) == SELECTORS_MAX:
                raise LimitExceeded("SELECTORS_MAX", len(found) + 1, SELECTORS_MAX, where="filter")
            self._at += 1
            found.append(self._selector())
        return found

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._text[self._at : self._at + 1] == ".":
            self._at += 1
            path.append(self._field())
        if self._text[self._at : self._at + 1] in ("", ","):
            return Selector(tuple(path))
        operator = self._take(_OPERATOR, "an operator")
        if operator not in ("==", "!=", "~="):
            raise self._error("==, != or ~= before this")
        return Selector(tuple(path), operator, self._value(any_quote=operator == "~="))

    def _field(self) -> str:
        self._skip_blanks()
        if self._text[self._at : self._at + 1] == '"':
            return self._quoted()
        return self._take(_FIELD, "a field")

    def _value(self, *, any_quote: bool) -> str:
        self._skip_blanks()
        first = self._text[self._at : self._at + 1]
        if first in _QUOTED and (first == '"' or any_quote):
            return self._quoted()
        if first in ("/", "|", ".", "=", "!", "~"):
            raise self._error("a value; this one needs quotes")
        value = self._take(_VALUE, "a value")
        if not all(_is_graphic(character) for character in value):
            raise self._error("a printable value before this")
        return value

    def _quoted(self) -> str:
        match = _QUOTED[self._text[self._at]].match(self._text, self._at)
        if match is None:
            raise self._error("the end of what is quoted from here")
        self._at = match.end()
        return self._unquote(match[1])

    def _unquote(self, text: str) -> str:
        """Go's escapes; those of bytes may make up one character together."""
        out, end = bytearray(), 0
        for match in _ESCAPE.finditer(text):
            out += text[end : match.start()].encode() + self._escape(match)
            end = match.end()
        try:
            return (out + text[end:].encode()).decode()
        except UnicodeDecodeError as error:
            raise self._error("UTF-8 before this") from error

    def _escape(self, match: re.Match[str]) -> bytes:
        letter, octal, byte, short, long = match.groups()
        if letter:
            return bytes([_LETTERS.get(letter, ord(letter))])
        number = int(octal, 8) if octal else int(byte or short or long or "-1", 16)
        try:
            return bytes([number]) if octal or byte else chr(number).encode()
        except (ValueError, OverflowError, UnicodeEncodeError) as error:
            raise self._error("a legal escape before this") from error

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        self._skip_blanks()
        match = pattern.match(self._text, self._at)
        if match is None:
            raise self._error(what)
        self._at = match.end()
        return match[0]

    def _skip_blanks(self) -> None:
        blank = _BLANK.match(self._text, self._at)
        self._at = blank.end() if blank else self._at

    def _error(self, expected: str) -> InvalidArgument:
        return InvalidArgument(f"filter: expected {expected} at {self._at} of {self._text[:200]!r}")


def _is_graphic(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMNPS"
