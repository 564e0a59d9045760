"""Comparing a family with transformers: tiny random checkpoints, and our logprobs against theirs."""

from pathlib import Path
from typing import Any

import torch
from harness import Sequence, as_tensor, make_engine
from torch import Tensor

NUM_NEW = 12
PROMPT = [int(x) for x in torch.randint(0, 300, (53,), generator=torch.Generator().manual_seed(1))]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_checkpoint(folder: Path, model_type: str, settings: dict[str, Any]) -> Path:
    """A random model with `settings`, whose norms and biases count, as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | settings))
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("bias", "norm.weight", "sinks", "correction_bias")):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def reference(folder: Path) -> list[Tensor]:
    """Logprobs [V] after the prompt and after each greedy token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids, rows = list(PROMPT), []
    for _ in range(NUM_NEW):
        rows.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        ids.append(int(rows[-1].argmax()))
    return rows


def assert_parity(folder: Path, expected: list[Tensor], **flags: Any) -> None:
    """Logprobs within 1e-4 over prefill, prefill in chunks after a cached prefix, and decode; the same greedy ids."""
    engine = make_engine(folder, **flags)
    for slot, chunk_size in enumerate((None, 16, 7)):
        sequence = Sequence(engine.executor, slot, 3 + 8 * slot, num_pages=8, num_groups=engine.num_groups)
        rows = [as_tensor(sequence.prefill(PROMPT, chunk_size))]
        rows += [as_tensor(sequence.decode()) for _ in range(NUM_NEW - 1)]
        for row, theirs in zip(rows, expected, strict=True):
            torch.testing.assert_close(row, theirs, atol=1e-4, rtol=0)
            assert row.argmax() == theirs.argmax()


@torch.inference_mode()
def assert_same(path: Path, model: Any) -> None:
    """Logprobs of what `path` holds and those of transformers' `model` agree, over prefill in chunks and decode."""
    engine = make_engine(path)
    sequence = Sequence(engine.executor, slot=0, first_page=1, num_pages=8, num_groups=engine.num_groups)
    ids, row = list(PROMPT), as_tensor(sequence.prefill(PROMPT, 16))
    for _ in range(4):
        torch.testing.assert_close(row, model(torch.tensor([ids])).logits[0, -1].log_softmax(-1), atol=1e-4, rtol=0)
        ids.append(int(row.argmax()))
        row = as_tensor(sequence.decode())


@torch.inference_mode()
def assert_every_expert_agrees(folder: Path, num_groups: int = 1, **flags: Any) -> None:
    """Logprobs within 1e-4 after each token of the prompt, so that all experts of the last layer count, too.

    And they do: with any tensor changed, of stacked experts that of any one, the reference says something else.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([PROMPT])
    expected = model(ids).logits[0].log_softmax(-1)
    ours = Sequence(make_engine(folder, **flags).executor, slot=0, first_page=1, num_pages=8, num_groups=num_groups)
    torch.testing.assert_close(ours.examine(PROMPT), expected, atol=1e-4, rtol=0)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        for index, part in enumerate(parameter if ".experts." in name else parameter[None]):
            saved = part.clone()
            part.mul_(1.1).add_(0.05 * torch.randn_like(part))
            moved = (model(ids).logits[0].log_softmax(-1) - expected).abs().max()
            part.copy_(saved)
            assert moved > 1e-3 or name.endswith("k_proj.bias"), f"{name}, {index}"
