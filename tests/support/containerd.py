"""A real, private containerd: own root, state, socket and config, apart from the machine's own.

::

    with running_containerd(release("1.6"), snapshotter=socket) as containerd:
        containerd.allow_http("127.0.0.1:5000")
        containerd.pull("127.0.0.1:5000/app:1", snapshotter="imgsnap")
        assert containerd.run("127.0.0.1:5000/app:1", "/bin/true", snapshotter="imgsnap") == ""

What a test leaves behind (containers, shims, mounts) is ended here, by process id and by path; what
containerd logged is printed when the body fails. Containers get names from `fresh_id`: runc's state
is below /run/containerd/runc whatever containerd's own state directory is.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgsnap.containerd.config import parse_version, snippet
from imgsnap.oci.platforms import host_platform
from tests.support.cli import REPOSITORY
from tests.support.mounts import unmount

VERSIONS = ("1.6", "1.7", "2.1")
NEWER = REPOSITORY / ".containerd"
"""Where scripts/newer-containerd unpacks, once for all tests."""

_START_S = 30.0
_STOP_S = 20.0
_COMMAND_S = 120.0
_SHIM = "containerd-shim-runc-v2"
_SHIM_SOCKET = re.compile(r"/run/containerd/s/[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Release:
    """One installed containerd: its series (``1.6``) and where its programs are."""

    series: str
    programs: Path

    @property
    def major(self) -> int:
        return int(self.series.partition(".")[0])

    def program(self, name: str) -> str:
        return str(self.programs / name)


def find_release(series: str) -> Release | str:
    """The containerd of a series, or the reason why there is none."""
    found = shutil.which("containerd")
    if found and series in _series_of(found):
        return Release(series, Path(found).parent)
    if series == VERSIONS[0]:
        return "the distribution's containerd is not installed, or another version"
    NEWER.mkdir(exist_ok=True)
    with (NEWER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        script = [str(REPOSITORY / "scripts/newer-containerd"), str(NEWER)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    for line in done.stdout.splitlines():
        name, _, rest = line.partition(" ")
        if name == series:
            missing = rest.startswith("missing: ")
            return rest.removeprefix("missing: ") if missing else _newer(series)
    return f"scripts/newer-containerd: {done.stderr.strip()[-300:]}"


def release(series: str) -> Release:
    """The containerd of a series; skips the test, with the reason, when it cannot be had."""
    found = find_release(series)
    if isinstance(found, str):
        pytest.skip(f"containerd {series}: {found}")
    return found


def _newer(series: str) -> Release:
    return Release(series, NEWER / series / "usr/bin")


def _series_of(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return ".".join(words[2].lstrip("v").split(".")[:2]) if len(words) > 2 else ""


def fresh_id(prefix: str = "t") -> str:
    """A container's name that nothing else on this machine has."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


@dataclass
class Containerd:
    """Keeps everything below `work`, which must be absolute and short: 107 bytes for a socket."""

    work: Path
    release: Release
    snapshotter: Path | None = None  # socket of the proxy plugin `imgsnap`
    cri: bool = False
    extra: str = ""  # TOML, appended to the configuration
    sandbox_image: str = ""  # for CRI
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.work / "sock"

    @property
    def root(self) -> Path:
        return self.work / "root"

    @property
    def state(self) -> Path:
        return self.work / "state"

    @property
    def config(self) -> Path:
        return self.work / "config.toml"

    @property
    def hosts(self) -> Path:
        return self.work / "certs.d"

    @property
    def log(self) -> str:
        path = self.work / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    # Life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Writes the configuration and starts; returns when the API answers."""
        self.hosts.mkdir(parents=True, exist_ok=True)
        self.config.write_text(self._config() + self.extra)
        with (self.work / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.release.program("containerd"), "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ(),
                process_group=0,
            )
        deadline = time.monotonic() + _START_S
        while self._ctr("version").returncode:
            assert self.process.poll() is None, f"containerd ended:\n{self.log[-3000:]}"
            assert time.monotonic() < deadline, f"containerd does not answer:\n{self.log[-3000:]}"
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends containerd alone: containers and their shims go on, as they should."""
        if self.process is None:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.stop(how)
        self.start()

    def clear(self) -> None:
        """Ends everything that was started below `work`, and unmounts what is mounted there."""
        self.stop()
        for bundle in self._bundles():
            self._end_container(bundle)
        for pid in self.shims():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for target in reversed(self.mounts()):
            with contextlib.suppress(OSError):
                unmount(Path(target))

    def _config(self) -> str:
        version = 3 if self.release.major >= 2 else 2
        lines = [
            f"version = {version}",
            f'root = "{self.root}"',
            f'state = "{self.state}"',
            *([] if self.cri else [f"disabled_plugins = {_disabled(self.release.major)}"]),
            "[grpc]",
            f'  address = "{self.socket}"',
            "[ttrpc]",
            f'  address = "{self.socket}.t"',
        ]
        if self.snapshotter is not None:
            lines += self._snapshotter_lines(self.snapshotter)
        if self.cri:
            lines += self._cri_lines()
        return "\n".join(lines) + "\n"

    def _snapshotter_lines(self, socket: Path) -> list[str]:
        """As `imgsnap config containerd` prints them."""
        version = parse_version(self.release.series)
        root = self.work / "snapshotter"
        return snippet(version, socket, root, str(host_platform())).splitlines()[1:]

    def _cri_lines(self) -> list[str]:
        """Registries, the pause image; pods use the host's network, so CNI finds nothing.

        Where root is not the machine's own, it may not lower an oom_score_adj.
        """
        sandbox = self.sandbox_image or "localhost/pause:none"
        if self.release.major >= 2:
            images, runtime = "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"
            return [
                f'[plugins."{images}".registry]',
                f'  config_path = "{self.hosts}"',
                f'[plugins."{images}".pinned_images]',
                f'  sandbox = "{sandbox}"',
                f'[plugins."{runtime}"]',
                "  restrict_oom_score_adj = true",
                f'[plugins."{runtime}".cni]',
                f'  conf_dir = "{self.work}/cni"',
            ]
        name = "io.containerd.grpc.v1.cri"
        return [
            f'[plugins."{name}"]',
            f'  sandbox_image = "{sandbox}"',
            "  restrict_oom_score_adj = true",
            f'[plugins."{name}".registry]',
            f'  config_path = "{self.hosts}"',
            f'[plugins."{name}".cni]',
            f'  conf_dir = "{self.work}/cni"',
        ]

    def _environ(self) -> dict[str, str]:
        path = f"{self.release.programs}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path}

    # What is left ----------------------------------------------------------------------------

    def shims(self) -> list[int]:
        """Of this containerd: their command line has its socket."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if str(self.socket).encode() in words and words[0].endswith(_SHIM.encode()):
                        found.append(int(entry.name))
        return found

    def mounts(self) -> list[str]:
        """Mount points below `work`, in the order of their making."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [p for line in lines if (p := line.split()[4]).startswith(f"{self.work}/")]

    def _bundles(self) -> list[Path]:
        return [p for p in self.state.glob("io.containerd.runtime.v2.task/*/*") if p.is_dir()]

    def _end_container(self, bundle: Path) -> None:
        """Kills a container's processes and removes runc's state and the shim's socket."""
        namespace, name = bundle.parent.name, bundle.name
        root = f"/run/containerd/runc/{namespace}"
        command = ["runc", "--root", root, "delete", "--force", name]
        subprocess.run(command, capture_output=True, timeout=30, check=False)
        for name in ("address", "bootstrap.json"):  # the latter from 1.7 on
            with contextlib.suppress(OSError):
                found = _SHIM_SOCKET.search((bundle / name).read_text())
                if found:
                    Path(found[0]).unlink(missing_ok=True)

    # ctr -------------------------------------------------------------------------------------

    def allow_http(self, registry: str) -> None:
        """Lets CRI and `pull` speak plain HTTP to a registry (``host:port``)."""
        directory = self.hosts / registry
        directory.mkdir(parents=True, exist_ok=True)
        server = f"http://{registry}"  # 1.6 wants a host table
        (directory / "hosts.toml").write_text(f'server = "{server}"\n[host."{server}"]\n')

    def ctr(self, *arguments: str, namespace: str = "default") -> str:
        """Standard output of a ctr command that must succeed."""
        done = self._ctr(*arguments, namespace=namespace)
        assert done.returncode == 0, f"ctr {' '.join(arguments)}: {done.stderr}\n{done.stdout}"
        return done.stdout

    def ctr_fails(self, *arguments: str, namespace: str = "default") -> str:
        """Standard error of a ctr command that must fail."""
        done = self._ctr(*arguments, namespace=namespace)
        assert done.returncode != 0, f"ctr {' '.join(arguments)} succeeded:\n{done.stdout}"
        return done.stderr

    def _ctr(self, *arguments: str, namespace: str = "default") -> "subprocess.CompletedProcess":
        return subprocess.run(
            [*self.ctr_command(namespace), *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_COMMAND_S,
            env=self._environ(),
            check=False,
        )

    def ctr_command(self, namespace: str = "default") -> list[str]:
        """Its beginning, for tests that start it themselves."""
        address = ["--address", str(self.socket), "--namespace", namespace]
        return [self.release.program("ctr"), *address]

    def pull(
        self,
        reference: str,
        *,
        snapshotter: str = "",
        namespace: str = "default",
        local: bool = False,
    ) -> None:
        """`ctr images pull` over plain HTTP; `local` for the client's own pull from 1.7 on."""
        chosen = ["--snapshotter", snapshotter] if snapshotter else []
        local_pull = ["--local"] if local and self.release.series != "1.6" else []
        command = ["images", "pull", "--plain-http", *local_pull, *chosen, reference]
        self.ctr(*command, namespace=namespace)

    def run(
        self,
        reference: str,
        *command: str,
        snapshotter: str = "",
        namespace: str = "default",
        options: tuple[str, ...] = (),
    ) -> str:
        """What a container of an image prints; the container is removed."""
        chosen = ["--snapshotter", snapshotter] if snapshotter else []
        arguments = ["run", "--rm", "--net-host", *chosen, *options, reference, fresh_id()]
        return self.ctr(*arguments, *command, namespace=namespace)

    def remove_image(self, reference: str, *, namespace: str = "default") -> None:
        """Removes an image; returns after the garbage collection."""
        self.ctr("images", "rm", "--sync", reference, namespace=namespace)

    def snapshots(self, snapshotter: str, *, namespace: str = "default") -> list[str]:
        """Keys that containerd knows of a snapshotter."""
        out = self.ctr("snapshots", "--snapshotter", snapshotter, "ls", namespace=namespace)
        return [line.split()[0] for line in out.splitlines()[1:] if line.strip()]


@contextlib.contextmanager
def running_containerd(
    release: Release,
    *,
    snapshotter: Path | None = None,
    cri: bool = False,
    extra: str = "",
    sandbox_image: str = "",
) -> Iterator[Containerd]:
    """A containerd that has started; ended with everything it started, whatever happens.

    `snapshotter` is the socket of the proxy plugin `imgsnap`, which becomes CRI's snapshotter.
    """
    work = Path(tempfile.mkdtemp(prefix="imgsnap-c-"))
    containerd = Containerd(work, release, snapshotter, cri, extra, sandbox_image)
    try:
        containerd.start()
        yield containerd
    except BaseException:
        print(f"--- containerd {release.series}, end of its log ---", file=sys.stderr)
        print(containerd.log[-6000:], file=sys.stderr)
        raise
    finally:
        containerd.clear()
        if not containerd.mounts():  # never delete through a mount that stayed
            shutil.rmtree(work)


def _disabled(major: int) -> str:
    names = ["io.containerd.grpc.v1.cri"]
    if major >= 2:
        names += ["io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"
