"""imgsnap completion"""

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print a shell completion script")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  source <(imgsnap completion bash)
    zsh:   imgsnap completion zsh > "${fpath[1]}/_imgsnap"
    fish:  imgsnap completion fish | source
    """
    completion = get_completion_class(shell)
    assert completion is not None  # click ships these three
    root = ctx.find_root().command
    click.echo(completion(root, {}, "imgsnap", "_IMGSNAP_COMPLETE").source())
