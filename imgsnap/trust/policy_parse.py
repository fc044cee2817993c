"""Policy files: the subset of containers-policy.json(5) that is about what we can check.

Strict, as podman is: a field, a type or a transport that is not known here refuses the whole file,
since leaving it out could accept what its author meant to refuse. Raises InvalidArgument, which
names file and field, and Unsupported for what the format has and we do not.
"""

import binascii
from base64 import b64decode
from collections.abc import Callable
from typing import Any

from imgsnap.errors import ImgsnapError, InvalidArgument, InvalidReference, Unsupported
from imgsnap.oci.manifest import parse_json_object
from imgsnap.trust.identity import Match, SignedIdentity, docker_reference
from imgsnap.trust.policy import (
    ACCEPT_ANYTHING,
    NOTATION_SIGNED,
    REJECT,
    SIGSTORE_SIGNED,
    AcceptAnything,
    NotationSigned,
    Policy,
    Reject,
    Requirement,
    Requirements,
    SigstoreSigned,
)
from imgsnap.trust.subjects import TrustedSubject, parse_subject

POLICY_SIZE_MAX = 192 << 10
"""Bytes, with the keys in it: two must fit into a request to a block server."""
KEY_SIZE_MAX = 64 << 10
"""Bytes of one file of keys or certificates."""
LIST_MAX = 64
"""Requirements of a scope, keys of a requirement, trusted identities."""
TEXT_MAX = 4096
KEY, CERTIFICATE = "PUBLIC KEY", "CERTIFICATE"
"""PEM labels (RFC 7468). What is between them is looked at when a signature is."""

USED = frozenset({"docker", "oci", "oci-archive", "docker-archive"})
UNUSED = frozenset(
    {
        *("atomic", "containers-storage", "dir", "docker-daemon"),
        *("ostree", "sif", "tarball"),
    }
)
"""Transports that no reference of ours has: what they say never decides here."""
_KEYLESS = frozenset(
    {
        *("fulcio", "pki", "rekorPublicKeyPath", "rekorPublicKeyPaths"),
        *("rekorPublicKeyData", "rekorPublicKeyDatas"),
    }
)

ReadKey = Callable[[str], bytes]
"""The bytes of a file that a policy names. Raises ImgsnapError, OSError."""


def parse_policy(raw: bytes, read: ReadKey, *, file: str = "policy") -> Policy:
    """The policy in `raw`; `file` names it in messages."""
    try:
        value = parse_json_object(raw, record=file, size_max=POLICY_SIZE_MAX)
    except ImgsnapError as error:
        raise InvalidArgument(str(error), hint="see docs/trust.md") from error
    policy = _Parser(file, read).policy(value)
    if len(policy.to_text().encode()) > POLICY_SIZE_MAX:
        raise InvalidArgument(f"{file}: is over {POLICY_SIZE_MAX} bytes with its keys")
    return policy


class _Parser:
    def __init__(self, file: str, read: ReadKey) -> None:
        self._file = file
        self._read = read

    def _wrong(self, where: str, problem: str) -> InvalidArgument:
        return InvalidArgument(f"{self._file}: {where}: {problem}", hint="see docs/trust.md")

    def policy(self, value: dict[str, Any]) -> Policy:
        self._only(value, "the policy", {"default", "transports"})
        if "default" not in value:
            raise self._wrong("default", "is missing")
        transports = self._object(value.get("transports", {}), "transports")
        for name in transports:
            if name not in USED | UNUSED:
                raise self._wrong("transports", f"unknown transport {name[:100]!r}")
        return Policy(
            self._requirements(value["default"], "default"),
            {name: self._scopes(name, transports[name]) for name in transports if name in USED},
        )

    def _scopes(self, transport: str, value: object) -> dict[str, Requirements]:
        where = f"transports.{transport}"
        scopes = self._object(value, where)
        for scope in scopes:
            self._check_scope(transport, scope, where)
        return {
            scope: self._requirements(found, f"{where}.{scope[:300]!r}")
            for scope, found in scopes.items()
        }

    def _check_scope(self, transport: str, scope: str, where: str) -> None:
        """A scope that can never match protects nothing."""
        if not scope:
            return
        wildcard = scope.removeprefix("*.") if transport == "docker" else scope
        if transport == "docker":
            wrong = "*" in wildcard or "://" in scope or scope.startswith("/")
            wrong = wrong or (wildcard != scope and ("/" in scope or ":" in scope))
        else:
            wrong = not scope.startswith("/") or scope == "/"
        wrong = wrong or not scope.isprintable() or len(scope) > TEXT_MAX
        if wrong or scope.endswith("/"):
            raise self._wrong(where, f"{scope[:300]!r} is not a scope")

    def _requirements(self, value: object, where: str) -> Requirements:
        found = tuple(
            self._requirement(self._object(item, f"{where}[{number}]"), f"{where}[{number}]")
            for number, item in enumerate(self._list(value, where))
        )
        if not found:
            raise self._wrong(
                where, f'is empty; accept anything with {{"type": "{ACCEPT_ANYTHING}"}}'
            )
        return found

    def _requirement(self, value: dict[str, Any], where: str) -> Requirement:
        kind = value.get("type")
        match kind:
            case "insecureAcceptAnything":
                self._only(value, where, {"type"})
                return AcceptAnything()
            case "reject":
                self._only(value, where, {"type"})
                return Reject()
            case "sigstoreSigned":
                return self._sigstore(value, where)
            case "imgsnapNotationSigned":
                return self._notation(value, where)
            case "signedBy":
                raise Unsupported(
                    f"{self._file}: {where}: GPG signatures (signedBy) are not checked"
                )
        known = ", ".join((ACCEPT_ANYTHING, REJECT, SIGSTORE_SIGNED, NOTATION_SIGNED))
        raise self._wrong(f"{where}.type", f"{str(kind)[:100]!r} is none of {known}")

    def _sigstore(self, value: dict[str, Any], where: str) -> SigstoreSigned:
        keyless = sorted(_KEYLESS & value.keys())
        if keyless:
            raise Unsupported(
                f"{self._file}: {where}.{keyless[0]}: keyless signatures (Fulcio, Rekor) are not"
                " checked",
                hint="sign with a key: cosign sign --key",
            )
        names = ("keyPath", "keyPaths", "keyData", "keyDatas")
        self._only(value, where, {"type", "signedIdentity", *names})
        keys = self._files(value, where, names, KEY)
        if "signedIdentity" not in value:
            return SigstoreSigned(keys, SignedIdentity())
        inner = f"{where}.signedIdentity"
        return SigstoreSigned(
            keys, self._identity(self._object(value["signedIdentity"], inner), inner)
        )

    def _notation(self, value: dict[str, Any], where: str) -> NotationSigned:
        names = ("rootPath", "rootPaths", "rootData", "rootDatas")
        self._only(value, where, {"type", "trustedIdentities", *names})
        roots = self._files(value, where, names, CERTIFICATE)
        inner = f"{where}.trustedIdentities"
        texts = [
            self._text(item, inner) for item in self._list(value.get("trustedIdentities"), inner)
        ]
        if not texts:
            raise self._wrong(inner, 'is missing or empty; ["*"] is any signer')
        if texts == ["*"]:
            return NotationSigned(roots, ())
        return NotationSigned(roots, tuple(self._subject(text, inner) for text in texts))

    def _subject(self, text: str, where: str) -> TrustedSubject:
        try:
            return parse_subject(text)
        except InvalidArgument as error:
            raise self._wrong(where, str(error)) from error

    def _identity(self, value: dict[str, Any], where: str) -> SignedIdentity:
        kind = value.get("type")
        fields = {
            Match.EXACT_REFERENCE.value: ("dockerReference",),
            Match.EXACT_REPOSITORY.value: ("dockerRepository",),
            Match.REMAP.value: ("prefix", "signedPrefix"),
        }.get(str(kind), ())
        try:
            match = Match(kind)
        except ValueError:
            known = ", ".join(item.value for item in Match)
            raise self._wrong(f"{where}.type", f"{str(kind)[:100]!r} is none of {known}") from None
        self._only(value, where, {"type", *fields})
        texts = [self._text(value.get(name), f"{where}.{name}") for name in fields]
        if match in (Match.EXACT_REFERENCE, Match.EXACT_REPOSITORY):
            named = match is Match.EXACT_REFERENCE
            texts = [self._docker_reference(texts[0], f"{where}.{fields[0]}", named=named)]
        return SignedIdentity(match, *texts)

    def _docker_reference(self, text: str, where: str, *, named: bool) -> str:
        """In its full form; with tag or digest exactly when it is to be `named` by one."""
        try:
            found = docker_reference(text)
        except InvalidReference as error:
            raise self._wrong(where, str(error)) from error
        if named != bool(found.tag or found.digest):
            raise self._wrong(where, "needs a tag or digest" if named else "is no repository alone")
        return str(found)

    def _files(
        self, value: dict[str, Any], where: str, names: tuple[str, ...], label: str
    ) -> tuple[bytes, ...]:
        """Exactly one of `names`: a path, paths, base64 data, datas; each PEM with this label."""
        given = [name for name in names if name in value]
        if len(given) != 1:
            raise self._wrong(where, f"needs exactly one of {', '.join(names)}")
        name = given[0]
        field = f"{where}.{name}"
        items = self._list(value[name], field) if name.endswith("s") else [value[name]]
        if not items:
            raise self._wrong(field, "is empty")
        load = self._from_path if "Path" in name else self._from_data
        found = tuple(self._sized(load(item, field), field) for item in items)
        if not all(f"-----BEGIN {label}-----".encode() in data for data in found):
            raise self._wrong(field, f"holds no {label} in PEM form")
        return found

    def _from_path(self, item: object, where: str) -> bytes:
        path = self._text(item, where)
        try:
            return self._read(path)
        except OSError as error:
            raise self._wrong(where, f"{path}: {error.strerror}") from error

    def _from_data(self, item: object, where: str) -> bytes:
        text = self._text(item, where, length_max=2 * KEY_SIZE_MAX)
        try:
            return b64decode(text, validate=True)
        except (ValueError, binascii.Error) as error:
            raise self._wrong(where, "is not base64") from error

    def _sized(self, data: bytes, where: str) -> bytes:
        if not data or len(data) > KEY_SIZE_MAX:
            raise self._wrong(where, f"{len(data)} bytes; a file has 1 to {KEY_SIZE_MAX}")
        return data

    def _only(self, value: dict[str, Any], where: str, known: set[str]) -> None:
        for name in value:
            if name not in known:
                raise self._wrong(where, f"unknown field {name[:100]!r}")

    def _object(self, value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(where, "is not an object")
        return value

    def _list(self, value: object, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._wrong(where, "is not a list")
        if len(value) > LIST_MAX:
            raise self._wrong(where, f"has {len(value)} entries, more than {LIST_MAX}")
        return value

    def _text(self, value: object, where: str, length_max: int = TEXT_MAX) -> str:
        if not isinstance(value, str) or not value or len(value) > length_max:
            raise self._wrong(where, f"is not a text of 1 to {length_max} characters")
        if not value.isprintable():
            raise self._wrong(where, "holds characters that cannot be printed")
        return value
