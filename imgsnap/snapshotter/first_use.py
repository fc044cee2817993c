"""Converts ordinary images in the background, once a container runs from them."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from imgsnap.digest import Digest
from imgsnap.errors import ImgsnapError, NotFound, Unavailable
from imgsnap.oci.reference import RegistryLocation
from imgsnap.snapshotter.counters import Counters
from imgsnap.snapshotter.image_labels import parse_image_labels, repository_name
from imgsnap.snapshotter.negative_cache import NegativeCache
from imgsnap.snapshotter.seams import ConvertImage, LookUp

_Job = tuple[RegistryLocation, Digest]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FirstUseLimits:
    """Times in seconds."""

    delay_s: float = 5.0  # the container's own start comes first
    waiting_max: int = 64
    done_ttl_s: float = 86400.0  # until a used image is looked at again
    failed_ttl_s: float = 3600.0
    unavailable_ttl_s: float = 300.0
    settled_max: int = 4096


class FirstUse:
    """A queue and a thread. Keeps nothing on disk: after a restart an image is converted when a
    container is made of it once more, and an image that was converted is found to be so.

    Safe for threads.
    """

    def __init__(
        self,
        wanted: Callable[[RegistryLocation], bool],
        look_up: LookUp,
        converter: ConvertImage,
        counters: Counters,
        limits: FirstUseLimits = FirstUseLimits(),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wanted` says of which repositories images are converted."""
        self._wanted = wanted
        self._look_up = look_up
        self._converter = converter
        self._counters = counters
        self._limits = limits
        self._settled = NegativeCache(limits.settled_max, clock=clock)
        self._lock = threading.Lock()
        self._pending: set[tuple[str, Digest]] = set()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="first-use", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Gives up what runs and forgets what waits."""
        self._stop.set()
        self._queue.put(None)
        self._converter.stop()
        self._thread.join()

    def waiting(self) -> int:
        """Images that are to be converted, the one under way included."""
        with self._lock:
            return len(self._pending)

    def used(self, labels: Mapping[str, str]) -> None:
        """A container is made of an ordinary image, one of whose layers has these labels.

        Does not wait, and raises nothing.
        """
        try:
            asked = parse_image_labels(labels)
            if asked.image is not None and asked.manifest is not None and self._wanted(asked.image):
                self._add(asked.image, asked.manifest)
        except ImgsnapError as error:
            _log.info("not to be converted: %s", error)
        except Exception:  # the container exists already
            _log.exception("not to be converted")

    def _add(self, image: RegistryLocation, manifest: Digest) -> None:
        key = repository_name(image), manifest
        with self._lock:
            if key in self._pending or key in self._settled:
                return
            if len(self._pending) >= self._limits.waiting_max:
                self._counters.add("conversions", result="queue_full")
                return
            self._pending.add(key)
        self._queue.put((image, manifest))

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._stop.wait(self._limits.delay_s):
                return
            image, manifest = job
            key = repository_name(image), manifest
            result, ttl_s = self._settle(image, manifest)
            self._counters.add("conversions", result=result)
            with self._lock:
                self._settled.add(key, ttl_s)
                self._pending.discard(key)

    def _settle(self, image: RegistryLocation, manifest: Digest) -> tuple[str, float]:
        """What became of it, and for how long that holds."""
        name = f"{repository_name(image)}@{manifest}"
        try:
            return self._convert(image, manifest, name), self._limits.done_ttl_s
        except Unavailable as error:
            _log.warning("%s is not converted: %s", name, error)
            return "failed", self._limits.unavailable_ttl_s
        except (ImgsnapError, OSError) as error:
            _log.warning("%s is not converted: %s", name, error)
        except Exception:
            _log.exception("%s is not converted", name)
        return "failed", self._limits.failed_ttl_s

    def _convert(self, image: RegistryLocation, manifest: Digest, name: str) -> str:
        if self._look_up(image, manifest) is not None:
            return "found"
        _log.info("converting %s", name)
        self._converter.convert(image, manifest)
        found = self._look_up(image, manifest)
        if found is None:
            raise NotFound("it was published, and its repository does not show it")
        _log.info("%s has the snapshot %s", name, found.digest)
        return "converted"
