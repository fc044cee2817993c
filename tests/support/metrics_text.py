"""A strict reader of Prometheus' text format 0.0.4, written from its description only."""

import re
from dataclasses import dataclass, field

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? (\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(,|$)')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
_SUFFIXES = ("_bucket", "_sum", "_count")
Labels = frozenset[tuple[str, str]]


@dataclass
class Metrics:
    types: dict[str, str] = field(default_factory=dict)
    helps: dict[str, str] = field(default_factory=dict)
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def value(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]

    def labels_of(self, family: str) -> set[str]:
        """Label names of a family's samples, without a histogram's own."""
        return {
            key
            for name, labels in self.samples
            if _family(name, self.types) == family
            for key, _ in labels
        } - {"le"}


def parse_metrics(text: str) -> Metrics:
    """Raises AssertionError for anything that the format does not allow."""
    assert text.endswith("\n") and "\n\n" not in text and "\r" not in text
    found = Metrics()
    current = ""
    for line in text.splitlines():
        if line.startswith("# "):
            _, keyword, name, rest = line.split(" ", 3)
            assert re.fullmatch(_NAME, name), line
            table = {"HELP": found.helps, "TYPE": found.types}[keyword]
            assert name not in table, f"twice: {line}"
            table[name] = rest
            assert keyword != "TYPE" or rest in ("counter", "gauge", "histogram"), line
            current = name
            continue
        match = _SAMPLE.fullmatch(line)
        assert match is not None, line
        name, labels = match[1], _labels(match[2])
        assert _family(name, found.types) == current, f"outside of its family: {line}"
        key = (name, labels)
        assert key not in found.samples, f"twice: {line}"
        found.samples[key] = float(match[3])
        assert found.types[current] == "gauge" or found.samples[key] >= 0, line
    assert set(found.types) == set(found.helps)
    _check_histograms(found)
    return found


def _labels(text: str | None) -> Labels:
    found: dict[str, str] = {}
    position = 0
    while text and position < len(text):
        match = _LABEL.match(text, position)
        assert match is not None, text
        assert match[1] not in found, text
        found[match[1]] = re.sub(r"\\.", lambda escape: _ESCAPES[escape[0]], match[2])
        position = match.end()
        assert (match[3] == "") == (position == len(text)), text
    return frozenset(found.items())


def _family(name: str, types: dict[str, str]) -> str:
    for suffix in _SUFFIXES:
        base = name.removesuffix(suffix)
        if base != name and types.get(base) == "histogram":
            return base
    return name


def _check_histograms(found: Metrics) -> None:
    for family in (name for name, kind in found.types.items() if kind == "histogram"):
        series: dict[Labels, list[tuple[float, float]]] = {}
        for (name, labels), value in found.samples.items():
            if name == f"{family}_bucket":
                (end,) = (value for key, value in labels if key == "le")
                rest = frozenset(item for item in labels if item[0] != "le")
                series.setdefault(rest, []).append((float(end), value))
        assert series, family
        for labels, buckets in series.items():
            counts = [count for _, count in sorted(buckets)]
            assert sorted(buckets) == buckets and counts == sorted(counts), family
            assert buckets[-1][0] == float("inf")
            assert counts[-1] == found.samples[f"{family}_count", labels]
            assert (f"{family}_sum", labels) in found.samples
