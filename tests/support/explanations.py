"""Explanations to be shown, and names that an image's author may have put into them."""

from imgsnap.node.explain import ChunkView, Explanation, StallView, Totals
from imgsnap.node.explain import _boot_pack as boot_pack

KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "h1", "p", "pre", "span", "i", "table"),
    *("colgroup", "col", "thead", "tbody", "tr", "th", "td", "code", "svg", "rect"),
}
"""Elements that a page has."""
HOSTILE = [
    "/<script>alert(1)</script>",
    "/\"><img src=x onerror='alert(1)'>",
    "/</code></td></table><iframe src=//evil.example>",
    "/<!-- ",
    "/]]>--></style>",
    "/&lt;b&gt;&amp;",
    "/a\nb\x1b[2J\x00\u202e",
    "/' onmouseover='x",
]


def stall(path: str = "/bin/sh", **changes) -> StallView:
    values = {
        "at": 0.010,
        "wait": 0.040,
        "offset": 8192,
        "length": 4096,
        "paths": (path,),
        "more_paths": False,
        "layers": ("sha256:" + "ab" * 32,),
        "chunks": (ChunkView("cd" * 32, "sha256:" + "ab" * 32, 1000),),
        "chunk_count": 1,
        "sources": ("registry.test",),
        "bytes": 1000,
        "error": "",
    }
    return StallView(**(values | changes))


def explanation(*stalls: StallView, **changes) -> Explanation:
    values = {
        "snapshot": "sha256:" + "12" * 32,
        "repository": "registry.test/app",
        "target": "/mnt",
        "direct": False,
        "opened": 1000.0,
        "size": 1 << 20,
        "reads": 10,
        "hits": 10 - len(stalls),
        "misses": len(stalls),
        "statistics": {},
        "totals": Totals(len(stalls), 0.1, 0.1, 0, 0, ()),
        "boot_pack": boot_pack({}, stalls),
        "stalls": stalls,
        "notes": (),
    }
    return Explanation(**(values | changes))
