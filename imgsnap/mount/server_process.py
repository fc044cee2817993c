"""A mount's private block server: the process that resolves, attaches, serves and cleans up."""

import json
import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from imgsnap.blockstore.boot_choice import AUTO
from imgsnap.blockstore.fetcher import DEFAULT_DEADLINE_S, DEFAULT_THREADS
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.readahead import WINDOW_MAX
from imgsnap.blockstore.store import BlockStore, Device, ReadOptions
from imgsnap.errors import Busy, ImgsnapError
from imgsnap.fuse.server import FuseServer
from imgsnap.mount import attach, linux, teardown
from imgsnap.mount.boot_phase import BootPhase
from imgsnap.mount.overlay import WritableLayer, mount_overlay
from imgsnap.mount.process import ProcessId
from imgsnap.mount.records import MOUNTED, MountRecord, MountRecords
from imgsnap.oci.repository import Platform, Repository

BOOT_ANSWER_S = 2.0
"""How long a mount waits to learn whether there is a boot pack; mostly it knows by then."""
HOUSEKEEPING_S = 5.0
"""How often overdue reads are failed; a read waits at most this much over its deadline."""
_END_S = 1.0
"""For the FUSE workers after an unmount; they stay in the kernel while a detached tree is used."""
_ENDED = signal.SIGUSR1
"""Sent by the FUSE workers to their own process when the superblock is gone."""
_HANDLED = (signal.SIGTERM, signal.SIGINT, _ENDED)

OpenRepository = Callable[[], Repository]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What to mount and how. Paths are made absolute by `mount_snapshot`."""

    reference: str  # a tag or digest in the repository
    target: Path
    run_dir: Path
    cache_dir: Path
    platform: Platform | None = None  # None: this machine's, or whatever the snapshot is for
    read_write: bool = False
    rw_root: Path | None = None  # where changes are kept; None: <cache_dir>/rw
    fetch_threads: int = DEFAULT_THREADS
    readahead_max: int = WINDOW_MAX  # bytes; 0 switches readahead off
    read_deadline_s: float = DEFAULT_DEADLINE_S
    mount_timeout_s: float = 300.0
    boot_pack: tuple[str, ...] = (AUTO,)  # names by preference; () for none
    image_config: bool = False  # have the source image's config cached afterwards
    trace_path: Path | None = None  # where a trace of the reads is written when the server ends


def run_server(
    options: MountOptions, record: MountRecord, open_repository: OpenRepository, pipe: int
) -> None:
    """Mounts and serves; reports through `pipe`, one JSON object a line, and returns at the end.

    First line {"pid", "start_time"}, second {"record"} or {"error"}.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = ProcessId.of(os.getpid())
    _send(pipe, {"pid": process.pid, "start_time": process.start_time})
    try:
        linux.name_process("imgsnap-block")
        linux.limit_heap()
        os.chdir("/")
        _start_log(record.log_path)
        records = MountRecords(options.run_dir)
        with _Server(options, record.with_server(process), records) as server:
            mounted = server.mount(open_repository)
            _send(pipe, {"mounted": True, "loop": mounted.loop})
            os.close(pipe)
            pipe = -1
            server.serve()
    except Exception as error:
        _log.error("the block server ends: %s", error, exc_info=not isinstance(error, ImgsnapError))
        if pipe >= 0:
            _send(pipe, {"error": error_value(error)})


def error_value(error: BaseException) -> dict[str, object]:
    """An error as JSON; `rebuild_error` is its inverse."""
    if isinstance(error, ImgsnapError):
        return {
            "class": type(error).__name__,
            "message": str(error),
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
    message = f"{type(error).__name__}: {error}"
    return {"class": "ImgsnapError", "message": message, "hint": None, "exit_code": 1}


class _Server:
    """Everything the process holds, released in reverse order."""

    def __init__(self, options: MountOptions, record: MountRecord, records: MountRecords) -> None:
        self._options = options
        self._record = record
        self._records = records
        self._stack = ExitStack()
        self._store: BlockStore | None = None
        self._boot: BootPhase | None = None

    def __enter__(self) -> "_Server":
        self._stack.callback(teardown.remove_instance, self._record)
        self._stack.callback(teardown.remove_entry, self._records, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def mount(self, open_repository: OpenRepository) -> MountRecord:
        """Makes the tree usable, and says so in the record."""
        device = self._open(open_repository)
        self._attach(device)
        record = replace(self._record, state=MOUNTED)
        self._records.update(record)
        _log.info("mounted %s on %s", record.manifest_digest, record.target)
        return record

    def _open(self, open_repository: OpenRepository) -> Device:
        options, stack = self._options, self._stack
        repository = open_repository()
        stack.callback(repository.close)
        self._store = BlockStore(NodeCache(options.cache_dir), fetch_threads=options.fetch_threads)
        device = self._store.open(
            repository,
            options.reference,
            platform=options.platform,
            options=ReadOptions(
                options.readahead_max,
                options.read_deadline_s,
                boot_pack=() if options.trace_path else options.boot_pack,
                trace=True,  # at 0.4 us a read, any mount can tell what its start read
                image_config=options.image_config,
            ),
        )
        reader, snapshot = device.reader, device.snapshot
        stack.callback(lambda: _log.info("statistics: %s", json.dumps(reader.statistics.as_dict())))
        stack.callback(device.close)
        if options.trace_path is not None:
            stack.callback(
                lambda path: path.write_bytes(reader.trace().to_json()), options.trace_path
            )
        stack.callback(self._store.close)
        self._record = replace(
            self._record,
            repository=repository.name,
            manifest_digest=snapshot.manifest.digest,
            config_digest=snapshot.manifest.config.digest,
        )
        return device

    def _attach(self, device: Device) -> None:
        """FUSE, then EROFS over its file, then the overlay.

        For a start from a boot pack, and to record one, the kernel must ask for what is read and no
        more: a request that reads ahead of it is none that the pack can answer.
        """
        record, stack, reader = self._record, self._stack, device.reader
        exact = self._options.trace_path is not None or (
            device.boot is not None and device.boot.found(BOOT_ANSWER_S)
        )
        record.device_dir.mkdir(mode=0o700)
        fd = attach.mount_fuse(record.device_dir)
        server = FuseServer(
            fd,
            {attach.DEVICE_FILE: reader},
            direct_io=exact,
            on_end=lambda: os.kill(os.getpid(), _ENDED),
        )
        stack.callback(server.join, _END_S)
        stack.callback(self._unmount)
        server.start()
        local = reader.local
        attach.tune_readahead(
            record.device_dir,
            attach.READ_AHEAD_LOCAL_KB if local else attach.READ_AHEAD_LAZY_KB,
        )
        target = Path(record.target)
        erofs_target = target
        if record.read_write:
            record.lower_dir.mkdir(mode=0o700)
            erofs_target = record.lower_dir
        erofs = attach.mount_erofs(
            record.device_dir / attach.DEVICE_FILE, erofs_target, find_bdi=exact
        )
        self._record = replace(record, loop=erofs.loop)
        if erofs.bdi and device.boot is not None:
            self._boot = BootPhase(device.boot, erofs.bdi)
        elif erofs.bdi:
            attach.set_readahead(erofs.bdi, 0)
        if record.read_write:
            layer = WritableLayer(Path(record.rw_dir))
            layer.create()
            mount_overlay(record.overlay_source, erofs_target, layer, target)

    def _unmount(self) -> None:
        """Unmounts what is left. Users of the tree lose it: without us it is dead anyway."""
        try:
            teardown.unmount_tree(self._record, lazy=False)
        except Busy as error:
            _log.warning("%s; detaching it", error)
            teardown.unmount_tree(self._record, lazy=True)

    def serve(self) -> None:
        """Returns when the superblock is gone or a signal asks for the end."""
        NodeCache(self._options.cache_dir).remove_stale_temporaries()
        while True:
            info = signal.sigtimedwait(_HANDLED, HOUSEKEEPING_S)
            if info is not None:
                _log.info("ending on %s", signal.Signals(info.si_signo).name)
                return
            if self._store is not None:
                self._store.fetcher.expire()
            if self._boot is not None:
                self._boot.check()


def _send(pipe: int, value: dict[str, object]) -> None:
    try:
        os.write(pipe, json.dumps(value).encode() + b"\n")
    except OSError as error:  # the parent is gone
        _log.debug("nobody listens: %s", error)


def _start_log(path: Path) -> None:
    """The log file instead of what the caller had set up, whose descriptors are closed."""
    logging.raiseExceptions = False
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # A command that logs has given the package a handler of its own, and no way to the root's.
    package = logging.getLogger("imgsnap")
    package.handlers.clear()
    package.propagate = True
    package.setLevel(logging.NOTSET)
