"""Policies: what is refused in a file, and which requirements a name gets."""

import json
from base64 import b64encode
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.errors import InvalidArgument, NotFound, Unsupported
from imgsnap.trust.identity import Match, SignedIdentity
from imgsnap.trust.names import Name
from imgsnap.trust.policy import AcceptAnything, NotationSigned, Policy, Reject, SigstoreSigned
from imgsnap.trust.policy_file import load_policy, parse_text, policy_of_key
from imgsnap.trust.policy_parse import KEY_SIZE_MAX, LIST_MAX, POLICY_SIZE_MAX, parse_policy
from imgsnap.trust.subjects import TrustedSubject, parse_subject

REJECT: list[Any] = [{"type": "reject"}]
PEM = b"-----BEGIN PUBLIC KEY-----\n-----BEGIN CERTIFICATE-----\n"
"""As far as a policy's parser looks."""
DATA = b64encode(PEM).decode()
DIGEST = "sha256:" + "ab" * 32


def parse(value: object) -> Policy:
    return parse_policy(json.dumps(value).encode(), lambda name: PEM + name.encode(), file="f")


def one(requirement: dict[str, Any]) -> Any:
    return parse({"default": [requirement]}).default[0]


def test_requirements():
    assert one({"type": "insecureAcceptAnything"}) == AcceptAnything()
    assert one({"type": "reject"}) == Reject()
    key = {"type": "sigstoreSigned", "keyData": DATA}
    assert one(key) == SigstoreSigned((PEM,), SignedIdentity(Match.REPO_DIGEST_OR_EXACT))
    paths = {"type": "sigstoreSigned", "keyPaths": ["/a", "b"]}
    assert one(paths).keys == (PEM + b"/a", PEM + b"b")
    remap = {"type": "remapIdentity", "prefix": "mirror.test", "signedPrefix": "vendor.test"}
    assert one(key | {"signedIdentity": remap}).identity == SignedIdentity(
        Match.REMAP, "mirror.test", "vendor.test"
    )
    notation = {"type": "imgsnapNotationSigned", "rootPath": "r", "trustedIdentities": ["*"]}
    assert one(notation) == NotationSigned((PEM + b"r",), ())


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({}, "default: is missing"),
        ({"default": []}, "default: is empty"),
        ({"default": {}}, "default: is not a list"),
        ({"default": [7]}, r"default\[0\]: is not an object"),
        ({"default": REJECT * (LIST_MAX + 1)}, "default: has 65"),
        ({"default": REJECT, "transport": {}}, "'transport'"),
        ({"default": REJECT, "transports": []}, "transports: is not an object"),
        ({"default": REJECT, "transports": {"dokcer": {}}}, "'dokcer'"),
        ({"default": REJECT, "transports": {"docker": {"a.test": []}}}, "'a.test': is empty"),
        ({"default": [{"type": "accept"}]}, r"default\[0\].type: 'accept'"),
        ({"default": [{}]}, r"default\[0\].type"),
        ({"default": [{"type": "reject", "except": "me"}]}, "'except'"),
        ({"default": [{"type": "sigstoreSigned"}]}, "exactly one of"),
        ({"default": [{"type": "sigstoreSigned", "keyPath": "a", "keyData": DATA}]}, "exactly"),
        ({"default": [{"type": "sigstoreSigned", "keyPath": ["a"]}]}, "keyPath: is not a text"),
        ({"default": [{"type": "sigstoreSigned", "keyPaths": "a"}]}, "keyPaths: is not a list"),
        ({"default": [{"type": "sigstoreSigned", "keyDatas": []}]}, "keyDatas: is empty"),
        ({"default": [{"type": "sigstoreSigned", "keyData": "?"}]}, "keyData: is not base64"),
        ({"default": [{"type": "sigstoreSigned", "keyData": "eA=="}]}, "keyData: holds no PUBLIC"),
        (
            {"default": [{"type": "sigstoreSigned", "keyData": DATA, "signedIdentity": {}}]},
            "signedIdentity.type",
        ),
        (
            {
                "default": [
                    {
                        "type": "sigstoreSigned",
                        "keyData": DATA,
                        "signedIdentity": {"type": "matchExact", "dockerReference": "a"},
                    }
                ]
            },
            "'dockerReference'",
        ),
        (
            {
                "default": [
                    {
                        "type": "sigstoreSigned",
                        "keyData": DATA,
                        "signedIdentity": {"type": "exactRepository"},
                    }
                ]
            },
            "dockerRepository: is not a text",
        ),
        ({"default": [{"type": "imgsnapNotationSigned", "rootData": DATA}]}, "trustedIdentities"),
        (
            {
                "default": [
                    {
                        "type": "imgsnapNotationSigned",
                        "rootData": DATA,
                        "trustedIdentities": ["*", "x509.subject: C=US, ST=WA, O=x"],
                    }
                ]
            },
            "does not begin with",
        ),
    ],
)
def test_what_is_refused(value, where):
    with pytest.raises(InvalidArgument, match=where) as raised:
        parse(value)
    assert str(raised.value).startswith("f: ")


@pytest.mark.parametrize(
    "scope",
    [
        *("*", "a*.test", "*.a.test/app", "*.a.test:80", "https://a.test", "/a.test", "a.test/"),
        *("a.test/\n", "a.test/*"),
    ],
)
def test_scopes_that_never_match_are_refused(scope):
    with pytest.raises(InvalidArgument, match="scope"):
        parse({"default": REJECT, "transports": {"docker": {scope: REJECT}}})


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"default":[],"default":[]}', b"\xff"])
def test_what_is_no_json_object(text):
    with pytest.raises(InvalidArgument, match="f: "):
        parse_policy(text, lambda name: b"", file="f")


def test_what_others_check_and_we_do_not():
    for requirement in (
        {"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"},
        {"type": "sigstoreSigned", "fulcio": {"caPath": "/ca"}},
        {"type": "sigstoreSigned", "keyPath": "/k", "rekorPublicKeyPath": "/r"},
        {"type": "sigstoreSigned", "pki": {}},
    ):
        with pytest.raises(Unsupported, match=r"f: default\[0\]"):
            parse({"default": [requirement]})


def test_transports_that_we_never_use_are_not_read():
    parse({"default": REJECT, "transports": {"docker-daemon": {"": [{"type": "signedBy"}]}}})


def test_limits():
    with pytest.raises(InvalidArgument, match="65537 bytes"):
        parse_policy(
            b'{"default": [{"type": "sigstoreSigned", "keyPath": "k"}]}',
            lambda name: bytes(KEY_SIZE_MAX + 1),
        )
    many = {"default": [{"type": "sigstoreSigned", "keyPaths": ["k"] * 4}]}
    with pytest.raises(InvalidArgument, match="with its keys"):
        parse_policy(json.dumps(many).encode(), lambda name: PEM.ljust(KEY_SIZE_MAX))
    with pytest.raises(InvalidArgument, match="json_size_max"):
        parse_policy(b" " * (POLICY_SIZE_MAX + 1), lambda name: b"")


def test_files(tmp_path):
    with pytest.raises(NotFound):
        load_policy(tmp_path / "none")
    with pytest.raises(NotFound):
        policy_of_key(tmp_path / "none")
    (tmp_path / "key").write_bytes(b"nonsense")
    with pytest.raises(InvalidArgument, match="key holds no PUBLIC KEY"):
        policy_of_key(tmp_path / "key")
    (tmp_path / "key").write_bytes(PEM)
    file = tmp_path / "policy.json"
    file.write_text('{"default": [{"type": "sigstoreSigned", "keyPath": "key"}]}')
    first = load_policy(file)
    assert first.default[0].keys == (PEM,)  # beside the file
    (tmp_path / "key").write_bytes(PEM + b"two")
    assert load_policy(file).digest != first.digest
    (tmp_path / "key").unlink()
    with pytest.raises(InvalidArgument, match=r"keyPath: .*No such file"):
        load_policy(file)


def test_a_text_from_elsewhere_names_no_files():
    with pytest.raises(InvalidArgument, match="not as files"):
        parse_text('{"default": [{"type": "sigstoreSigned", "keyPath": "/etc/shadow"}]}')


# Which requirements ----------------------------------------------------------------------------

LABELS = st.sampled_from(["a", "b", "c"])
HOSTS = st.builds(
    lambda labels, port: ".".join(labels) + port,
    st.lists(LABELS, min_size=2, max_size=4),
    st.sampled_from(["", ":5000"]),
)
REPOSITORIES = st.builds(
    lambda host, path: "/".join([host, *path]), HOSTS, st.lists(LABELS, min_size=1, max_size=3)
)
NAMES = st.builds(
    lambda repository, tag, digest: Name("docker", repository, "" if digest else tag, digest),
    REPOSITORIES,
    st.sampled_from(["1", "2"]),
    st.sampled_from(["", DIGEST]),
)


def scopes_of(name: Name) -> st.SearchStrategy[str]:
    """Near misses and hits."""
    host = name.repository.partition("/")[0].partition(":")[0]
    labels = host.split(".")
    parts = name.repository.split("/")
    near = [
        "",
        *("/".join(parts[: n + 1]) for n in range(len(parts))),
        *("*." + ".".join(labels[n:]) for n in range(len(labels))),
        *(f"{name.repository}:{tag}" for tag in ("1", "2")),
        f"{name.repository}@{DIGEST}",
        *(name.repository[:-1], name.repository + "x", host),
    ]
    return st.sampled_from([scope for scope in near if not scope.endswith(("/", ":"))])


def rank(scope: str, name: Name) -> tuple[int, int] | None:
    """By the words of containers-policy.json(5): how narrow a scope is that matches, else None."""
    tail = f"@{name.digest}" if name.digest else f":{name.tag}"
    if scope == name.repository + tail:
        return (3, 0)
    if scope == name.repository or (name.repository.startswith(scope + "/") and scope):
        return (2, len(scope))
    host = name.repository.partition("/")[0].partition(":")[0]
    if scope.startswith("*.") and host.endswith(scope[1:]):
        return (1, len(scope))
    return (0, 0) if scope == "" else None


@given(st.data())
def test_the_narrowest_scope_decides_alone(data):
    name = data.draw(NAMES)
    scopes = data.draw(st.lists(scopes_of(name), unique=True))
    requirements = {
        scope: (SigstoreSigned((scope.encode(),), SignedIdentity()),) for scope in scopes
    }
    policy = Policy((Reject(),), {"docker": requirements, "oci": {"": (AcceptAnything(),)}})
    ranks = {scope: found for scope in scopes if (found := rank(scope, name)) is not None}
    best = max(ranks, key=lambda scope: ranks[scope], default=None)
    expected = policy.default if best is None else requirements[best]
    assert policy.requirements(name) == expected


@given(st.lists(scopes_of(Name("docker", "a.b.c:5000/d/e", "1")), unique=True))
def test_a_policy_survives_its_text(scopes):
    policy = parse(
        {
            "default": [
                {"type": "sigstoreSigned", "keyDatas": [DATA, DATA]},
                {
                    "type": "imgsnapNotationSigned",
                    "rootData": DATA,
                    "trustedIdentities": ["x509.subject: C=US, ST=a\\,b, O=\\ x\\ "],
                },
            ],
            "transports": {
                "docker": dict.fromkeys(scopes, REJECT),
                "oci": {"/a/b": [{"type": "insecureAcceptAnything"}]},
            },
        }
    )
    again = parse_text(policy.to_text())
    assert again == policy and again.digest == policy.digest


def test_names(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    layout = Name.of(f"oci:{tmp_path}/link", "1.0")
    assert layout == Name("oci", str(real), "1.0") and not layout.is_docker
    assert layout.scopes()[:2] == [f"{real}:1.0", str(real)]
    assert layout.scopes()[-2:] == ["/" + real.parts[1], ""]
    assert all(len(wide) < len(narrow) for narrow, wide in pairwise(layout.scopes()))
    registry = Name.of("a.test:5000/app", DIGEST)
    assert str(registry) == f"docker:a.test:5000/app@{DIGEST}"
    assert registry.scopes() == [
        f"a.test:5000/app@{DIGEST}",
        "a.test:5000/app",
        "a.test:5000",
        "*.test",
        "",
    ]
    assert Name.of("oci-archive:/x", "1").scopes() == [""]
    assert Name.of("oci:5000/app", "1") == Name("docker", "oci:5000/app", "1")  # a registry's


# Identities ------------------------------------------------------------------------------------

TAGGED = Name("docker", "a.test/app", "1")
PINNED = Name("docker", "a.test/app", digest=DIGEST)
LAYOUT = Name("oci", "/store", "1")


@pytest.mark.parametrize(
    ("match", "name", "accepted", "refused"),
    [
        (Match.EXACT, TAGGED, ["a.test/app:1"], ["a.test/app:2", "a.test/app", "b.test/app:1"]),
        (Match.EXACT, PINNED, [], ["a.test/app:1", "a.test/app"]),
        (Match.REPO_DIGEST_OR_EXACT, TAGGED, ["a.test/app:1"], ["a.test/app", "a.test/app:2"]),
        (Match.REPO_DIGEST_OR_EXACT, PINNED, ["a.test/app:7"], ["a.test/app", "a.test/apps:7"]),
        (
            Match.REPOSITORY,
            TAGGED,
            ["a.test/app", "a.test/app:2"],
            ["a.test", "a.test/app/x", "", "A B"],
        ),
        (Match.REPOSITORY, LAYOUT, [], ["/store", "store:1", "oci:/store"]),
        (Match.EXACT, LAYOUT, [], ["/store:1"]),
        (Match.DIGEST_ONLY, LAYOUT, [None, "anything"], []),
        (Match.REPOSITORY, TAGGED, [], [None]),
    ],
)
def test_identities(match, name, accepted, refused):
    identity = SignedIdentity(match)
    assert [signed for signed in accepted if identity.problem(name, signed)] == []
    assert [signed for signed in refused if not identity.problem(name, signed)] == []


def test_docker_hubs_names():
    """cosign writes the old name of the registry."""
    hub = Name("docker", "docker.io/library/busybox", "1")
    identity = SignedIdentity(Match.REPOSITORY)
    for same in ("index.docker.io/library/busybox", "docker.io/busybox", "busybox:2"):
        assert identity.problem(hub, same) is None
    assert identity.problem(hub, "index.docker.io/other/busybox")
    key = {"type": "sigstoreSigned", "keyData": DATA}
    exact = {"type": "exactRepository", "dockerRepository": "index.docker.io/library/busybox"}
    assert one(key | {"signedIdentity": exact}).identity.value == "docker.io/library/busybox"


@pytest.mark.parametrize(
    "identity",
    [
        {"type": "exactRepository", "dockerRepository": "a.test/x:1"},
        {"type": "exactRepository", "dockerRepository": "A B"},
        {"type": "exactReference", "dockerReference": "a.test/x"},
    ],
)
def test_values_that_never_match_are_refused(identity):
    with pytest.raises(InvalidArgument, match=r"needs a tag|no repository|is not a"):
        one({"type": "sigstoreSigned", "keyData": DATA, "signedIdentity": identity})


def test_identities_with_values():
    exact = SignedIdentity(Match.EXACT_REFERENCE, "v.test:5000/x:1")
    assert exact.problem(LAYOUT, "v.test:5000/x:1") is None
    assert exact.problem(LAYOUT, "v.test:5000/x")
    repository = SignedIdentity(Match.EXACT_REPOSITORY, "v.test:5000/x")
    assert repository.problem(LAYOUT, "v.test:5000/x") is None
    assert repository.problem(LAYOUT, "v.test:5000/x:7") is None
    assert repository.problem(LAYOUT, f"v.test:5000/x@{DIGEST}") is None
    assert repository.problem(LAYOUT, "v.test:5000/xy")


@pytest.mark.parametrize(
    ("prefix", "signed", "fits"),
    [
        ("a.test", "v.test/app:1", True),
        ("a.test/app", "v.test:1", False),
        ("a.tes", "v.test/app:1", False),
        ("other.test", "a.test/app:1", True),
        ("a.test", "v.test/app:2", False),
        ("a.test", "a.test/app:1", False),
    ],
)
def test_remapping(prefix, signed, fits):
    identity = SignedIdentity(Match.REMAP, prefix, "v.test")
    assert (identity.problem(TAGGED, signed) is None) == fits


# Subjects --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C=US,ST=WA,O=x", {"C": "US", "ST": "WA", "O": "x"}),
        (" C=US, ST = WA , O=a\\, b ", None),
        (" c=US, ST=WA, O=a\\, b ", {"C": "US", "ST": "WA", "O": "a, b"}),
        (" C=US, ST=WA, O=\\ a\\\\\\;\\ ", {"C": "US", "ST": "WA", "O": " a\\; "}),
        (" C=US, ST=WA, O=a=b", {"C": "US", "ST": "WA", "O": "a=b"}),
    ],
)
def test_subjects(text, expected):
    found = parse_subject("x509.subject:" + text)
    if expected is None:
        expected = {"C": "US", "ST": "WA", "O": "a, b"}
    assert dict(found.attributes) == expected
    assert parse_subject(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "C=US",
            "C=US, ST=WA",
            "C=US, ST=WA, O=",
            "C=US, ST=WA, O=a, O=b",
            "C=US, ST=WA, O=a,",
        ),
        *("C=US, ST=WA, O=a;b", "C=US, ST=WA, O=a\\", "C=US, ST=WA, O=a\\b", "C=US, ST=WA, X=a"),
    ],
)
def test_subjects_that_are_none(text):
    with pytest.raises(InvalidArgument):
        parse_subject("x509.subject: " + text)


@given(st.text(alphabet="ab ,;\\=", min_size=1, max_size=8))
def test_any_value_survives_its_text(value):
    subject = TrustedSubject((("C", "US"), ("ST", "WA"), ("O", value)))
    assert parse_subject(str(subject)) == subject


def test_a_subject_with_two_values_does_not_match():
    wanted = parse_subject("x509.subject: C=US, ST=WA, O=x")
    assert wanted.matches({"C": ["US"], "ST": ["WA"], "O": ["x"], "OU": ["a", "b"]})
    assert not wanted.matches({"C": ["US"], "ST": ["WA"], "O": ["x", "y"]})
    assert not wanted.matches({"C": ["US"], "ST": ["WA"]})
