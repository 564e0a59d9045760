from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hornbeam.comm.grid import Grid
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import Placement
from hornbeam.layers.context import BuildContext
from hornbeam.models.index import find_family
from hornbeam.ops.kernels import choose_kernels
from hornbeam.ops.query import OpQuery
from hornbeam.weights.checkpoint import Checkpoint, open_checkpoint
from hornbeam.weights.gguf import read_gguf
from hornbeam.weights.load import load_weights, unpermute_heads

from .conftest import gguf_bytes

pytestmark = pytest.mark.cpu


def build(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Placement]]:
    """The family's model for `checkpoint`, with NaN in every parameter, and its weight map."""
    family = find_family(checkpoint.hf_config)
    config = family.parse(checkpoint.hf_config)
    query = OpQuery(
        device="cpu",
        dtype="float32",
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=1,
    )
    device = torch.device("cpu")
    kernels = choose_kernels(query, "reference")
    model = family.build(
        config, BuildContext(grid=Grid(), kernels=kernels, dtype=dtype, device=device, context_len=config.context_len)
    )
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    return model, dict(family.weight_map(config))


def part(model: nn.Module, placement: Placement) -> Tensor:
    parameter = model.get_parameter(placement.parameter)
    owner = model.get_submodule(placement.parameter.rpartition(".")[0])
    sizes = getattr(owner, "parts", (len(parameter),))
    first = sum(sizes[: placement.part])
    return parameter[first : first + sizes[placement.part]]


def tiny_llama(folder: Path, **settings: object) -> dict[str, Tensor]:
    """Save a random model with transformers, in several shards; returns its tensors."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        **settings,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(folder, max_shard_size="15KB")
    assert (folder / "model.safetensors.index.json").exists()
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{"tie_word_embeddings": False}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}],
)
def test_every_tensor_of_a_sharded_folder_arrives(tmp_path: Path, dtype: torch.dtype, settings: dict) -> None:
    theirs = tiny_llama(tmp_path, **settings)
    checkpoint = open_checkpoint(tmp_path)
    model, weight_map = build(checkpoint, dtype)
    load_weights(model, checkpoint, weight_map)
    if settings["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert theirs.keys() == weight_map.keys()
    for name, placement in weight_map.items():
        assert torch.equal(part(model, placement), theirs[name].to(dtype)), name
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Merge the shards into one file after `change`."""
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_one_error_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    tiny_llama(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.surplus.weight"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 32)

    rewrite(tmp_path, change)
    checkpoint = open_checkpoint(tmp_path)
    model, weight_map = build(checkpoint)
    with pytest.raises(ConfigError) as caught:
        load_weights(model, checkpoint, weight_map)
    message = str(caught.value)
    assert "1 tensors missing:\n  model.norm.weight" in message
    assert "1 tensors not known to the model:\n  model.surplus.weight" in message
    assert "k_proj.weight [8, 32], expected [16, 32]" in message
    assert all(parameter.isnan().all() for parameter in model.parameters()), "nothing may be copied before the check"


def test_numbers_that_are_no_weights(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].int()}))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight in .* is torch\.int32"):
        load_weights(build(checkpoint)[0], checkpoint, build(checkpoint)[1])


def test_derived_tensors_and_the_copy_of_a_tied_head_are_left_unread(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tie_word_embeddings=True)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewrite(tmp_path, change)
    checkpoint = open_checkpoint(tmp_path)
    model, weight_map = build(checkpoint)
    load_weights(model, checkpoint, weight_map)


def test_a_map_that_leaves_a_parameter_unfilled_is_our_mistake(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model, weight_map = build(checkpoint)
    del weight_map["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(AssertionError, match=r"layers\.1\.mlp\.gate_up\.weight"):
        load_weights(model, checkpoint, weight_map)


def test_unpermuting_undoes_the_order_of_gguf() -> None:
    num_heads, half = 3, 4
    rows = torch.arange(num_heads * 2 * half * 5).view(num_heads, 2, half, 5)  # head, half, pair, column
    permuted = rows.transpose(1, 2).reshape(-1, 5)
    assert torch.equal(unpermute_heads(permuted, num_heads), rows.reshape(-1, 5))
    assert torch.equal(unpermute_heads(permuted[:, 0], num_heads), rows.reshape(-1, 5)[:, 0])


def test_a_gguf_file_loads_like_the_folder_it_was_made_of(tmp_path: Path) -> None:
    """Written as a converter would: GGUF names, query and key rows in its rotary order."""
    theirs = tiny_llama(tmp_path, tie_word_embeddings=False)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    kinds = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    kinds |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    kinds |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in theirs.items():
        stem = name.removesuffix(".weight")
        kind = stem.rpartition(".")[2]
        if kind in ("q_proj", "k_proj"):
            tensor = tensor.view(4 if kind == "q_proj" else 2, 2, 4, 32).transpose(1, 2).reshape(-1, 32)
        layer = f"blk.{stem.split('.')[2]}.{kinds[kind]}" if kind in kinds else names[stem]
        tensors[f"{layer}.weight"] = tensor.numpy()
    metadata = {"general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64}
    metadata |= {"llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.attention.head_count": 4}
    metadata |= {"llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8}
    (tmp_path / "tiny.gguf").write_bytes(gguf_bytes(metadata, tensors))
    loaded = []
    for path in (tmp_path, tmp_path / "tiny.gguf"):
        checkpoint = open_checkpoint(path)
        model, weight_map = build(checkpoint)
        load_weights(model, checkpoint, weight_map)
        loaded.append(dict(model.named_parameters()))
    assert loaded[0].keys() == loaded[1].keys()
    for name, parameter in loaded[0].items():
        assert torch.equal(parameter, loaded[1][name]), name


def test_an_unsupported_block_type_names_file_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama"}, {"token_embd.weight": np.ones(8, np.float32)}))
    checkpoint = open_checkpoint(path)
    file = checkpoint.source.file
    tensors = {name: replace(tensor, type_name="IQ2_S") for name, tensor in file.tensors.items()}
    source = replace(checkpoint.source, file=replace(file, tensors=tensors))
    with pytest.raises(ConfigError, match=r"tiny\.gguf: tensor token_embd\.weight.*IQ2_S"):
        list(source.read({"model.embed_tokens.weight"}))


def test_the_default_model(smollm2_gguf: Path) -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    checkpoint = open_checkpoint(smollm2_gguf)
    model, weight_map = build(checkpoint)
    load_weights(model, checkpoint, weight_map)
    tensors = read_gguf(smollm2_gguf).tensors
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "blk.29.ffn_up.weight": "model.layers.29.mlp.up_proj.weight",
    }.items():
        tensor = tensors[theirs]
        expected = quants.dequantize(np.asarray(tensor.data), constants.GGMLQuantizationType[tensor.type_name])
        np.testing.assert_array_equal(part(model, weight_map[ours]).numpy().ravel(), expected.view(np.float32).ravel())
