"""Stacks of layer tars, unpacked one by one and stacked by overlayfs, against two unpackers that
extract them on top of each other: the reference tree and umoci."""

import io
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings

from imgsnap.convert.ingest import LayerSource, index_tar
from imgsnap.convert.limits import Limits
from imgsnap.convert.reference import Node, ReferenceTree
from imgsnap.digest import sha256_digest
from imgsnap.errors import IntegrityError
from imgsnap.formats.layer_index import Kind, LayerIndex
from imgsnap.formats.rules import Rules
from imgsnap.oci.repository import Descriptor
from tests.property.test_layers import MEMORY, QUIET, TYPES, plain
from tests.support.tar_stacks import DIR, Entry, stacks, to_tar, unambiguous, without_idle_whiteouts
from tests.support.trees import Facts, observe
from tests.support.unpacked import sha256, stacked, unpack_stack

pytestmark = pytest.mark.root
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
"""cap_net_bind_service+ep; the kernel refuses values that are none."""


def possible(layers: list[list[Entry]]) -> list[list[Entry]]:
    """The stack with capabilities that a file system takes."""

    def mended(entry: Entry) -> Entry:
        xattrs = {
            name: CAPABILITY if name == b"security.capability" else value
            for name, value in entry.item.xattrs.items()
        }
        return replace(entry, item=replace(entry.item, xattrs=xattrs))

    return [[mended(entry) for entry in layer] for layer in layers]


def without_setgid_directories(layers: list[list[Entry]]) -> list[list[Entry]]:
    """mkdir(2) below one hands group and bit down, and umoci keeps that for implied directories."""

    def mended(entry: Entry) -> Entry:
        item = entry.item
        mode = item.mode & ~stat.S_ISGID if item.kind == DIR else item.mode
        return replace(entry, item=replace(item, mode=mode))

    return [[mended(entry) for entry in layer] for layer in layers]


def indexes(tars: list[bytes], root: Path) -> list[LayerIndex]:
    found = []
    for tar in tars:
        (root / "tar").write_bytes(tar)
        source = LayerSource(Descriptor("", sha256_digest(tar), len(tar)), sha256_digest(tar))
        found.append(index_tar(root / "tar", source, Rules(), Limits(), strip_root=True).index)
    return found


def follows_links(tars: list[bytes], found: list[LayerIndex]) -> bool:
    """Does a layer put something below a lower layer's symlink without an entry for it?

    Extraction follows the link; a layer by itself cannot, and takes its place.
    """
    tree = ReferenceTree()
    for tar, index in zip(tars, found, strict=True):
        below = dict(tree.walk())
        for record in index.directories:
            node = below.get(record.path)
            if record.inode < 0 and node is not None and node.kind == Kind.SYMLINK:
                return True
            parents = record.path.split(b"/")[:-1]
            for depth in range(1, len(parents) + 1):
                node = below.get(b"/".join(parents[:depth]))
                if node is not None and node.kind == Kind.SYMLINK:
                    return True
        tree.apply(io.BytesIO(tar))
    return False


@contextmanager
def view_of(layers: list[list[Entry]]) -> Iterator[tuple[list[bytes], Path, Path, bool]]:
    """(tars, scratch, mounted stack, whether a hard link leads into a lower layer)."""
    tars = [to_tar(layer) for layer in layers]
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        root = Path(directory)
        try:
            found = indexes(tars, root)
            assume(not follows_links(tars, found))
            directories = unpack_stack(tars, root)
        except IntegrityError:
            assume(False)
        with stacked(directories, root) as view:
            yield tars, root, view, any(index.lower_links for index in found)


def facts_of_node(node: Node, links: tuple[bytes, ...]) -> dict[str, object]:
    is_link = node.kind == Kind.SYMLINK
    return {
        "type": TYPES[node.kind],
        "mode": 0o777 if is_link else node.mode,
        "owner": (node.uid, node.gid),
        "mtime": node.mtime[0] * 10**9 + node.mtime[1],
        "size": node.size,
        "device": node.device,
        "target": node.target,
        "content": node.sha256 or sha256(b""),
        "xattrs": dict(node.xattrs),
        "links": () if node.kind == Kind.DIRECTORY else links,
    }


def facts_of_view(facts: Facts) -> dict[str, object]:
    is_link = stat.S_ISLNK(facts.mode)
    is_device = stat.S_ISCHR(facts.mode) or stat.S_ISBLK(facts.mode)
    device = (facts.rdev >> 8 & 0xFFF, facts.rdev & 0xFF | facts.rdev >> 12 & 0xFFF00)
    return {
        "type": stat.S_IFMT(facts.mode),
        "mode": 0o777 if is_link else stat.S_IMODE(facts.mode),
        "owner": (facts.uid, facts.gid),
        "mtime": facts.mtime_ns,
        "size": 0 if is_link else facts.size,
        "device": device if is_device else (0, 0),
        "target": facts.target,
        "content": sha256(facts.content),
        "xattrs": facts.xattrs,
        "links": facts.links,
    }


def without_links(tree: dict[bytes, dict[str, object]]) -> dict[bytes, dict[str, object]]:
    return {path: {**facts, "links": None} for path, facts in tree.items()}


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(stacks())
def test_the_stack_is_what_the_reference_unpacks(layers: list[list[Entry]]) -> None:
    with view_of(unambiguous(possible(layers))) as (tars, _, view, lower_links):
        tree = ReferenceTree()
        try:
            for tar in tars:
                tree.apply(io.BytesIO(tar))
        except IntegrityError:
            assume(False)
        nodes = dict(tree.walk())
        names: dict[int, list[bytes]] = {}
        for path, node in nodes.items():
            names.setdefault(id(node), []).append(path)
        wanted = {
            path: facts_of_node(node, tuple(sorted(names[id(node)])))
            for path, node in nodes.items()
        }
        got = {path: facts_of_view(facts) for path, facts in observe(view).items()}
        if lower_links:  # a copy, as overlayfs makes one
            wanted, got = without_links(wanted), without_links(got)
        assert got == wanted


@settings(max_examples=25, deadline=None, suppress_health_check=QUIET)
@given(stacks())
def test_the_stack_is_what_umoci_unpacks(layers: list[list[Entry]]) -> None:
    chosen = without_idle_whiteouts(unambiguous(without_setgid_directories(possible(layers))))
    with view_of(chosen) as (_, root, view, lower_links):
        done = subprocess.run(
            ["umoci", "unpack", "--image", f"{root}/layout:latest", f"{root}/bundle"],
            capture_output=True,
        )
        assume(done.returncode == 0)
        wanted = {path: plain(facts) for path, facts in observe(root / "bundle/rootfs").items()}
        got = {path: plain(facts) for path, facts in observe(view).items()}
        if lower_links:
            wanted, got = without_links(wanted), without_links(got)
        assert got == wanted
