"""Prometheus' text format 0.0.4.

Source: prometheus.io/docs/instrumenting/exposition_formats.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Family(NamedTuple):
    """One metric; docs/metrics.md has the same rows."""

    name: str
    kind: str  # counter, gauge or histogram
    labels: tuple[str, ...]
    help: str


class Sample(NamedTuple):
    """One line. `suffix` follows the family's name: of histograms only."""

    family: str  # without `imgsnap_`
    labels: Mapping[str, str]
    value: float
    suffix: str = ""


def families(rows: Iterable[tuple[str, str, tuple[str, ...], str]]) -> tuple[Family, ...]:
    """Families from name (without `imgsnap_`), kind, labels and help."""
    return tuple(Family(f"imgsnap_{name}", kind, labels, text) for name, kind, labels, text in rows)


def page(known: Sequence[Family], found: Iterable[Sample]) -> str:
    """The whole page: families in their order, those without samples left out."""
    samples: dict[str, list[Sample]] = {family.name: [] for family in known}
    for sample in found:
        samples[f"imgsnap_{sample.family}"].append(sample)
    lines = []
    for family in known:
        if samples[family.name]:
            lines.append(f"# HELP {family.name} {family.help}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            lines += [_line(family.name, sample) for sample in samples[family.name]]
    return "\n".join(lines) + "\n"


def histogram(
    family: str,
    own: Mapping[str, str],
    ends: Sequence[float],
    counts: Iterable[int],
    total: float,
) -> Iterator[Sample]:
    """A histogram from the counts between ends, the last one of what is beyond all of them, and
    the total of what was observed. On the page a bucket counts all up to its end."""
    count = 0
    for end, here in zip([*map(repr, ends), "+Inf"], counts, strict=True):
        count += here
        yield Sample(family, {**own, "le": end}, count, "_bucket")
    yield Sample(family, own, total, "_sum")
    yield Sample(family, own, count, "_count")


def process_samples(processes: Mapping[str, Mapping[str, float]]) -> Iterator[Sample]:
    """What `process_usage` found out about processes, by their role."""
    for process, usage in processes.items():
        for family, key in (
            ("process_resident_memory_bytes", "rss_bytes"),
            ("process_cpu_seconds_total", "cpu_seconds"),
            ("process_open_fds", "open_fds"),
        ):
            if key in usage:
                yield Sample(family, {"process": process}, usage[key])


PROCESS_FAMILIES = (
    ("process_resident_memory_bytes", "gauge", ("process",), "Resident memory."),
    ("process_cpu_seconds_total", "counter", ("process",), "CPU time, user and system."),
    ("process_open_fds", "gauge", ("process",), "Open descriptors."),
)
"""For `families`: of `process_samples`."""


def _line(name: str, sample: Sample) -> str:
    labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sample.labels.items())
    shown = f"{{{labels}}}" if labels else ""
    return f"{name}{sample.suffix}{shown} {_number(sample.value)}"


def _escaped(value: str) -> str:
    text = value.encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(value) if isinstance(value, int) else repr(value)
