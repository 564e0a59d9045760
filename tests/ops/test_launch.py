import itertools
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@pytest.fixture(scope="module")
def scaled():
    """number * x at every `stride`-th place, by a kernel that Triton compiles for kinds of x and of `stride`."""
    from hornbeam.ops.launch import Kernel

    @Kernel
    @triton.jit(do_not_specialize=["number"])
    def scaled_kernel(x_ptr, out_ptr, stride, number, SIZE: tl.constexpr, NEGATIVE: tl.constexpr):
        offsets = tl.arange(0, SIZE)
        x = tl.load(x_ptr + offsets * stride) * number
        tl.store(out_ptr + offsets, -x if NEGATIVE else x)

    def run(x, stride, number, negative):
        out = torch.empty(8, dtype=x.dtype, device=x.device)
        scaled_kernel[(1,)](x, out, stride, number, SIZE=8, NEGATIVE=negative, num_warps=1)
        return out

    return run


@pytest.mark.parametrize("strides", [(1, 17), (17, 1), (2, 16, 48)], ids=str)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_launches_that_look_alike_take_the_variant_that_suits_them(device, scaled, strides, first, dtype):
    x = torch.arange(512, device=device).to(dtype)[first:]
    for stride, number, negative in itertools.product((*strides, *strides), (1, 16, 3, 2**40), (False, True)):
        expected = x[: 8 * stride : stride] * (-number if negative else number)
        assert torch.equal(scaled(x, stride, number, negative), expected)


@pytest.mark.cpu
def test_sizes():
    from hornbeam.ops.launch import cdiv, next_power_of_2

    assert [cdiv(number, 4) for number in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(number) for number in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


@pytest.mark.cpu
@pytest.mark.parametrize(("told", "expected"), [({"shared_memory_per_multiprocessor": 233472}, 233472), ({}, 0)])
def test_shared_memory_that_torch_does_not_tell_is_none(monkeypatch, told, expected):
    from hornbeam.ops.launch import shared_memory

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**told))
    assert shared_memory.__wrapped__(torch.device("cuda")) == expected
    assert shared_memory(torch.device("cpu")) == 0
