"""imgsnap files"""

import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from imgsnap.formats.layer_index import Kind
from imgsnap_cli.output import format_option, print_json, printable
from imgsnap_cli.places import Places, platform_option, policy_option, registry_flags
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.formats.erofs_read import ErofsReader, Inode

_TYPE_BITS = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHAR_DEVICE: stat.S_IFCHR,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
}


@click.command(short_help="List the files of a snapshot")
@click.argument("ref")
@click.argument("path", default="/")
@click.option("-R", "--recursive", is_flag=True, help="Everything below PATH")
@click.option("-l", "--long", "long_", is_flag=True, help="As ls -l")
@platform_option
@format_option
@policy_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    path: str,
    recursive: bool,
    long_: bool,
    platform: str | None,
    format_: str,
    **flags: Any,
) -> None:
    """List PATH (the root by default) of the snapshot REF, fetching only its metadata."""
    from imgsnap.formats.erofs_read import ErofsReader

    places = Places(settings, flags)
    with ExitStack() as stack:
        snapshot = places.snapshot(stack, ref, platform)
        reader = ErofsReader(stack.enter_context(places.block_reader(snapshot)))
        found = _listing(reader, path.encode("utf-8", "surrogateescape"), recursive)
        if format_ == "json":
            print_json({"files": [_value(reader, name, inode) for name, inode in found]})
            return
        for name, inode in found:
            click.echo(_long_line(reader, name, inode) if long_ else printable(name))


def _listing(
    reader: "ErofsReader", path: bytes, recursive: bool
) -> "Iterator[tuple[bytes, Inode]]":
    top = reader.resolve(path)
    if not top.is_directory:
        yield path, top
        return
    stack = [(b"", top)]
    while stack:
        prefix, directory = stack.pop()
        below = []
        for entry in reader.entries(directory):
            if entry.name in (b".", b".."):
                continue
            inode, name = reader.inode(entry.nid), prefix + entry.name
            yield name, inode
            if recursive and inode.is_directory:
                below.append((name + b"/", inode))
        stack += reversed(below)


def _value(reader: "ErofsReader", name: bytes, inode: "Inode") -> dict[str, Any]:
    value: dict[str, Any] = {
        "path": printable(name),
        "type": Kind(inode.kind).name.lower(),
        "mode": f"{inode.mode:04o}",
        "uid": inode.uid,
        "gid": inode.gid,
        "size": inode.size,
        "mtime": inode.mtime,
        "links": inode.nlink,
    }
    if inode.kind == Kind.SYMLINK:
        value["target"] = printable(reader.readlink(inode))
    return value


def _long_line(reader: "ErofsReader", name: bytes, inode: "Inode") -> str:
    mode = stat.filemode(_TYPE_BITS[Kind(inode.kind)] | inode.mode)
    arrow = f" -> {printable(reader.readlink(inode))}" if inode.kind == Kind.SYMLINK else ""
    try:
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(inode.mtime))
    except (ValueError, OverflowError, OSError):
        when = f"@{inode.mtime}"
    owner = f"{inode.uid}:{inode.gid}"
    return f"{mode} {inode.nlink:>3} {owner:>11} {inode.size:>11} {when} {printable(name)}{arrow}"
