"""Requests to measure with: drawn at random, or read from files. The same seed draws the same requests."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hornbeam.core.errors import ConfigError
from hornbeam.text.tokenizer import Tokenizer

NAMES = ("random", "random-ids", "sharegpt", "generated-shared-prefix", "custom")
TEXT_DATASETS = ("sharegpt", "custom")  # need a tokenizer
DATASET_FLAGS = (  # as attributes of the parsed values
    *("dataset_name", "dataset_path", "num_prompts", "seed", "random_input_len", "random_output_len"),
    *("random_range_ratio", "sharegpt_output_len", "sharegpt_context_len", "gsp_num_groups", "gsp_prompts_per_group"),
    *("gsp_system_prompt_len", "gsp_question_len", "gsp_output_len"),
)
_FIRST_ID = 5  # below it are special tokens, in most vocabularies


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request. `text` is None where only ids are known, `messages` where it is no chat."""

    token_ids: tuple[int, ...]
    num_output: int
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None


def add_dataset_flags(parser: argparse.ArgumentParser, default: str | None) -> None:
    """The flags that `draw_samples` reads."""
    group = parser.add_argument_group("requests")
    group.add_argument("--dataset-name", choices=NAMES, default=default, help="Where requests come from.")
    group.add_argument(
        "--dataset-path", type=Path, metavar="FILE", help="sharegpt: its JSON; custom: JSON lines of conversations."
    )
    group.add_argument("--num-prompts", type=int, default=1000, help="Default: %(default)s.")
    group.add_argument("--seed", type=int, default=1, help="Of all draws. Default: %(default)s.")
    group.add_argument("--random-input-len", type=int, default=1024, metavar="N", help="Tokens. Default: %(default)s.")
    group.add_argument("--random-output-len", type=int, default=1024, metavar="N", help="Tokens. Default: %(default)s.")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="Lengths are uniform between this share of the full length and all of it; 1: all alike. Default: 0.",
    )
    group.add_argument(
        "--sharegpt-output-len", type=int, metavar="N", help="In place of the recorded answers' lengths."
    )
    group.add_argument("--sharegpt-context-len", type=int, metavar="N", help="Leave out longer conversations.")
    shared = parser.add_argument_group("generated-shared-prefix")
    for name, default_value, what in (
        ("num-groups", 64, "Groups that share a system prompt."),
        ("prompts-per-group", 16, "Requests of a group."),
        ("system-prompt-len", 2048, "Tokens that a group shares."),
        ("question-len", 128, "Tokens that a request adds."),
        ("output-len", 256, "Tokens to generate."),
    ):
        parser_help = f"{what} Default: %(default)s."
        shared.add_argument(f"--gsp-{name}", type=int, default=default_value, metavar="N", help=parser_help)


def draw_samples(values: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int) -> list[Sample]:
    """What the flags of `add_dataset_flags` ask for.

    Args:
        values: the parsed flags.
        tokenizer: None draws ids without text, and reads no files of text.
        vocab_size: drawn ids are below it.

    Raises:
        ConfigError: a flag is wrong, or the file is.
    """
    if values.num_prompts < 1 or not 0 <= values.random_range_ratio <= 1:
        raise ConfigError("--num-prompts must be at least 1, --random-range-ratio in 0..1")
    draw = Random(values.seed)
    match values.dataset_name:
        case "random" | "random-ids":
            samples = list(_random(values, draw, vocab_size))
        case "generated-shared-prefix":
            samples = _shared_prefix(values, draw, vocab_size)
        case _:
            if tokenizer is None:
                raise ConfigError(f"--dataset-name {values.dataset_name} needs a tokenizer (--tokenizer)")
            return _conversations(values, draw, tokenizer)
    return samples if tokenizer is None else [_with_text(sample, tokenizer) for sample in samples]


def _random(values: argparse.Namespace, draw: Random, vocab_size: int) -> Iterator[Sample]:
    lengths = [
        [draw.randint(max(1, int(full * values.random_range_ratio)), full) for _ in range(values.num_prompts)]
        for full in (values.random_input_len, values.random_output_len)
    ]
    for num_input, num_output in zip(*lengths, strict=True):
        yield Sample(token_ids=_ids(draw, num_input, vocab_size), num_output=num_output)


def _shared_prefix(values: argparse.Namespace, draw: Random, vocab_size: int) -> list[Sample]:
    samples = []
    for _ in range(values.gsp_num_groups):
        system = _ids(draw, values.gsp_system_prompt_len, vocab_size)
        for _ in range(values.gsp_prompts_per_group):
            question = _ids(draw, values.gsp_question_len, vocab_size)
            samples.append(Sample(token_ids=system + question, num_output=values.gsp_output_len))
    draw.shuffle(samples)
    return samples


def _ids(draw: Random, num: int, vocab_size: int) -> tuple[int, ...]:
    first = min(_FIRST_ID, vocab_size - 1)
    return tuple(draw.randrange(first, vocab_size) for _ in range(num))


def _with_text(sample: Sample, tokenizer: Tokenizer) -> Sample:
    """Random ids rarely survive being decoded: the text's own ids count, cut or repeated to the length asked for."""
    length = len(sample.token_ids)
    text = tokenizer.decode(list(sample.token_ids))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) > length:
        text = tokenizer.decode(ids[:length])
        ids = tokenizer.encode(text, add_special_tokens=False)
    return Sample(token_ids=tuple(ids), num_output=sample.num_output, text=text)


def _conversations(values: argparse.Namespace, draw: Random, tokenizer: Tokenizer) -> list[Sample]:
    """First turns of recorded conversations: sharegpt's JSON list, or JSON lines of them."""
    if values.dataset_path is None:
        raise ConfigError(f"--dataset-name {values.dataset_name} needs --dataset-path FILE")
    turns = _read_turns(values.dataset_path, is_list=values.dataset_name == "sharegpt")
    draw.shuffle(turns)
    samples = []
    for prompt, answer in turns:
        ids = tokenizer.encode(prompt)
        num_output = values.sharegpt_output_len or len(tokenizer.encode(answer, add_special_tokens=False))
        longest = values.sharegpt_context_len or len(ids) + num_output
        if len(ids) < 2 or num_output < 2 or len(ids) + num_output > longest:
            continue
        message = {"role": "user", "content": prompt}
        samples.append(Sample(token_ids=tuple(ids), num_output=num_output, text=prompt, messages=(message,)))
        if len(samples) == values.num_prompts:
            break
    if not samples:
        raise ConfigError(f"--dataset-path {values.dataset_path} has no conversation of fitting length")
    return samples


def _read_turns(path: Path, is_list: bool) -> list[tuple[str, str]]:
    """(prompt, answer) of each conversation that has both. A turn's text is its "value" or "content"."""
    try:
        content = path.read_text("utf-8")
        rows: Sequence[Any] = json.loads(content) if is_list else [json.loads(line) for line in content.splitlines()]
        found = []
        for row in rows:
            turns = row.get("conversations", row.get("conversation", row.get("messages", [])))
            texts = [turn.get("value", turn.get("content")) for turn in turns[:2]]
            if len(texts) == 2:
                found.append((str(texts[0]), str(texts[1])))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--dataset-path {path} cannot be read: {error}") from error
    return found
