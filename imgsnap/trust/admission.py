"""The check at a snapshot's opening: before anything of it but manifests is fetched or used."""

import json
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from imgsnap.oci.repository import RawManifest, Repository
from imgsnap.trust.judge import Judge, Verdict, refuse
from imgsnap.trust.names import Name
from imgsnap.trust.policy import AcceptAnything, Policy
from imgsnap.trust.policy_file import parse_text
from imgsnap.trust.target import Target

_log = logging.getLogger(__name__)


class Memory(Protocol):
    """Small values by key, kept on this node; the node cache."""

    def load_tag(self, key: str) -> bytes | None: ...

    def store_tag(self, key: str, value: bytes) -> None: ...


class Admission:
    """The policies that a snapshot must be accepted by to be opened: all of them.

    What was accepted is remembered for its name, policy and digest: then nobody is asked again,
    until something that it rests on expires.
    """

    def __init__(self, policies: Sequence[Policy], memory: Memory) -> None:
        self._policies = policies
        self._memory = memory

    @classmethod
    def of_texts(cls, texts: Sequence[str], memory: Memory) -> "Admission":
        """From policies as `Policy.to_text` has them. Raises InvalidArgument."""
        return cls([parse_text(text) for text in texts], memory)

    def __call__(
        self, repository: Repository, reference: str, documents: Sequence[RawManifest]
    ) -> None:
        """Returns when the snapshot `documents[0]`, which `reference` named, may be opened; the
        others commit to it.

        Raises NotTrusted, and what `Judge.judge` raises.
        """
        name = Name.of(repository.name, reference)
        targets = [Target.of(document) for document in documents]
        judge = Judge(repository, name, targets)
        for policy in self._policies:
            self._admit(policy, judge, name, targets[0])

    def _admit(self, policy: Policy, judge: Judge, name: Name, target: Target) -> None:
        requirements = policy.requirements(name)
        if all(isinstance(requirement, AcceptAnything) for requirement in requirements):
            return
        key = f"trust\0{policy.digest}\0{name}\0{target.digest}"
        if _still_holds(self._memory.load_tag(key)):
            return
        verdict = judge.judge(requirements)
        if not verdict.accepted:
            raise refuse(name, target, verdict.reason)
        _log.info("%s of %s: signed by %s", target.digest, name, _signers(verdict))
        self._memory.store_tag(key, json.dumps({"until": verdict.until}).encode())


def _signers(verdict: Verdict) -> str:
    return ", ".join(signer.name for signer in verdict.signers)


def _still_holds(raw: bytes | None) -> bool:
    if raw is None:
        return False
    try:
        until = json.loads(raw)["until"]
        return until is None or time.time() < float(until)
    except (ValueError, KeyError, TypeError):
        return False
