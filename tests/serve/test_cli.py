"""The command line, without starting anything."""

import pytest

from hornbeam import __version__
from hornbeam.config.flags import FLAGS, check_flags
from hornbeam.core.errors import ConfigError
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


def test_flags_that_ask_for_nothing_new_are_accepted(served):
    arguments = "serve --tp 1 --enable-mixed-chunk --disaggregation-mode null --context-length 4k --max-total-tokens 1K"
    assert cli.main(arguments.split()) == 0
    assert served == [{"context_length": 4000, "max_total_tokens": 1024}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--tp 2",
            "--tp-size 2 is not supported: a server uses one device; run one server per device. Nearest: --device",
        ),
        ("--lora-paths a b=c", "--lora-paths a b=c is not supported: there are no adapters yet"),
        ("--grpc-mode", "--grpc-mode True is not supported"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(arguments, message, served, capsys):
    assert cli.main(["serve", *arguments.split()]) == 1
    assert message in capsys.readouterr().err
    assert served == []


def test_a_mistyped_flag_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--page-sise", "4"])
    assert "unknown argument --page-sise (is --page-size meant?)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is --max-running-requests meant"):
        check_flags({"max_runing_requests": 4})


def test_a_file_of_flags(served, tmp_path, capsys):
    path = tmp_path / "serve.yaml"
    path.write_text("model-path: m\nport: 8000\ncuda_graph_bs: [1, 2]\njson-model-override-args: {a: 1}\ntp-size: 1\n")
    assert cli.main(["serve", "--config", str(path), "--port", "8001"]) == 0
    expected = {"model_path": "m", "port": 8001, "cuda_graph_bs": (1, 2), "json_model_override_args": '{"a": 1}'}
    assert served == [expected]
    for text, message in (("port: [", "cannot be read"), ("- port", "must map flags"), ("prot: 1", "is --port meant")):
        path.write_text(text)
        assert cli.main(["serve", "--config", str(path)]) == 1
        assert message in capsys.readouterr().err
