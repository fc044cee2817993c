"""Finds a registry's credentials in the files and helpers that docker and podman use.

Order: a first file, which may be missing; then one file given by the caller, else
``$REGISTRY_AUTH_FILE``, else ``$XDG_RUNTIME_DIR/containers/auth.json``,
``$XDG_CONFIG_HOME/containers/auth.json`` and ``$DOCKER_CONFIG/config.json`` (``~/.docker`` without
it). The environment is the caller's mapping: this module never looks at the process's own.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgsnap.errors import AccessDenied, FormatError
from imgsnap.oci.manifest import parse_json_object
from imgsnap.oci.reference import DOCKER_HUB, DOCKER_HUB_WIRE

if TYPE_CHECKING:
    import subprocess

CONFIG_SIZE_MAX = 1 << 20
HELPER_OUTPUT_MAX = 64 << 10
HELPER_TIMEOUT_S = 30.0
"""Cloud helpers call their vendor's API; more than this and the user should hear about it."""

_HUB_KEYS = (f"https://index.{DOCKER_HUB}/v1/", f"index.{DOCKER_HUB}", DOCKER_HUB, DOCKER_HUB_WIRE)
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN_USER = "<token>"  # noqa: S105  (the helper protocol's mark for an identity token)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name with a password, or an identity (refresh) token."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


class CredentialHelperError(AccessDenied):
    """A docker-credential-* program is missing, failed, took too long or printed nonsense."""

    def __init__(self, helper: str, problem: str) -> None:
        super().__init__(
            f"docker-credential-{helper}: {problem}",
            hint="fix the helper, or name another file with --registry-config",
        )
        self.helper = helper


class CredentialSource:
    """Looks up credentials; files are read anew each time, so a login is noticed."""

    def __init__(
        self,
        environ: Mapping[str, str],
        registry_config: Path | None = None,
        *,
        first: Path | None = None,
        helper_timeout_s: float = HELPER_TIMEOUT_S,
    ) -> None:
        self._environ = dict(environ)
        self._registry_config = registry_config
        self._first = first
        self._helper_timeout_s = helper_timeout_s

    def lookup(self, registry: str, repository: str = "") -> Credentials | None:
        """The credentials for a registry, the most specific for the repository; None without.

        Raises CredentialHelperError, FormatError for a file that is no JSON, or AccessDenied
        for one that may not be read.
        """
        for path in self._files():
            config = self._load(path)
            if config is not None:
                found = self._from_config(config, registry, repository, str(path))
                if found is not None:
                    return found
        return None

    def _files(self) -> Iterator[Path]:
        environ = self._environ
        if self._first is not None:
            yield self._first
        if self._registry_config is not None:
            yield self._registry_config
            return
        if environ.get("REGISTRY_AUTH_FILE"):
            yield Path(environ["REGISTRY_AUTH_FILE"])
            return
        home = environ.get("HOME", "")
        if environ.get("XDG_RUNTIME_DIR"):
            yield Path(environ["XDG_RUNTIME_DIR"], "containers", "auth.json")
        if environ.get("XDG_CONFIG_HOME") or home:
            base = environ.get("XDG_CONFIG_HOME") or f"{home}/.config"
            yield Path(base, "containers", "auth.json")
        if environ.get("DOCKER_CONFIG") or home:
            yield Path(environ.get("DOCKER_CONFIG") or f"{home}/.docker", "config.json")

    def _load(self, path: Path) -> dict[str, Any] | None:
        try:
            with path.open("rb") as file:
                raw = file.read(CONFIG_SIZE_MAX + 1)
        except (FileNotFoundError, NotADirectoryError):
            if path == self._registry_config:
                raise AccessDenied(f"{path}: the registry configuration does not exist") from None
            return None
        except OSError as error:
            raise AccessDenied(f"{path}: {error.strerror}") from error
        if not raw.strip():
            return None  # podman logout leaves an empty file behind.
        return parse_json_object(raw, record=str(path), size_max=CONFIG_SIZE_MAX)

    def _from_config(
        self, config: dict[str, Any], registry: str, repository: str, record: str
    ) -> Credentials | None:
        helpers = _object(config, "credHelpers", record)
        auths = _object(config, "auths", record)
        keys = _keys(registry, repository)
        for key in keys:
            helper = helpers.get(key)
            if helper:
                return self._ask_helper(helper, key)
        store = config.get("credsStore")
        if store:
            found = self._ask_helper(store, _HUB_KEYS[0] if _is_hub(registry) else registry)
            if found is not None:
                return found
        normal = {_normalize(key): entry for key, entry in auths.items()}
        for key in keys:
            entry = normal.get(_normalize(key))
            if isinstance(entry, dict):
                found = _from_entry(entry, f"{record}: auths[{key}]")
                if found is not None:
                    return found
        return None

    def _ask_helper(self, helper: object, server: str) -> Credentials | None:
        import subprocess

        if not isinstance(helper, str) or not _HELPER_NAME.fullmatch(helper):
            raise CredentialHelperError(str(helper)[:100], "is not a helper's name")
        try:
            # The environment decides where the helper is found, hence env= and not our own PATH.
            done = subprocess.run(
                [f"docker-credential-{helper}", "get"],
                input=server.encode(),
                capture_output=True,
                timeout=self._helper_timeout_s,
                env=self._environ,
                check=False,
            )
        except FileNotFoundError as error:
            raise CredentialHelperError(helper, "is not installed") from error
        except OSError as error:
            raise CredentialHelperError(helper, str(error.strerror)) from error
        except subprocess.TimeoutExpired as error:
            raise CredentialHelperError(
                helper, f"no answer in {self._helper_timeout_s:g} s"
            ) from error
        return _helper_answer(helper, done)


def _helper_answer(helper: str, done: "subprocess.CompletedProcess[bytes]") -> Credentials | None:
    if done.returncode != 0:
        text = (done.stdout + b" " + done.stderr).decode(errors="replace").strip()
        # The protocol tells "none stored" from "failed" by this text only.
        if "credentials not found" in text:
            return None
        raise CredentialHelperError(helper, f"exit {done.returncode}: {text[:300]}")
    try:
        answer = json.loads(done.stdout[:HELPER_OUTPUT_MAX])
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CredentialHelperError(helper, "printed something other than credentials") from error
    if not isinstance(username, str) or not isinstance(secret, str):
        raise CredentialHelperError(helper, "printed something other than credentials")
    if username == _TOKEN_USER:
        return Credentials(identity_token=secret)
    return Credentials(username, secret) if username or secret else None


def _object(config: dict[str, Any], name: str, record: str) -> dict[str, Any]:
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(record, name, 0, "is not an object")
    return value


def _is_hub(registry: str) -> bool:
    return registry in (DOCKER_HUB, DOCKER_HUB_WIRE, f"index.{DOCKER_HUB}")


def _keys(registry: str, repository: str) -> list[str]:
    """Keys to try, most specific first; podman stores logins below a registry by path."""
    keys = []
    parts = repository.split("/") if repository else []
    for count in range(len(parts), 0, -1):
        keys.append("/".join([registry, *parts[:count]]))
    keys.append(registry)
    if _is_hub(registry):
        keys.extend(_HUB_KEYS)
    return keys


def _normalize(key: str) -> str:
    """docker stores some keys as URLs: ``https://host/v1/`` and ``https://host`` mean ``host``."""
    bare = re.sub(r"\Ahttps?://", "", key)
    return re.sub(r"/v[12]/?\Z", "", bare).rstrip("/")


def _from_entry(entry: dict[str, Any], record: str) -> Credentials | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credentials(identity_token=token)
    packed = entry.get("auth")
    if isinstance(packed, str) and packed:
        try:
            text = base64.b64decode(packed, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise FormatError(record, "auth", 0, "is not base64 of USER:PASSWORD") from error
        username, colon, password = text.partition(":")
        if not colon:
            raise FormatError(record, "auth", 0, "is not base64 of USER:PASSWORD")
        return Credentials(username, password.rstrip("\0"))
    plain = entry.get("username"), entry.get("password")
    if isinstance(plain[0], str) and isinstance(plain[1], str) and plain[0]:
        return Credentials(plain[0], plain[1])
    return None
