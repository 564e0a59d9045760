"""`hornbeam bench fidelity`: how far a model with rounded arithmetic is from itself in float32, on a real text.

Both models read the same tokens in the same stretches; nothing is sampled.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hornbeam
from hornbeam.bench.report import append_json, show
from hornbeam.core.errors import ConfigError
from hornbeam.core.plan import StepResult
from hornbeam.core.request import Request, SamplingParams
from hornbeam.engine.build import build_engine
from hornbeam.engine.logs import set_up_logging
from hornbeam.executor.executor import Executor
from hornbeam.serve.cli import FlagParser, checked
from hornbeam.serve.serving import engine_flags, with_model
from hornbeam.text.loading import load_tokenizer

NUM_TOKENS = 2000
_STRETCH = 500  # tokens that see each other


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench fidelity`.

    Raises:
        HornbeamError: a flag is wrong, the text is too short, or a model cannot be built.
    """
    parser = FlagParser(
        "hornbeam bench fidelity",
        f"Compares what the model says after each of {NUM_TOKENS} tokens of a text with what it says in float32.",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="What to read. Default: Hornbeam's docstrings.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Append the JSON line to this file, too.")
    parser.add_flags()
    values = parser.parse_flags(argv)
    path, json_path = values.pop("text"), values.pop("json")
    user = checked(values)
    set_up_logging(user.get("log_level", "warning"), "bench")
    found = measure_fidelity(user, own_prose() if path is None else path.read_text("utf-8"))
    show(f"{found.num_tokens} tokens of {path or 'docstrings'}, against float32")
    show(f"mean KL divergence  {found.mean_divergence:.5f} nats (largest {found.largest_divergence:.3f})")
    show(f"top-1 agreement     {found.top1_agreement:.2%}")
    append_json(json_path, [asdict(found)])
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """After each of `num_tokens` tokens: Kullback-Leibler divergence from float32, in nats; equal likeliest tokens."""

    num_tokens: int
    mean_divergence: float
    largest_divergence: float
    top1_agreement: float


def own_prose() -> str:
    """English text that is there wherever Hornbeam is: the docstrings of its modules and of what is in them."""
    texts = []
    for path in sorted(Path(hornbeam.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
    return "\n\n".join(text for text in texts if len(text) > 200)


def measure_fidelity(user: Mapping[str, Any], text: str) -> Fidelity:
    """Compare the model that the checked flags `user` describe with the same in float32, on `text`.

    Raises:
        ConfigError: the text is too short, or a model cannot be built.
    """
    user = engine_flags(with_model(user))
    ids = load_tokenizer(Path(user.get("tokenizer_path", user["model_path"]))).encode(text)[:NUM_TOKENS]
    if len(ids) < NUM_TOKENS:
        raise ConfigError(f"the text has {len(ids)} tokens, and {NUM_TOKENS} are needed")
    exact = list(_logits({**user, "dtype": "float32", "quantization": "unquant"}, ids))
    divergences, agreements = [], 0
    for expected, actual in zip(exact, _logits(user, ids), strict=True):
        truth, other = expected.float().log_softmax(-1), actual.float().log_softmax(-1)
        divergences.append((truth.exp() * (truth - other)).sum(-1))
        agreements += int((expected.argmax(-1) == actual.argmax(-1)).sum())
    every = torch.cat(divergences)
    return Fidelity(
        num_tokens=len(every),
        mean_divergence=float(every.mean()),
        largest_divergence=float(every.max()),
        top1_agreement=agreements / len(every),
    )


def _logits(user: Mapping[str, Any], ids: Sequence[int]) -> Iterator[Tensor]:
    """The logits [T, V] after every token, a step at a time."""
    built = build_engine({**user, "disable_radix_cache": True, "max_total_tokens": 2 * NUM_TOKENS})
    executor, scheduler = built.executor, built.scheduler
    assert isinstance(executor, Executor)
    for begin in range(0, len(ids), _STRETCH):
        sampling = SamplingParams(max_new_tokens=1, temperature=0)
        scheduler.submit(Request(rid=str(begin), prompt_ids=tuple(ids[begin : begin + _STRETCH]), sampling=sampling))
        while (plan := scheduler.plan()) is not None:
            yield executor.examine(plan)
            scheduler.apply(StepResult(step_id=plan.step_id, token_ids=((0,),) * plan.num_samples))
            scheduler.drain()
