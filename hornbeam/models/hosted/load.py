"""Makes a hosted model: as transformers initialises it, or with a checkpoint's weights.

transformers names, converts and ties the weights; reading them is ours, and so is refusing what does not fit.
"""

from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from hornbeam.layers.context import BuildContext
from hornbeam.models.hosted.attention import IMPLEMENTATION
from hornbeam.models.hosted.config import HostedConfig
from hornbeam.models.hosted.model import HostedModel
from hornbeam.models.hosted.survey import class_of, read_config
from hornbeam.weights.checkpoint import Checkpoint
from hornbeam.weights.load import refuse_misfits

_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # follow from the config; old checkpoints only


def build(config: HostedConfig, context: BuildContext) -> HostedModel:
    """The model with random weights."""
    hf_config = read_config(config.hf_config, config.code)
    model_class = class_of(hf_config, config.hf_config, config.code)
    with torch.device(context.device):
        network = model_class._from_config(hf_config, dtype=context.dtype, attn_implementation=IMPLEMENTATION)
    return HostedModel(config, _frozen(network), context)


def load(config: HostedConfig, context: BuildContext, checkpoint: Checkpoint) -> HostedModel:
    """The model with the weights of `checkpoint`.

    Raises:
        ConfigError: names or shapes do not fit the model, or a tensor cannot be read.
    """
    hf_config = read_config(config.hf_config, config.code)
    source = checkpoint.source
    tensors = dict(source.read(source.shapes().keys()))  # views of mapped files: read when they are copied
    transformers_logging.set_verbosity_error()  # it draws a table of what does not fit, which is told here
    transformers_logging.disable_progress_bar()
    network, report = class_of(hf_config, config.hf_config, config.code).from_pretrained(
        None,
        config=hf_config,
        state_dict=tensors,
        dtype=context.dtype,
        ignore_mismatched_sizes=True,  # reported, then refused
        output_loading_info=True,
    )
    _refuse_misfits(report, checkpoint)
    return HostedModel(config, _frozen(network.to(context.device)), context)


def _frozen(network: Any) -> Any:
    return network.requires_grad_(False).eval()


def _refuse_misfits(report: dict[str, Any], checkpoint: Checkpoint) -> None:
    misfits = {
        "missing": sorted(report["missing_keys"]),
        "not known to the model": sorted(name for name in report["unexpected_keys"] if not name.endswith(_DERIVED)),
        "of the wrong shape": [
            f"{name} {list(theirs)}, expected {list(ours)}" for name, theirs, ours in sorted(report["mismatched_keys"])
        ],
        "not converted": report["error_msgs"],
    }
    refuse_misfits(checkpoint.path, misfits)
