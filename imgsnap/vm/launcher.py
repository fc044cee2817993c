"""The program that starts a command in a guest: it becomes who the image wants and executes it.

busybox has no tool that sets supplementary groups and then a user, and a shell would take words and
variables apart again. So one is written for each command.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from imgsnap.mount.container import Command
from imgsnap.vm.assembler import Assembler, program

NOT_FOUND = 127
"""Exit status, as shells have it."""
_EXECVE, _CHDIR, _MKDIR, _FCHOWN = 59, 80, 83, 93
_SETUID, _SETGID, _SETGROUPS, _CHROOT = 105, 106, 116, 161


def launcher(command: Command) -> bytes:
    """A program that runs a command in its working directory's tree, as root's child.

    Its standard output becomes the user's, so that programs may open /dev/stdout. It exits with 127
    when there is no such program, with 126 when it may not be executed or the user not become.
    """
    return program(lambda out: _write(out, command))


def _write(out: Assembler, command: Command) -> None:
    who = command.identity
    out.must("cannot enter the image", _CHROOT, out.text_at("."))
    for path in _parents(command.cwd):
        out.call(_MKDIR, out.text_at(path), 0o755)  # as runc does
    out.must(f"cannot enter {command.cwd}", _CHDIR, out.text_at(command.cwd))
    out.call(_FCHOWN, 1, who.uid, who.gid)
    groups = b"".join(group.to_bytes(4, "little") for group in who.groups)
    out.must("cannot set the groups", _SETGROUPS, len(who.groups), out.bytes_at(groups))
    out.must("cannot set the group", _SETGID, who.gid)
    out.must("cannot set the user", _SETUID, who.uid)
    arguments, environment = out.list_at(command.args), out.list_at(command.env)
    for path in _candidates(command):
        out.call(_EXECVE, out.text_at(path), arguments, environment)
    out.if_denied(f"{command.args[0]}: permission denied")
    out.give_up(f"{command.args[0]}: not found", NOT_FOUND)


def _parents(cwd: str) -> list[str]:
    path = PurePosixPath(cwd)
    return [str(parent) for parent in (*reversed(path.parents), path)][1:]


def _candidates(command: Command) -> Iterator[str]:
    """The paths that a program's name may stand for, by PATH."""
    name = command.args[0]
    if "/" in name:
        yield name
        return
    path = dict(item.split("=", 1) for item in command.env).get("PATH", "")
    for directory in path.split(":"):
        yield f"{directory or '.'}/{name}"
