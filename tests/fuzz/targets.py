"""The parsers that a registry or a user reaches. A new one is a function with `@target` on it."""

import contextlib
import gzip
import json
import os
import random
import shutil
import socket
import tarfile
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from imgsnap.blockstore.extent_cache import PresenceHeader
from imgsnap.blockstore.snapshot_manifest import snapshot_manifest
from imgsnap.blockstore.verity_tree import VerifiedDevice
from imgsnap.containerd.api.cri.v1 import cri_pb2
from imgsnap.containerd.config import snippet
from imgsnap.convert.ingest import LayerSource, index_tar
from imgsnap.convert.limits import Limits
from imgsnap.convert.tar import TarReader
from imgsnap.digest import sha256_digest
from imgsnap.errors import FormatError, IntegrityError, InvalidArgument
from imgsnap.formats import chunk_map_codec, erofs, layer_index_codec, layer_index_layout
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.formats.frame import compress, decompress
from imgsnap.formats.layer_index import Kind
from imgsnap.formats.rules import Rules
from imgsnap.formats.snapshot_config import parse_config
from imgsnap.mount.container import Command, Identity
from imgsnap.oci.archive import DockerArchiveRepository, OciArchiveRepository
from imgsnap.oci.auth import Scope, basic_header, parse_challenges, parse_token_answer
from imgsnap.oci.auth import token_request as token_request_for
from imgsnap.oci.connections import ConnectionOptions
from imgsnap.oci.credentials import CredentialSource
from imgsnap.oci.hosts import parse_hosts
from imgsnap.oci.http_errors import parse_refusal
from imgsnap.oci.image_config import parse_run_config
from imgsnap.oci.manifest import parse_document
from imgsnap.oci.reference import parse_location
from imgsnap.oci.repository import Descriptor, RawManifest
from imgsnap.oci.retry import retry_after_s
from imgsnap.snapshotter.doctor import examine_containerd
from imgsnap.snapshotter.filters import parse_filters
from imgsnap.snapshotter.image_labels import parse_image_labels
from imgsnap.snapshotter.image_service import pulled_with
from imgsnap.snapshotter.labels import (
    GID_MAPPING,
    IMAGE_REF,
    MANIFEST_DIGEST,
    SNAPSHOT_DIGEST,
    TARGET,
    UID_MAPPING,
    check_labels,
    digest_label,
    mapped_root,
)
from imgsnap.snapshotter.layer_tree import write_layer
from imgsnap.snapshotter.rows import Kind as SnapshotKind
from imgsnap.snapshotter.rows import Row, decode, encode
from imgsnap.vm.initramfs import is_static
from imgsnap.vm.kernel import kernel_version
from imgsnap.vm.launcher import launcher
from imgsnap.vm.modules import dependencies
from tests.fuzz.harness import JSON_WORDS, target
from tests.support.golden import golden_files
from tests.support.images import Bytes
from tests.support.oci_images import descriptor_of, repository_at, tar_of
from tests.support.snapshots import BuiltSnapshot, build_snapshot, index_manifest, random_device
from tests.support.tars import Item, layer_tar


@cache
def snapshot() -> BuiltSnapshot:
    return build_snapshot(random_device(64), extents=2, packs=2, created="2026-01-02T03:04:05Z")


@cache
def sealed() -> BuiltSnapshot:
    """With a hash tree."""
    return build_snapshot(random_device(64), verity=True)


def manifests() -> list[bytes]:
    index = index_manifest([(snapshot().manifest.descriptor, "amd64")])
    return [snapshot().manifest.raw, sealed().manifest.raw, index.raw]


@target("manifest", seeds=manifests, words=JSON_WORDS)
def _(data: bytes) -> None:
    parse_document(data)


@target("snapshot-manifest", seeds=manifests, words=JSON_WORDS)
def _(data: bytes) -> None:
    kind = json.loads(snapshot().manifest.raw)["mediaType"]
    snapshot_manifest(RawManifest(Descriptor(kind, sha256_digest(data), len(data)), data))


@target(
    "image-config",
    seeds=lambda: [b'{"config":{"Cmd":["a"],"Env":["A=b"],"Entrypoint":null,"WorkingDir":"/"}}'],
    words=JSON_WORDS,
)
def _(data: bytes) -> None:
    parse_run_config(data)


@target(
    "snapshot-config",
    seeds=lambda: [snapshot().config.to_json(), sealed().config.to_json()],
    words=JSON_WORDS,
)
def _(data: bytes) -> None:
    parse_config(data)


@target("verified-device", seeds=lambda: [sealed().device])
def _(data: bytes) -> None:
    """What is read is what the root hash says, whatever is on the disk."""
    config = sealed().config
    fd = os.memfd_create("device")
    try:
        os.write(fd, data)
        device = VerifiedDevice(fd, config.total_blocks, config.root_hash)
        for offset in range(0, device.size, 65536):
            with suppress(IntegrityError):
                end = min(offset + 65536, device.size)
                assert device.read(offset, 65536) == sealed().device[offset:end]
    finally:
        os.close(fd)


@target("chunk-map", seeds=lambda: [chunk_map_codec.encode(snapshot().chunk_map)])
def _(data: bytes) -> None:
    chunk_map_codec.decode(data)


def with_index_checksum(data: bytes) -> bytes:
    if len(data) < layer_index_layout.HEADER_SIZE:
        return data
    changed = bytearray(data)
    changed[12:16] = layer_index_layout.header_checksum(changed).to_bytes(4, "little")
    return bytes(changed)


@target(
    "layer-index",
    seeds=lambda: [golden_files()["layer-index-v1.hex"]],
    repair=with_index_checksum,
)
def _(data: bytes) -> None:
    layer_index_codec.decode(data)


@target("zstd-frame", seeds=lambda: [compress(bytes(9000), 3), compress(os.urandom(999), 3)])
def _(data: bytes) -> None:
    decompress(data, size_max=1 << 20, record="frame")


def with_superblock_checksum(data: bytes) -> bytes:
    if len(data) < 4096:
        return data
    checksum = erofs.superblock_checksum(data)
    return data[:1028] + checksum.to_bytes(4, "little") + data[1032:]


@target(
    "erofs",
    seeds=lambda: [golden_files()["erofs-v1.hex"]],
    repair=with_superblock_checksum,
    cost=4,
)
def _(data: bytes) -> None:
    reader = ErofsReader(Bytes(data))
    for number, (path, inode) in enumerate(reader.walk()):
        reader.xattrs(inode)
        if inode.kind is Kind.SYMLINK:
            reader.readlink(inode)
        if inode.kind is Kind.FILE:
            reader.read(inode, 0, 4096)
        if number > 1000:
            break
        reader.lookup(path)


@target("presence-map", seeds=lambda: [PresenceHeader(3, 48, "ab" * 32).pack() + b"\1\0\1"])
def _(data: bytes) -> None:
    PresenceHeader.parse(data)


@target(
    "reference",
    seeds=lambda: [
        b"registry.example:5000/team/app:1.0@sha256:" + b"a" * 64,
        *(b"nginx", b"oci:dir:tag", b"store:name:tag", b"docker-archive:a.tar:app:1"),
        *(b"oci-archive:/x/a.tar:tag", b"[::1]:5000/app", b"docker://busybox"),
    ],
    words=(b":", b"/", b"@", b"sha256:", b"//", b"..", b"\0", b"[", b"]", b"%00"),
    size_max=4096,
)
def _(data: bytes) -> None:
    location = parse_location(data.decode("utf-8", "surrogateescape"))
    str(location)


@target(
    "image-labels",
    seeds=lambda: [
        b"registry.example:5000/team/app:1.0@sha256:" + b"a" * 64,
        b"sha256:" + b"b" * 64,
        b"docker.io/library/nginx:1.27",
    ],
    words=(b"oci:", b"store:", b"docker://", b"/", b"@", b"..", b"\n", b"\xff", b"a" * 4096),
    size_max=1 << 14,
)
def _(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for name in (IMAGE_REF, MANIFEST_DIGEST, SNAPSHOT_DIGEST):
        parse_image_labels({name: text})


@target(
    "hosts-toml",
    seeds=lambda: [
        b'server = "https://a.example"\n[host."http://m:5000/v2/p"]\ncapabilities = ["pull"]\n'
        b'ca = "a.pem"\nclient = [["a", "b"]]\nskip_verify = true\ndial_timeout = "1m2.5s"\n'
        b'override_path = true\nproxy = "http://p"\n[host."http://m:5000/v2/p".header]\nx = ["1"]\n'
    ],
    words=(b"[host.", b"]", b"[[", b"{", b"'''", b"= 1", b"inf", b"1979-05-27", b'"\\u0000"'),
)
def _(data: bytes) -> None:
    parse_hosts(data, Path("/certs/x/hosts.toml"), "registry.example:5000")


_SCRATCH = tempfile.TemporaryDirectory(prefix="imgsnap-fuzz-")


def scratch(data: bytes) -> Path:
    path = Path(_SCRATCH.name) / "input"
    path.write_bytes(data)
    return path


@target(
    "docker-config",
    seeds=lambda: [
        b'{"auths":{"r.example":{"auth":"dTpw"},"r.example/team":{"username":"a","password":"b"},'
        b'"https://s.example/v1/":{"identitytoken":"t"}},"credHelpers":{"h.example":"none"}}'
    ],
    words=JSON_WORDS,
    cost=10,
)
def _(data: bytes) -> None:
    # No PATH: a helper that a mutation names is not found.
    source = CredentialSource({"PATH": _SCRATCH.name}, scratch(data))
    for registry in ("r.example", "s.example"):
        found = source.lookup(registry, "team/app")
        if found is not None:
            basic_header(found)
            token_request_for(CHALLENGE, Scope.pull("team/app"), found)


(CHALLENGE,) = parse_challenges('Bearer realm="https://auth.example/t",service="s"')


@target(
    "www-authenticate",
    seeds=lambda: [
        b'Bearer realm="https://a.example/t?x=1",service="s",scope="repository:a:pull"',
        b'Basic realm="x\\"y", Digest nonce=abc, Bearer realm="http://h:1/"',
    ],
    words=(b"Bearer ", b"Basic", b'realm="', b"http://[", b'"', b"\\", b",", b"=", b"a " * 500),
)
def _(data: bytes) -> None:
    for challenge in parse_challenges(data.decode("latin-1")):
        if challenge.parameters.get("realm"):
            token_request_for(challenge, Scope.pull("a"), None)


@target("token-answer", seeds=lambda: [b'{"token":"abc","expires_in":300}'], words=JSON_WORDS)
def _(data: bytes) -> None:
    parse_token_answer(data, realm="https://auth.example/token")


@target(
    "refusal",
    seeds=lambda: [
        b'{"errors":[{"code":"DENIED","message":"no"}]}',
        b"Fri, 31 Dec 1999 23:59:59 GMT",
        b"120",
    ],
    words=JSON_WORDS,
)
def _(data: bytes) -> None:
    str(parse_refusal(500, data))
    retry_after_s(data.decode("latin-1"))


def archives() -> list[bytes]:
    config = b'{"rootfs":{"type":"layers","diff_ids":["%s"]}}' % sha256_digest(b"x" * 600).encode()
    entry = [{"Config": "c.json", "RepoTags": ["app:1"], "Layers": ["l.tar"]}]
    docker = {"c.json": config, "l.tar": b"x" * 600, "manifest.json": json.dumps(entry).encode()}
    raw = snapshot().manifest.raw
    listed = [{"mediaType": json.loads(raw)["mediaType"], "digest": sha256_digest(raw)}]
    listed[0]["size"] = len(raw)  # type: ignore[assignment]
    layout = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": listed}).encode(),
        "blobs/sha256/" + sha256_digest(raw).partition(":")[2]: raw,
    }
    return [tar_of(docker), tar_of(layout)]


def with_tar_checksums(data: bytes) -> bytes:
    """Mends the checksum of each block that looks like a header."""
    changed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        block = changed[at : at + 512]
        if block[257:262] == b"ustar":
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            changed[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(changed)


@target("archive", seeds=archives, repair=with_tar_checksums, cost=8)
def _(data: bytes) -> None:
    path = scratch(data)
    problems = []
    for kind in (OciArchiveRepository, DockerArchiveRepository):
        try:
            repository = kind(path)
            try:
                reference = repository.default_reference()
                repository.manifest(reference)
                repository.referrers("sha256:" + "0" * 64, "")
            finally:
                repository.close()
        except Exception as error:
            problems.append(error)
    for problem in problems:
        if not isinstance(problem, FormatError):
            raise problem


class _Answers:
    """A server that answers each connection with the same bytes and closes it."""

    def __init__(self) -> None:
        self.data = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                try:
                    connection.recv(65536)
                    connection.sendall(self.data)
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(1)
                    while connection.recv(65536):
                        pass
                except OSError:
                    pass


@target("layer-tar", seeds=archives, repair=with_tar_checksums, cost=2)
def _(data: bytes) -> None:
    for entry in TarReader(memoryview(data), Limits()):
        repr(entry)


def layer_tars() -> list[bytes]:
    """Two layers with whatever a layer may bring."""
    rng = random.Random(1)
    return [
        *archives(),
        layer_tar([Item(b"a/b", content=b"x" * 600), Item(b"l", tarfile.SYMTYPE, link=b"/a")]),
        layer_tar(
            [
                Item(b"a", tarfile.DIRTYPE, mode=0o755, xattrs={b"user.x": b"1"}),
                Item(b"a/.wh.b"),
                Item(b"a/h", tarfile.LNKTYPE, link=b"a/b"),
                Item(b"d/.wh..wh..opq"),
                Item(b"n", tarfile.CHRTYPE, device=(1, 3)),
                Item(b"p", tarfile.FIFOTYPE),
                Item(b"up", tarfile.SYMTYPE, link=b"../.."),
                Item(b"up/out", content=rng.randbytes(700)),
            ]
        ),
    ]


@target(
    "unpack-layer",
    seeds=layer_tars,
    repair=with_tar_checksums,
    words=(b"../", b"/", b".wh.", b".wh..wh..opq", b"..", b"a/b", b"5", b"2", b"1"),
    size_max=1 << 16,
    cost=20,
)
def _(data: bytes) -> None:
    """On top of a lower layer; nothing may come to be outside of the directory."""
    place = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    try:
        for name in ("lower", "in/layer"):
            (place / name).mkdir(parents=True)
        (place / "lower/a").mkdir()
        (place / "lower/a/b").write_text("b")
        (place / "lower/l").symlink_to("/")
        (place / "tar").write_bytes(data)
        source = LayerSource(descriptor_of(data), sha256_digest(data))
        limits = Limits(entries=1000, file_size=1 << 20)
        built = index_tar(place / "tar", source, Rules(), limits, strip_root=True)
        with (place / "tar").open("rb") as tar, suppress(OSError):
            write_layer(built, tar.fileno(), place / "in/layer", [place / "lower"])
    finally:
        found = {str(path.relative_to(place)) for path in place.glob("*")} - {"tar"}
        outside = [*(place / "in").glob("*"), *(place / "lower/a").glob("*")]
        shutil.rmtree(place)
    assert found == {"lower", "in"} and len(outside) == 2


@cache
def answers() -> _Answers:
    return _Answers()


BODY = b"0123456789" * 10


@target(
    "http-message",
    seeds=lambda: [
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/100\r\n"
        b"Docker-Content-Digest: x\r\n\r\n0123456789",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n",
        b"HTTP/1.1 429 Slow\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 307 There\r\nLocation: ftp://x/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(BODY),
    ],
    words=(
        b"\r\n",
        b"\n",
        b": ",
        b"Content-Length: -1",
        b"chunked",
        b"ffffffffffffffff\r\n",
        b"\0",
    ),
    size_max=1 << 16,
    cost=50,
)
def _(data: bytes) -> None:
    if b"ocation" in data and b"http" in data.lower():
        return  # nobody else shall be asked
    server = answers()
    server.data = data
    options = ConnectionOptions(plain_http=True, read_timeout_s=1)
    repository = repository_at(server.host, options=options, attempts_max=1)
    try:
        repository.read_range(descriptor_of(BODY), 0, 10)
        repository.tags()
    finally:
        repository.close()


@target(
    "snapshot-filter",
    seeds=lambda: [
        b'labels."containerd.io/snapshot.ref"==sha256:0,parent=="n/1/x"',
        b'name~=/a.b/,kind!="view",labels.a.b',
        rb'a=="\x41\101\u00e9\U0001f600\n\""',
    ],
    words=(b'"', b"\\", b"==", b"!=", b"~=", b",", b".", b"/", b"|", b"\\x", b"\\U", b"(", b"*"),
)
def _(data: bytes) -> None:
    row = Row(1, "n/1/x", "", SnapshotKind.VIEW, 0, 0, {"a.b": "c" * 4000})
    parse_filters(data.decode("utf-8", "replace").split("\0"))(row)


@target(
    "snapshot-labels",
    seeds=lambda: [b"0:100000:65536,65536:5:1", b"sha256:" + b"a" * 64],
    words=(b":", b",", b"0", b"4294967295", b"sha256:"),
)
def _(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    labels = check_labels({UID_MAPPING: text, GID_MAPPING: "0:0:1", TARGET: text})
    with contextlib.suppress(InvalidArgument):
        digest_label(labels, TARGET)
    mapped_root(labels)


@target(
    "snapshot-row",
    seeds=lambda: [
        b'{"kind":"committed","created":1,"updated":2,"labels":{"a":"b"},"usage":{"size":1,'
        b'"inodes":2},"claim":{"repository":"r","layer":{"diff_id":"d","digest":"d","size":1,'
        b'"media_type":"m","chain_id":"c"},"device":null,"materialised":false}}'
    ],
    words=JSON_WORDS,
)
def _(data: bytes) -> None:
    encode(decode(1, "name", "", data.decode("utf-8", "replace")))


def pull_requests() -> list[bytes]:
    image = cri_pb2.ImageSpec(image="registry.example:5000/team/app:1")
    parts = [
        cri_pb2.AuthConfig(username="u", password="p", server_address="https://registry.example"),
        cri_pb2.AuthConfig(auth="dTpw", server_address="registry.example:5000"),
        cri_pb2.AuthConfig(identity_token="t"),
    ]
    return [cri_pb2.PullImageRequest(image=image, auth=p).SerializeToString() for p in parts]


def guest_programs() -> list[bytes]:
    command = Command(("true",), ("PATH=/bin",), "/", Identity(0, 0), terminal=False)
    return [launcher(command), b"\x7fELF\0name=erofs\0depends=libcrc32c,netfs\0"]


@target("guest-programs", seeds=guest_programs, words=(b"\0depends=", b"\x7fELF\x02\x01"))
def _(data: bytes) -> None:
    assert all(name for name in dependencies(data))
    is_static(data)


def kernel_images() -> list[bytes]:
    head = bytearray(0x400)
    head[0x202:0x206], head[0x20E:0x210] = b"HdrS", b"\x80\0"
    head[0x280:0x290] = b"6.12.0 (x@y) #1\0"
    return [bytes(head)]


@target("guest-kernel", seeds=kernel_images)
def _(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vmlinuz"
        path.write_bytes(data)
        kernel_version(path)


@target("pull-request", seeds=pull_requests)
def _(data: bytes) -> None:
    pulled_with(data)


@target(
    "containerd-config",
    seeds=lambda: [
        snippet(v, Path("/s"), Path("/r"), "linux/amd64").encode() for v in ((1, 7), (2, 0))
    ],
    words=(b"imports = ", b"[[", b"]]", b"version = 2", b"disabled_plugins = ", b'["*"]', b"= 1\n"),
)
def _(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.toml"
        file.write_bytes(data)
        list(examine_containerd(Path("/s"), file=file))
