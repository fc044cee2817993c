"""Merging rules, one by one; the kernel judges them all together in tests/integration."""

import pytest

from imgsnap.convert.flatten import Directory, Tree, flatten
from imgsnap.errors import IntegrityError
from tests.support.layers import Layer, Link, build_all, directory, regular, symlink


def merge(*layers: Layer) -> Tree:
    return flatten([layer.index for layer in build_all(list(layers))])


def paths(tree: Tree) -> dict[bytes, int]:
    """Row by path; directories with a slash at the end."""
    found = {}
    stack = [(b"", tree.root)]
    while stack:
        prefix, found_directory = stack.pop()
        found[prefix] = found_directory.row
        for name, child in found_directory.children.items():
            if isinstance(child, Directory):
                stack.append((prefix + name + b"/", child))
            else:
                found[prefix + name] = child
    return found


def names(tree: Tree) -> set[bytes]:
    return set(paths(tree)) - {b""}


def test_no_layers() -> None:
    tree = merge()
    assert tree.root.row == tree.implicit_row == 0
    assert not tree.root.children


def test_a_whiteout_hides_a_subtree_of_lower_layers() -> None:
    lower = Layer({b"d/e/f": regular(), b"g": regular()})
    assert names(merge(lower, Layer(whiteouts={b"d"}))) == {b"g"}
    assert names(merge(lower, Layer(whiteouts={b"d/e"}))) == {b"d/", b"g"}
    assert names(merge(Layer(whiteouts={b"g"}), lower)) == {b"d/", b"d/e/", b"d/e/f", b"g"}


def test_what_a_layer_adds_survives_its_own_whiteouts() -> None:
    lower = Layer({b"d/old": regular(), b"f": regular()})
    upper = Layer({b"d/new": regular(), b"f": regular()}, whiteouts={b"d", b"f"})
    assert names(merge(lower, upper)) == {b"d/", b"d/new", b"f"}
    opaque = Layer({b"d/new": regular()}, opaque={b"d"})
    assert names(merge(lower, opaque)) == {b"d/", b"d/new", b"f"}


def test_an_opaque_root_hides_everything() -> None:
    tree = merge(Layer({b"a/b": regular()}), Layer({b"c": regular()}, opaque={b""}))
    assert names(tree) == {b"c"}


def test_directories_merge_and_attributes_come_from_the_last_entry() -> None:
    lower = Layer({b"d": directory(uid=1), b"d/a": regular()})
    implied = Layer({b"d/b": regular()})
    tree = merge(lower, implied)
    assert names(tree) == {b"d/", b"d/a", b"d/b"}
    assert paths(tree)[b"d/"] == 0
    tree = merge(lower, implied, Layer({b"d": directory(uid=2)}))
    assert paths(tree)[b"d/"] == 3
    assert paths(merge(implied))[b"d/"] == merge(implied).implicit_row


def test_type_changes_replace() -> None:
    tree = merge(Layer({b"x/y/z": regular()}), Layer({b"x": regular()}))
    assert names(tree) == {b"x"}
    tree = merge(Layer({b"x": regular()}), Layer({b"x/y": regular()}))
    assert names(tree) == {b"x/", b"x/y"}
    assert paths(tree)[b"x/"] == tree.implicit_row
    tree = merge(Layer({b"x/y": regular()}), Layer({b"x": symlink(b"z")}))
    assert names(tree) == {b"x"}


def test_hard_links_share_a_row() -> None:
    found = paths(merge(Layer({b"a": regular(b"1"), b"b": Link(b"a"), b"c": Link(b"b")})))
    assert found[b"a"] == found[b"b"] == found[b"c"]


def test_a_link_to_a_lower_layer_means_what_is_there_below_this_layer() -> None:
    lower = Layer({b"a": regular(b"1"), b"b": regular(b"2")})
    upper = Layer({b"x": Link(b"a"), b"y": Link(b"b", lower=True), b"b": regular()}, {b"a"})
    found = paths(merge(lower, upper))
    assert (found[b"x"], found[b"y"], found[b"b"]) == (0, 1, 2)


@pytest.mark.parametrize("target", [b"none", b"d", b"f/none", b"own"])
def test_a_link_to_nothing_names_the_target_and_the_layer(target: bytes) -> None:
    lower = Layer({b"d": directory(), b"f": regular()})
    upper = Layer({b"x": Link(target, lower=True), b"own": regular()})
    diff_id = build_all([upper])[0].index.diff_id
    with pytest.raises(IntegrityError, match=f"{diff_id}.*{target.decode()}"):
        merge(lower, upper)


def test_a_deep_tree_needs_no_deep_stack() -> None:
    deep = b"/".join([b"d"] * 2000)
    tree = merge(Layer({deep: regular()}), Layer({b"x": regular()}))
    assert deep in names(tree)
    assert names(merge(Layer({deep: regular()}), Layer(whiteouts={b"d"}))) == set()


def test_an_implied_directory_over_a_symlink_is_what_the_link_leads_to() -> None:
    lower = Layer(
        {
            b"usr/lib/old": regular(),
            b"lib": symlink(b"usr/lib"),
            b"a/up": symlink(b"../lib/."),
            b"out": symlink(b"/../made/./here"),
        }
    )
    upper = Layer(
        {b"lib/new": regular(), b"a/up/too": regular(), b"out/x": regular()},
        whiteouts={b"a/up/old"},
    )
    assert names(merge(lower, upper)) == {
        *(b"usr/", b"usr/lib/", b"usr/lib/new", b"usr/lib/too", b"lib"),
        *(b"a/", b"a/up", b"made/", b"made/here/", b"made/here/x", b"out"),
    }


def test_a_directory_entry_over_a_symlink_replaces_it() -> None:
    lower = Layer({b"usr/lib/old": regular(), b"lib": symlink(b"usr/lib")})
    upper = Layer({b"lib": directory(), b"lib/new": regular()})
    assert names(merge(lower, upper)) == {
        *(b"usr/", b"usr/lib/", b"usr/lib/old", b"lib/", b"lib/new"),
    }


def test_a_directory_implied_below_a_circle_of_symlinks() -> None:
    lower = Layer({b"a": symlink(b"b"), b"b": symlink(b"a")})
    with pytest.raises(IntegrityError, match="symlinks"):
        merge(lower, Layer({b"a/x": regular()}))


def test_links_to_lower_layers_follow_symlinked_parents() -> None:
    lower = Layer({b"usr/f": regular(), b"d/l": symlink(b"/usr"), b"s": symlink(b"usr/f")})
    tree = merge(lower, Layer({b"x": Link(b"d/l/f", lower=True), b"y": Link(b"s", lower=True)}))
    found = paths(tree)
    assert found[b"x"] == found[b"usr/f"] and found[b"y"] == found[b"s"] != found[b"x"]
