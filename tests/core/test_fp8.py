"""What a config says of eight-bit weights."""

import pytest

from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.core.fp8 import Fp8Format, read_fp8

pytestmark = pytest.mark.pure
STATED = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_modules_are_listed_whole_or_by_their_ends() -> None:
    fp8 = Fp8Format(plain_modules=("lm_head", "model.layers.1", "mlp.gate"))
    plain = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.7.mlp.gate"]
    assert [fp8.leaves_plain(module) for module in plain] == [True] * 3
    quantized = ["model.layers.10.mlp.up_proj", "model.layers.7.mlp.gate_proj", "lm_head_2", "model.other.lm_heads"]
    assert [fp8.leaves_plain(module) for module in quantized] == [False] * 4


def test_both_names_of_the_list_are_read() -> None:
    stated = {"modules_to_not_convert": ["a"], "ignored_layers": ["b"], "scale_fmt": "ue8m0"}
    read = ConfigReader({"quantization_config": STATED | stated})
    assert read_fp8(read) == Fp8Format(power_of_two=True, plain_modules=("a", "b"))
    assert read_fp8(ConfigReader({})) is None


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "awq"},
        {"quant_method": None},
        {"weight_block_size": None},
        {"weight_block_size": [128, 64]},
        {"fmt": "e5m2"},
        {"scale_fmt": "fp16"},
        {"activation_scheme": "static"},
    ],
)
def test_other_formats_are_refused_with_what_to_take_instead(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config: .*; take the model in bfloat16 or in float8 blocks"):
        read_fp8(ConfigReader({"quantization_config": STATED | change}))
