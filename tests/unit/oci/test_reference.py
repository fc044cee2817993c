"""Parsing and printing of locations."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.errors import InvalidReference
from imgsnap.oci.reference import (
    DockerArchiveLocation,
    LayoutLocation,
    OciArchiveLocation,
    RegistryLocation,
    StoreLocation,
    normalize_docker_name,
    parse_location,
)

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected", "printed", "reference"),
    [
        (
            "reg.example/team/app:1.0",
            RegistryLocation("reg.example", "team/app", "1.0"),
            "reg.example/team/app:1.0",
            "1.0",
        ),
        (
            f"docker://localhost:5000/a@{DIGEST}",
            RegistryLocation("localhost:5000", "a", None, DIGEST),
            f"localhost:5000/a@{DIGEST}",
            DIGEST,
        ),
        (
            f"REG.example:443/a:t@{DIGEST}",
            RegistryLocation("reg.example:443", "a", "t", DIGEST),
            f"reg.example:443/a:t@{DIGEST}",
            DIGEST,
        ),
        ("localhost/a", RegistryLocation("localhost", "a"), "localhost/a", "latest"),
        ("[::1]:5000/a:b", RegistryLocation("[::1]:5000", "a", "b"), "[::1]:5000/a:b", "b"),
        (
            "docker.io/alpine",
            RegistryLocation("docker.io", "library/alpine"),
            "docker.io/library/alpine",
            "latest",
        ),
        (
            "docker://alpine:3",
            RegistryLocation("docker.io", "library/alpine", "3"),
            "docker.io/library/alpine:3",
            "3",
        ),
        (
            "index.docker.io/me/x",
            RegistryLocation("docker.io", "me/x"),
            "docker.io/me/x",
            "latest",
        ),
        ("oci:dir", LayoutLocation(Path("dir")), "oci:dir", "latest"),
        ("oci:/a/b@c:v1", LayoutLocation(Path("/a/b@c"), "v1"), "oci:/a/b@c:v1", "v1"),
        (
            f"oci:d:reg.example/x:1@{DIGEST}",
            LayoutLocation(Path("d"), "reg.example/x:1", DIGEST),
            f"oci:d:reg.example/x:1@{DIGEST}",
            DIGEST,
        ),
        ("store:app", StoreLocation("app"), "store:app:latest", "app:latest"),
        (
            "store:localhost:5000/app:2",
            StoreLocation("localhost:5000/app", "2"),
            "store:localhost:5000/app:2",
            "localhost:5000/app:2",
        ),
        ("oci-archive:f.tar:x", OciArchiveLocation(Path("f.tar"), "x"), "oci-archive:f.tar:x", "x"),
        (
            "docker-archive:f.tar:me/x:1",
            DockerArchiveLocation(Path("f.tar"), "me/x:1"),
            "docker-archive:f.tar:me/x:1",
            "me/x:1",
        ),
        (
            "docker-archive:f.tar:x",
            DockerArchiveLocation(Path("f.tar"), "x:latest"),
            "docker-archive:f.tar:x:latest",
            "x:latest",
        ),
    ],
)
def test_accepts(text, expected, printed, reference):
    location = parse_location(text)
    assert location == expected
    assert str(location) == printed
    assert location.reference == reference


def test_docker_hub_has_another_name_on_the_wire():
    assert parse_location("docker.io/x").host == "registry-1.docker.io"
    assert parse_location("reg.example:1/x").host == "reg.example:1"


@pytest.mark.parametrize(
    ("text", "store", "hub"),
    [
        ("myapp:1", "store:myapp:1", "docker.io/library/myapp:1"),
        ("myapp", "store:myapp", "docker.io/library/myapp"),
        ("team/app", "store:team/app", "docker.io/team/app"),
        ("my.app:1.2", "store:my.app:1.2", "docker.io/library/my.app:1.2"),
    ],
)
def test_bare_names_are_ambiguous_and_the_hint_spells_both(text, store, hub):
    with pytest.raises(InvalidReference, match="ambiguous") as caught:
        parse_location(text)
    assert store in caught.value.hint
    assert hub in caught.value.hint
    parse_location(store)
    parse_location(hub)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b",
        "reg.example/UPPER",
        "reg.example/a//b",
        "reg.example/a:",
        "reg.example/a:-x",
        "reg.example/a:" + "t" * 129,
        "reg.example/" + "a" * 250,
        "reg.example:99999/a",
        "reg.example:0/a",
        "-reg.example/a",
        "reg.example/a@sha256:abc",
        "reg.example/a@sha512:" + "a" * 128,
        f"reg.example/a@{DIGEST.upper()}",
        "reg.example/../etc",
        "https://reg.example/a",
        "docker-daemon:x:1",
        "dir:/tmp/x",
        "reg.example:5000",
        "localhost:5000",
        "oci:",
        "oci::tag",
        "oci:dir:ta g",
        "oci:dir@sha256:zz",
        "store:",
        "store:Up",
        "docker-archive:f:Name:1",
        "user:pw@reg.example/a",
    ],
)
def test_refuses(text):
    with pytest.raises(InvalidReference):
        parse_location(text)


@pytest.mark.parametrize("name", ["x", "x:latest", "library/x", "docker.io/x:latest"])
def test_docker_names_that_mean_the_same(name):
    assert normalize_docker_name(name) == "docker.io/library/x:latest"


_COMPONENT = st.from_regex(r"[a-z0-9]{1,8}([._-][a-z0-9]{1,4})?", fullmatch=True)
_REPOSITORY = st.lists(_COMPONENT, min_size=2, max_size=4).map("/".join)
_HOST = st.from_regex(r"[a-z][a-z0-9]{0,8}\.[a-z]{2,5}(:[1-9][0-9]{0,3})?", fullmatch=True)
_TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", fullmatch=True)
_DIGEST = st.binary(min_size=32, max_size=32).map(lambda raw: "sha256:" + raw.hex())
_PATH = st.from_regex(r"/?[A-Za-z0-9 _.@+-]{1,9}(/[A-Za-z0-9 _.@+-]{1,9}){0,3}", fullmatch=True)
_SOME = st.one_of(
    st.builds(RegistryLocation, _HOST, _REPOSITORY, st.none() | _TAG, st.none() | _DIGEST),
    st.builds(LayoutLocation, _PATH.map(Path), st.none() | _TAG, st.none() | _DIGEST),
    st.builds(StoreLocation, _REPOSITORY, _TAG, st.none() | _DIGEST),
    st.builds(OciArchiveLocation, _PATH.map(Path), st.none() | _TAG),
    st.builds(
        DockerArchiveLocation,
        _PATH.map(Path),
        st.none() | st.builds("{}:{}".format, _REPOSITORY, _TAG),
    ),
)


def _made(strategy):
    """Locations that their own checks let pass."""

    @st.composite
    def draw_made(draw):
        try:
            return draw(strategy)
        except InvalidReference:
            return None

    return draw_made()


@given(_made(_SOME))
def test_printing_and_parsing_round_trips(location):
    if location is not None:
        assert parse_location(str(location)) == location


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    try:
        location = parse_location(text)
    except InvalidReference:
        return
    assert parse_location(str(location)) == location


@given(st.sampled_from(["oci:", "store:", "docker://", "oci-archive:", "docker-archive:"]))
def test_prefixes_alone_are_refused(prefix):
    with pytest.raises(InvalidReference):
        parse_location(prefix)


@given(
    st.sampled_from(["oci:", "store:", "docker://", "oci-archive:", "docker-archive:", "x.y/"]),
    st.text(alphabet="ab/:.@-_[]0", max_size=20),
)
def test_any_tail_is_parsed_or_refused(prefix, tail):
    test_any_text_is_parsed_or_refused.hypothesis.inner_test(prefix + tail)
