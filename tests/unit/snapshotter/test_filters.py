"""The filter language: what containerd sends, what it refuses, and what would hurt us."""

import re

import pytest

from imgsnap.errors import InvalidArgument, LimitExceeded
from imgsnap.snapshotter import filters
from imgsnap.snapshotter.filters import Selector, parse_filter, parse_filters
from imgsnap.snapshotter.rows import Kind, Row

ROW = Row(1, "n/1/key", "n/1/below", Kind.ACTIVE, 0, 0, {"a.b/c": "x=1,y", "empty": ""})


@pytest.mark.parametrize(
    ("text", "selectors"),
    [
        ("", []),
        ("name", [(("name",), "", "")]),
        ('labels."a.b/c"==x', [(("labels", "a.b/c"), "==", "x")]),
        ("labels.a.b!=x", [(("labels", "a", "b"), "!=", "x")]),
        ('a==b,c~="d"', [(("a",), "==", "b"), (("c",), "~=", "d")]),
        (r'a=="\"\\\n\x41\101é\U0001f600"', [(("a",), "==", '"\\\nAAé😀')]),
        (r'a=="\xc3\xa9"', [(("a",), "==", "é")]),
        ("a~=|b|", [(("a",), "~=", "b")]),
        ("a==sha256:0,parent==x/y", [(("a",), "==", "sha256:0"), (("parent",), "==", "x/y")]),
        ("  a  ==  b", [(("a",), "==", "b")]),
    ],
)
def test_parsed(text: str, selectors: list):
    assert parse_filter(text) == [Selector(*one) for one in selectors]


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("name==n/1/key", True),
        ("parent==n/1/below,kind==active", True),
        ("parent==n/1/below,kind==view", False),
        ('labels."a.b/c"=="x=1,y"', True),
        ('labels."a.b/c"', True),
        ("labels.empty", True),
        ("labels.other", False),
        ('labels.other==""', False),
        ("labels.other!=x", True),
        ('labels.other!=""', False),
        ("labels.other~=x", False),
        ('labels."a.b/c"~="^x.*y$"', True),
        ("name~=1/k", True),
        (r'name~="^n/\\d/[a-z]+$"', True),
        (r'name~="\\(|\\*|\\+|key"', True),
        (r'name~="n\\.1"', False),
        ("unknown", False),
        ("unknown!=x", True),
    ],
)
def test_matched(text: str, matches: bool):
    assert parse_filters([text])(ROW) is matches


def test_several_filters_are_alternatives():
    assert parse_filters([])(ROW)
    assert parse_filters(["name==x", "kind==active"])(ROW)
    assert not parse_filters(["name==x", "kind==view"])(ROW)
    assert parse_filters(["name==x", ""])(ROW)


@pytest.mark.parametrize(
    "text",
    [
        *(",", "=", "a=b", "a===b", "a==", "==b", "a==b,", "a b", "a. b==", "a==b c", "a==b ,c"),
        *('"a', 'a=="b', "a==/b/", "a==|b|", 'a=="\\q"', 'a=="\\xff"', 'a=="\\ud800"', "é==b"),
        *(
            "a~=/\\./",
            'a=="\\U99999999"',
            'a=="\\400"',
            "a==\x01",
            "a~=[",
            "a~=(a|a)b",
            "a~=x*y*",
            "a~=(?=x)",
        ),
        "a~=x{1,99999999999999999999}",
    ],
)
def test_refused(text: str):
    with pytest.raises(InvalidArgument):
        parse_filters([text])


@pytest.mark.parametrize(
    "texts",
    [
        ["name"] * (filters.FILTERS_MAX + 1),
        ["a" * (filters.FILTER_CHARS_MAX + 1)],
        [",".join(["a"] * (filters.SELECTORS_MAX + 1))],
        ["a~=" + "b" * (filters.PATTERN_CHARS_MAX + 1)],
    ],
)
def test_limits(texts: list[str]):
    with pytest.raises(LimitExceeded):
        parse_filters(texts)


def test_a_pattern_that_backtracks_ends():
    """The worst that is let through: quadratic on the longest label."""
    row = Row(1, "a" * 4096, "", Kind.VIEW, 0, 0, {})
    assert not parse_filters(["name~=a*b"])(row)
    with pytest.raises(InvalidArgument):
        parse_filters(["name~=" + re.escape("(") + "(a|a)" * 40 + "b"])
