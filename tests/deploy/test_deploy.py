"""What stands under deploy/: parsed, and held to the flags, paths and routes that exist. Nothing is started."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from source_tree import ROOT

from hornbeam.config.file import read_config_file
from hornbeam.config.flags import check_flags
from hornbeam.serve import cli, server

pytestmark = pytest.mark.pure

DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """Of the container file: (word, rest), lines joined, comments dropped."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def served_with(command: list[str], monkeypatch) -> dict:
    """The checked flags of a `hornbeam serve` command."""
    calls: list[dict] = []
    monkeypatch.setattr(server, "run_server", calls.append)
    assert Path(command[0]).name == "hornbeam"
    assert cli.main(command[1:]) == 0, command
    return calls[0]


def test_the_container_files_commands():
    words = instructions()
    for word, rest in words:
        if word == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        if word == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0, rest
        if word == "HEALTHCHECK":
            compile(json.loads(rest[rest.index("[") :])[2], "healthcheck", "exec")
    stages = {rest.split(" AS ")[1]: rest.split(" AS ")[0] for word, rest in words if word == "FROM"}
    assert {"cpu", "cuda"} <= stages.keys()
    assert all(base in stages or ":" in base for base in stages.values())


def test_the_build_gets_every_file_it_copies():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert copied == allowed


def test_the_containers_entry_point(monkeypatch):
    commands = [json.loads(rest) for word, rest in instructions() if word == "ENTRYPOINT"]
    assert len(commands) == 2
    for command in commands:
        assert served_with(command, monkeypatch) == {"host": "0.0.0.0", "port": 30000}


def test_extras_that_are_installed_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    asked = [part for word, rest in instructions() if word == "RUN" for part in shlex.split(rest) if part[:2] == ".["]
    assert asked
    assert all(set(part[2:-1].split(",")) <= extras.keys() for part in asked)


def test_the_example_configuration():
    assert check_flags(read_config_file(DEPLOY / "serve.yaml"))["port"] == 30000
    text = (DEPLOY / "serve.yaml").read_text("utf-8").replace("# model", "model").replace("# a", "a")
    names = [name.replace("-", "_") for name in yaml.safe_load(text)]
    assert {"model_path", "api_key", "admin_api_key"} <= set(names)
    assert check_flags(dict.fromkeys(names)) == {}


def test_the_systemd_unit(monkeypatch):
    unit = (DEPLOY / "hornbeam.service").read_text("utf-8")
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).partition("=")[2]
    served_with(shlex.split(command.replace("%d", str(DEPLOY))), monkeypatch)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_takes_the_unit(tmp_path):
    """The program of the unit is not installed here, so another stands in for it."""
    unit = (DEPLOY / "hornbeam.service").read_text("utf-8").replace("/opt/hornbeam/bin/hornbeam", "/bin/true")
    path = tmp_path / "hornbeam.service"
    path.write_text(unit)
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "hornbeam.service" in line]) == (0, [])


def test_the_kubernetes_example(monkeypatch):
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8")))
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "Deployment", "Service"]
    claim, deployment, service = documents
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    flags = served_with(["hornbeam", "serve", *container["args"]], monkeypatch)
    assert flags.keys() == {"api_key", "admin_api_key", "max_queued_requests"}
    assert {f"$({variable['name']})" for variable in container["env"]} <= set(container["args"])
    assert container["ports"][0]["containerPort"] == 30000
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": container["ports"][0]["name"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > server.DRAIN_SECONDS + server.CLOSE_SECONDS
