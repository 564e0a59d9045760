"""Products of eight-bit floats: the reference against the definition, the kernels against the reference."""

import pytest
import torch
from torch import Tensor

from hornbeam.core.fp8 import Fp8Format
from hornbeam.ops.linear.contract import Fp8Weight, InputNorm
from hornbeam.ops.linear.fp8_reference import BACKEND as REFERENCE
from hornbeam.ops.linear.fp8_reference import round_rows, round_weight, widened_rows

# Rows of padding hold whatever was in memory; in the interpreter, numpy warns of what comes of that.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|All-NaN):RuntimeWarning")


@pytest.fixture(autouse=True)
def rounding_that_carries(monkeypatch):
    """Triton's interpreter rounds 127 to 64 instead of 128: it does not carry into the exponent."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def converted(values, source, target, rounding):
        if target != interpreter.tl.float8e4nv or source != interpreter.tl.float32:
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(values.view("float32").copy()).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


both_scales = pytest.mark.parametrize("power_of_two", [False, True])


def make_weight(num_out: int, num_in: int, power_of_two: bool, device: torch.device) -> Fp8Weight:
    blocks = torch.rand(-(-num_out // 128), -(-num_in // 128), device=device) + 0.5
    weight = torch.randn(num_out, num_in, device=device) / num_in**0.5
    weight *= blocks.repeat_interleave(128, 0)[:num_out].repeat_interleave(128, 1)[:, :num_in]
    values, scales = round_weight(weight, power_of_two=power_of_two)
    return Fp8Weight(values=values, scales=scales, power_of_two=power_of_two)


def uneven(num_rows: int, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose magnitudes differ by far from group to group, some of them zeros."""
    x = torch.randn(num_rows, size, device=device) * (10.0 ** torch.randint(-3, 3, (num_rows, 1), device=device))
    x *= 2.0 ** (torch.arange(size, device=device) // 128 % 7)
    x[:, 128:200] = 0
    return x.to(dtype)


@pytest.mark.cpu
@both_scales
def test_the_reference_is_the_definition(power_of_two: bool) -> None:
    torch.manual_seed(0)
    x, weight = uneven(5, 300, torch.device("cpu")), make_weight(200, 300, power_of_two, torch.device("cpu"))
    bias = torch.randn(200)
    expected = bias.double().repeat(5, 1)
    for begin in range(0, 300, 128):
        part = x[:, begin : begin + 128]
        scales = part.abs().amax(1).clamp(min=1e-10) / 448
        if power_of_two:
            scales = 2 ** scales.log2().ceil()
        rounded = (part / scales[:, None]).to(torch.float8_e4m3fn)
        for first in range(0, 200, 128):
            values = weight.values[first : first + 128, begin : begin + 128]
            product = rounded.double() @ values.double().T
            scale = weight.scales[first // 128, begin // 128].double()
            expected[:, first : first + 128] += product * scales[:, None].double() * scale
    torch.testing.assert_close(REFERENCE.linear(x, weight, bias).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.cpu
def test_rounding_costs_what_eight_bits_cost() -> None:
    torch.manual_seed(0)
    x, exact = torch.randn(64, 512), torch.randn(256, 512)
    values, scales = round_weight(exact, power_of_two=False)
    out = REFERENCE.linear(x, Fp8Weight(values=values, scales=scales, power_of_two=False), None)
    expected = x @ exact.T
    assert 0.03 < (out - expected).norm() / expected.norm() < 0.045


@both_scales
@pytest.mark.parametrize("gated", [False, True])
def test_rows_are_rounded_bit_by_bit(device, dtype, power_of_two, gated):
    from hornbeam.ops.activation.reference import BACKEND as ACTIVATION
    from hornbeam.ops.linear import fp8_rounding

    x = uneven(7, 600, device, dtype)
    values, scales = (part[:7].cpu() for part in fp8_rounding.round_rows(x, power_of_two=power_of_two, gated=gated))
    x = x.cpu()  # where divisions are exact
    expected, expected_scales = round_rows(ACTIVATION.silu_mul(x) if gated else x, power_of_two=power_of_two)
    if gated:  # exponentials differ in their last bits, and what lies between two numbers then goes either way
        close(widened_rows(values, scales), widened_rows(expected, expected_scales), 3e-2)
    else:
        assert values.view(torch.uint8).equal(expected.view(torch.uint8))
        assert scales.equal(expected_scales)


SHAPES = [(256, 128, False), (200, 576, True), (64, 4224, False)]


@both_scales
@pytest.mark.parametrize("num_rows", [0, 1, 20, 70])
@pytest.mark.parametrize(("num_out", "num_in", "bias"), SHAPES)
def test_linear(device, num_rows, num_out, num_in, bias, power_of_two):
    from hornbeam.ops.linear.fp8_triton import BACKEND

    x = uneven(num_rows, num_in + 32, device)[:, :num_in]
    weight = make_weight(num_out, num_in, power_of_two, device)
    offset = torch.randn(num_out, device=device) if bias else None
    out, expected = (backend.linear(x, weight, offset) for backend in (BACKEND, REFERENCE))
    close(out, expected)


@pytest.mark.cpu
@pytest.mark.parametrize("num_out", [128, 1024, 2176, 4096])
def test_no_program_of_a_split_product_has_nothing_to_read(num_out):
    from hornbeam.ops.linear.fp8_triton import choose_tile

    for groups in range(1, 256):
        splits = choose_tile(1, 128 * groups, num_out).splits
        assert (splits - 1) * -(-groups // splits) < groups


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("num_out", "num_in", "bias"), [(256, 128, False), (256, 576, True)])
def test_normed(device, num_rows, num_out, num_in, bias, added):
    from hornbeam.ops.linear.fp8_triton import BACKEND

    x, residual = uneven(num_rows, num_in, device), uneven(num_rows, num_in, device)
    weight = make_weight(num_out, num_in, False, device)
    offset = torch.randn(num_out, device=device) if bias else None
    norm = InputNorm(weight=torch.rand(num_in, device=device) + 0.5, eps=1e-5)
    arguments = x, residual if added else None, norm, weight, offset
    before = x.clone(), residual.clone()
    out, total = BACKEND.normed(*arguments)
    expected, expected_total = REFERENCE.normed(*arguments)
    torch.testing.assert_close(total, expected_total)
    close(out, expected)
    assert x.equal(before[0])
    assert residual.equal(before[1])


@pytest.mark.parametrize("num_rows", [127, 130])
def test_many_rows_in_half_precision(device, num_rows):
    from hornbeam.ops.linear.fp8_triton import BACKEND

    if device.type == "cpu":
        pytest.skip("Triton's interpreter truncates bfloat16")
    x, bias = uneven(num_rows, 1024, device, torch.bfloat16), torch.randn(384, device=device).bfloat16()
    weight = make_weight(384, 1024, False, device)
    close(BACKEND.linear(x, weight, bias).float(), REFERENCE.linear(x, weight, bias).float(), 1e-2)


def test_gated(device):
    from hornbeam.ops.linear.fp8_triton import BACKEND

    x, weight = uneven(5, 768, device), make_weight(256, 384, False, device)
    close(BACKEND.gated(x, weight, None), REFERENCE.gated(x, weight, None))


@both_scales
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_experts(device, tokens, power_of_two):
    from hornbeam.ops.moe.contract import ExpertsShape, ExpertWeights, GatedUnit
    from hornbeam.ops.moe.reference import EXPERTS
    from hornbeam.ops.moe.tiles import Tile, Tiles
    from hornbeam.ops.moe.triton import TritonExperts

    gate_up, down = ([make_weight(*size, power_of_two, device) for _ in range(4)] for size in ((512, 320), (320, 256)))
    stacked = (torch.stack([getattr(w, part) for w in ws]) for ws in (gate_up, down) for part in ("values", "scales"))
    experts = ExpertWeights(**dict(zip(("gate_up", "gate_up_scales", "down", "down_scales"), stacked, strict=True)))
    shape = ExpertsShape(
        num_experts=4,
        top_k=2,
        hidden_size=320,
        intermediate_size=256,
        unit=GatedUnit(),
        fp8=Fp8Format(power_of_two=power_of_two),
        dtype=torch.float32,
        device=device,
    )
    ids = torch.randint(-1, 4, (tokens, 2), device=device, dtype=torch.int32)
    ids[0] = torch.tensor([2, 0])
    x, shares = torch.randn(tokens, 320, device=device), torch.rand(tokens, 2, device=device)
    tile = Tile(block_n=64, block_k=64, group=2, num_warps=4, num_stages=2)
    out = TritonExperts(shape).run(x, shares, ids, experts, Tiles(block_m=16, gate_up=tile, down=tile))
    close(out, EXPERTS.create(shape)(x, shares, ids, experts), 1e-2)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    """Row by row: where what is rounded differs in its last bit, a few elements are rounded to the next number."""
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
        assert error.max() < tolerance, error
