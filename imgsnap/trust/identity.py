"""`signedIdentity`: what a signature may say it is a signature of (containers-policy.json(5))."""

from dataclasses import dataclass
from enum import Enum

from imgsnap.errors import InvalidReference
from imgsnap.oci.reference import RegistryLocation, parse_location
from imgsnap.trust.names import Name


class Match(Enum):
    """The kinds of `signedIdentity`, by their names in a policy."""

    EXACT = "matchExact"
    REPO_DIGEST_OR_EXACT = "matchRepoDigestOrExact"
    REPOSITORY = "matchRepository"
    EXACT_REFERENCE = "exactReference"
    EXACT_REPOSITORY = "exactRepository"
    REMAP = "remapIdentity"
    DIGEST_ONLY = "imgsnapDigestOnly"
    """Ours: the manifest's digest alone. Cosign's bundles name nothing else."""


def docker_reference(text: str) -> RegistryLocation:
    """A docker reference; Docker Hub's short and old names in their full form. Raises
    InvalidReference."""
    found = parse_location(f"docker://{text}")
    assert isinstance(found, RegistryLocation)
    return found


@dataclass(frozen=True, slots=True)
class SignedIdentity:
    """A `signedIdentity`; `value` is the reference, the repository or, of a remapping, the
    `prefix`, which `signed_prefix` stands in for. References are as `docker_reference` prints
    them."""

    match: Match = Match.REPO_DIGEST_OR_EXACT
    value: str = ""
    signed_prefix: str = ""

    def problem(self, name: Name, signed: str | None) -> str | None:
        """Why a signature of `signed`, a docker reference or None, is none of `name`; None when it
        is one."""
        if self.match is Match.DIGEST_ONLY:
            return None
        if signed is None:
            return f"names no repository, which {self.match.value} asks for"
        try:
            reference = docker_reference(signed)
        except InvalidReference:
            return f"is of {signed[:300]!r}, which is no reference"
        if self.match is Match.EXACT_REFERENCE:
            fits = str(reference) == self.value
        elif self.match is Match.EXACT_REPOSITORY:
            fits = _repository(reference) == self.value
        elif not name.is_docker:
            return f"{name} has no identity in a registry, which {self.match.value} asks for"
        else:
            fits = self._fits(name, reference)
        return None if fits else f"is of {signed[:300]!r}, not of {name}"

    def _fits(self, name: Name, signed: RegistryLocation) -> bool:
        wanted = self._remapped(name.repository)
        if self.match is Match.REPOSITORY:
            return _repository(signed) == wanted
        if name.digest and self.match is not Match.EXACT:
            # As others read it: who names no tag at all asks for matchRepository.
            return _repository(signed) == wanted and str(signed) != wanted
        return bool(name.tag) and str(signed) == f"{wanted}:{name.tag}"

    def _remapped(self, repository: str) -> str:
        if self.match is not Match.REMAP:
            return repository
        if repository == self.value or repository.startswith(self.value + "/"):
            return self.signed_prefix + repository[len(self.value) :]
        return repository


def _repository(reference: RegistryLocation) -> str:
    return f"{reference.registry}/{reference.repository}"
