"""Policies of signatures on their way to the process that opens a snapshot.

They travel as texts that need no other file (`Policy.to_text`), so it does not matter what the
opening process can read, and what was decided is what was meant when it was asked.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.resolve import Admit, admit_all
from imgsnap.node.request import AttachRequest


def admission(policies: Sequence[str], cache: NodeCache) -> Admit:
    """Who lets a snapshot be opened by all these policies; anybody when there are none. Raises
    InvalidArgument."""
    if not policies:
        return admit_all
    from imgsnap.trust.admission import Admission

    return Admission.of_texts(policies, cache)


class DaemonPolicy:
    """The policy that a daemon adds to those of its callers: they can ask for more, not for less.

    Its file is read each time: what it says now counts for what is opened now.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def bind(self, request: AttachRequest) -> AttachRequest:
        """Raises what `load_policy` raises: without a readable policy nothing is opened."""
        if self.path is None:
            return request
        return replace(request, policies=(policy_text(self.path), *request.policies))


def policy_text(path: Path) -> str:
    """A policy's file as a text. Raises what `load_policy` raises."""
    from imgsnap.trust.policy_file import load_policy

    return load_policy(path).to_text()


def check_policy(path: Path) -> None:
    """Raises what `load_policy` and `check_keys` raise: for a process that would otherwise refuse
    everything later."""
    from imgsnap.trust.judge import check_keys
    from imgsnap.trust.policy_file import load_policy

    check_keys(load_policy(path))
