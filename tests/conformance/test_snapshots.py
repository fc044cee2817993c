"""A port of containerd's core/snapshots/testsuite, whose names are here in snake case.

CloseTwice has no counterpart: nobody closes a service through its API.
"""

import time
from pathlib import Path

import pytest

from imgsnap.containerd.api.services.snapshots.v1 import snapshots_pb2 as messages
from tests.conformance.conftest import Suite
from tests.support.fs_steps import (
    Step,
    chown,
    create_dir,
    create_file,
    link,
    remove,
    rename,
    steps,
    tree,
)
from tests.support.snapshots_client import KEPT, code, mounted

pytestmark = pytest.mark.root
VIEW, ACTIVE, COMMITTED = messages.VIEW, messages.ACTIVE, messages.COMMITTED


def change(suite: Suite, name: str, parent: str, step: Step) -> str:
    """A committed snapshot that adds `step` to its parent."""
    with mounted(suite.client.prepare(f"{name}-prepare", parent)) as target:
        step(target)
    suite.client.commit(name, f"{name}-prepare")
    return name


def check_layers(suite: Suite, *layers: Step) -> None:
    """Each layer as a view is the same as all steps so far in one directory."""
    flat = suite.work / f"flat-{time.monotonic_ns()}"
    flat.mkdir()
    parent = ""
    for number, step in enumerate(layers):
        parent = change(suite, f"{flat.name}-{number}", parent, step)
        step(flat)
        with mounted(suite.client.view(f"{parent}-view", parent)) as shown:
            assert tree(shown) == tree(flat), f"layer {number + 1}"
        suite.client.remove(f"{parent}-view")


def test_basic(suite: Suite):
    client = suite.client
    first = steps(
        create_file("foo", b"foo\n", 0o777),
        create_dir("a", 0o755),
        create_dir("a/b", 0o755),
        create_dir("a/b/c", 0o755),
    )
    second = steps(
        create_file("bar", b"bar\n", 0o777),
        create_file("foo", b"bar\n", 0o777),
        remove("a/b"),
    )
    flat = suite.work / "flat"
    flat.mkdir()

    with mounted(client.prepare("preparing")) as target:
        first(target)
    client.commit("committed", "preparing")
    info = client.stat("committed")
    assert (info.parent, info.kind) == ("", COMMITTED)
    with code("NOT_FOUND"):
        client.stat("preparing")

    first(flat)
    with mounted(client.prepare("next", "committed")) as target:
        assert tree(target) == tree(flat)
        second(target)
    info_next = client.stat("next")
    assert (info_next.parent, info_next.kind) == ("committed", ACTIVE)
    client.commit("committed-next", "next")
    info_next = client.stat("committed-next")
    assert (info_next.parent, info_next.kind) == ("committed", COMMITTED)
    with code("NOT_FOUND"):
        client.stat("next")
    assert {i.name: i for i in client.list()} == {"committed": info, "committed-next": info_next}

    second(flat)
    with mounted(client.view("view", "committed-next")) as target:
        assert tree(target) == tree(flat)
    client.remove("view")
    with code("FAILED_PRECONDITION"):
        client.remove("committed")
    client.remove("committed-next")
    client.remove("committed")
    assert client.list() == []


def test_stat_active(suite: Suite):
    with mounted(suite.client.prepare("preparing")) as target:
        (target / "foo").write_bytes(b"foo\n")
    info = suite.client.stat("preparing")
    assert (info.name, info.kind, info.parent) == ("preparing", ACTIVE, "")


def test_stat_committed(suite: Suite):
    change(suite, "committed", "", create_file("foo", b"foo\n", 0o777))
    info = suite.client.stat("committed")
    assert (info.name, info.kind, info.parent) == ("committed", COMMITTED, "")


def test_transitivity(suite: Suite):
    change(suite, "a", "", create_file("foo", b"foo\n", 0o777))
    change(suite, "b", "a", create_file("foo", b"foo bar\n", 0o777))
    assert suite.client.stat("a").parent == ""
    assert suite.client.stat("b").parent == "a"
    assert suite.client.stat(suite.client.stat("b").parent).parent == ""


def test_prepare_view_failing(suite: Suite):
    client = suite.client
    change(suite, "a", "", steps())
    client.prepare("layer", "a")
    client.view("view", "a")
    for key in ("layer", "view"):
        with code("ALREADY_EXISTS"):
            client.view(key, "a")
        with code("ALREADY_EXISTS"):
            client.prepare(key, "a")


def base_snapshots(suite: Suite) -> dict[str, tuple[int, str]]:
    client = suite.client
    client.prepare("c1-a")
    client.commit("c1", "c1-a")
    client.prepare("c2-a", "c1")
    client.commit("c2", "c2-a")
    client.prepare("a1", "c2")
    client.prepare("a2")
    client.view("v1", "c2")
    client.view("v2")
    return {
        "c1": (COMMITTED, ""),
        "c2": (COMMITTED, "c1"),
        "a1": (ACTIVE, "c2"),
        "a2": (ACTIVE, ""),
        "v1": (VIEW, "c2"),
        "v2": (VIEW, ""),
    }


def test_update(suite: Suite):
    client = suite.client
    start = time.time_ns()
    expected = base_snapshots(suite)
    end = time.time_ns()
    for name, (kind, parent) in expected.items():
        info = client.stat(name)
        created = info.created_at.ToNanoseconds()
        assert start <= created <= end
        assert info.updated_at == info.created_at
        assert (info.name, info.kind, info.parent) == (name, kind, parent)

        wanted = {"l1": "v1", "l2": "v2", "l3": "v3", **KEPT}
        before = time.time_ns()
        info = client.update(_with(info, wanted))
        assert before <= info.updated_at.ToNanoseconds() <= time.time_ns()
        assert info.created_at.ToNanoseconds() == created
        assert (info.name, info.kind, info.parent) == (name, kind, parent)
        assert dict(info.labels) == wanted

        change_some = _with(info, {"l1": "updated", "l4": "v4"})
        info = client.update(change_some, "labels.l1", "labels.l2")
        assert dict(info.labels) == {"l1": "updated", "l3": "v3", **KEPT}
        info = client.update(_with(info, {"l4": "v4", **KEPT}), "labels")
        assert dict(info.labels) == {"l4": "v4", **KEPT}
        with code("INVALID_ARGUMENT"):
            client.update(_with(info, {}), "parent")
        assert client.stat(name) == info


def _with(info, labels: dict[str, str]):
    """With other labels and a parent that must not matter."""
    return messages.Info(name=info.name, parent="doesnotexist", kind=info.kind, labels=labels)


def test_remove(suite: Suite):
    client = suite.client
    client.prepare("committed-a")
    client.commit("committed-1", "committed-a")
    client.prepare("reuse-1", "committed-1")
    client.remove("reuse-1")
    client.view("reuse-1", "committed-1")
    client.remove("reuse-1")
    client.prepare("reuse-1")
    client.remove("committed-1")
    client.commit("committed-1", "reuse-1")
    assert [info.name for info in client.list()] == ["committed-1"]


GC = 'labels."containerd.io/gc.root"==check-walk'


@pytest.mark.parametrize(
    ("filters", "matches"),
    [
        ([GC], "a-np p a v p-wl a-wl v-wl a-np-wl"),
        ([f"kind==active,{GC}"], "a-np a a-wl a-np-wl"),
        ([f"kind==view,{GC}"], "v v-wl"),
        ([f"kind==committed,{GC}"], "p p-wl"),
        (["name==p", "name==a-np-wl"], "p a-np-wl"),
        (["name==a-wl,labels.l"], "a-wl"),
        (["parent==p"], "a v"),
        ([f'parent!="",{GC}'], "a v a-wl v-wl"),
        (["labels.l"], "p-wl a-wl v-wl a-np-wl"),
        (["labels.l==2"], "a-wl a-np-wl"),
        (['labels.l~="[13]"'], "p-wl v-wl"),
        (["labels.l~=/[13]/"], "p-wl v-wl"),
        (["labels.l!=2"], "a-np p a v p-wl v-wl"),
        (["nonsense!=2"], "a-np p a v p-wl a-wl v-wl a-np-wl"),
        (["nonsense"], ""),
        ([' name == "p"'], "p"),
        ([r'name=="\x70"'], "p"),
    ],
)
def test_walk(suite: Suite, filters: list[str], matches: str):
    client = suite.client
    root = {"containerd.io/gc.root": "check-walk"}
    client.prepare("a-np", labels=root)
    client.prepare("p-tmp", labels=root)
    client.commit("p", "p-tmp", root)
    client.prepare("a", "p", root)
    client.view("v", "p", root)
    client.prepare("p-wl-tmp", labels=root)
    client.commit("p-wl", "p-wl-tmp", {"l": "1", **root})
    client.prepare("a-wl", "p-wl", {"l": "2", **root})
    client.view("v-wl", "p-wl", {"l": "3", **root})
    client.prepare("a-np-wl", labels={"l": "2", **root})
    assert sorted(i.name for i in client.list(*filters)) == sorted(matches.split())


@pytest.mark.parametrize(
    "text", ["name=p", "name===p", "name==", "==p", "name==p,", "name==/p/", 'name=="p', "name p"]
)
def test_filters_that_are_refused(suite: Suite, text: str):
    with code("INVALID_ARGUMENT", "UNKNOWN"):  # the latter from containerd 1.6
        suite.client.list(text)


def test_layer_file_update(suite: Suite):
    for _ in range(3):
        check_layers(
            suite,
            steps(
                create_dir("etc", 0o700),
                create_file("etc/hosts", b"mydomain 10.0.0.1", 0o644),
                create_file("etc/profile", b"PATH=/usr/bin", 0o644),
            ),
            steps(
                create_file("etc/hosts", b"mydomain 10.0.0.2", 0o644),
                create_file("etc/profile", b"PATH=/usr/bin", 0o666),
                create_dir("root", 0o700),
                create_file("root/.bashrc", b"PATH=/usr/sbin:/usr/bin", 0o644),
            ),
        )


def test_remove_directory_in_lower_layer(suite: Suite):
    check_layers(
        suite,
        steps(create_dir("lib", 0o700), create_file("lib/hidden", b"", 0o644)),
        steps(remove("lib"), create_dir("lib", 0o700), create_file("lib/not-hidden", b"", 0o644)),
        create_file("lib/newfile", b"", 0o644),
    )


def test_chown(suite: Suite):
    names = ("opt", "opt/a", "opt/a/b")
    check_layers(
        suite,
        steps(
            *(create_dir(name, 0o700) for name in names),
            create_file("opt/a/b/file.txt", b"hello", 0o644),
        ),
        steps(*(chown(name, 1, 1) for name in (*names, "opt/a/b/file.txt"))),
    )


def test_directory_permission_on_commit(suite: Suite):
    check_layers(
        suite,
        steps(
            *(create_dir(f"dir{number}", 0o700) for number in range(1, 6)),
            create_file("dir4/f1", b"...", 0o644),
            create_file("dir5/f1", b"...", 0o644),
            *(chown(name, 1, 1) for name in ("dir1", "dir2", "dir3", "dir5", "dir5/f1")),
        ),
        steps(chown("dir2", 0, 0), remove("dir3"), chown("dir4", 1, 1), chown("dir4/f1", 1, 1)),
        steps(
            create_dir("dir3", 0o700),
            chown("dir3", 1, 1),
            remove("dir5"),
            create_dir("dir5", 0o700),
            chown("dir5", 1, 1),
        ),
    )


def test_remove_intermediate_snapshot(suite: Suite):
    client = suite.client
    change(suite, "base", "", steps())
    change(suite, "intermediate", "base", steps())
    client.prepare("top", "intermediate")
    with code("FAILED_PRECONDITION"):
        client.remove("intermediate")
    for name in ("top", "intermediate", "base"):
        client.remove(name)


def test_deleted_files_in_child_snapshot(suite: Suite):
    check_layers(
        suite,
        steps(create_file("foo", b"foo\n", 0o777), create_file("foobar", b"foobar\n", 0o777)),
        remove("foobar"),
        steps(),
    )


def test_move_file_from_lower_layer(suite: Suite):
    check_layers(
        suite,
        steps(
            create_dir("dir1", 0o700),
            create_file("dir1/f1", b"Hello", 0o644),
            create_dir("dir2", 0o700),
            create_file("dir2/f2", b"...", 0o644),
        ),
        steps(
            create_dir("dir3", 0o700),
            create_file("dir3/f1", b"Hello", 0o644),
            remove("dir1"),
            link("dir2/f2", "dir3/f2"),
            remove("dir2/f2"),
        ),
    )


@pytest.mark.parametrize("layers", [1, 2])
def test_view_readonly(suite: Suite, layers: int):
    parent = ""
    for number in range(layers):
        parent = change(suite, f"committed-{number}", parent, steps())
    with mounted(suite.client.view("view", parent)) as target, pytest.raises(OSError):
        (target / "testfile").write_bytes(b"testcontent")


def test_stat_in_walk(suite: Suite):
    base_snapshots(suite)
    found = suite.client.list()
    assert len(found) == 6
    for info in found:
        assert suite.client.stat(info.name) == info


def test_root_permission(suite: Suite):
    with mounted(suite.client.prepare("preparing")) as target:
        assert target.stat().st_mode & 0o777 == 0o755


def test_rename(suite: Suite):
    directory = () if suite.is_overlay else (rename("dir1", "dir2"),)  # overlay: EXDEV
    check_layers(
        suite,
        steps(
            create_dir("dir1", 0o700),
            create_dir("somefiles", 0o700),
            create_file("somefiles/f1", b"was here first!", 0o644),
            create_file("somefiles/f2", b"nothing interesting", 0o644),
        ),
        steps(
            *directory,
            create_file("somefiles/f1-overwrite", b"new content 1", 0o644),
            rename("somefiles/f1-overwrite", "somefiles/f1"),
            rename("somefiles/f2", "somefiles/f3"),
        ),
    )


def test_128_layers_mount(suite: Suite):
    flat = suite.work / "flat"
    flat.mkdir()
    bottom = steps(
        create_file("bottom", b"way at the bottom\n", 0o777),
        create_file("overwriteme", b"FIRST!\n", 0o777),
        create_dir("addhere", 0o755),
        create_dir("onlyme", 0o755),
        create_file("onlyme/bottom", b"bye!\n", 0o777),
    )
    others = [
        steps(
            create_file("overwriteme", b"%d WAS HERE!\n" % number, 0o777),
            create_file(f"addhere/file-{number}", b"same\n", 0o755),
            remove("onlyme"),
            create_dir("onlyme", 0o755),
            create_file(f"onlyme/file-{number}", b"only me!\n", 0o777),
        )
        for number in range(1, 128)
    ]
    parent = ""
    for number, step in enumerate([bottom, *others]):
        with mounted(suite.client.prepare(f"prepare-{number}", parent)) as target:
            assert tree(target) == tree(flat), f"layer {number}"
            step(flat)
            step(target)
            assert tree(target) == tree(flat), f"layer {number}"
        parent = f"committed-{number}"
        suite.client.commit(parent, f"prepare-{number}")
    with mounted(suite.client.view("fullview", parent)) as target:
        assert tree(target) == tree(flat)


# What the original leaves out: the codes that containerd's callers tell apart --------------------


def test_codes(suite: Suite):
    client = suite.client
    base_snapshots(suite)
    for call in (client.stat, client.mounts, client.remove, client.usage):
        with code("NOT_FOUND"):
            call("missing")
    with code("NOT_FOUND"):
        client.prepare("x", "missing")
    with code("INVALID_ARGUMENT"):
        client.prepare("x", "a1")
    with code("INVALID_ARGUMENT"):
        client.view("x", "v1")
    with code("FAILED_PRECONDITION"):
        client.mounts("c1")
    with code("NOT_FOUND"):
        client.commit("x", "missing")
    measures_first = () if suite.is_overlay else ("UNKNOWN",)  # containerd's native one
    with code("FAILED_PRECONDITION", *measures_first):
        client.commit("x", "v1")
    with code("ALREADY_EXISTS"):
        client.commit("c1", "a2")
    with code("NOT_FOUND"):
        client.update(messages.Info(name="missing"))
    assert len(client.list()) == 6


def test_mounts_are_those_of_prepare(suite: Suite):
    change(suite, "base", "", create_file("foo", b"foo\n", 0o777))
    assert suite.client.prepare("a", "base") == suite.client.mounts("a")
    assert suite.client.view("v", "base") == suite.client.mounts("v")


def test_what_is_extracted_into_is_writable(suite: Suite):
    first = suite.client.prepare("one")
    suite.client.commit("c", "one")
    for mounts in (first, suite.client.prepare("two", "c")):
        assert "ro" not in mounts[-1].options


def test_usage(suite: Suite):
    """A file of 1 MiB with two names, its directory, and the root."""

    def fill(target: Path) -> None:
        (target / "d").mkdir()
        (target / "d/data").write_bytes(b"x" * (1 << 20))
        (target / "d/again").hardlink_to(target / "d/data")

    with mounted(suite.client.prepare("a")) as target:
        fill(target)
    size, inodes = suite.client.usage("a")
    assert 1 << 20 <= size < (1 << 20) + 65536
    assert inodes == 3
    suite.client.commit("c", "a")
    assert suite.client.usage("c") == (size, inodes)
    if suite.is_overlay:
        suite.client.view("v", "c")
        suite.client.prepare("next", "c")
        assert suite.client.usage("next")[1] == 1


def test_many_are_listed(suite: Suite):
    names = {f"many-{number}" for number in range(230)}
    for name in names:
        suite.client.prepare(name)
    assert {info.name for info in suite.client.list()} == names
