"""Makes a real engine of a user's options. Alone in `engine` and `serve` it touches torch, when it is called."""

import json
import logging
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from hornbeam.config.components import EngineOptions
from hornbeam.config.environment import read_environment
from hornbeam.config.resolve import resolve_engine
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import ModelConfig
from hornbeam.engine.envelope import Ready
from hornbeam.engine.parts import Built
from hornbeam.models.index import find_family
from hornbeam.scheduler.record import RecordingScheduler
from hornbeam.scheduler.scheduler import Scheduler
from hornbeam.weights.checkpoint import Checkpoint, open_checkpoint
from hornbeam.weights.read_ahead import read_early

logger = logging.getLogger(__name__)


def build_engine(user: Mapping[str, Any]) -> Built:
    """The engine that the checked flags `user` describe (see `check_flags`; `model_path` is set).

    Raises:
        ConfigError: a flag, the checkpoint or the machine cannot work.
        FamilyUnavailable: the model's family cannot be used.
    """
    checkpoint = open_checkpoint(Path(user["model_path"]), user.get("load_format", "auto"), _overrides(user))
    if checkpoint.first_file is not None:
        read_early(checkpoint.first_file)  # while libraries are imported, the device wakes up and kernels are chosen
    disabled = read_environment().disabled_architectures
    code = checkpoint.path if user.get("trust_remote_code") else None
    family = find_family(checkpoint.hf_config, disabled, user.get("model_impl", "auto"), code)
    config = family.parse(checkpoint.hf_config)

    from hornbeam.executor.build import build_executor
    from hornbeam.executor.profiler import StepProfiler
    from hornbeam.platforms.index import PLATFORMS

    choice = PLATFORMS.choose(None, user.get("device", "auto"))
    logger.info("platform = %s (%s)", choice.name, choice.reason)
    platform = choice.value.create()
    facts = platform.facts()
    options = resolve_engine(user, family.name, family.defaults(config, facts.name), config, facts)
    built = build_executor(family, config, checkpoint, options, platform)
    arguments: dict[str, Any] = {
        "options": options.scheduler,
        "cache": options.cache,
        "specs": built.specs,
        "num_pages": built.num_pages,
        "context_len": options.model.context_len,
        "eos_ids": _eos_ids(checkpoint),
    }
    record = None if options.loop.record is None else _open_record(options.loop.record)
    scheduler = Scheduler(**arguments) if record is None else RecordingScheduler(record, **arguments)
    ready = Ready(
        context_len=options.model.context_len,
        vocab_size=config.vocab_size,
        max_total_tokens=scheduler.stats().max_total_tokens,
        max_running_requests=options.scheduler.max_running_requests,
        facts=_facts(options, config, facts.device)
        | {"model_type": checkpoint.hf_config.get("model_type"), "quantization": built.quantization},
    )
    return Built(
        scheduler=scheduler,
        executor=built.executor,
        ready=ready,
        options=options.loop,
        resource=record,
        profiler=StepProfiler(platform),
    )


def _open_record(path: str) -> FileIO:
    try:
        return FileIO(path, "w")  # unbuffered: what was told before a crash is there
    except OSError as error:
        raise ConfigError(f"--record-schedule {path} cannot be written: {error}") from error


def _overrides(user: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that replace those of the model's config."""
    text = user.get("json_model_override_args", "{}")
    try:
        overrides = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--json-model-override-args is not JSON ({error}): {text}") from error
    if not isinstance(overrides, dict):
        raise ConfigError(f"--json-model-override-args must be a JSON object, not {text}")
    return overrides


def _eos_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """What the checkpoint itself says ends a text; the tokenizer's own end is known to the server."""
    given = checkpoint.generation_config.get("eos_token_id", checkpoint.hf_config.get("eos_token_id"))
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ConfigError(f"{checkpoint.path}: eos_token_id must be a token id or a list of such, not {given!r}")
    return frozenset(ids)


def _facts(options: EngineOptions, config: ModelConfig, device: str) -> dict[str, Any]:
    """For /server_info: every resolved option by its flag's name, and what the model and the machine are."""
    resolved = {name: reason.value for name, reason in options.reasons.items()}
    return {**resolved, "device_name": device, "architectures": [config.architecture]}
