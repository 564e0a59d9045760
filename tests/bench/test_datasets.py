"""Requests drawn at random: the same seed, the same requests, within the lengths asked for."""

import argparse

import pytest

from hornbeam.bench.datasets import DATASET_FLAGS, add_dataset_flags, draw_samples
from hornbeam.core.errors import ConfigError

pytestmark = pytest.mark.pure


def values(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_dataset_flags(parser, "random")
    return parser.parse_args(flags)


def test_the_flags_are_listed():
    assert set(vars(values())) == set(DATASET_FLAGS)


def test_lengths_are_within_the_range():
    flags = ["--random-input", "40", "--random-output", "20", "--random-range-ratio", "0.5", "--num-prompts", "50"]
    samples = draw_samples(values(*flags), None, 1000)
    assert {len(sample.token_ids) for sample in samples} <= set(range(20, 41))
    assert {sample.num_output for sample in samples} <= set(range(10, 21))
    assert samples == draw_samples(values(*flags), None, 1000)
    assert samples != draw_samples(values(*flags, "--seed", "2"), None, 1000)
    exact = draw_samples(values(*flags, "--random-range-ratio", "1"), None, 1000)
    assert {len(sample.token_ids) for sample in exact} == {40}


def test_groups_share_their_prefix():
    flags = "--dataset-name generated-shared-prefix --gsp-num-groups 3 --gsp-prompts-per-group 4 --gsp-system-prompt 16"
    samples = draw_samples(values(*flags.split()), None, 1000)
    assert len(samples) == 12
    assert len({sample.token_ids[:16] for sample in samples}) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-prompts 0", "--num-prompts"),
        ("--random-range-ratio 2", "--random-range-ratio"),
        ("--dataset-name sharegpt", "needs a tokenizer"),
    ],
)
def test_what_cannot_work_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        draw_samples(values(*flags.split()), None, 1000)
