"""Running an image's command in a mounted root: an OCI runtime bundle for runc, or unshare.

The container shares the host's network and has its own mounts, processes, host name and IPC.
Capabilities, devices, masked paths and mounts are those that docker and nerdctl give.
Specification: runtime-spec 1.0, config.md and config-linux.md.
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imgsnap.errors import InvalidArgument, NotFound, Unsupported
from imgsnap.mount import linux
from imgsnap.oci.image_config import RunConfig

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ACCOUNT_FILE_MAX = 4 << 20
"""Of /etc/passwd and /etc/group, bytes that are read."""
ReadFile = Callable[[str], bytes]
"""The first ACCOUNT_FILE_MAX bytes of a file of the image, b"" without it."""
END_GRACE_S = 10.0
"""For a command that is told to end; the first process of a container may ignore SIGTERM."""

_CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
)
_READ_ONLY = (
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the command runs as."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


@dataclass(frozen=True, slots=True)
class Command:
    """A command ready to run in a root directory."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    identity: Identity
    terminal: bool


def files_below(root: Path) -> ReadFile:
    """Reads the files of an image that is mounted at `root`."""

    def read(path: str) -> bytes:
        try:
            fd = linux.open_in_root(root, path)
        except OSError:
            return b""
        with os.fdopen(fd, "rb") as file:
            return file.read(ACCOUNT_FILE_MAX)

    return read


def resolve_command(
    read: ReadFile, config: RunConfig, override: Sequence[str], *, terminal: bool
) -> Command:
    """The image's command, or `override` in the place of its Cmd, as docker run has it.

    Raises InvalidArgument when there is nothing to run, NotFound for a user the image lacks.
    """
    args = (*config.entrypoint, *(tuple(override) or config.cmd))
    if not args:
        raise InvalidArgument(
            "the image names no command", hint="give one: imgsnap run REF -- COMMAND"
        )
    identity = _identity(read, config.user)
    env = dict(item.split("=", 1) for item in (DEFAULT_PATH, *config.env))
    env.setdefault("HOME", identity.home)
    if terminal:
        env.setdefault("TERM", "xterm")
    return Command(
        args,
        tuple(f"{name}={value}" for name, value in env.items()),
        config.working_dir,
        identity,
        terminal,
    )


def run(root: Path, command: Command, bundle: Path, name: str) -> int:
    """Runs the command to its end; its exit status, 128 + signal for one that was killed."""
    runc = shutil.which("runc")
    if runc is None:
        return _run_unshared(root, command)
    (bundle / "config.json").write_text(json.dumps(runtime_spec(root, command)))
    state = bundle / "state"
    arguments = [runc, "--root", str(state), "run", "--bundle", str(bundle), name]
    try:
        return _exit_status(_wait(subprocess.Popen(arguments)))
    finally:
        # Nothing is left when the command has ended by itself.
        subprocess.run(
            [runc, "--root", str(state), "delete", "--force", name],
            capture_output=True,
            check=False,
        )


def runtime_spec(root: Path, command: Command) -> dict[str, Any]:
    """The bundle's config.json."""
    identity = command.identity
    capabilities = list(_CAPABILITIES)
    sets = dict.fromkeys(("bounding", "effective", "permitted"), capabilities)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": command.terminal,
            "user": {
                "uid": identity.uid,
                "gid": identity.gid,
                "additionalGids": list(identity.groups),
            },
            "args": list(command.args),
            "env": list(command.env),
            "cwd": command.cwd,
            "capabilities": sets if identity.uid == 0 else {"bounding": capabilities},
            "noNewPrivileges": False,
        },
        "root": {"path": str(root), "readonly": False},
        "hostname": "imgsnap",
        "mounts": _mounts(),
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
            "resources": {"devices": _devices()},
        },
    }


def _devices() -> list[dict[str, Any]]:
    """Nothing but the usual nodes may be opened; any may be made, as docker has it."""
    allowed = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None)]
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    rules += [{"allow": True, "type": kind, "access": "m"} for kind in ("c", "b")]
    for major, minor in allowed:
        rule: dict[str, Any] = {"allow": True, "type": "c", "major": major, "access": "rwm"}
        rules.append(rule if minor is None else {**rule, "minor": minor})
    return rules


def _mounts() -> list[dict[str, Any]]:
    hidden = ["nosuid", "noexec", "nodev"]
    mounts: list[dict[str, Any]] = [
        _mount("/proc", "proc", "proc", hidden),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _mount("/dev/shm", "tmpfs", "shm", [*hidden, "mode=1777", "size=65536k"]),  # noqa: S108
        _mount("/dev/mqueue", "mqueue", "mqueue", hidden),
        _mount("/sys", "sysfs", "sysfs", [*hidden, "ro"]),
    ]
    # The network is the host's, so its name service configuration is too.
    for name in ("/etc/resolv.conf", "/etc/hosts"):
        if Path(name).is_file():
            mounts.append(_mount(name, "bind", os.path.realpath(name), ["rbind", "ro"]))
    return mounts


def _mount(target: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": options}


_PREPARE = """\
set -e; "$1" -t proc proc "$2/proc"; "$1" -t tmpfs -o mode=755,nosuid tmpfs "$2/dev"
for n in null zero full random urandom tty; do
    : >"$2/dev/$n"; "$1" --bind "/dev/$n" "$2/dev/$n"
done
shift 2; exec "$@"
"""
"""$1: mount(8), $2: the root; then the command."""


def _run_unshared(root: Path, command: Command) -> int:
    """Without runc: the same namespaces by unshare(1); root keeps all its capabilities."""
    programs = {name: shutil.which(name) for name in ("unshare", "mount", "sh")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        raise Unsupported(
            f"without runc, {' and '.join(missing)} is needed", hint="install runc or util-linux"
        )
    for name in ("proc", "dev"):
        (root / name).mkdir(exist_ok=True)
    identity = command.identity
    unshare = str(programs["unshare"])
    outer = [unshare, "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    outer += [str(programs["sh"]), "-c", _PREPARE, "sh", str(programs["mount"]), str(root)]
    inner = [unshare, f"--root={root}", f"--wd={command.cwd}"]
    inner += [f"--setgid={identity.gid}", f"--setuid={identity.uid}", "--"]
    environment = dict(item.split("=", 1) for item in command.env)
    process = subprocess.Popen([*outer, *inner, *command.args], env=environment)
    return _exit_status(_wait(process))


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Waits; an interrupt goes to the command, which is in our process group, and not to us."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
        except BaseException:
            process.terminate()
            try:
                process.wait(END_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


def _exit_status(code: int) -> int:
    return 128 - code if code < 0 else code


def _identity(read: ReadFile, user: str) -> Identity:
    """A user of the image by the forms that `User` may have."""
    name, _, group = user.partition(":")
    passwd = _accounts(read, "/etc/passwd", 7)
    groups = _accounts(read, "/etc/group", 4)
    if not name or name.isdigit():
        uid = int(name or 0)
        entry = next((e for e in passwd if e[2] == str(uid)), None)
    else:
        entry = next((e for e in passwd if e[0] == name), None)
        if entry is None:
            raise NotFound(
                f"the image has no user {name!r}", hint="its /etc/passwd decides; use a uid"
            )
        uid = _number(entry[2], "uid")
    gid = _number(entry[3], "gid") if entry else 0
    member = entry[0] if entry else ""
    extra = tuple(_number(g[2], "gid") for g in groups if member and member in g[3].split(","))
    identity = Identity(uid, gid, extra, (entry[5] if entry else "") or "/")
    if not group:
        return identity
    if group.isdigit():
        return replace(identity, gid=int(group), groups=())
    found = next((g for g in groups if g[0] == group), None)
    if found is None:
        raise NotFound(f"the image has no group {group!r}")
    return replace(identity, gid=_number(found[2], "gid"), groups=())


def _number(text: str, what: str) -> int:
    if not text.isdigit() or int(text) >= 1 << 32:
        raise InvalidArgument(f"the image's account files name the {what} {text[:40]!r}")
    return int(text)


def _accounts(read: ReadFile, path: str, fields: int) -> list[list[str]]:
    """The well-formed lines of a passwd or group file of the image; [] without the file."""
    text = read(path).decode("utf-8", "surrogateescape")
    lines = (line.split(":") for line in text.splitlines())
    return [line for line in lines if len(line) == fields]


def supported_architecture(architecture: str) -> bool:
    """Whether this machine runs programs of an OCI architecture by itself."""
    from imgsnap.oci.platforms import host_platform

    return architecture == host_platform().architecture or (
        architecture == "386" and platform.machine() == "x86_64"
    )
