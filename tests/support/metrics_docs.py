"""docs/metrics.md, a section at a time."""

import re
from collections.abc import Sequence
from pathlib import Path

from imgsnap.node.prometheus import Family
from tests.support.metrics_text import parse_metrics

PAGE = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
_ROW = re.compile(
    r"^\| `(imgsnap_\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) \| [^|]+ \| (stable|experimental) \|$",
    re.M,
)


def section(title: str = "") -> str:
    """The text below a heading, or before the first one."""
    parts = ("\n" + PAGE).split("\n## ")
    return next(part for part in parts[1:] if part.startswith(title)) if title else parts[0]


def check(text: str, rendered_page: str, families: Sequence[Family]) -> None:
    """A section's rows are what a page with everything on it shows."""
    rows = _ROW.findall(text)
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, _, labels, _ in rows
    }
    assert len(rows) == len(documented) == text.count("\n| `imgsnap_")
    metrics = parse_metrics(rendered_page)
    rendered = {name: (kind, metrics.labels_of(name)) for name, kind in metrics.types.items()}
    assert rendered == documented
    assert list(documented) == [family.name for family in families]
    for name, kind, unit, _, _ in rows:
        assert (kind == "counter") == name.endswith("_total"), name
        assert ("bytes" in name) == (unit == "bytes"), name
        assert ("seconds" in name) == (unit == "seconds"), name
