"""An explanation as text and HTML: names of images are data there, whatever is in them."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from imgsnap.node.explain import BootPack
from imgsnap.node.explain import _boot_pack as boot_pack
from imgsnap.node.explain import _union as union
from imgsnap_cli.cmd_explain import _text as text_lines
from imgsnap_cli.explain_html import page
from tests.support.explanations import HOSTILE, KNOWN, explanation, stall

VOID = {"meta", "col", "br", "hr", "img", "link", "input"}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "style", "scope", "role"),
    *("aria-label", "x", "y", "width", "height"),
}


class Strict(HTMLParser):
    """Fails for a tag that is not closed, not known, or loads something."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag in KNOWN, tag
        assert {name for name, _ in attrs} <= ATTRIBUTES, (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data):
        raise AssertionError(data)

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)


def parse(text: str) -> list[str]:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser.texts


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_text(name: str):
    texts = parse(page(explanation(stall(name), repository=name)))
    escaped = name.encode("unicode_escape").decode()
    assert any(escaped in text for text in texts) or any(name in text for text in texts)
    for line in text_lines(explanation(stall(name)), 5)[:3]:
        assert line.isprintable()
    parse(page(explanation(stall(sources=(name,)), stall(error=name, sources=()))))


def test_the_page_loads_nothing_and_runs_nothing():
    text = page(explanation(stall()))
    assert "default-src &#x27;none&#x27;" in text
    for word in ("http://", "https://", "<script", "url(", "@import", " src=", "href="):
        assert word not in text
    assert text.count("<rect ") == 1
    assert "prefers-color-scheme: dark" in text


def test_the_waterfall_stays_inside_its_width():
    stalls = [stall(at=0.0, wait=0.0), stall(at=1.0, wait=2.0), stall(at=3.0, wait=0.0)]
    for row in page(explanation(*stalls)).split("<rect ")[1:]:
        x, width = (
            float(row.partition(f' {key}="')[2].partition("%")[0]) for key in ("x", "width")
        )
        assert x >= 0 and width > 0 and x + width <= 100.001


def test_text_shows_the_longest_waits_by_time():
    stalls = [stall(f"/f{n}", at=n / 10, wait=w) for n, w in enumerate((0.01, 0.3, 0.02, 0.2))]
    lines = text_lines(explanation(*stalls), 2)
    assert [line.split()[-1] for line in lines[1:3]] == ["/f1", "/f3"]
    assert lines[3] == ""
    assert not any("/f0" in line for line in lines)
    assert text_lines(explanation(*stalls), 0)[0].startswith("snapshot")
    assert len(text_lines(explanation(direct=True), 2)) == 1
    parse(page(explanation(direct=True)))
    parse(page(explanation(notes=("<b>",))))


def test_what_a_boot_pack_covered_and_a_new_one_would_save():
    covered = stall(sources=("pack",), wait=0.5)
    first = stall(at=1.0, wait=0.2, offset=0, length=8192)
    joined = stall(at=1.1, wait=0.2, offset=4096, length=8192)  # the same chunk, overlapping
    found = boot_pack({"requests": 1, "bytes": 50, "blocks": 3}, [covered, first, joined])
    assert (found.covered, found.missed) == (1, 2)
    assert found.missed_wait == pytest.approx(0.4)
    assert found.missed_held_up == pytest.approx(0.3)
    assert (found.missed_bytes, found.missed_blocks) == (1000, 3)
    assert found.advised
    nothing = boot_pack({}, [covered, replace(first, wait=0.001)])
    assert not nothing.advised
    lines = text_lines(explanation(covered, first, boot_pack=found), 5)
    assert any("brought 50 bytes, 3 blocks" in line for line in lines)
    assert any("imgsnap trace" in line for line in lines)
    none = BootPack({}, 0, 0, 0.0, 0.0, 0, 0, False)
    assert any("none was used" in line for line in text_lines(explanation(boot_pack=none), 5))


def test_union_of_intervals():
    assert union([]) == 0
    assert union([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4
