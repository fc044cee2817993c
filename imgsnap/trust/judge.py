"""Whether a policy's requirements are met by the signatures that a repository has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from imgsnap.errors import FormatError, NotTrusted
from imgsnap.oci.repository import Repository
from imgsnap.trust.certificates import parse_roots
from imgsnap.trust.cosign import CosignSignature
from imgsnap.trust.find import Found, find_signatures
from imgsnap.trust.keys import public_key
from imgsnap.trust.names import Name
from imgsnap.trust.notation import NotationSignature
from imgsnap.trust.policy import (
    AcceptAnything,
    NotationSigned,
    Policy,
    Reject,
    Requirement,
    Requirements,
    SigstoreSigned,
)
from imgsnap.trust.target import NotAccepted, Signer, Target, printable


@dataclass(frozen=True, slots=True)
class Judged:
    """One signature of a target: by whom, if a requirement accepts it, else why not."""

    found: Found
    target: Target
    signer: Signer | None
    problem: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of all requirements. `signers` are those of the signatures that decided."""

    accepted: bool
    signers: tuple[Signer, ...]
    judged: tuple[Judged, ...]
    reason: str  # why it is not accepted

    @property
    def until(self) -> float | None:
        """Unix time until when it holds; None: for good."""
        return min((s.until for s in self.signers if s.until is not None), default=None)


class _Outcome(NamedTuple):
    """What came of one requirement."""

    met: bool
    signer: Signer | None = None
    problem: str = ""
    judged: tuple[Judged, ...] = ()


class Judge:
    """Judges one snapshot; looks signatures up at most once per target."""

    def __init__(self, repository: Repository, name: Name, targets: Sequence[Target]) -> None:
        """`targets`: the snapshot's manifest, then what commits to it by digest, nearest first: a
        signature of any of them is one of the snapshot."""
        self._repository = repository
        self._name = name
        self._targets = targets
        self._found: dict[Target, list[Found]] = {}

    def judge(self, requirements: Requirements, *, all_signatures: bool = False) -> Verdict:
        """Raises Unavailable and AccessDenied when the repository does not say which signatures
        there are; InvalidArgument and Unsupported for a key that is none.

        With `all_signatures` every one is listed, also where none is needed.
        """
        outcomes = [self._meet(requirement) for requirement in requirements]
        judged = [item for outcome in outcomes for item in outcome.judged]
        if all_signatures and not any(map(_asks_for_signatures, requirements)):
            judged += [
                Judged(found, target, None, found.problem or "is not asked for")
                for target in self._targets
                for found in self._signatures(target)
            ]
        unmet = [outcome.problem for outcome in outcomes if not outcome.met]
        return Verdict(
            accepted=bool(outcomes) and not unmet,
            signers=tuple(o.signer for o in outcomes if o.signer is not None),
            judged=tuple(judged),
            reason=unmet[0] if unmet else "",
        )

    def _meet(self, requirement: Requirement) -> "_Outcome":
        if isinstance(requirement, AcceptAnything):
            return _Outcome(met=True)
        if isinstance(requirement, Reject):
            return _Outcome(met=False, problem="the policy rejects everything of this name")
        judged: list[Judged] = []
        for target in self._targets:
            for found in self._signatures(target):
                signer, problem = _judge_one(requirement, found, target, self._name)
                judged.append(Judged(found, target, signer, problem))
            accepted = next((item.signer for item in judged if item.signer is not None), None)
            if accepted is not None:
                return _Outcome(met=True, signer=accepted, judged=tuple(judged))
        return _Outcome(met=False, problem=_summary(requirement, judged), judged=tuple(judged))

    def _signatures(self, target: Target) -> list[Found]:
        if target not in self._found:
            self._found[target] = find_signatures(self._repository, target)
        return self._found[target]


def _asks_for_signatures(requirement: Requirement) -> bool:
    return isinstance(requirement, SigstoreSigned | NotationSigned)


def _judge_one(
    requirement: SigstoreSigned | NotationSigned, found: Found, target: Target, name: Name
) -> tuple[Signer | None, str]:
    signature = found.signature
    try:
        if signature is None:
            return None, found.problem
        if isinstance(requirement, SigstoreSigned) and isinstance(signature, CosignSignature):
            return signature.accept(requirement, target, name), ""
        if isinstance(requirement, NotationSigned) and isinstance(signature, NotationSignature):
            return signature.accept(requirement, target), ""
    except (NotAccepted, FormatError) as error:
        return None, str(error)
    return None, "is of another kind than the policy asks for"


def _summary(requirement: SigstoreSigned | NotationSigned, judged: Sequence[Judged]) -> str:
    kind = "cosign" if isinstance(requirement, SigstoreSigned) else "notation"
    mine = [item for item in judged if item.found.kind.startswith(kind)]
    if not mine:
        others = f" ({len(judged)} of another kind)" if judged else ""
        return f"it has no signature of {kind}'s, which the policy asks for{others}"
    more = f", and {len(mine) - 1} more are not accepted" if len(mine) > 1 else ""
    return f"its {mine[0].found.kind} signature {mine[0].problem}{more}"


def check_keys(policy: Policy) -> None:
    """Raises InvalidArgument and Unsupported for a key or a root that is none, also when no
    snapshot has needed it yet."""
    scopes = [policy.default, *(r for found in policy.transports.values() for r in found.values())]
    for requirement in (requirement for requirements in scopes for requirement in requirements):
        if isinstance(requirement, SigstoreSigned):
            for key in requirement.keys:
                public_key(key)
        elif isinstance(requirement, NotationSigned):
            for root in requirement.roots:
                parse_roots(root)


def refuse(
    name: Name, target: Target, reason: str, *, hint: str = "`imgsnap verify` shows its signatures"
) -> NotTrusted:
    """The error of a snapshot that a policy does not accept."""
    shown = str(name) if name.digest else f"{name} ({target.digest})"
    return NotTrusted(
        f"{shown} is not accepted by the policy: {printable(reason)}",
        hint=hint,
    )
