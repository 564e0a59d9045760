"""GGUF files made by hand."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LLAMA_METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 0.5,
    "llama.rope.freq_base": 1000.0,
    "llama.rope.dimension_count": 4,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
LAYER_SHAPES = {
    "attn_norm": (8,),
    "attn_q": (8, 8),
    "attn_k": (4, 8),
    "attn_v": (4, 8),
    "attn_output": (8, 8),
    "ffn_norm": (8,),
    "ffn_gate": (16, 8),
    "ffn_up": (16, 8),
    "ffn_down": (8, 16),
}


def llama_tensors() -> dict[str, np.ndarray]:
    """One layer of float32 noise."""
    shapes = {"token_embd.weight": (32, 8), "output_norm.weight": (8,)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in LAYER_SHAPES.items()}
    noise = np.random.default_rng(0)
    return {name: noise.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, np.ndarray], version: int = 3) -> bytes:
    """A GGUF file: ints as uint32, floats as float32, tensors as F32."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, array in tensors.items():
        header += _text(name) + struct.pack("<I", array.ndim) + struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        header += struct.pack("<IQ", 0, len(data))
        data += _padded(array.tobytes())
    return _padded(header) + data


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        packed = [_value(item) for item in value]
        return struct.pack("<I", 9) + packed[0][:4] + struct.pack("<Q", len(value)) + b"".join(p[4:] for p in packed)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """write_gguf(metadata=..., tensors=..., version=...) -> path; by default a tiny model of one layer."""

    def write(metadata: Any = LLAMA_METADATA, tensors: Any = None, version: int = 3) -> Path:
        path = tmp_path / "tiny.gguf"
        path.write_bytes(gguf_bytes(metadata, llama_tensors() if tensors is None else tensors, version))
        return path

    return write
