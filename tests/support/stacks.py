"""Hypothesis strategies for stacks of layers, dense in collisions between layers."""

from hypothesis import strategies as st

from imgsnap.formats.layer_index import Kind
from tests.support.layers import Layer, Link, Node, encode_device

NAMES = (b"a", b"b", b"c", b"-", b"!", b".-", b"..a", b"\xff\xfe \n", b"n" * 255)
"""Few, so that layers meet; some sort before ``.`` and ``..``, or between and after them."""

names = st.sampled_from(NAMES)
paths = st.lists(names, min_size=1, max_size=3).map(b"/".join)
binary = st.binary(min_size=0, max_size=40)
suffixes = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)
contents = st.sampled_from(
    [b"", b"x", b"same" * 700, b"e" * 4095, b"f" * 4096, b"g" * 4097, b"h" * 20000]
)
owners = st.sampled_from([0, 1, 1000, 65534, 65536, 100_000, 3_000_000_000, 0xFFFFFFFE])
seconds = st.one_of(
    st.sampled_from([0, -1, -5, 1_700_000_000, -(2**33), 2**33, 2**40]),
    st.integers(-(2**34), 2**34),
)
nanoseconds = st.sampled_from([0, 1, 500_000_000, 999_999_999])
targets = st.one_of(
    st.sampled_from([b"a", b"../b", b"/etc/passwd", b"\xff", b"t" * 3900, b"u" * 4095]),
    st.binary(min_size=1, max_size=60).filter(lambda target: b"\0" not in target),
)
devices = st.builds(encode_device, st.integers(1, 4095), st.integers(0, (1 << 20) - 1))


def xattrs(prefixes: list[bytes]) -> st.SearchStrategy:
    name = st.builds(lambda prefix, rest: prefix + rest, st.sampled_from(prefixes), suffixes)
    values = st.one_of(binary, st.just(b"long" * 600))
    some = st.dictionaries(name, values, max_size=3)
    return st.one_of(st.just(()), some.map(lambda found: tuple(sorted(found.items()))))


@st.composite
def nodes(draw: st.DrawFn, kinds: tuple[Kind, ...] = tuple(Kind)) -> Node:
    kind = draw(st.sampled_from(kinds))
    # The VFS keeps user.* for files and directories.
    prefixes = [b"trusted.", b"security.z"]
    if kind in (Kind.FILE, Kind.DIRECTORY):
        prefixes.append(b"user.")
    is_device = kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE)
    return Node(
        kind=kind,
        mode=0o777 if kind == Kind.SYMLINK else draw(st.integers(0, 0o7777)),
        uid=draw(owners),
        gid=draw(owners),
        mtime=draw(seconds),
        nsec=draw(nanoseconds),
        content=draw(contents) if kind == Kind.FILE else b"",
        target=draw(targets) if kind == Kind.SYMLINK else b"",
        rdev=draw(devices) if is_device else 0,
        xattrs=draw(xattrs(prefixes)),
    )


def _parents(path: bytes) -> list[bytes]:
    names = path.split(b"/")
    return [b"/".join(names[:depth]) for depth in range(1, len(names))]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """A layer in which no path is both a directory and something else."""
    layer = Layer()
    if draw(st.booleans()):
        layer.entries[b""] = draw(nodes((Kind.DIRECTORY,)))
    directories: set[bytes] = set()

    def is_file(path: bytes) -> bool:
        node = layer.entries.get(path)
        return isinstance(node, Link) or (node is not None and node.kind != Kind.DIRECTORY)

    for path in draw(st.lists(paths, max_size=8, unique=True)):
        parents = _parents(path)
        if any(map(is_file, parents)):
            continue
        linkable = [other for other in layer.entries if is_file(other)]
        if path in directories:
            layer.entries[path] = draw(nodes((Kind.DIRECTORY,)))
        elif linkable and draw(st.integers(0, 4)) == 0:
            layer.entries[path] = Link(draw(st.sampled_from(linkable)))
        else:
            layer.entries[path] = draw(nodes())
        directories.update(parents)
    for path in draw(st.lists(paths, max_size=3, unique=True)):
        if not any(map(is_file, _parents(path))):
            layer.whiteouts.add(path)
    for path in draw(st.lists(st.one_of(paths, st.just(b"")), max_size=1)):
        if not any(map(is_file, [*_parents(path), path])):
            layer.opaque.add(path)
    return layer


def _implied(layer: Layer) -> set[bytes]:
    """The directories that a layer has without saying so."""
    named = [*layer.entries, *layer.whiteouts, *(path + b"/x" for path in layer.opaque)]
    return {parent for path in named for parent in _parents(path)} - set(layer.entries)


def _spell_out(stack: list[Layer]) -> list[Layer]:
    """Gives an entry to each implied directory that a lower layer may have as a symlink.

    Extraction follows such a symlink, and so does the flattening; overlayfs, the judge of these
    stacks, knows nothing of implied directories. tests/property/test_layers.py covers them.
    """
    below: set[bytes] = set()
    for layer in stack:
        for path in sorted(_implied(layer) & below):
            layer.entries[path] = Node(Kind.DIRECTORY, mode=0o755)
        below |= {
            path
            for path, node in layer.entries.items()
            if isinstance(node, Link) or node.kind == Kind.SYMLINK
        }
    return stack


stacks = st.lists(layers(), min_size=1, max_size=4).map(_spell_out)
