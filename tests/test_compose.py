import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.version import Version
from ray.scripts.scripts import cli as ray_command_line

from pipeline.cli import app
from tests.requirements import distributions, requirements_of

ROOT = Path(__file__).parent.parent
VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")
CREDENTIAL = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|ROOT_USER")

TEXT = (ROOT / "docker-compose.yml").read_text()


def fill_in(text: str) -> str:
    """Compose's own substitution: the default, or the name of a variable that has none."""
    return VARIABLE.sub(lambda found: found["rest"] if found["kind"] == "-" else found["name"], text)


COMPOSE: dict[str, Any] = yaml.safe_load(fill_in(TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def words_of(command: Any) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else list(command or [])


def cdp_arguments(service: dict[str, Any]) -> list[str] | None:
    """What comes after `cdp` in the service's command; None when it runs something else."""
    words = words_of(service.get("entrypoint")) + words_of(service.get("command"))
    return words[1:] if words[:1] == ["cdp"] else None


def parse_with(group: Any, arguments: list[str]) -> dict[str, Any]:
    """Parse arguments with a real command line of subcommands, without running anything."""
    name, *rest = arguments
    with group.make_context("root", [], resilient_parsing=True) as context:
        command = group.get_command(context, name)
        assert command is not None, f"there is no command {name}"
        with command.make_context(name, rest, parent=context) as parsed:
            return {"command": name, **parsed.params}


def parse_cdp(arguments: list[str]) -> dict[str, Any]:
    return parse_with(typer.main.get_command(app.app), arguments)


def test_the_two_jobs_are_commands_that_the_command_line_takes() -> None:
    parsed = {
        name: parse_cdp(arguments)
        for name, service in SERVICES.items()
        if (arguments := cdp_arguments(service)) is not None
    }
    assert set(parsed) == {"extract", "train"}
    extract, train = parsed["extract"], parsed["train"]
    assert (extract["command"], train["command"]) == ("extract-teacher", "train-student")
    assert extract["ray_address"] == "ray://ray-head:10001"
    assert extract["teacher"] == "/models/teacher"
    assert extract["targets"] == train["targets"] == "s3://targets/samples"
    assert extract["samples"] == train["samples"] == "/data/samples"
    assert str(train["output"]).startswith("/runs/")
    assert train["stage"] == "all"


def test_a_flag_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(Exception, match="--nonsense"):
        parse_cdp(["extract-teacher", "--nonsense=1"])


def test_ray_takes_the_flags_it_is_started_and_checked_with() -> None:
    head = parse_with(ray_command_line, words_of(SERVICES["ray-head"]["command"])[1:])
    worker = parse_with(ray_command_line, words_of(SERVICES["ray-worker"]["command"])[1:])
    assert (head["command"], head["head"], head["block"], head["port"]) == ("start", True, True, 6379)
    assert (head["ray_client_server_port"], head["dashboard_port"]) == (10001, 8265)
    assert (worker["address"], worker["block"]) == ("ray-head:6379", True)
    for name in ("ray-head", "ray-worker"):
        check = SERVICES[name]["healthcheck"]["test"]
        assert check[:2] == ["CMD", "ray"]
        assert parse_with(ray_command_line, check[2:])["address"].endswith(":6379")


def test_published_ports_are_unique_and_on_this_machine_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    hosts = [port.rpartition(":")[0] for port in published]
    assert len(set(hosts)) == len(hosts)
    assert all(host.startswith("127.0.0.1:") for host in hosts)
    assert {int(port.rpartition(":")[2]) for port in published} == {6379, 8265, 10001, 9000, 9001, 6006}


def test_a_port_in_a_command_is_one_the_service_publishes_or_names() -> None:
    head = " ".join(words_of(SERVICES["ray-head"]["command"]))
    for port in ("--port=6379", "--dashboard-port=8265", "--ray-client-server-port=10001"):
        assert port in head
    assert "--address=ray-head:6379" in " ".join(words_of(SERVICES["ray-worker"]["command"]))
    assert COMPOSE["x-environment"]["AWS_ENDPOINT_URL"] == "http://object-store:9000"


def test_every_named_volume_is_declared_and_used() -> None:
    used = {
        source
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not (source := volume.split(":")[0]).startswith((".", "/"))
    }
    assert used == set(COMPOSE["volumes"])


def test_every_dependency_exists_and_can_reach_the_state_that_is_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, wanted in service.get("depends_on", {}).items():
            assert other in SERVICES, f"{name} waits for {other}"
            if wanted["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for {other} to be healthy"
            if wanted["condition"] == "service_completed_successfully":
                assert SERVICES[other]["restart"] == "no", f"{other} must end"
            assert not SERVICES[other].get("profiles"), f"{other} would not be started for {name}"


def test_every_build_context_has_a_dockerfile_and_each_other_image_a_fixed_tag() -> None:
    for name, service in SERVICES.items():
        if "build" in service:
            assert (ROOT / service["build"]["context"] / "Dockerfile").is_file()
        else:
            tag = service["image"].partition(":")[2]
            assert tag not in ("", "latest"), name


def test_the_image_is_given_every_file_it_copies_or_installs_from() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    packages = {"pipeline", "stages", "storage"}
    assert kept >= packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in kept)


NEEDS = {
    "ray": r"\bray (start|status)\b|--ray-address",
    "ray[default]": r"--dashboard-host|--dashboard-port|\b8265\b",
    "ray[client]": r"--ray-client-server-port|\bray://",
    "ray[train]": r"\bray start\b|train-student .*--ray-address",
    "obstore": r"\bs3://",
    "tensorboard": r"\btensorboard\b",
}
"""What a service asks of its image, by the words of its command, check and ports. Ray's nodes also run what is sent to
them, training among it."""


def lacking(extras: set[str]) -> dict[str, set[str]]:
    """Service -> what it needs and an image with these extras has not."""
    has = distributions(requirements_of(*sorted(extras)))
    lacks = {}
    for name, service in SERVICES.items():
        if service["image"] != COMPOSE["x-image"]["image"]:
            continue
        words = words_of(service["command"]) + words_of(service.get("healthcheck", {}).get("test"))
        text = " ".join([*words, *service.get("ports", [])])
        lacks[name] = {package for package, pattern in NEEDS.items() if re.search(pattern, text)} - has
    return {name: packages for name, packages in lacks.items() if packages}


def test_the_image_has_what_the_command_of_each_service_needs() -> None:
    installed = re.findall(r"pip install .*'\.\[([\w,-]+)\]'", (ROOT / "Dockerfile").read_text())
    assert len(installed) == 1
    assert lacking(set(installed[0].split(","))) == {}


def test_an_image_without_an_extra_would_be_noticed() -> None:
    assert lacking({"s3", "tensorboard"}) == {
        "ray-head": {"ray[default]", "ray[train]"},
        "ray-worker": {"ray[train]"},
    }
    assert lacking({"cluster", "ray-train"}) == {
        "tensorboard": {"tensorboard"},
        "extract": {"obstore"},
        "train": {"obstore"},
    }
    assert "extract" not in lacking({"s3"})


def test_rays_lower_bound_knows_the_token_that_the_cluster_asks_for() -> None:
    assert COMPOSE["x-environment"]["RAY_AUTH_MODE"] == "token"
    (bound,) = {str(r.specifier) for r in requirements_of("all") if r.name == "ray"}
    assert Version(bound.removeprefix(">=")) >= Version("2.52")


def test_jobs_start_only_when_asked_for_and_workers_can_be_scaled() -> None:
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["jobs"]} == {
        "extract",
        "train",
    }
    assert not {"container_name", "ports", "hostname"} & set(SERVICES["ray-worker"])


def test_workers_and_training_reserve_a_gpu() -> None:
    for name in ("ray-worker", "train"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_every_credential_comes_from_the_environment_and_has_no_default() -> None:
    raw = yaml.safe_load(TEXT)
    environments = [
        raw["x-environment"],
        *(service.get("environment", {}) for service in raw["services"].values()),
    ]
    credentials = [
        value for environment in environments for key, value in environment.items() if CREDENTIAL.search(key)
    ]
    assert credentials
    for value in credentials:
        found = VARIABLE.fullmatch(value)
        assert found, value
        assert found["kind"] == "?", value


def test_the_example_environment_names_every_variable_and_fills_in_no_credential() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert {found["name"] for found in VARIABLE.finditer(TEXT)} - {"BASE_IMAGE"} == set(example)
    assert all(value == "" for key, value in example.items() if CREDENTIAL.search(key))
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
