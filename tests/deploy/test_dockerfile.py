"""The Dockerfile, as far as it can be judged where there is no Docker."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from notellm.settings import variable_names
from tests.conftest import REPOSITORY
from tests.deploy.compose_file import compose_file

DOCKERFILE = REPOSITORY / "Dockerfile"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined, comments left out."""
    text = "\n".join(line for line in DOCKERFILE.read_text("utf-8").splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", "").splitlines() if line.strip()]
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def last_stage() -> list[tuple[str, str]]:
    every = instructions()
    start = max(place for place, (instruction, _) in enumerate(every) if instruction == "FROM")
    return every[start:]


def copied() -> list[str]:
    """What the build takes from the repository."""
    return [path for rest in arguments("COPY") if "--from=" not in rest for path in rest.split()[:-1]]


def test_the_base_is_pinned() -> None:
    defaults = dict(rest.split("=") for rest in arguments("ARG") if "=" in rest)
    assert re.fullmatch(r"3\.11\.\d+", defaults["PYTHON"])
    assert [base.split(" AS ")[0] for base in arguments("FROM")] == ["python:${PYTHON}-slim-bookworm"] * 2
    assert defaults["EXTRA"] == "cpu"


def test_it_ends_as_a_user_without_rights() -> None:
    users = [rest for instruction, rest in last_stage() if instruction == "USER"]
    assert users == ["10001:10001"]
    assert users == [compose_file()["services"]["updater"]["user"]]
    after = [instruction for instruction, _ in last_stage()][[i for i, _ in last_stage()].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & set(after)


def test_nothing_comes_from_the_network_but_packages_with_pinned_versions() -> None:
    assert arguments("ADD") == []
    assert not re.search(r"\b(curl|wget|apt-get|git clone)\b|https?://", " ".join(arguments("RUN")))
    assert "PIP_CONSTRAINT=/source/constraints.txt" in arguments("ENV")[0]
    installs = [part for rest in arguments("RUN") for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 2
    assert "--only-binary :all:" in installs[0]
    # constraints.txt leaves it open.
    assert re.search(r"\bclick==\d+\.\d+\.\d+ ", installs[0])
    assert "--no-deps" in installs[1]


def test_every_requirement_of_the_image_has_a_pin() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    }
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *extras["cpu"], *extras["gpu"], "setuptools"]:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        assert name[0].lower().replace("_", "-") in pinned, f"constraints.txt has no version of {name[0]}"


def test_the_extras_are_the_projects() -> None:
    (guard,) = [rest for rest in arguments("RUN") if rest.startswith("case")]
    allowed = guard.split(" in ")[1].split(")")[0].split("|")
    assert set(allowed) == {"cpu", "gpu"}
    assert set(allowed) <= set(PROJECT["project"]["optional-dependencies"])
    built = {service["build"]["args"]["EXTRA"] for service in compose_file()["services"].values() if "build" in service}
    assert built == set(allowed)


def test_it_copies_what_the_project_is_made_of() -> None:
    for path in copied():
        assert (REPOSITORY / path).exists(), path
    # What setuptools packages, and no torch-only folder is missing: commands import export, which imports training.
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {
        path.name
        for path in REPOSITORY.iterdir()
        if (path / "__init__.py").exists() and any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
    }
    imported = packages & imported_at_start()
    assert imported <= set(copied())
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= set(copied())


def test_the_program_needs_no_torch() -> None:
    """The image has none."""
    assert not {"torch", "transformers", "onnx", "peft"} & imported_at_start()


@functools.cache
def imported_at_start() -> set[str]:
    """The top-level modules that ``notellm`` loads, whatever its command."""
    program = "import sys, commands.app; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return set(done.stdout.split())


def test_docker_sees_what_is_copied_and_nothing_else() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text("utf-8").split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied())


def test_it_runs_the_updater_and_asks_it_how_it_is() -> None:
    last = dict(last_stage())
    assert json.loads(last["ENTRYPOINT"]) == ["notellm"]
    assert json.loads(last["CMD"]) == ["update"]
    check = json.loads(last["HEALTHCHECK"].split("CMD", 1)[1])
    assert check[:2] == ["python", "-c"]
    compile(check[2], "healthcheck", "exec")
    assert "/healthz" in check[2]
    environment = dict(pair.split("=", 1) for pair in last["ENV"].split())
    assert last["EXPOSE"] == environment["NOTELLM_OPERATIONS_PORT"]
    assert {name for name in environment if name.startswith("NOTELLM_")} <= set(variable_names().values())
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert f'image.version="{PROJECT["project"]["version"]}"' in last["LABEL"]


@pytest.mark.parametrize("ask", ["Dockerfile", "docker-compose.yml"])
def test_the_health_checks_tell_good_from_bad(ask: str, tmp_path: Path) -> None:
    """Both one-liners, run for real against a server that answers, one that does not feel well, and none."""
    from commands.embedded import free_port
    from consumers.operations import OperationsServer
    from notellm.settings import OperationsSettings

    port = free_port()
    if ask == "Dockerfile":
        code = json.loads(dict(last_stage())["HEALTHCHECK"].split("CMD", 1)[1])[2]
    else:
        code = compose_file()["services"]["updater"]["healthcheck"]["test"][3].replace("9464", str(port))
    reasons: list[str] = []

    def checked() -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"NOTELLM_OPERATIONS_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=20,
            cwd=tmp_path,
            check=False,
        )
        return done.returncode, done.stdout.strip()

    with OperationsServer(OperationsSettings(port=port), lambda: reasons, lambda: reasons):
        assert checked() == (0, '{"status": "ok"}')
        reasons.append("Milvus is away")
        assert checked() == (1, '{"status": "unavailable", "reasons": ["Milvus is away"]}')
    assert checked()[0] == 1
