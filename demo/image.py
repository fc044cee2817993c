"""Builds the demo image, an OCI image layout, from distribution packages: a base layer with the
essential packages, a layer with Python and a few libraries, and a small program on top.

Nothing but packages is downloaded. Needs root (ownership, chroot) and apt.
"""

import gzip
import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

BASE = ["?essential"]
PYTHON = ["python3", "python3-numpy", "python3-flask", "python3-yaml"]
PROGRAM = """\
import numpy, flask, yaml
app = flask.Flask(__name__)
with app.app_context():
    answer = flask.jsonify(determinant=numpy.linalg.det(numpy.eye(3)))
print("ready:", " ".join(answer.get_data(as_text=True).split()), flush=True)
"""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
TAG = "latest"


def run(*command: str, **options: object) -> str:
    result = subprocess.run(command, text=True, capture_output=True, **options)  # type: ignore[call-overload]
    if result.returncode:
        raise SystemExit(f"error: {' '.join(command[:4])} … failed:\n{result.stderr[-2000:]}")
    return str(result.stdout)


def download(packages: list[str], cache: Path) -> list[Path]:
    """The .deb files of the packages and all they depend on, as for an empty system."""
    archives = cache / "archives"
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    options = [
        f"Dir::Cache={cache}",
        "Dir::State::status=/dev/null",
        "APT::Sandbox::User=root",
        "Debug::NoLocking=1",
    ]
    command = ["apt-get", "-qq", *(part for option in options for part in ("-o", option))]
    wanted = ["install", "-y", "--no-install-recommends", *packages]
    run(*command, "--download-only", *wanted)
    listing = run(*command, "--print-uris", "--no-download", "--reinstall", *wanted)
    names = [line.split()[1] for line in listing.splitlines() if line.startswith("'")]
    return [archives / name for name in names] or sorted(archives.glob("*.deb"))


def unpack(packages: list[Path], root: Path) -> None:
    for package in packages:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
        ) as tar:
            run("tar", "-x", "--keep-directory-symlink", "-C", str(root), stdin=tar.stdout)


def listing(root: Path) -> set[str]:
    return {
        str((Path(directory) / name).relative_to(root))
        for directory, directories, files in os.walk(root)
        for name in directories + files
    }


def add_layer(layout: Path, root: Path, names: set[str]) -> tuple[dict[str, object], str]:
    """Packs the paths as a gzip layer; returns its descriptor and its diffID."""
    order = "\0".join(sorted(names))
    tar = subprocess.run(
        ["tar", "-c", "-C", str(root), "--no-recursion", "--numeric-owner", "--null", "-T", "-"],
        input=order.encode("utf-8", "surrogateescape"),
        capture_output=True,
        check=True,
    ).stdout
    packed = gzip.compress(tar, 6, mtime=0)
    return put(
        layout, packed, "application/vnd.oci.image.layer.v1.tar+gzip"
    ), "sha256:" + hashlib.sha256(tar).hexdigest()


def put(layout: Path, data: bytes, media_type: str) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def skeleton(root: Path) -> None:
    """A merged /usr, as today's Debian has it."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")


def finish_python(root: Path) -> None:
    """What the packages' scripts would have done and the program needs: BLAS and byte code."""
    for library in ("blas/libblas.so.3", "lapack/liblapack.so.3"):
        for found in root.glob(f"usr/lib/*/{library}"):
            link = found.parent.parent / found.name
            if not link.is_symlink():
                link.symlink_to(library)
    # Some packages carry test files that are no valid Python: the exit code says only that.
    subprocess.run(
        ["chroot", root, "python3", "-m", "compileall", "-q", "/usr/lib/python3"],
        capture_output=True,
        check=False,
    )


def build(layout: Path, work: Path) -> None:
    """Makes the layout, tag `latest`; does nothing when it is there."""
    if (layout / "index.json").exists():
        return
    shutil.rmtree(layout, ignore_errors=True)
    root = work / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    skeleton(root)
    base = download(BASE, work / "base")
    unpack(base, root)
    first = listing(root)
    together = download([*BASE, *PYTHON], work / "python")
    known = {package.name for package in base}
    unpack([package for package in together if package.name not in known], root)
    finish_python(root)
    second = listing(root) - first
    (root / "app").mkdir()
    (root / "app/main.py").write_text(PROGRAM)
    third = {"app", "app/main.py"}
    layers = [add_layer(layout, root, names) for names in (first, second, third)]
    write_index(layout, layers)
    shutil.rmtree(root)


def write_index(layout: Path, layers: list[tuple[dict[str, object], str]]) -> None:
    config = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["python3", "/app/main.py"],
            "WorkingDir": "/app",
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(
            layout, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"
        ),
        "layers": [descriptor for descriptor, _ in layers],
    }
    entry = put(layout, json.dumps(manifest).encode(), str(manifest["mediaType"]))
    entry["annotations"] = {"org.opencontainers.image.ref.name": TAG}
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
