"""imgsnap verify"""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imgsnap.errors import InvalidArgument
from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.places import Places, node_cache, platform_option, policy_option, registry_flags
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.blockstore.snapshot_manifest import SnapshotManifest
    from imgsnap.trust.judge import Judged, Verdict
    from imgsnap.trust.policy import Policy


@click.command(short_help="Show who signed a snapshot, and check it by a policy")
@click.argument("ref")
@policy_option
@click.option(
    "--key",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Check by this public key of cosign's instead",
)
@platform_option
@format_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    key: Path | None,
    platform: str | None,
    format_: str,
    **flags: Any,
) -> None:
    """Show the signatures of the snapshot REF, and whether a policy accepts it.

    The root hash is that of its dm-verity hash tree, which the signed manifest states.
    Signatures of cosign and notation are looked for in the snapshot's own repository, each time
    anew. The exit code is 0 only if the snapshot is accepted, 11 if it is not.
    """
    from imgsnap.blockstore.resolve import resolve_snapshot
    from imgsnap.blockstore.snapshot_manifest import snapshot_manifest
    from imgsnap.oci.platforms import parse_platform
    from imgsnap.trust.judge import Judge, refuse
    from imgsnap.trust.names import Name
    from imgsnap.trust.target import Target

    chosen = _policy(settings, key)
    with ExitStack() as stack:
        repository, reference = Places(settings, flags).reader(stack, ref)
        wanted = parse_platform(platform) if platform else None
        found = resolve_snapshot(repository, reference, node_cache(settings), wanted)
        name = Name.of(repository.name, reference)
        targets = [Target.of(document) for document in found.documents]
        verdict = Judge(repository, name, targets).judge(
            chosen.requirements(name), all_signatures=True
        )
    manifest = snapshot_manifest(found.manifest)
    if format_ == "json":
        print_json(_as_json(manifest, verdict))
    else:
        _print(manifest, verdict)
    if not verdict.accepted:
        raise refuse(name, targets[0], verdict.reason, hint="how to sign it: docs/trust.md")


def _policy(settings: Settings, key: Path | None) -> "Policy":
    from imgsnap.trust.policy_file import load_policy, policy_of_key

    if key is not None:
        return policy_of_key(key)
    if settings.policy is None:
        raise InvalidArgument(
            "nothing to check by", hint="give --policy FILE or --key FILE, see docs/trust.md"
        )
    return load_policy(settings.policy)


def _as_json(manifest: "SnapshotManifest", verdict: "Verdict") -> dict[str, Any]:
    return {
        "digest": manifest.digest,
        "rootHash": manifest.root_hash,
        "accepted": verdict.accepted,
        "reason": verdict.reason or None,
        "until": verdict.until,
        "signatures": [
            {
                "kind": judged.found.kind,
                "manifest": judged.found.manifest,
                "of": judged.target.digest,
                "signer": judged.signer.name if judged.signer else None,
                "problem": judged.problem or None,
            }
            for judged in verdict.judged
        ],
    }


def _print(manifest: "SnapshotManifest", verdict: "Verdict") -> None:
    pairs = (
        ("digest", manifest.digest),
        ("root hash", manifest.root_hash or "none"),
        ("accepted", "yes" if verdict.accepted else "no"),
    )
    for name, text in pairs:
        click.echo(f"{name + ':':<14}{text}")
    if verdict.judged:
        click.echo()
        rows = [(j.found.kind, j.target.digest[7:19], _outcome(j)) for j in verdict.judged]
        print_table(("SIGNATURE", "OF", "RESULT"), rows)


def _outcome(judged: "Judged") -> str:
    from imgsnap.trust.target import printable

    if judged.signer is not None:
        return f"by {judged.signer.name}"
    return printable(f"not accepted: {judged.problem}")
