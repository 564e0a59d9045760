"""An engine without a model: the real loop and scheduler over an executor that counts through the alphabet.

The id of an ASCII character is its code. After "a" comes "b", and so on; after "z" comes EOS, after that "a" again.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hornbeam.config.components import CacheOptions, LoopOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.core.request import LogprobOptions, TokenLogprobs
from hornbeam.engine.envelope import Ready
from hornbeam.engine.parts import Built
from hornbeam.scheduler.scheduler import Scheduler
from hornbeam.text.formats.contents import TokenizerContents
from hornbeam.text.tokenizer import Tokenizer

EOS, FAIL, DIE, VOCAB = 256, 257, 258, 259
CONTEXT_LEN = 200
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def next_id(token_id: int) -> int:
    if token_id == ord("z"):
        return EOS
    return token_id + 1 if ord("a") <= token_id < ord("z") else ord("a")


def make_tokenizer() -> Tokenizer:
    alphabet = list(map(chr, range(33, 127)))
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(alphabet))
    vocab = {char: ord(char) for char in alphabet}
    free = (token_id for token_id in range(256) if token_id not in vocab.values())
    vocab |= dict(zip(others, free, strict=True))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<fail>", "<die>"])
    contents = TokenizerContents(backend=backend, eos_ids=frozenset({EOS}), chat_template=CHAT_TEMPLATE)
    return Tokenizer(contents)


@dataclass
class FakeStep:
    """Done at a point in time; fails or kills the process then, if it was told to."""

    answer: StepResult
    done_at: float
    tokens: frozenset[int]

    def wait(self, timeout: float | None = None) -> bool:
        left = self.done_at - time.monotonic()
        if left > 0:
            time.sleep(left if timeout is None else min(left, timeout))
        return time.monotonic() >= self.done_at

    def result(self) -> StepResult:
        self.wait()
        if DIE in self.tokens:
            os._exit(3)
        if FAIL in self.tokens:
            raise RuntimeError("the device hiccuped")
        return self.answer


class FakeExecutor:
    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self.fail_launch = False
        self.num_launched = 0
        self._last: dict[int, int] = {}
        self._logprobs: dict[int, LogprobOptions | None] = {}
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> FakeStep:
        self.num_launched += 1
        if self.fail_launch:
            self.fail_launch = False
            raise RuntimeError("no launch today")
        for start in plan.starts:
            self._logprobs[start.slot] = start.logprobs
        for chunk in plan.chunks:
            self._last[chunk.slot] = chunk.token_ids[-1]
        ids, logprobs = [], []
        for slot in plan.sampling_slots:
            self._last[slot] = next_id(self._last[slot])
            ids.append(self._last[slot])
            options = self._logprobs[slot]
            logprobs.append(() if options is None else (self._score(ids[-1], options),))
        scores = tuple(
            tuple(self._score(token_id, self._logprobs[chunk.slot]) for token_id in chunk.scored_ids)
            for chunk in plan.chunks
            if chunk.scored_ids
        )
        self._free_at = max(self._free_at, time.monotonic()) + self.step_seconds
        return FakeStep(
            answer=StepResult(
                step_id=plan.step_id,
                token_ids=tuple((i,) for i in ids),
                logprobs=tuple(logprobs),
                input_logprobs=scores,
            ),
            done_at=self._free_at,
            tokens=frozenset(token_id for chunk in plan.chunks for token_id in chunk.token_ids),
        )

    @staticmethod
    def _score(token_id: int, options: LogprobOptions) -> TokenLogprobs:
        return TokenLogprobs(
            chosen=-0.5,
            top=tuple((token_id + i, -0.5 - i) for i in range(options.num_top)),
            asked=tuple(-float(i) for i in options.token_ids),
        )


def build(user: Mapping[str, Any]) -> Built:
    """The seconds of a step are hidden in `random_seed`, in thousandths."""
    options = SchedulerOptions(
        max_running_requests=user.get("max_running_requests", 8),
        max_queued_requests=user.get("max_queued_requests"),
        chunked_prefill_size=32,
        seed=0,
    )
    scheduler = Scheduler(
        options,
        CacheOptions(page_size=4, max_total_tokens=None, memory_fraction=0.5, radix=True),
        specs=(CacheSpec(kind="full", layers=(0,), row_shapes=((1, 1),) * 2, dtype="float32"),),
        num_pages=(501,),
        context_len=CONTEXT_LEN,
        eos_ids=frozenset({EOS}),
    )
    ready = Ready(
        context_len=CONTEXT_LEN,
        vocab_size=VOCAB,
        max_total_tokens=2000,
        max_running_requests=options.max_running_requests,
        facts={
            "model_path": "fake",
            "architectures": ["Fake"],
            "model_type": "fake",
            "enable_priority_scheduling": user.get("enable_priority_scheduling", False),
            "abort_on_priority_when_disabled": user.get("abort_on_priority_when_disabled", False),
            "default_priority_value": user.get("default_priority_value", 0),
        },
    )
    return Built(
        scheduler=scheduler,
        executor=FakeExecutor(user.get("random_seed", 0) / 1000),
        ready=ready,
        options=LoopOptions(
            overlap=not user.get("disable_overlap_schedule", False),
            watchdog_timeout=user.get("watchdog_timeout", 300.0),
        ),
    )


def refuse(user: Mapping[str, Any]) -> Built:
    raise ConfigError("--page-size is no good")
