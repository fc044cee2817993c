"""convert given broken, hostile and foreign images: one error, its exit code, nothing visible."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest
import zstandard

from tests.support.cli import Cli
from tests.support.image_builder import (
    Blobs,
    Image,
    LayerBlob,
    collect,
    image,
    write_layout,
)
from tests.support.samples import DIR, LINK, SYM, base_tar, noise, top_tar
from tests.support.tars import Item, end, header, layer_tar, padded, pax, raw_item

HASH = "sha256:" + "0" * 64


def refused(cli: Cli, code: int, content, *options: object, hint: bool = False) -> str:
    """Converting this image fails, and the store shows nothing of it."""
    shutil.rmtree(cli.root / "bad", ignore_errors=True)
    write_layout(cli.root / "bad", content)
    source = f"oci:{cli.root}/bad"
    err = cli.fails(code, "convert", source, "store:bad", "--progress", "none", *options, hint=hint)
    assert cli("ls", "-q").out == ""
    assert list(cli.tmp.iterdir()) == []
    return err


def one(tar: bytes, **changes: object) -> Image:
    return Image((replace(LayerBlob(tar, "gzip"), **changes),))


def test_layers_that_are_not_what_their_digests_say(cli: Cli):
    tar = base_tar()
    err = refused(cli, 3, one(tar, diff_id=HASH), hint=True)
    assert HASH in err and "decompressed" in err
    other = gzip.compress(top_tar(), 1, mtime=0)
    err = refused(cli, 3, one(tar, digest=HASH), hint=False)
    assert HASH in err
    err = refused(cli, 3, one(tar, blob=other), hint=True)
    assert "decompressed" in err


def test_damaged_compression(cli: Cli):
    tar = base_tar()
    packed = gzip.compress(tar, 1, mtime=0)
    assert "cut off" in refused(cli, 3, one(tar, blob=packed[:-2000]))
    flipped = packed[:5000] + bytes([packed[5000] ^ 0xFF]) + packed[5001:]
    assert "layer sha256:" in refused(cli, 3, one(tar, blob=flipped))
    assert "gzip" in refused(cli, 3, one(tar, blob=packed + b"rubbish"))
    squeezed = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(tar)
    assert "layer sha256:" in refused(cli, 3, one(tar, blob=squeezed[:-2000]))
    flipped = squeezed[:5000] + bytes([squeezed[5000] ^ 0xFF]) + squeezed[5001:]
    assert "zstd" in refused(cli, 3, one(tar, blob=flipped))
    assert "layer sha256:" in refused(cli, 3, one(tar, blob=b"neither tar nor gzip"), hint=True)


@pytest.mark.parametrize(
    ("tar", "problem"),
    [
        (layer_tar([Item(b"a/../../etc/passwd")]), "'..'"),
        (layer_tar([Item(b"/etc/passwd")]), "absolute"),
        (layer_tar([Item(b"d/" * 2048 + b"f")]), "over 4096"),
        (layer_tar([Item(b"n" * 256)]), "over 255"),
        (layer_tar([Item(b"f", LINK, link=b"../x")]), "'..'"),
        (layer_tar([Item(b"f", LINK, link=b"nowhere")]), "in no lower layer"),
        (layer_tar([Item(b"d", DIR), Item(b"f", LINK, link=b"d")]), "directory"),
        (layer_tar([Item(b"f"), Item(b"f/g")]), "below a file"),
        (layer_tar([Item(b"a", SYM, link=b"a"), Item(b"a/b")]), "symlinks"),
        (header(b"f", size=b"77777777777\0") + end(), "cut off"),
        (header(b"f", size=1000) + b"short", "cut off"),
        (header(b"f", size=b"\x80" + b"\xff" * 11) + end(), "limit file-size"),
        (pax([(b"size", b"9" * 19)]) + header(b"f") + end(), "limit file-size"),
        (header(b"f", kind=b"?") + end(), "entry type"),
        (header(b"f", mode=b"not octa") + end(), "octal"),
        (b"x" * 1024, "checksum"),
        (header(b"x", size=2 << 20, kind=b"L") + end(), "limit header-size"),
        (
            layer_tar([Item(b"f", xattrs={b"user.%d" % n: b"v" * 8000 for n in range(9)})]),
            "limit xattr-size",
        ),
        (raw_item(Item(b".")), "root is not a directory"),
    ],
)
def test_tars_that_no_one_should_write(cli: Cli, tar: bytes, problem: str):
    codes = {"limit": 9, "entry type": 8}
    code = next((code for start, code in codes.items() if problem.startswith(start)), 3)
    assert problem in refused(cli, code, one(tar))


def test_absolute_names_on_request(cli: Cli):
    tar = layer_tar([Item(b"/etc", DIR), Item(b"/etc/passwd", content=b"root")])
    write_layout(cli.root / "absolute", one(tar))
    cli.convert(f"oci:{cli.root}/absolute", "store:a", "--absolute-names")
    assert cli("cat", "store:a", "etc/passwd").out == "root"


def test_bombs_meet_named_limits(cli: Cli):
    entries = layer_tar([Item(b"%d" % n) for n in range(200)])
    err = refused(cli, 9, one(entries), "--limit", "entries=100", hint=True)
    assert "--limit entries=" in err
    zeros = layer_tar([Item(b"zeros", content=bytes(3_000_000))])
    err = refused(cli, 9, one(zeros), "--limit", "layer-size=1MiB", hint=True)
    assert "layer-size" in err
    err = refused(cli, 9, one(zeros), "--limit", "file-size=2MB", hint=True)
    assert "file-size" in err
    layers = Image(tuple(LayerBlob(top_tar(b"%d" % n)) for n in range(5)))
    assert "limit layers" in refused(cli, 9, layers, "--limit", "layers=4", hint=True)
    sparse = pax([(b"GNU.sparse.size", b"9" * 12), (b"GNU.sparse.map", b"0,1")])
    assert "file-size" in refused(cli, 9, one(sparse + header(b"f", size=1) + padded(b"x") + end()))
    write_layout(cli.root / "fine", one(zeros))
    cli.convert(f"oci:{cli.root}/fine", "store:fine", "--limit", "layer-size=4MiB")


@pytest.mark.slow
def test_a_decompression_bomb_stops_at_its_ratio(cli: Cli):
    """Only over 1 GiB is the ratio asked; the bomb is stopped soon after."""
    piece = zstandard.ZstdCompressor(level=3).compress(bytes(64 << 20))
    bomb = one(b"", blob=piece * 64, diff_id=HASH)
    err = refused(cli, 9, bomb, hint=True)
    assert "layer-ratio" in err


def test_documents_that_are_no_images(cli: Cli):
    blobs = collect(image(base_tar(1000)))
    entry = blobs.names[0][1]
    manifest = json.loads(blobs.by_digest[entry["digest"]])

    def with_manifest(**changes: object) -> Blobs:
        changed = Blobs(dict(blobs.by_digest))
        raw = json.dumps({**manifest, **changes}).encode()
        changed.names.append(("latest", changed.add(entry["mediaType"], raw)))
        return changed

    def with_config(raw: bytes) -> Blobs:
        changed = Blobs(dict(blobs.by_digest))
        config = changed.add(manifest["config"]["mediaType"], raw)
        document = json.dumps({**manifest, "config": config}).encode()
        changed.names.append(("latest", changed.add(entry["mediaType"], document)))
        return changed

    assert "is no image" in refused(
        cli, 2, with_manifest(config={**manifest["config"], "mediaType": "text/plain"})
    )
    refused(cli, 3, with_manifest(layers="none"))
    refused(cli, 3, with_manifest(layers=[{**manifest["layers"][0], "size": -1}]))
    refused(cli, 3, with_manifest(layers=[{**manifest["layers"][0], "digest": "sha256:zz"}]))
    refused(cli, 3, with_config(b"not json"))
    refused(cli, 3, with_config(b"{}"))
    refused(cli, 3, with_config(b'{"rootfs":{"diff_ids":[]}}'))
    refused(cli, 3, with_config(b'{"rootfs":{"diff_ids":["md5:1"]}}'))
    refused(cli, 3, with_config(b"[" * 100_000))
    gone = with_manifest()
    del gone.by_digest[manifest["layers"][0]["digest"]]
    assert manifest["layers"][0]["digest"] in refused(cli, 4, gone)


def test_sources_and_targets_that_do_not_fit(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar(1000)), "1.0")
    source = f"oci:{tmp_path}/layout"
    cli.convert(source, "store:app")
    err = cli.fails(2, "convert", "store:app", "store:again")
    assert "snapshot already" in err
    assert "ambiguous" in cli.fails(2, "convert", "app:1.0", "store:x")
    assert "ambiguous" in cli.fails(2, "convert", "team/app", "store:x")
    cli.fails(2, "convert", "https://registry.example/app", "store:x")
    cli.fails(2, "convert", source, f"docker-archive:{tmp_path}/out.tar")
    cli.fails(2, "convert", source, f"store:app@{HASH}")
    cli.fails(2, "convert", source, "store:UPPER", hint=False)
    cli.fails(4, "convert", f"{source}:2.0", "store:x")
    cli.fails(4, "convert", f"oci:{tmp_path}/absent", "store:x", hint=False)
    cli.fails(4, "convert", f"oci-archive:{tmp_path}/absent.tar", "store:x", hint=False)
    (tmp_path / "file").write_text("no directory")
    cli.fails(7, "convert", source, f"oci:{tmp_path}/file:x")
    cli.fails(2, "convert", source, f"oci:{tmp_path}:x")
    cli.fails(7, "convert", source, f"{source}:1.0")
    two = Blobs()
    for label in (b"one", b"two"):
        two.names.append((label.decode(), two.add_image(image(top_tar(label)))))
    write_layout(tmp_path / "two", two)
    err = cli.fails(2, "convert", f"oci:{tmp_path}/two", "store:x")
    assert "one" in err and "two" in err
    assert cli("ls", "-q").out == "store:app:latest\n"


def test_a_failed_layer_costs_only_itself(cli: Cli):
    """What was finished before the error is not converted again."""
    good, bad = LayerBlob(base_tar(), "gzip"), LayerBlob(top_tar(), "gzip", diff_id=HASH)
    refused(cli, 3, Image((good, bad)), "--jobs", 1, hint=True)
    write_layout(cli.root / "mended", Image((good, LayerBlob(top_tar(), "gzip"))))
    report = cli.report(f"oci:{cli.root}/mended", "store:app")
    assert [layer["reused"] for layer in report["images"][0]["layers"]] == [True, False]
    assert cli.bytes_of("cat", "store:app", "usr/noise") == noise(300_000, 1)
