"""When and how long to wait before a request is tried again."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from imgsnap.errors import ImgsnapError
from imgsnap.oci.cancellation import Cancellation
from imgsnap.oci.http_errors import RegistryUnavailable


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter under an overall deadline. Times in seconds.

    The default waits at most about 0.2 + 0.4 + … = 12.6 s in all when the server says nothing,
    which outlasts a registry's rolling restart behind a load balancer.
    """

    attempts_max: int = 7
    base_s: float = 0.2
    backoff_max_s: float = 10.0
    retry_after_max_s: float = 60.0
    """A longer Retry-After is shortened to this: the server's word, within reason."""
    deadline_s: float = 300.0
    """No further attempt begins later than this after the first one."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)


class Attempts:
    """The attempts of one request: call `failed` after each failure, then try again."""

    def __init__(self, policy: RetryPolicy, cancellation: Cancellation | None = None) -> None:
        self._policy = policy
        self._cancellation = cancellation
        self._made = 0
        self._started_s = policy.clock()

    def failed(self, error: ImgsnapError) -> None:
        """Sleeps before the next attempt, or raises `error` when there shall be none.

        Raises Cancelled when the request is given up meanwhile.
        """
        policy, cancellation = self._policy, self._cancellation
        if cancellation is not None:
            cancellation.check()
        self._made += 1
        if not error.retryable or self._made >= policy.attempts_max:
            raise error
        # Jitter only spreads load; nothing secret hangs on it.
        wait_s = random.uniform(0.5, 1.0) * min(  # noqa: S311
            policy.backoff_max_s, policy.base_s * 2 ** (self._made - 1)
        )
        asked_s = _asked_s(error)
        if asked_s is not None:
            wait_s = max(wait_s, min(asked_s, policy.retry_after_max_s))
        if policy.clock() - self._started_s + wait_s > policy.deadline_s:
            raise error
        if cancellation is None:
            policy.sleep(wait_s)
        elif cancellation.allows(wait_s):
            cancellation.wait(wait_s)
        else:
            raise error

    def progressed(self) -> None:
        """Forgets past failures: the transfer moved on, so its next break is a first one."""
        self._made = 0
        self._started_s = self._policy.clock()


class Counters:
    """Named counters, thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Adds to a counter, which begins at 0."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    def get(self, name: str) -> int:
        """The counter's value; 0 when it has never been added to."""
        with self._lock:
            return self._values.get(name, 0)

    def snapshot(self) -> dict[str, int]:
        """All counters that have been added to, in order of their names."""
        with self._lock:
            return dict(sorted(self._values.items()))


def retry_after_s(header: str | None, *, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or an HTTP date (RFC 9110, 10.2.3).

    None when there is none, or none that makes sense.
    """
    if not header:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(min(int(text[:12]), 86_400 * 365))
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())


def _asked_s(error: ImgsnapError) -> float | None:
    if isinstance(error, RegistryUnavailable) and error.refusal is not None:
        return error.refusal.retry_after_s
    return None
