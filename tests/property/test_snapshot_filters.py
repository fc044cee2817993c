"""Filters against a model that reads what was written, and any text at all."""

import json

from hypothesis import given
from hypothesis import strategies as st

from imgsnap.errors import ImgsnapError
from imgsnap.snapshotter.filters import parse_filter, parse_filters
from imgsnap.snapshotter.rows import Kind, Row

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\n"), max_size=8)
LABELS = st.dictionaries(TEXT.filter(bool), TEXT.filter(bool), max_size=4)
ROWS = st.builds(
    Row,
    st.just(1),
    TEXT,
    TEXT,
    st.sampled_from(Kind),
    st.just(0),
    st.just(0),
    LABELS,
)
FIELDS = st.one_of(st.sampled_from(["name", "parent", "kind", "unknown"]), st.tuples(TEXT))
SELECTORS = st.tuples(FIELDS, st.sampled_from(["", "==", "!="]), TEXT)


def quoted(text: str) -> str:
    """As Go's %q, by another way than the parser's: JSON's escapes are Go's but for "\\/"."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")


def written(selector: tuple) -> str:
    field, operator, value = selector
    path = field if isinstance(field, str) else f"labels.{quoted(field[0])}"
    return path + (operator + quoted(value) if operator else "")


def model(row: Row, selector: tuple) -> bool:
    field, operator, value = selector
    known = {"name": row.name, "parent": row.parent, "kind": row.kind.name.lower()}
    found = known.get(field) if isinstance(field, str) else row.labels.get(field[0])
    if operator == "!=":
        return (found or "") != value
    return found is not None and (not operator or found == value)


@given(
    ROWS, st.lists(st.lists(SELECTORS, min_size=1, max_size=3), min_size=1, max_size=3), st.data()
)
def test_matches_as_the_model(row: Row, filters: list[list[tuple]], data: st.DataObject):
    if row.labels and data.draw(st.booleans()):  # or else hardly ever a label is met
        name = data.draw(st.sampled_from(sorted(row.labels)))
        filters[0][0] = ((name,), "==", row.labels[name])
    texts = [",".join(map(written, selectors)) for selectors in filters]
    expected = any(all(model(row, one) for one in selectors) for selectors in filters)
    assert parse_filters(texts)(row) is expected


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str):
    try:
        parse_filter(text)
    except ImgsnapError:
        return


@given(TEXT.filter(bool))
def test_every_text_survives_its_quotes(text: str):
    [selector] = parse_filter(f"labels.{quoted(text)}=={quoted(text)}")
    assert (selector.path, selector.value) == (("labels", text), text)
