"""The command line, without starting anything."""

import pytest

from hornbeam import __version__
from hornbeam.config.flags import FLAGS, check_flags
from hornbeam.serve import cli, server

pytestmark = pytest.mark.pure


@pytest.fixture
def served(monkeypatch) -> list[dict]:
    calls: list[dict] = []
    monkeypatch.setattr(server, "run_server", calls.append)
    return calls


def test_flags_reach_the_server(served):
    arguments = "serve --model m --max-total 64 --disable-radix-cache --mem-fraction-static 0.5 --cuda-graph-bs 1 2"
    assert cli.main(arguments.split()) == 0
    assert served == [
        {
            "model_path": "m",
            "max_total_tokens": 64,
            "disable_radix_cache": True,
            "mem_fraction_static": 0.5,
            "cuda_graph_bs": (1, 2),
        }
    ]


def test_every_flag_is_there(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in FLAGS:
        assert f"--{flag.name.replace('_', '-')}" in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hornbeam {__version__}\n"


@pytest.mark.parametrize("arguments", ["", "serve --port x", "serve --dtype int3", "serve --nonsense", "dance"])
def test_usage_errors(arguments, served, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2
    assert served == []


def test_names_of_flags_are_those_of_the_table(served):
    cli.main(["serve"])
    assert served == [check_flags({})]
