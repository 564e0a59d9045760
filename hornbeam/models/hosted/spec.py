"""Models without a family of their own, hosted: transformers' modules run them over our paged attention and cache.

Chosen last, for what no family claims, and by `--model-impl transformers`. What such a model is made of is found out
by looking at it, without weights (`survey`). Imports neither torch nor transformers until it is asked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import HostQuery, Placement
from hornbeam.core.windows import attention_specs
from hornbeam.models.hosted.config import HostedConfig, HostedLayer

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.hosted.model import HostedModel
    from hornbeam.weights.checkpoint import Checkpoint


class TransformersHost:
    """See `core.family.Host`."""

    def supports(self, query: HostQuery) -> str | None:
        """None if transformers can run the model over our cache, else the reason why not."""
        try:
            self.family(query).parse(query.hf_config)
        except ConfigError as error:
            return str(error)
        return None

    def family(self, query: HostQuery) -> "HostedFamily":
        """The one family, which may run the checkpoint's code or not."""
        return HostedFamily(query.code)


class HostedFamily:
    """See `core.family.ModelFamily`."""

    name = "hosted"

    def __init__(self, code: Path | None = None) -> None:
        self._code = code

    def parse(self, hf_config: Mapping[str, Any]) -> HostedConfig:
        """Read a Hugging Face config and look at its model. Raises ConfigError for what cannot be hosted."""
        try:
            from hornbeam.models.hosted.survey import survey
        except ImportError as error:
            raise ConfigError(
                f"transformers is not installed ({error}): pip install 'hornbeam[transformers]'"
            ) from error
        try:
            return survey(hf_config, self._code)
        except ConfigError as error:
            if self._code is None and hf_config.get("auto_map"):
                raise ConfigError(f"{error}. It brings its own code, which --trust-remote-code would run") from error
            raise

    def cache_specs(self, config: HostedConfig) -> tuple[CacheSpec, ...]:
        """A group per window; a window over everything is none."""
        windows = [_window(layer, config.context_len) for layer in config.layers]
        return attention_specs(windows, config.num_kv_heads, config.head_dim, config.dtype)

    def defaults(self, config: HostedConfig, platform: str) -> Mapping[str, Any]:
        """Nobody promises that these modules can be recorded."""
        return {"disable_cuda_graph": True}

    def build(self, config: HostedConfig, context: "BuildContext") -> "HostedModel":
        """The model as transformers initialises it."""
        from hornbeam.models.hosted.load import build

        return build(config, context)

    def load(self, config: HostedConfig, context: "BuildContext", checkpoint: "Checkpoint") -> "HostedModel":
        """The model with the weights of `checkpoint`, by transformers' own naming and conversions."""
        from hornbeam.models.hosted.load import load

        return load(config, context, checkpoint)

    def weight_map(self, config: HostedConfig) -> Mapping[str, Placement]:
        """Never asked: `load` does it."""
        raise NotImplementedError("hosted models load themselves")


HOST = TransformersHost()


def _window(layer: HostedLayer, context_len: int) -> int | None:
    return None if layer.window is None or layer.window >= context_len else layer.window
