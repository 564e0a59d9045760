"""How a checkpoint says that the weights of its products are eight-bit floats in blocks. Imports no torch."""

from dataclasses import dataclass

from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError

_BLOCK = [128, 128]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Format:
    """Weights are float8_e4m3fn with a float32 scale per block of 128 x 128, activations rounded as they come."""

    power_of_two: bool = False  # scales of activations are rounded up to powers of two
    plain_modules: tuple[str, ...] = ()  # names, or ends of names, of modules that are not quantized

    def leaves_plain(self, module: str) -> bool:
        """Whether the module of a checkpoint is listed as not quantized, itself or as part of another one."""
        return any(
            f"{module}.".startswith(f"{listed}.") or module.endswith(f".{listed}") for listed in self.plain_modules
        )


def read_fp8(read: ConfigReader) -> Fp8Format | None:
    """The format that a config's quantization_config states; None without one.

    Raises:
        ConfigError: it states another one.
    """
    quantization = read.section("quantization_config")
    if not quantization.values:
        return None
    try:
        quantization.only("quant_method", "fp8")
        for setting, supported in (("fmt", "e4m3"), ("activation_scheme", "dynamic"), ("scale_fmt", "ue8m0")):
            quantization.only(setting, supported)
        quantization.only("weight_block_size", _BLOCK)
        if quantization.values.get("weight_block_size") is None or quantization.values.get("quant_method") is None:
            raise ConfigError(
                "weights with one scale for all of a matrix are not implemented, only blocks of 128 x 128"
            )
    except ConfigError as error:
        raise ConfigError(
            f"the config's quantization_config: {error}; take the model in bfloat16 or in float8 blocks (quant_method "
            "fp8, weight_block_size [128, 128])"
        ) from error
    return Fp8Format(
        power_of_two=quantization.values.get("scale_fmt") is not None,
        plain_modules=_names(quantization, "modules_to_not_convert") + _names(quantization, "ignored_layers"),
    )


def _names(quantization: ConfigReader, setting: str) -> tuple[str, ...]:
    names = quantization.values.get(setting) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"the config's {setting} must be a list of names of modules, not {names!r}")
    return tuple(names)
