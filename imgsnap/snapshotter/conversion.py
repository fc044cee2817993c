"""Conversions on first use, each in a process of its own: what it takes and breaks is not ours."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from imgsnap.digest import Digest
from imgsnap.errors import ImgsnapError, Unavailable
from imgsnap.node.source import Source
from imgsnap.oci.reference import RegistryLocation
from imgsnap.snapshotter.conversion_request import Request
from imgsnap.snapshotter.counters import Counters
from imgsnap.snapshotter.directories import CONVERTING
from imgsnap.snapshotter.find_image import Finder
from imgsnap.snapshotter.first_use import FirstUse
from imgsnap.snapshotter.image_labels import repository_name
from imgsnap.snapshotter.node_settings import NodeSettings
from imgsnap.snapshotter.parts import matches

CONVERSION_MAX_S = 3600.0
_STOP_S = 10.0
_NOT_FOR_CHILDREN = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[str] | None = None
    stopped: bool = False


def first_use(settings: NodeSettings, finder: Finder, counters: Counters) -> FirstUse | None:
    """Converts the images of the repositories that the settings name; None when they name none."""
    patterns = settings.convert
    if not patterns:
        return None
    return FirstUse(
        lambda location: matches(patterns, location),
        finder.look_up,
        Conversions(settings),
        counters,
    )


class Conversions:
    """Implements ConvertImage. One at a time; `stop` may be called by any thread.

    Layers are decompressed below `<root>/converting`, which is discarded when a snapshotter starts,
    and with it the place where an orphan of a killed one works.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._work = settings.root / CONVERTING
        self._lock = threading.Lock()
        self._running = _Running()

    def convert(self, image: RegistryLocation, manifest: Digest) -> None:
        """See ConvertImage."""
        self._work.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._work, ignore_cleanup_errors=True) as work:
            self._convert(self._request(image, manifest, Path(work)))

    def stop(self) -> None:
        """Ends the conversion that runs, and lets none begin."""
        with self._lock:
            self._running.stopped = True
            if self._running.process is not None:
                self._running.process.terminate()

    def _request(self, image: RegistryLocation, manifest: Digest, work: Path) -> Request:
        settings, name = self._settings, repository_name(image)
        source = Source(
            f"docker://{name}@{manifest}",
            settings.store,
            settings.registry,
            Source.kept_environ(settings.environ),
        )
        # where `imgsnap convert` has it
        index = hashlib.sha256(name.encode()).hexdigest()[:32]
        return Request(source, manifest, work, settings.cache_dir / "chunk-index" / index)

    def _convert(self, request: Request) -> None:
        with self._lock:
            if self._running.stopped:
                raise ImgsnapError("the snapshotter ends")
            process = self._running.process = _start()
        try:
            _, said = process.communicate(json.dumps(request.to_json()), CONVERSION_MAX_S)
        except subprocess.TimeoutExpired as error:
            raise ImgsnapError(f"took longer than {CONVERSION_MAX_S:.0f} s") from error
        finally:
            _end(process)
            with self._lock:
                self._running.process = None
        if process.returncode:
            reason = said.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            again = process.returncode == Unavailable.exit_code
            raise (Unavailable if again else ImgsnapError)(reason[0][:1000])


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "imgsnap.snapshotter.convert_image"],
        env={name: text for name, text in os.environ.items() if name not in _NOT_FOR_CHILDREN},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[str]) -> None:
    """Returns when the process has gone, whatever it does."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            stream.close()
