"""An explanation as one HTML page: no script, nothing from elsewhere, light and dark.

Names of files and hosts are others': every text goes through `_t`, and the page's policy
(Content-Security-Policy) forbids scripts, forms and all loading should one ever get out.
"""

from html import escape
from typing import TYPE_CHECKING

from imgsnap_cli.cmd_explain import files, short, summary

if TYPE_CHECKING:
    from imgsnap.node.explain import Explanation, StallView

BAR_MIN = 0.15
"""Per cent of the waterfall's width: the shortest wait can be seen."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6470; --paper: #ffffff;
  --line: #d9dee4; --host: #2f6fde; --pack: #1f8a4c; --cache: #8a6d1f; --error: #c62f2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --dim: #98a2ae; --paper: #14171b;
  --line: #333a42; --host: #6d9dff; --pack: #52c583; --cache: #d3b04c; --error: #ff7a7a; } }
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
pre { margin: 0 0 1.2rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, monospace; }
.key span { display: inline-block; margin-right: 1.2rem; color: var(--dim); }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { padding: .18rem .5rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--dim); font-weight: 500; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font: 12px/1.5 ui-monospace, monospace; }
svg { display: block; width: 100%; height: 1.1rem; }
.host { fill: var(--host); background: var(--host); }
.pack { fill: var(--pack); background: var(--pack); }
.cache { fill: var(--cache); background: var(--cache); }
.error { fill: var(--error); background: var(--error); }
"""
_COLUMNS = (
    ("at ms", "6%", True),
    ("wait ms", "6%", True),
    ("bytes", "7%", True),
    ("waterfall", "26%", False),
    ("file", "26%", False),
    ("source", "10%", False),
    ("layer", "9%", False),
    ("chunks", "10%", False),
)


def page(found: "Explanation") -> str:
    """The whole document; all stalls, by time."""
    title = f"Start of {found.repository or found.snapshot}"
    if found.direct:
        body = [
            f"<p>{_t(found.snapshot)} is complete and mounted from local files: no read waits.</p>"
        ]
    else:
        body = [f"<pre>{_t(chr(10).join(summary(found)))}</pre>", *_waterfall(found)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_t(_POLICY)}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{_t(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{_t(title)}</h1>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _waterfall(found: "Explanation") -> list[str]:
    if not found.stalls:
        return ["<p>No read has waited.</p>"]
    span = max(stall.at + stall.wait for stall in found.stalls) or 1.0
    key = "".join(
        f'<span><i class="{kind}"></i>{text}</span>'
        for kind, text in (
            ("host", "fetched from a host"),
            ("pack", "boot pack"),
            ("cache", "this machine"),
            ("error", "error"),
        )
    )
    sizes = "".join(f'<col style="width:{width}">' for _, width, _ in _COLUMNS)
    heads = "".join(f'<th{_numeric(right)} scope="col">{name}</th>' for name, _, right in _COLUMNS)
    return [
        f'<p class="key">{key}</p>',
        "<table>",
        f"<colgroup>{sizes}</colgroup>",
        f"<thead><tr>{heads}</tr></thead>",
        "<tbody>",
        *(_row(stall, span) for stall in found.stalls),
        "</tbody>",
        "</table>",
    ]


def _row(stall: "StallView", span: float) -> str:
    cells = (
        f"{stall.at * 1000:.1f}",
        f"{stall.wait * 1000:.1f}",
        str(stall.bytes),
        _bar(stall, span),
        f"<code>{_t(files(stall))}</code>",
        _t(stall.error or ", ".join(stall.sources)),
        f"<code>{_t(', '.join(short(layer) for layer in stall.layers))}</code>",
        f"<code>{_t(_chunks(stall))}</code>",
    )
    shown = (
        f"<td{_numeric(right)}>{cell}</td>"
        for cell, (_, _, right) in zip(cells, _COLUMNS, strict=True)
    )
    return f"<tr>{''.join(shown)}</tr>"


def _bar(stall: "StallView", span: float) -> str:
    start, width = 100 * stall.at / span, max(BAR_MIN, 100 * stall.wait / span)
    start = min(start, 100 - width)
    return (
        f'<svg role="img" aria-label="waits from {stall.at * 1000:.1f} ms for '
        f'{stall.wait * 1000:.1f} ms"><rect class="{_kind(stall)}" x="{start:.3f}%" y="15%" '
        f'width="{width:.3f}%" height="70%"></rect></svg>'
    )


def _kind(stall: "StallView") -> str:
    if stall.error:
        return "error"
    return stall.sources[0] if stall.sources in (("pack",), ("cache",)) else "host"


def _chunks(stall: "StallView") -> str:
    names = ", ".join(chunk.id[:12] for chunk in stall.chunks[:2])
    more = stall.chunk_count - min(2, len(stall.chunks))
    return names + (f" +{more}" if more else "")


def _numeric(right: bool) -> str:
    return ' class="n"' if right else ""


def _t(text: str) -> str:
    """Text for HTML, also inside double quotes; lone surrogates are escaped."""
    return escape(text.encode("utf-8", "backslashreplace").decode(), quote=True)
