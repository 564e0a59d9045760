"""Checkpoints that bring modeling code of their own: refused, or run on request."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hornbeam
from hornbeam.core.errors import ConfigError
from hornbeam.models.hosted.tests.test_parity import GROUPED, PROMPT, SIZES
from hornbeam.models.index import find_family
from hornbeam.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.cpu

CONFIG = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own-kind"
    logits_factor: float = 1.0
"""
MODEL = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
Path({mark!r}).touch()
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *inputs, **settings):
        output = super().forward(*inputs, **settings)
        output.logits = output.logits * self.config.logits_factor
        return output
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose own code doubles the logits, and marks that it ran."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    torch.manual_seed(0)
    folder = tmp_path / "own"
    LlamaForCausalLM(LlamaConfig(**SIZES | GROUPED)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"architectures": ["OwnForCausalLM"], "model_type": "own-kind", "auto_map": own, "logits_factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(MODEL.format(mark=str(tmp_path / "mark")))
    return folder


def test_it_is_not_run_unasked(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"OwnForCausalLM.*'own-kind'.*own code, which --trust-remote-code would run"):
        hornbeam.Engine(model_path=str(folder), skip_tokenizer_init=True)
    assert not (folder.parent / "mark").exists()


def test_it_is_run_on_request(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    (folder.parent / "mark").unlink()
    sampling = {"temperature": 0, "max_new_tokens": 1}
    with hornbeam.Engine(
        model_path=str(folder), skip_tokenizer_init=True, trust_remote_code=True, max_total_tokens=512
    ) as engine:
        answer = engine.generate(
            input_ids=PROMPT, sampling_params=sampling, return_logprob=True, top_logprobs_num=len(expected)
        )
    found = {token: logprob for logprob, token, _ in answer["meta_info"]["output_top_logprobs"][0]}
    torch.testing.assert_close(torch.tensor([found[i] for i in range(len(expected))]), expected, atol=1e-4, rtol=0)


def test_code_that_cannot_be_loaded(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("import a_module_that_nobody_has")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ConfigError, match=r"own code for AutoModelForCausalLM cannot be loaded: ImportError"):
        find_family(checkpoint.hf_config, code=folder)
