"""A model of transformers in the place of ours: hidden rows and logits by its own modules, attention by our layers."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from hornbeam.core.errors import ConfigError
from hornbeam.layers.attention import Attention
from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.models.hosted.attention import Hook
from hornbeam.models.hosted.config import HostedConfig
from hornbeam.models.hosted.survey import body_name

_MIXING_TOLERANCE = 1e-2  # of the largest number; rounding stays far below, looking at other tokens far above


class HostedModel(nn.Module):
    """`network` taken apart: its body makes hidden rows, the rest of it logits (head, scales, caps)."""

    def __init__(self, config: HostedConfig, network: PreTrainedModel, context: BuildContext) -> None:
        """Take over `network`, a causal language model with its weights."""
        super().__init__()
        layers = {network.get_submodule(layer.module): index for index, layer in enumerate(config.layers)}
        self._layers = layers
        self._scales = [layer.scale / config.layers[0].scale for layer in config.layers]
        self._value_dim = config.value_dim
        self._attention = [
            Attention(index, config.num_heads, config.num_kv_heads, config.head_dim, context)
            for index in range(config.num_layers)
        ]
        self._hook = Hook(_values_alone)
        self._hook.attach(network)
        name = body_name(network)
        self.body = network.get_submodule(name)
        network.set_submodule(name, _Given())
        self.top = network
        self._refuse_mixing(config.vocab_size)

    def forward(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H] after the final norm, of the tokens that are wanted."""
        self._hook.attend = partial(self._attend, fwd)
        given = fwd.input_embeds
        tokens = {"input_ids": ids[None]} if given is None else {"inputs_embeds": given[None]}
        hidden = self._run(positions, tokens)
        return hidden if fwd.wanted is None else hidden[fwd.wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        return self.top(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def _run(self, positions: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        return self.body(**tokens, position_ids=positions[None], use_cache=False).last_hidden_state[0]

    def _attend(
        self, fwd: Forward, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        """One layer over the cache. All requests of the step are one row of T tokens to transformers."""
        layer = self._layers[module]
        q, k, v = (heads[0].transpose(0, 1).contiguous() for heads in (query, key, value))
        if self._scales[layer] != 1:
            q = q * self._scales[layer]
        v = F.pad(v, (0, k.shape[-1] - self._value_dim))
        rows = self._attention[layer].attend(q, k, v, None, None, fwd, settings.get("s_aux"))
        return rows[None, ..., : self._value_dim]

    @torch.inference_mode()
    def _refuse_mixing(self, vocab_size: int) -> None:
        """Apart from attention, a token's row must depend on this token alone: the batch holds those of others.

        Raises:
            ConfigError: it does not, so something in the model is not under our control.
        """
        device = next(self.body.parameters()).device
        positions = torch.arange(3, device=device)
        ids = torch.tensor([[0, 1, 2], [0, vocab_size - 1, 2]], device=device)
        rows, others = (self._run(positions, {"input_ids": row[None]})[[0, 2]].float() for row in ids)
        if (rows - others).abs().max() > _MIXING_TOLERANCE * rows.abs().max():
            raise ConfigError("its tokens see each other outside of attention, so transformers cannot run it here")


class _Rows(BaseModelOutputWithPast):
    """A body's result that has nothing but rows, whatever else is looked for (states, attentions, routes)."""

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands for the body where its rows are known already."""

    def forward(self, *tokens: None, inputs_embeds: Tensor, **settings: Any) -> _Rows:
        """The rows as a body's result."""
        return _Rows(last_hidden_state=inputs_embeds)


def _values_alone(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tensor:
    """Attention of each token to itself."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)
