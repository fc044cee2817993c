"""Policies, with signatures of the real cosign and notation in a real registry."""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image
from tests.support.installed import HTTP
from tests.support.node import Node, node_daemon
from tests.support.samples import program_tar
from tests.support.signers import Cosign, Notation, Skopeo

pytestmark = [pytest.mark.root, pytest.mark.registry]
REFUSED = 11
ANY = [{"type": "insecureAcceptAnything"}]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signers")


@pytest.fixture(scope="session")
def cosign(home: Path) -> Cosign:
    return Cosign.make(2, home / "cosign2")


@pytest.fixture(scope="session")
def cosign3(home: Path) -> Cosign:
    return Cosign.make(3, home / "cosign3")


@pytest.fixture(scope="session")
def notation(home: Path) -> Notation:
    return Notation.make(home / "notation")


@pytest.fixture(scope="session")
def skopeo(home: Path) -> Skopeo:
    return Skopeo.make(home / "skopeo")


class Published:
    """A snapshot in a registry, by tag and by digest."""

    def __init__(self, cli: Cli, registry: DockerRegistry, name: str, *options: str) -> None:
        self.repository = f"{registry.address}/{name}"
        self.tag = f"{self.repository}:1.0"
        source = registry.put(f"{name}-source", collect(image(program_tar()), "1.0"))
        self.digest = "sha256:" + cli.convert(source, self.tag, HTTP, *options)
        self.by_digest = f"{self.repository}@{self.digest}"


@pytest.fixture
def app(cli: Cli, registry: DockerRegistry, name: str) -> Published:
    return Published(cli, registry, name)


@pytest.fixture
def policy(tmp_path: Path) -> Callable[..., Path]:
    """Writes a policy for everything."""

    def write(*requirements: dict[str, Any], file: str = "policy.json", **more: Any) -> Path:
        path = tmp_path / file
        path.write_text(json.dumps({"default": list(requirements), **more}))
        return path

    return write


def by_key(key: Path, identity: str = "matchRepository") -> dict[str, Any]:
    return {"type": "sigstoreSigned", "keyPath": str(key), "signedIdentity": {"type": identity}}


def by_notation(root: Path, *identities: str) -> dict[str, Any]:
    trusted = list(identities) or ["x509.subject: C=US, ST=WA, O=Notary"]
    return {
        "type": "imgsnapNotationSigned",
        "rootPath": str(root),
        "trustedIdentities": trusted,
    }


def mounts_and_reads(cli: Cli, where: Path, *arguments: object) -> None:
    cli("mount", HTTP, *arguments, where)
    try:
        assert (where / "bin/busybox").read_bytes()
    finally:
        cli("umount", where)


# What signers make -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tag", "referrer"])
def test_cosign_2(form: str, cli: Cli, app: Published, cosign: Cosign, policy, tmp_path):
    if form == "tag":
        cosign.sign(app.by_digest)
    else:
        mode = "--registry-referrers-mode=oci-1-1"
        cosign.sign(app.by_digest, mode, COSIGN_EXPERIMENTAL="1")
    file = policy(by_key(cosign.public))
    for reference in (app.tag, app.by_digest):
        found = cli("verify", HTTP, reference, "--policy", file, "--format", "json").json
        assert found["accepted"] and found["digest"] == app.digest and found["until"] is None
        (signature,) = found["signatures"]
        assert signature["kind"] == "cosign" and signature["of"] == app.digest
        assert signature["signer"].startswith("key sha256:") and signature["problem"] is None
        mounts_and_reads(cli, tmp_path / "tree", "--policy", file, reference)


def test_cosign_3(cli: Cli, app: Published, cosign3: Cosign, policy, tmp_path):
    cosign3.sign(app.by_digest)
    assert cosign3.verifies(app.by_digest)
    file = policy(by_key(cosign3.public, "imgsnapDigestOnly"))
    (signature,) = cli("verify", HTTP, app.tag, "--policy", file, "--format", "json").json[
        "signatures"
    ]
    assert signature["kind"] == "cosign bundle"
    mounts_and_reads(cli, tmp_path / "tree", "--policy", file, app.tag)
    strict = policy(by_key(cosign3.public), file="strict.json")
    assert "names no repository" in cli.fails(REFUSED, "verify", HTTP, app.tag, "--policy", strict)


def test_notation(cli: Cli, app: Published, notation: Notation, policy, tmp_path):
    notation.sign(app.by_digest, "--expiry", "24h", "--user-metadata", "build=7")
    file = policy(by_notation(notation.root))
    found = cli("verify", HTTP, app.tag, "--policy", file, "--format", "json").json
    (signature,) = found["signatures"]
    assert signature["kind"] == "notation" and "O=Notary" in signature["signer"]
    assert found["until"] > 0
    mounts_and_reads(cli, tmp_path / "tree", "--policy", file, app.tag)
    other = policy(by_notation(notation.root, "x509.subject: C=US, ST=WA, O=Others"), file="o.json")
    assert "no trusted identity" in cli.fails(REFUSED, "verify", HTTP, app.tag, "--policy", other)


def test_notation_with_cose(cli: Cli, app: Published, notation: Notation, policy):
    notation.sign(app.by_digest, "--signature-format", "cose")
    file = policy(by_notation(notation.root))
    assert "COSE" in cli.fails(REFUSED, "verify", HTTP, app.tag, "--policy", file)


def test_both_are_needed(
    cli: Cli, app: Published, cosign: Cosign, notation: Notation, policy, tmp_path
):
    file = policy(by_key(cosign.public), by_notation(notation.root))
    cosign.sign(app.by_digest)
    assert "notation" in cli.fails(
        REFUSED, "mount", HTTP, "--policy", file, app.tag, tmp_path / "t"
    )
    notation.sign(app.by_digest)
    mounts_and_reads(cli, tmp_path / "tree", "--policy", file, app.tag)


def test_the_whole_of_what_a_tag_names(cli: Cli, registry, name, cosign: Cosign, policy, tmp_path):
    """`cosign sign` of a tag signs the index behind it, which commits to image and snapshot."""
    app = Published(cli, registry, name, "--as", "image")
    cosign.sign(app.tag)
    file = policy(by_key(cosign.public))
    mounts_and_reads(cli, tmp_path / "tree", "--policy", file, app.tag)


def test_each_snapshot_of_a_tag(cli: Cli, registry, name, cosign: Cosign, policy):
    """What the snapshotter needs: it knows a snapshot's digest only."""
    app = Published(cli, registry, name, "--as", "image")
    file = policy(by_key(cosign.public))
    asked = ("verify", HTTP, "--policy", file, "--format", "json")
    cosign.sign(app.tag)
    digest = cli(*asked, app.tag).json["digest"]
    cli.fails(REFUSED, "verify", HTTP, "--policy", file, f"{app.repository}@{digest}")
    cosign.sign(app.tag, "--recursive")
    assert cli(*asked, f"{app.repository}@{digest}").json["accepted"]


def test_signatures_come_along(
    cli: Cli, registry, app: Published, name, cosign: Cosign, cosign3, notation, policy
):
    """Into the local store, and from there into another repository."""
    for signer in (cosign, cosign3, notation):
        signer.sign(app.by_digest)
    file = policy(by_key(cosign.public), by_notation(notation.root))
    cli("pull", HTTP, "--progress", "none", "--policy", file, app.tag, "store:pulled")
    copy = f"{registry.address}/{name}-copy:1.0"
    cli("push", HTTP, "--progress", "none", "store:pulled", copy)
    of = by_key(cosign.public) | {
        "signedIdentity": {"type": "exactRepository", "dockerRepository": app.repository}
    }
    moved = policy(of, by_key(cosign3.public, "imgsnapDigestOnly"), by_notation(notation.root))
    for reference in ("store:pulled", copy):
        found = cli("verify", HTTP, reference, "--policy", moved, "--format", "json").json
        assert found["digest"] == app.digest and found["accepted"]
        assert {s["kind"] for s in found["signatures"]} == {"cosign", "cosign bundle", "notation"}


def test_signatures_of_the_target_are_kept(
    cli: Cli, registry, app: Published, name, cosign: Cosign, cosign3: Cosign
):
    """Somebody signed there what is pushed again with fewer signatures."""
    cli("pull", HTTP, "--progress", "none", app.tag, "store:unsigned")
    cosign.sign(app.by_digest)
    cli("pull", HTTP, "--progress", "none", app.tag, "store:signed")
    cosign3.sign(app.by_digest, "--new-bundle-format=false")
    for stored in ("store:unsigned", "store:signed"):
        cli("push", HTTP, "--progress", "none", stored, app.tag)
        for key in (cosign.public, cosign3.public):
            cli("verify", HTTP, "--key", key, app.tag)


def test_a_signature_of_the_image_is_none_of_its_snapshot(
    cli: Cli, registry, name, cosign: Cosign, policy
):
    """Anybody who may push can call something a snapshot of a signed image."""
    source = registry.put(name, collect(image(program_tar()), "1.0"))
    cli.convert(source, f"{registry.address}/{name}:snapshot", HTTP)
    cosign.sign(source)
    file = policy(by_key(cosign.public))
    assert "no signature" in cli.fails(REFUSED, "verify", HTTP, source, "--policy", file)


# Another reader of policies --------------------------------------------------------------------


def test_skopeo_reads_policies_as_we_do(
    cli: Cli, app: Published, cosign: Cosign, cosign3: Cosign, skopeo: Skopeo, policy
):
    """containers-policy.json(5) is its programs' format: scopes and identities mean the same."""
    cosign.sign(app.by_digest)
    host = app.repository.partition("/")[0]
    good, bad = cosign.public, cosign3.public
    remap = {"type": "remapIdentity", "prefix": host, "signedPrefix": host}

    def key(file: Path, **identity: str) -> list[dict[str, Any]]:
        value: dict[str, Any] = {"type": "sigstoreSigned", "keyPath": str(file)}
        return [value | ({"signedIdentity": identity} if identity else {})]

    def repository(file: Path) -> list[dict[str, Any]]:
        return key(file, type="matchRepository")

    cases: list[dict[str, Any]] = [
        {"": repository(good)},
        {"": repository(bad)},
        {"": key(good)},
        {"": key(good, type="matchExact")},
        {"": key(good, type="exactRepository", dockerRepository=app.repository)},
        {"": key(good, type="exactRepository", dockerRepository=app.repository[:-1])},
        {"": key(good, type="exactReference", dockerReference=app.tag)},
        {"": key(good, **remap)},
        {"": repository(bad), host: repository(good)},
        {host: repository(bad), app.repository: repository(good)},
        {app.repository: repository(good), app.tag: repository(bad)},
        {app.repository: repository(bad), app.by_digest: ANY},
        {app.repository[:-1]: repository(good)},
        {"*.0.0.1": repository(good), "*.1": ANY},
        {"*.1": repository(bad), host: repository(good)},
        {"": [*repository(good), {"type": "reject"}]},
        {"": [*repository(good), *ANY]},
        {"": [*repository(good), *repository(bad)]},
    ]
    for number, scopes in enumerate(cases):
        file = policy({"type": "reject"}, file=f"{number}.json", transports={"docker": scopes})
        for reference in (app.tag, app.by_digest):
            ours = cli.any("verify", HTTP, reference, "--policy", file)
            assert ours.code in (0, REFUSED), ours.err
            theirs = skopeo.accepts(reference, file)
            assert (ours.code == 0) == theirs, (scopes, reference, ours.err)


def test_signatures_of_skopeo(
    cli: Cli, registry, app: Published, cosign: Cosign, skopeo: Skopeo, policy, name
):
    """They name tag and all, so they need no weaker identity than the default."""
    copy = f"{registry.address}/{name}-copy:1.0"
    skopeo.copy_signed(app.tag, copy, cosign.run.home / "cosign.key")
    strict = policy({"type": "sigstoreSigned", "keyPath": str(cosign.public)})
    found = cli("verify", HTTP, copy, "--policy", strict, "--format", "json").json
    assert found["accepted"] and found["digest"] == app.digest


# Refusals --------------------------------------------------------------------------------------


def refused_everywhere(cli: Cli, app: Published, file: Path, where: Path, why: str) -> None:
    """No way of opening it is open, and nothing is left of the tries."""
    before = sorted(path.name for path in where.parent.iterdir())
    for arguments in (
        ("mount", HTTP, "--policy", file, app.tag, where),
        ("run", HTTP, "--policy", file, app.tag, "--", "/bin/busybox"),
        ("warm", HTTP, "--policy", file, app.tag),
        ("cat", HTTP, "--policy", file, app.tag, "/bin/busybox"),
        ("pull", HTTP, "--policy", file, app.tag, "store:pulled"),
        ("verify", HTTP, "--policy", file, app.tag),
    ):
        assert why in cli.fails(REFUSED, *arguments), arguments
    assert sorted(path.name for path in where.parent.iterdir()) == before
    assert cli.leftovers() == []
    kept = [path for kind in ("metadata", "chunk-maps") for path in cli.cache.glob(f"*/{kind}/*")]
    assert [*cli.cache.glob("*/blobs/*")] and kept == [], "a part was fetched"


def test_unsigned(cli: Cli, app: Published, cosign: Cosign, policy, tmp_path, other_cli: Cli):
    file = policy(by_key(cosign.public))
    refused_everywhere(other_cli, app, file, tmp_path / "tree", "no signature of cosign's")


def test_the_wrong_key(
    cli: Cli, app: Published, cosign: Cosign, cosign3: Cosign, policy, tmp_path, other_cli: Cli
):
    cosign.sign(app.by_digest)
    file = policy(by_key(cosign3.public))
    refused_everywhere(other_cli, app, file, tmp_path / "tree", "by another key")


def test_a_signature_replayed_from_another_snapshot(
    cli: Cli, registry, app: Published, name, cosign: Cosign, policy, tmp_path, other_cli: Cli
):
    other = Published(cli, registry, f"{name}-2", "--chunk-size", "128KiB")
    cosign.sign(other.by_digest)
    tag = other.digest.replace(":", "-") + ".sig"
    kind = "application/vnd.oci.image.manifest.v1+json"
    where = registry.url(f"{name}-2/manifests/{tag}")
    with urllib.request.urlopen(urllib.request.Request(where, headers={"Accept": kind})) as answer:
        raw = answer.read()
    for layer in [*json.loads(raw)["layers"], json.loads(raw)["config"]]:
        blob = registry.blob_file(layer["digest"]).read_bytes()
        registry._put_blob(name, layer["digest"], blob)
    registry._put_manifest(name, app.digest.replace(":", "-") + ".sig", raw)
    file = policy(by_key(cosign.public))
    refused_everywhere(other_cli, app, file, tmp_path / "tree", f"is of {other.digest}")


def test_rejected_by_name(cli: Cli, app: Published, policy, tmp_path):
    scopes = {app.repository: [{"type": "reject"}], app.tag: ANY}
    file = policy({"type": "reject"}, transports={"docker": scopes})
    mounts_and_reads(cli, tmp_path / "tree", "--policy", file, app.tag)
    assert "rejects" in cli.fails(
        REFUSED, "mount", HTTP, "--policy", file, app.by_digest, tmp_path / "tree"
    )


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ("{}", 2, "default"),
        ('{"default": [{"type": "reject"}], "transport": {}}', 2, "'transport'"),
        ('{"default": [{"type": "sigstoreSigned", "keyPath": "/none"}]}', 2, "default[0].keyPath"),
        ('{"default": [{"type": "signedBy", "keyType": "GPGKeys"}]}', 8, "signedBy"),
        ('{"default": [{"type": "sigstoreSigned", "fulcio": {}}]}', 8, "fulcio"),
        ('{"default": [', 2, "JSON"),
    ],
)
def test_a_policy_that_cannot_be_used(text, code, field, cli: Cli, app: Published, tmp_path):
    file = tmp_path / "policy.json"
    file.write_text(text)
    for arguments in (("mount", HTTP, app.tag, tmp_path / "tree"), ("daemon", "run")):
        said = cli.any(*arguments, env={"IMGSNAP_POLICY": str(file)})
        assert said.code == code and field in said.err and str(file) in said.err
    assert cli.leftovers() == []


def test_a_missing_policy(cli: Cli, app: Published, tmp_path):
    cli.fails(
        4, "mount", HTTP, "--policy", tmp_path / "none", app.tag, tmp_path / "tree", hint=False
    )


# What is remembered ----------------------------------------------------------------------------


def test_what_was_accepted_opens_while_the_registry_is_away(
    cli: Cli, own_registry: DockerRegistry, name, cosign: Cosign, cosign3: Cosign, policy, tmp_path
):
    app = Published(cli, own_registry, name)
    cosign.sign(app.by_digest)
    file = policy(by_key(cosign.public))
    for command in (("warm",), ("verify",)):
        cli(*command, HTTP, "--policy", file, app.tag)
    own_registry.accesses()
    mounts_and_reads(cli, tmp_path / "tree", "--policy", file, app.tag)
    asked = [a.path for a in own_registry.accesses()]
    assert [path for path in asked if ".sig" in path or "referrers" in path] == []
    own_registry.stop()
    for reference in (app.tag,):
        mounts_and_reads(cli, tmp_path / "tree", "--policy", file, reference)
    # Another policy has accepted nothing yet, nor has this one with another key in its file.
    other = policy(by_key(cosign.public), by_key(cosign.public), file="other.json")
    cli.fails(6, "mount", HTTP, "--policy", other, app.tag, tmp_path / "tree", hint=False)
    key = tmp_path / "key.pub"
    key.write_bytes(cosign.public.read_bytes())
    moved = policy(by_key(key), file="moved.json")
    mounts_and_reads(cli, tmp_path / "tree", "--policy", moved, app.tag)  # the same key
    key.write_bytes(cosign3.public.read_bytes())
    cli.fails(6, "mount", HTTP, "--policy", moved, app.tag, tmp_path / "tree", hint=False)
    assert cli.leftovers() == []


def test_without_a_policy_nobody_is_asked_for_signatures(
    cli: Cli, own_registry: DockerRegistry, name, tmp_path
):
    app = Published(cli, own_registry, name)
    own_registry.accesses()
    mounts_and_reads(cli, tmp_path / "tree", "--boot-pack", "none", app.tag)
    asked = [a.path for a in own_registry.accesses()]
    assert asked and not [path for path in asked if "sha256-" in path or "referrers" in path]


# The daemon ------------------------------------------------------------------------------------


@pytest.fixture
def guarded(cli: Cli, cosign: Cosign, policy):
    """A daemon with a policy, and the file of it."""
    file = policy(by_key(cosign.public), file="daemon.json")
    with node_daemon(cli, env={"IMGSNAP_POLICY": str(file)}) as running:
        yield running, file


def test_a_client_cannot_weaken_the_daemons_policy(
    guarded: tuple[Node, Path], cli: Cli, app: Published, cosign: Cosign, policy, tmp_path
):
    where = tmp_path / "tree"
    lax = policy(*ANY, file="lax.json")
    for flags in ((), ("--policy", lax)):
        assert "no signature" in cli.fails(REFUSED, "mount", HTTP, *flags, app.tag, where)
        assert "no signature" in cli.fails(REFUSED, "attach", HTTP, *flags, app.tag)
    assert not where.exists() and cli.mounts() == [str(cli.run_dir / "node/dev")]
    assert cli("daemon", "status", "--format", "json").json["attachments"] == []
    cosign.sign(app.by_digest)
    mounts_and_reads(cli, where, "--policy", lax, app.tag)
    path = cli("attach", HTTP, app.tag).out.strip()
    assert Path(path).stat().st_size
    cli("detach", path)


def test_a_client_can_ask_for_more(
    guarded: tuple[Node, Path], cli: Cli, app: Published, cosign: Cosign, cosign3, policy, tmp_path
):
    cosign.sign(app.by_digest)
    more = policy(by_key(cosign3.public), file="more.json")
    where = tmp_path / "tree"
    assert "another key" in cli.fails(REFUSED, "mount", HTTP, "--policy", more, app.tag, where)
    mounts_and_reads(cli, where, app.tag)


def test_a_policy_that_changes_counts_from_then_on(
    guarded: tuple[Node, Path], cli: Cli, app: Published, cosign: Cosign, cosign3, policy, tmp_path
):
    node, file = guarded
    cosign.sign(app.by_digest)
    first, second = tmp_path / "first", tmp_path / "second"
    cli("mount", HTTP, app.tag, first)
    try:
        policy(by_key(cosign3.public), file=file.name)
        assert "another key" in cli.fails(REFUSED, "mount", HTTP, app.tag, second)
        # What is mounted was accepted when it was: it stays, also with another block server.
        server = node.server()
        assert server is not None
        node.kill(server)
        assert (first / "bin/busybox").read_bytes()
    finally:
        cli("umount", first)
    file.write_text("{")
    cli.fails(2, "mount", HTTP, app.tag, second)


def test_a_daemon_that_a_command_starts_has_its_policy(
    cli: Cli, app: Published, cosign: Cosign, policy
):
    cosign.sign(app.by_digest)
    file = policy(by_key(cosign.public))
    path = cli("attach", HTTP, "--policy", file, app.tag).out.strip()
    try:
        assert cli("daemon", "status", "--format", "json").json["policy"] == str(file)
    finally:
        cli("detach", path)
        cli("daemon", "stop", "--force")
