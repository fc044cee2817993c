"""The page about the command line against the command line."""

import inspect
import re
from pathlib import Path

import pytest

from imgsnap import errors
from imgsnap_cli.main import COMMANDS, cli, main
from imgsnap_cli.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_described_and_has_help(name: str, capsys: pytest.CaptureFixture):
    assert f"\n| `{name}` |" in PAGE and f"imgsnap {name}" in PAGE
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: imgsnap {name}")
    command = cli.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None and command.short_help == COMMANDS[name]


def test_every_exit_code_is_described():
    documented = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", PAGE, re.M) for code in row.split(",")
    }
    raised = {
        cls.exit_code
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.ImgsnapError)
    }
    assert documented == raised | {0, 130, 141, 143}


def test_every_variable_is_described():
    variables = re.findall(r"`(IMGSNAP_\w+)`", PAGE)
    values = {name: f"/{name}" for name in variables}
    settings = Settings.make(values)
    places = (settings.store, settings.cache, settings.run, settings.hosts, settings.policy)
    patterns = (*settings.trust, *settings.convert)
    texts = (settings.cache_quota, settings.metrics, settings.snapshotter_metrics, *patterns)
    assert set(map(str, places + texts)) == set(values.values())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["conver"], "Did you mean 'convert'"),
        (["nonsense"], "no command 'nonsense'"),
        (["--nonsense"], "No such option"),
        (["ls", "--nonsense"], "No such option"),
        (["convert", "only-one"], "Missing argument"),
        (["ls", "--format", "xml"], "'xml'"),
        (["inspect", "-H", "no colon", "store:x"], "NAME:VALUE"),
    ],
)
def test_mistyped_command_lines(arguments, problem: str, capsys: pytest.CaptureFixture):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and problem in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
