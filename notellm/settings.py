"""Every setting of the project, on one page.

Where a value comes from, the later winning: the defaults below, a TOML file (``--config``, ``NOTELLM_CONFIG``, or
``./notellm.toml`` where there is one), the environment (``NOTELLM_KAFKA_BOOTSTRAP_SERVERS`` is
``[kafka] bootstrap_servers``), flags. A name that is not on this page stops the start.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableVariable

from notellm.errors import SettingsError

__all__ = [
    "CONFIG_VARIABLE",
    "EncoderSettings",
    "KafkaSettings",
    "MilvusSettings",
    "OperationsSettings",
    "Settings",
    "StreamsSettings",
    "TrainingSettings",
    "UpdaterSettings",
    "load_settings",
    "variable_names",
]

CONFIG_VARIABLE = "NOTELLM_CONFIG"
_PREFIX = "NOTELLM_"
_DEFAULT_FILE = Path("notellm.toml")
# Options of commands, not settings of the system: their commands declare them.
_COMMAND_PREFIXES = ("NOTELLM_EXPORT_", "NOTELLM_CLI_")
# Their values are never shown, whatever is wrong with them.
_SECRETS = ("milvus.token", "kafka.properties")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSettings(_Section):
    """Where notes come from."""

    bootstrap_servers: str = Field(
        "127.0.0.1:9092", min_length=1, description="Kafka brokers, host:port[,host:port...]."
    )
    notes_topic: str = Field("notes", min_length=1, description="The topic of notes: key = note_id, compacted.")
    dead_letter_topic: str = Field(
        "notes.dead-letter", min_length=1, description="Where records go that are no notes; not compacted."
    )
    group_prefix: str = Field(
        "notellm", min_length=1, description="Begins the consumer group's name; database and collection follow."
    )
    assignor: Literal["cooperative-sticky", "range", "roundrobin"] = Field(
        "cooperative-sticky",
        description="How the group shares the partitions out; the same for all updaters of a group. cooperative-sticky "
        "takes only those partitions away that go to another updater, the others take all.",
    )
    group_instance_id: str = Field(
        "",
        description="Static membership: a name of this updater alone, the same after a restart, which then costs no "
        "rebalance within session.timeout.ms. Empty: none.",
    )
    vectors_topic_prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,200}$",
        description="Also publish what was written, one record per acknowledged note, to the compacted topic "
        "<prefix>.<model_version>; note-vectors is the usual prefix. Empty: do not.",
    )
    properties: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        repr=False,  # It may hold sasl.password.
        description="Any librdkafka property, passed through to consumer and producers (security, timeouts).",
    )

    @field_validator("properties")
    @classmethod
    def _ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        owned = {"bootstrap.servers", "group.id", "enable.auto.commit", "enable.auto.offset.store", "auto.offset.reset"}
        settings = {"partition.assignment.strategy": "kafka.assignor", "group.instance.id": "kafka.group_instance_id"}
        for name, setting in settings.items():
            if name in value:
                raise ValueError(f"{name} has a setting of its own: {setting}")
        taken = sorted(owned & set(value))
        if taken:
            raise ValueError(f"{taken[0]} is set by the updater itself, or nothing acknowledged could be kept safe")
        return value

    @field_validator("dead_letter_topic")
    @classmethod
    def _another_topic(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("notes_topic"):
            raise ValueError("a topic other than kafka.notes_topic is needed")
        return value


class MilvusSettings(_Section):
    """Where rows go."""

    uri: str = Field("http://127.0.0.1:19530", description="A Milvus server, http:// or https://.")
    token: SecretStr = Field(SecretStr(""), description="user:password or an API key. By environment or file only.")
    database: str = Field("default", min_length=1, description="The database that holds the collections.")
    collection_prefix: str = Field(
        "notes", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Collections are called <prefix>_<model_version>."
    )
    alias: str = Field("notes", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="The name that readers use.")
    timeout_s: float = Field(10.0, gt=0, le=600, description="Seconds that one call to Milvus may take.")
    hnsw_m: int = Field(16, ge=4, le=64, description="HNSW: links per node.")
    hnsw_ef_construction: int = Field(200, ge=8, le=1024, description="HNSW: candidates while building.")

    @field_validator("uri")
    @classmethod
    def _server(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("a server's address is needed (http://host:port); a .db file serves one process only")
        return value


class EncoderSettings(_Section):
    """The model."""

    bundle: Path = Field(Path("build/bundles/default"), description="The exported model's directory.")
    provider: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto takes CUDA if it can."
    )
    threads: int = Field(0, ge=0, le=1024, description="Threads of one pass on CPU; 0 is one per core.")
    token_budget: int = Field(2048, ge=64, le=1_048_576, description="Padded tokens in one batch, at most.")
    max_rows: int = Field(16, ge=1, le=4096, description="Notes in one batch, at most.")
    in_process: bool = Field(
        False, description="Run the model inside the updater instead of in a child process; for debugging only."
    )
    memory_limit_mb: int = Field(
        0,
        ge=0,
        description="Memory that the encoder's process may take for data (RLIMIT_DATA, Linux), in MiB; past it, it is "
        "started again and the note to blame becomes a dead letter. 0: no limit.",
    )
    start_timeout_s: float = Field(
        600.0, gt=0, description="Seconds within which the encoder's process must have loaded the model."
    )
    answer_timeout_s: float = Field(
        300.0, gt=0, description="Seconds without an answer after which the encoder's process counts as hung."
    )


class UpdaterSettings(_Section):
    """Kafka -> encoder -> Milvus."""

    queue_notes: int = Field(
        256, ge=1, le=100_000, description="Notes between poller and encoder; when full, partitions are paused."
    )
    batch_notes: int = Field(
        32, ge=1, le=1024, description="Notes the encoder stage takes from its queue at once, at most."
    )
    commit_interval_s: float = Field(1.0, gt=0, le=60, description="Seconds between commits of acknowledged offsets.")
    drain_timeout_s: float = Field(
        20.0, gt=0, le=240, description="Seconds to finish what is in flight when partitions are revoked or on SIGTERM."
    )
    vectors_first: bool = Field(
        True, description="Write a row as soon as its vector is there, and again with its tags (lower freshness)."
    )
    retry_max_s: float = Field(5.0, gt=0, le=300, description="Longest wait between two tries while Milvus is away.")


class StreamsSettings(_Section):
    """Click streams: the Faust app."""

    clicks_topic: str = Field("note-clicks", min_length=1, description="The topic of clicks: key = user_id.")
    dead_letter_topic: str = Field(
        "note-clicks.dead-letter", min_length=1, description="Where records go that are no clicks; not compacted."
    )
    app_id: str = Field(
        "notellm-clicks",
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="Faust's: the consumer group, and how the changelog topic's name begins.",
    )
    window_days: int = Field(
        7, ge=1, le=365, description="Days of clicks that are kept of each user; what is older expires."
    )
    allowed_lateness_s: int = Field(
        86_400,
        ge=0,
        description="A click is late, and dropped, when its clicked_at is further behind its record's timestamp.",
    )
    future_tolerance_s: int = Field(
        300,
        ge=0,
        le=86_400,
        description="A click is of the future, and dropped, when its clicked_at is further ahead of its record's "
        "timestamp.",
    )
    clicks_per_day: int = Field(
        200, ge=1, le=10_000, description="Clicks that are kept of one user and one day, the newest; a bot's others go."
    )
    data: Path = Field(Path("build/streams"), description="The worker's folder: RocksDB, one for each partition.")
    session_timeout_s: int = Field(
        30, ge=6, le=300, description="Seconds after which a worker that is silent loses its partitions to the others."
    )
    stall_s: float = Field(
        300.0, gt=0, description="Seconds of waiting clicks and no committed offset after which a worker ends itself."
    )
    port: int = Field(
        9466, ge=0, le=65535, description="Port of the worker's /metrics, on operations.host; 0 turns it off."
    )

    @field_validator("dead_letter_topic")
    @classmethod
    def _another_topic(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("clicks_topic"):
            raise ValueError("a topic other than streams.clicks_topic is needed")
        return value


class TrainingSettings(_Section):
    """``notellm train``. What the paper (arXiv 2403.01744) fixes is the default."""

    steps: int = Field(300, ge=1, le=10_000_000, description="Optimiser steps.")
    batch_pairs: int = Field(
        32, ge=2, le=65_536, description="Pairs of one step and one process; every other note of a batch is a negative."
    )
    chunk_notes: int = Field(
        0,
        ge=0,
        le=131_072,
        description="Notes that go through the model at a time; more chunks than one cost a pass more, and memory is a "
        "chunk's alone. 0: as many as fit the memory that is free.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again instead of keeping them: less memory, a third more time."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Of the computation; auto is bf16 on a GPU that has it and fp32 elsewhere."
    )
    method: Literal["auto", "lora", "full"] = Field(
        "auto",
        description="Train an adapter (lora), or all weights of the base (full). auto: all of a base of up to a "
        "billion parameters, where no adapter is gone on from.",
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="LoRA: rank of the two matrices.")
    lora_alpha: int = Field(32, ge=1, description="LoRA: the adapter counts alpha / rank times.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="LoRA: dropout in front of the adapter.")
    lora_targets: str = Field(
        "all-linear", min_length=1, description="LoRA: all-linear, or names of modules: q_proj,v_proj."
    )
    learning_rate: float = Field(3e-4, gt=0, le=1, description="Highest learning rate, of adapter or base.")
    projection_learning_rate: float = Field(1e-3, gt=0, le=1, description="The same of projection and temperature.")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the rate falls after that.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's, of matrices.")
    max_gradient_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this length.")
    embedding_dim: int = Field(64, ge=2, le=32_768, description="Dimensions of the embedding.")
    projection_start: Literal["whitened", "random"] = Field(
        "whitened",
        description="The projection begins as the PCA-whitening of the base's own embeddings, or at random.",
    )
    whitening_notes: int = Field(1024, ge=8, description="Notes that the whitening is made of, at most.")
    temperature: float = Field(
        3.0, ge=-5, le=6, description="Where the learned temperature t begins; cosines count exp(t) times."
    )
    generative_weight: float = Field(
        0.01, ge=0, description="a in (contrastive + a * generative) / (1 + a); 0 trains no generation."
    )
    contrastive: bool = Field(True, description="false trains generation only.")
    hashtag_share: float = Field(
        0.4, ge=0, le=1, description="Share of the notes that are asked for hashtags; the others for their category."
    )
    asked_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the notes that are asked for anything; the others are embedded alone, from all of their "
        "prompt. Below 1 where a note's hashtags matter to its embedding.",
    )
    held_back: Literal["one", "some", "all"] = Field(
        "one", description="How many of its hashtags a note is asked for; the others stay in its prompt."
    )
    category_hashtags: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the notes asked for their category whose hashtags stay in the prompt; below 1 the model "
        "learns to tell it from the text alone as well.",
    )
    score_power: float = Field(1.0, ge=0, le=8, description="Pairs are drawn by score ** this; 0 draws all alike.")
    mask_false_negatives: bool = Field(
        True, description="No negatives: the same note again, the partner again, another known partner."
    )
    hard_negatives: float = Field(
        0.0, ge=0, le=2, description="How much more near negatives weigh (b of arXiv 2010.04592); 0: all alike."
    )
    template: Literal["en", "zh"] = Field("en", description="Language of the prompt.")
    note_tokens: int = Field(128, ge=16, le=4096, description="Tokens that the prompt reads of a note.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="The same seed, data and machine: the same run.")
    save_every: int = Field(50, ge=1, description="Steps between the states that a killed run goes on from.")
    keep_states: int = Field(2, ge=1, le=1000, description="How many of those are kept.")
    validate_every: int = Field(50, ge=1, description="Steps between looks at the validation part of a split.")
    validation_pairs: int = Field(64, ge=2, description="Validation pairs of such a look, at most.")


class OperationsSettings(_Section):
    """What operators look at: /metrics, /healthz, /readyz."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(9464, ge=0, le=65535, description="Port to listen on; 0 turns it off.")


class Settings(BaseSettings):
    """All sections; see each field's description."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        extra="forbid",
        frozen=True,
    )

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    milvus: MilvusSettings = Field(default_factory=MilvusSettings)
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    updater: UpdaterSettings = Field(default_factory=UpdaterSettings)
    streams: StreamsSettings = Field(default_factory=StreamsSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    operations: OperationsSettings = Field(default_factory=OperationsSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load_settings merges file and flags by hand; only the environment is read here.
        return init_settings, env_settings


def load_settings(config: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Read all sources. ``flags`` maps ``"kafka.bootstrap_servers"`` to a value; None there means "not given".

    Raises :class:`SettingsError`: one line per fault, with the setting's name, its value and what is allowed.
    """
    values = _read_file(config)
    _refuse_unknown_variables()
    try:
        from_environment = Settings().model_dump(exclude_unset=True)
        for section, chosen in from_environment.items():
            values.setdefault(section, {}).update(chosen)
        for name, value in (flags or {}).items():
            if value is not None:
                section, key = name.split(".", 1)
                values.setdefault(section, {})[key] = value
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(fault) for fault in error.errors())) from None
    except UnreadableVariable:
        # The one setting that the environment gives as JSON.
        raise SettingsError(
            f"kafka.properties ({variable_names()['kafka.properties']}): (hidden) is not JSON; allowed is an object"
        ) from None


def variable_names() -> dict[str, str]:
    """Every setting -> its environment variable."""
    return {
        f"{section}.{name}": f"{_PREFIX}{section}_{name}".upper()
        for section, field in Settings.model_fields.items()
        for name in _fields(field.annotation)
    }


def _fields(section: Any) -> dict[str, Any]:
    return dict(section.model_fields)


def _read_file(config: Path | None) -> dict[str, Any]:
    chosen = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    file = chosen or _DEFAULT_FILE
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        if chosen is None:
            return {}
        raise SettingsError(f"config file {file}: is not there") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"config file {file}: cannot be read as TOML: {error}") from None
    for section, content in values.items():
        if section not in Settings.model_fields or not isinstance(content, dict):
            allowed = ", ".join(f"[{name}]" for name in Settings.model_fields)
            raise SettingsError(f"{section}: unknown setting in {file}; allowed are the tables {allowed}")
    return values


def _refuse_unknown_variables() -> None:
    known = {CONFIG_VARIABLE, *variable_names().values()}
    for name in sorted(os.environ):
        # pydantic-settings reads a variable in any case.
        upper = name.upper()
        if upper.startswith(_PREFIX) and upper not in known and not upper.startswith(_COMMAND_PREFIXES):
            raise SettingsError(
                f"{name}: unknown setting in the environment; see docs/configuration.md for those there are"
            )


def _explain(fault: Any) -> str:
    location = fault["loc"]
    name = ".".join(str(part) for part in location)
    variable = f" ({variable_names()[name]})" if name in variable_names() else ""
    if fault["type"] == "extra_forbidden":
        section = Settings.model_fields.get(str(location[0]))
        allowed = ", ".join(_fields(section.annotation)) if section else ", ".join(Settings.model_fields)
        return f"{name}: unknown setting; allowed are {allowed}"
    value = "(hidden)" if name.startswith(_SECRETS) else repr(fault["input"])
    return f"{name}{variable}: {value} is not allowed: {fault['msg']}"
