"""The real cosign, notation and skopeo, unpacked by scripts/signers; each with its own home."""

import fcntl
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY

PROGRAMS = REPOSITORY / ".signers"
_COMMAND_S = 120
_NO_LOG = ("--tlog-upload=false", "-y")


@cache
def _found() -> dict[str, str]:
    """Names to package versions, or to why they are missing."""
    PROGRAMS.mkdir(exist_ok=True)
    with (PROGRAMS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        script = [str(REPOSITORY / "scripts/signers"), str(PROGRAMS)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return {name: rest for name, _, rest in lines}


def _program(name: str) -> Path:
    said = _found().get(name, "missing: scripts/signers failed")
    if said.startswith("missing"):
        pytest.skip(f"{name} {said}")
    return PROGRAMS / name / "run"


@dataclass(frozen=True)
class Signer:
    """One program; `home` holds its keys."""

    program: Path
    home: Path

    @classmethod
    def of(cls, name: str, home: Path) -> "Signer":
        """Skips the test when it cannot be had."""
        home.mkdir(exist_ok=True)
        return cls(_program(name), home)

    def __call__(self, *arguments: object, **env: str) -> str:
        done = self.any(*arguments, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def any(self, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.program), *map(str, arguments)],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.home),
                "XDG_CONFIG_HOME": str(self.home),
                "COSIGN_PASSWORD": "",
                **env,
            },
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
        )


@dataclass(frozen=True)
class Cosign:
    """cosign with a key pair; nothing goes to a log or comes from the network."""

    run: Signer
    major: int

    @classmethod
    def make(cls, major: int, home: Path) -> "Cosign":
        cosign = cls(Signer.of(f"cosign{major}", home), major)
        if not cosign.public.exists():
            cosign.run("generate-key-pair")
        return cosign

    @property
    def public(self) -> Path:
        return self.run.home / "cosign.pub"

    def sign(self, reference: str, *options: str, **env: str) -> None:
        more = ("--use-signing-config=false",) if self.major >= 3 else ()
        self.run("sign", "--key", "cosign.key", *more, *_NO_LOG, *options, reference, **env)

    def verifies(self, reference: str) -> bool:
        """What cosign itself says."""
        options = ("--key", "cosign.pub", "--insecure-ignore-tlog=true")
        return self.run.any("verify", *options, reference).returncode == 0


@dataclass(frozen=True)
class Notation:
    """notation with a key and a certificate of its own making, which ends in a day."""

    run: Signer

    @classmethod
    def make(cls, home: Path) -> "Notation":
        notation = cls(Signer.of("notation", home))
        notation.run("cert", "generate-test", "--default", "test.example")
        return notation

    @property
    def root(self) -> Path:
        return self.run.home / "notation/localkeys/test.example.crt"

    def sign(self, reference: str, *options: str) -> None:
        self.run("sign", "--insecure-registry", *options, reference)


@dataclass(frozen=True)
class Skopeo:
    """skopeo, which checks the policies of containers-policy.json(5) and makes signatures."""

    run: Signer

    @classmethod
    def make(cls, home: Path) -> "Skopeo":
        skopeo = cls(Signer.of("skopeo", home))
        text = "default-docker:\n  use-sigstore-attachments: true\n"
        (home / "registries.d").mkdir(exist_ok=True)
        (home / "registries.d/default.yaml").write_text(text)
        (home / "passphrase").touch()
        return skopeo

    def accepts(self, reference: str, policy: Path) -> bool:
        """Whether this policy lets an image be copied."""
        command = ("copy", "--policy", policy, "--registries.d", "registries.d")
        where = ("--src-tls-verify=false", f"docker://{reference}", "dir:copy")
        done = self.run.any(*command, *where)
        refused = "Source image rejected" in done.stderr
        assert refused or done.returncode == 0, done.stderr
        return not refused

    def copy_signed(self, source: str, target: str, key: Path) -> None:
        self.run(
            *("copy", "--insecure-policy", "--preserve-digests"),
            *("--src-tls-verify=false", "--dest-tls-verify=false"),
            *("--registries.d", "registries.d", "--sign-passphrase-file", "passphrase"),
            *("--sign-by-sigstore-private-key", key),
            *(f"docker://{source}", f"docker://{target}"),
        )
