"""Settings: defaults < TOML < environment < flags, and nothing unknown or wrong passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from notellm.errors import SettingsError
from notellm.settings import CONFIG_VARIABLE, Settings, load_settings, variable_names

SECRET = "hunter2"

# One allowed value for every setting, none of them its default.
ALLOWED: dict[str, Any] = {
    "kafka.bootstrap_servers": "kafka-1:9092,kafka-2:9092",
    "kafka.notes_topic": "n",
    "kafka.dead_letter_topic": "n.dead",
    "kafka.group_prefix": "blue",
    "kafka.assignor": "range",
    "kafka.group_instance_id": "updater-1",
    "kafka.vectors_topic_prefix": "note-vectors",
    "kafka.properties": {"security.protocol": "SASL_SSL", "session.timeout.ms": 6000, "check.crcs": True},
    "milvus.uri": "https://milvus:443",
    "milvus.token": "123456",
    "milvus.database": "blue",
    "milvus.collection_prefix": "blue_notes",
    "milvus.alias": "blue_notes",
    "milvus.timeout_s": 2.5,
    "milvus.hnsw_m": 32,
    "milvus.hnsw_ef_construction": 100,
    "encoder.bundle": Path("null"),
    "encoder.provider": "cuda",
    "encoder.threads": 4,
    "encoder.token_budget": 4096,
    "encoder.max_rows": 8,
    "encoder.in_process": True,
    "encoder.memory_limit_mb": 4096,
    "encoder.start_timeout_s": 60.0,
    "encoder.answer_timeout_s": 30.0,
    "updater.queue_notes": 1,
    "updater.batch_notes": 2,
    "updater.commit_interval_s": 0.5,
    "updater.drain_timeout_s": 3.0,
    "updater.vectors_first": False,
    "updater.retry_max_s": 0.25,
    "streams.clicks_topic": "prod-clicks",
    "streams.dead_letter_topic": "prod-clicks-dead",
    "streams.app_id": "prod-clicks-app",
    "streams.window_days": 14,
    "streams.allowed_lateness_s": 3600,
    "streams.future_tolerance_s": 60,
    "streams.clicks_per_day": 500,
    "streams.data": Path("clicks-data"),
    "streams.session_timeout_s": 10,
    "streams.stall_s": 120.0,
    "streams.port": 8081,
    "training.steps": 7,
    "training.batch_pairs": 64,
    "training.chunk_notes": 16,
    "training.gradient_checkpointing": True,
    "training.precision": "bf16",
    "training.method": "full",
    "training.lora_rank": 8,
    "training.lora_alpha": 16,
    "training.lora_dropout": 0.1,
    "training.lora_targets": "q_proj,v_proj",
    "training.learning_rate": 1e-4,
    "training.projection_learning_rate": 2e-3,
    "training.warmup_share": 0.1,
    "training.schedule": "linear",
    "training.weight_decay": 0.01,
    "training.max_gradient_norm": 0.5,
    "training.embedding_dim": 128,
    "training.projection_start": "random",
    "training.whitening_notes": 64,
    "training.temperature": 1.6,
    "training.generative_weight": 0.5,
    "training.contrastive": False,
    "training.hashtag_share": 0.25,
    "training.asked_share": 0.5,
    "training.held_back": "some",
    "training.category_hashtags": 0.75,
    "training.score_power": 0.5,
    "training.mask_false_negatives": False,
    "training.template": "zh",
    "training.note_tokens": 64,
    "training.hard_negatives": 0.5,
    "training.seed": 3,
    "training.save_every": 5,
    "training.keep_states": 1,
    "training.validate_every": 10,
    "training.validation_pairs": 32,
    "operations.host": "0.0.0.0",
    "operations.port": 8080,
}
# What is wrong with a setting, and what its error says is allowed.
WRONG: dict[str, tuple[Any, str]] = {
    "kafka.bootstrap_servers": ("", "at least 1 character"),
    "kafka.notes_topic": ("", "at least 1 character"),
    "kafka.dead_letter_topic": ("notes", "other than kafka.notes_topic"),
    "kafka.assignor": ("sticky", "'cooperative-sticky', 'range' or 'roundrobin'"),
    "kafka.vectors_topic_prefix": ("note vectors", "should match pattern"),
    "milvus.uri": ("milvus.db", "http://host:port"),
    "milvus.collection_prefix": ("a-b", "should match pattern"),
    "milvus.alias": ("1a", "should match pattern"),
    "milvus.timeout_s": (0, "greater than 0"),
    "milvus.hnsw_m": (65, "less than or equal to 64"),
    "encoder.provider": ("tpu", "'auto', 'cpu' or 'cuda'"),
    "encoder.threads": (-1, "greater than or equal to 0"),
    "encoder.token_budget": (1, "greater than or equal to 64"),
    "encoder.max_rows": ("many", "valid integer"),
    "encoder.memory_limit_mb": (-1, "greater than or equal to 0"),
    "streams.clicks_topic": ("", "at least 1 character"),
    "streams.dead_letter_topic": ("note-clicks", "other than streams.clicks_topic"),
    "streams.app_id": ("two words", "should match pattern"),
    "streams.window_days": (0, "greater than or equal to 1"),
    "streams.future_tolerance_s": (86_401, "less than or equal to 86400"),
    "streams.session_timeout_s": (5, "greater than or equal to 6"),
    "training.steps": (0, "greater than or equal to 1"),
    "training.method": ("qlora", "'auto', 'lora' or 'full'"),
    "training.hashtag_share": (1.1, "less than or equal to 1"),
    "training.held_back": ("none", "'one', 'some' or 'all'"),
    "training.lora_targets": ("", "at least 1 character"),
    "operations.port": (65536, "less than or equal to 65535"),
    "updater.queue_notes": (0, "greater than or equal to 1"),
    "updater.vectors_first": ("perhaps", "valid boolean"),
    "updater.retry_max_s": (301, "less than or equal to 300"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with no notellm.toml in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(settings: Settings, name: str) -> Any:
    section, key = name.split(".")
    found = getattr(getattr(settings, section), key)
    return found.get_secret_value() if isinstance(found, SecretStr) else found


def toml(folder: Path, text: str, name: str = "n.toml") -> Path:
    file = folder / name
    file.write_text(text, "utf-8")
    return file


def toml_with(folder: Path, name: str, setting: Any) -> Path:
    """A TOML file with one setting; TOML and JSON write these values alike, but for tables."""
    section, key = name.split(".")
    if isinstance(setting, dict):
        lines = "\n".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in setting.items())
        return toml(folder, f"[{section}.{key}]\n{lines}\n")
    return toml(folder, f"[{section}]\n{key} = {json.dumps(setting, default=str)}\n")


def as_text(setting: Any) -> str:
    return json.dumps(setting) if isinstance(setting, dict) else str(setting)


def refusal(config: Path | None = None, flags: dict[str, Any] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, flags)
    return str(caught.value)


def test_every_setting_is_tried_here() -> None:
    assert set(ALLOWED) == set(variable_names())
    defaults = load_settings()
    assert not [name for name, value in ALLOWED.items() if read(defaults, name) == value]


def test_variable_is_the_settings_name_in_capitals() -> None:
    assert variable_names()["kafka.bootstrap_servers"] == "NOTELLM_KAFKA_BOOTSTRAP_SERVERS"


@pytest.mark.parametrize("name", variable_names())
class TestEverySetting:
    def test_by_file(self, name: str, folder: Path) -> None:
        assert read(load_settings(toml_with(folder, name, ALLOWED[name])), name) == ALLOWED[name]

    def test_by_environment(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(variable_names()[name], as_text(ALLOWED[name]))
        assert read(load_settings(), name) == ALLOWED[name]

    def test_by_flag(self, name: str) -> None:
        assert read(load_settings(flags={name: ALLOWED[name]}), name) == ALLOWED[name]


def test_flag_wins_over_environment_over_file_over_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["milvus.hnsw_m", "encoder.threads", "encoder.max_rows", "updater.batch_notes"]
    default = load_settings()
    config = toml(folder, "[milvus]\nhnsw_m = 5\n[encoder]\nthreads = 5\nmax_rows = 5\n[updater]\nqueue_notes = 5\n")
    for name in names[:2]:
        monkeypatch.setenv(variable_names()[name], "6")
    settings = load_settings(config, {"milvus.hnsw_m": 7, "encoder.threads": None})
    assert [read(settings, name) for name in names] == [7, 6, 5, read(default, names[3])]


@pytest.mark.parametrize("name", WRONG)
class TestWrongValue:
    """The error names the setting, its variable, the value and what is allowed."""

    def check(self, name: str, line: str) -> None:
        value, allowed = WRONG[name]
        assert line.startswith(f"{name} ({variable_names()[name]}): ")
        assert str(value) in line
        assert allowed in line

    def test_by_file(self, name: str, folder: Path) -> None:
        self.check(name, refusal(toml_with(folder, name, WRONG[name][0])))

    def test_by_environment(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(variable_names()[name], as_text(WRONG[name][0]))
        self.check(name, refusal())

    def test_by_flag(self, name: str) -> None:
        self.check(name, refusal(flags={name: WRONG[name][0]}))


def test_every_fault_has_its_line(folder: Path) -> None:
    lines = refusal(toml(folder, '[encoder]\nthreads = -1\nprovider = "tpu"\n[milvus]\nhnsw_m = 1\n')).splitlines()
    assert sorted(line.split(" ")[0] for line in lines) == ["encoder.provider", "encoder.threads", "milvus.hnsw_m"]


# Unknown names


def test_unknown_key_of_the_file_is_refused(folder: Path) -> None:
    line = refusal(toml(folder, "[kafka]\nbootstrap = 1\n"))
    assert line.startswith("kafka.bootstrap: unknown setting; allowed are bootstrap_servers, notes_topic,")


@pytest.mark.parametrize("text", ["[kafak]\n", "kafak = 1\n", "kafka = 1\n"])
def test_unknown_table_of_the_file_is_refused(folder: Path, text: str) -> None:
    line = refusal(toml(folder, text))
    tables = "[kafka], [milvus], [encoder], [updater], [streams], [training], [operations]"
    assert line.startswith(text.strip("[]\n").split(" ")[0] + ": unknown setting in ")
    assert line.endswith(f"allowed are the tables {tables}")


@pytest.mark.parametrize(
    "name", ["NOTELLM_KAFKA_TOPIC", "NOTELLM_KAFKA", "NOTELLM_X", "NOTELLM_CONFIGURATION", "notellm_kafka_topic"]
)
def test_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert refusal().startswith(f"{name}: unknown setting in the environment; see docs/")


def test_variables_of_commands_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTELLM_EXPORT_CATEGORIES", "categories.txt")
    assert load_settings() == Settings()


@pytest.mark.parametrize("name", ["kafka.x", "kafak.x"])
def test_unknown_flag_is_refused(name: str) -> None:
    assert "unknown setting; allowed are" in refusal(flags={name: 1})


# The file


def test_file_in_the_working_folder_is_read(folder: Path) -> None:
    toml(folder, "[encoder]\nthreads = 5\n", "notellm.toml")
    assert load_settings().encoder.threads == 5


def test_file_named_by_the_environment_is_read_instead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml(folder, "[encoder]\nthreads = 5\n", "notellm.toml")
    monkeypatch.setenv(CONFIG_VARIABLE, str(toml(folder, "[encoder]\nthreads = 6\n", "other.toml")))
    assert load_settings().encoder.threads == 6
    assert load_settings(toml(folder, "[encoder]\nthreads = 7\n")).encoder.threads == 7


def test_named_file_must_be_there(folder: Path) -> None:
    assert refusal(folder / "nowhere.toml") == f"config file {folder}/nowhere.toml: is not there"


@pytest.mark.parametrize("content", [b"[kafka", b"\xff"])
def test_file_that_is_no_toml_is_refused(folder: Path, content: bytes) -> None:
    (folder / "n.toml").write_bytes(content)
    assert refusal(folder / "n.toml").startswith(f"config file {folder}/n.toml: cannot be read as TOML: ")


def test_folder_in_place_of_the_file_is_refused(folder: Path) -> None:
    assert refusal(folder).startswith(f"config file {folder}: cannot be read as TOML: ")


# Kafka's own properties


def test_property_that_has_a_setting_names_it(folder: Path) -> None:
    for name, setting in {
        "partition.assignment.strategy": "kafka.assignor",
        "group.instance.id": "kafka.group_instance_id",
    }.items():
        line = refusal(toml_with(folder, "kafka.properties", {"sasl.password": SECRET, name: "x"}))
        assert f"{name} has a setting of its own: {setting}" in line
        assert SECRET not in line


@pytest.mark.parametrize(
    "owned", ["bootstrap.servers", "group.id", "enable.auto.commit", "enable.auto.offset.store", "auto.offset.reset"]
)
def test_property_that_keeps_notes_safe_cannot_be_set(folder: Path, owned: str) -> None:
    line = refusal(toml_with(folder, "kafka.properties", {"sasl.password": SECRET, owned: "x"}))
    assert f"{owned} is set by the updater itself" in line
    assert SECRET not in line


# Secrets


def test_secrets_are_not_in_the_settings_text(folder: Path) -> None:
    config = toml(folder, f'[milvus]\ntoken = "{SECRET}"\n[kafka.properties]\n"sasl.password" = "{SECRET}"\n')
    settings = load_settings(config)
    assert settings.milvus.token.get_secret_value() == settings.kafka.properties["sasl.password"] == SECRET
    assert SECRET not in f"{settings} {settings!r} {settings.kafka!r}"


@pytest.mark.parametrize(
    "text",
    [
        f'[milvus]\ntoken = ["{SECRET}"]\n',
        f'[milvus]\ntokn = "{SECRET}"\n',
        f'[kafka]\nproperties = "{SECRET}"\n',
        f'[kafka.properties]\n"sasl.password" = ["{SECRET}"]\n',
    ],
)
def test_wrong_secret_of_the_file_is_not_shown(folder: Path, text: str) -> None:
    line = refusal(toml(folder, text))
    assert line.startswith(("milvus.tok", "kafka.properties"))
    assert SECRET not in line


@pytest.mark.parametrize("text", [f'{{"sasl.password": "{SECRET}"', f'["{SECRET}"]', SECRET])
def test_wrong_properties_of_the_environment_are_not_shown(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("NOTELLM_KAFKA_PROPERTIES", text)
    line = refusal()
    assert line.startswith("kafka.properties (NOTELLM_KAFKA_PROPERTIES): (hidden) is not ")
    assert SECRET not in line
