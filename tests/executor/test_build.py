"""Start-up: what the device cannot hold is the user's to solve, with the numbers."""

import pytest
import torch

from hornbeam.core.errors import ConfigError

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("broken", "what"), [("_load", "the weights"), ("_warm_up", "the largest step")])
def test_no_memory_left(tiny_checkpoint, monkeypatch, broken, what):
    from hornbeam import Engine

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(f"hornbeam.executor.build.{broken}", fail)
    flags = {"model_path": str(tiny_checkpoint), "skip_tokenizer_init": True, "device": "cpu"}
    with pytest.raises(ConfigError, match=rf"no memory left for {what}: .* GiB are free; .*CUDA out of memory"):
        Engine(**flags)


def test_no_memory_left_on_the_host_is_not_the_familys_fault(tiny_checkpoint, monkeypatch):
    from hornbeam import Engine

    def fail(*arguments):
        raise MemoryError("Unable to allocate 2.00 GiB")

    monkeypatch.setattr("hornbeam.models.llama.model.LlamaModel.__init__", fail)
    flags = {"model_path": str(tiny_checkpoint), "skip_tokenizer_init": True, "device": "cpu"}
    with pytest.raises(ConfigError, match="no memory left for the weights"):
        Engine(**flags)


def test_more_tokens_than_the_machine_can_hold(tiny_checkpoint):
    from hornbeam import Engine

    flags = {"model_path": str(tiny_checkpoint), "skip_tokenizer_init": True, "device": "cpu"}
    with pytest.raises(ConfigError, match=r"no memory left for the key-value cache: .*; lower --max-total-tokens"):
        Engine(**flags, max_total_tokens=10**14)
