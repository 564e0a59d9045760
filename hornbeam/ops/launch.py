"""How kernels are launched: cheaply for the host, on how many multiprocessors, and early.

Programmatic dependent launch: a kernel may begin before the one ahead of it has ended.

A kernel launched so first does what needs nothing of its predecessors (addresses, weights), then waits for them with
`tl.extra.cuda.gdc_wait()`, and tells its successor to begin with `gdc_launch_dependents()`. Since every kernel waits
before it reads or writes what others touch, order is kept through any number of kernels. What kernels of another kind
wrote for the step (lengths, page tables) can be read without waiting: they were over before the first of ours began.
Short kernels tell their successors before they wait themselves, so that several stand ready; behind long ones, which
fill the device, those would be in the way. Hopper and later.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction, driver

_INT32_MAX = 2**31 - 1


class Kernel:
    """A Triton kernel, to be launched as Triton launches it: `kernel[grid](*arguments, **constants)`.

    Triton finds out at each launch which variant of a kernel suits it, which takes the host longer than most kernels
    take the device. Here it does so once for launches that look alike: with the same constants, and with arguments of
    the same kinds, as far as Triton tells them apart (types, alignment of addresses, ones and multiples of 16).
    Constants follow the arguments, of which the first is a tensor. Triton's hooks see the first of such launches only.
    """

    def __init__(self, function: Any) -> None:
        """Take what `triton.jit` returns; Triton's interpreter goes on as it does."""
        self._function = function
        self._compiles = isinstance(function, JITFunction)
        params = function.params if self._compiles else ()
        self._plain = [p.do_not_specialize or p.do_not_specialize_on_alignment for p in params]
        self._launches: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # by looks

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        launch: Callable[..., None] = partial(self._launch, grid) if self._compiles else self._function[grid]
        return launch

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].get_device()
        looks, values = [device, *constants, *constants.values()], []
        for value, plain in zip(arguments, self._plain, strict=False):
            if isinstance(value, Tensor):
                looks.append(value.dtype)
                value = value.data_ptr()  # so the driver is not asked whose address it is
                looks.append(plain or value % 16)
            elif isinstance(value, int):
                looks.append(value > _INT32_MAX)
                looks.append(plain or (16 if value == 1 else value % 16))  # 17 is not like 1
            else:
                looks.append(type(value))
            values.append(value)
        found = self._launches.get(key := tuple(looks))
        if found is not None:
            run, function, metadata, ordered = found
            x, y, z = (*grid, 1, 1)[:3]
            stream = driver.active.get_current_stream(device)
            run(x, y, z, stream, function, metadata, None, None, None, *values, *ordered)
            return
        compiled = self._function[grid](*arguments, **constants)
        if compiled is not None:  # a hook may have withheld it
            ordered = [constants[name] for name in self._function.arg_names[len(arguments) :]]
            self._launches[key] = compiled.run, compiled.function, compiled.packed_metadata, ordered


def cdiv(number: int, size: int) -> int:
    """Parts of `size` that hold `number`. Triton's own of this name takes microseconds."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not less than `number`, which is positive."""
    return 1 << (number - 1).bit_length()


@cache
def early_launch(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a Triton launch whose kernel has the constexpr EARLY."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a CUDA device's multiprocessor; of another, and where torch does not tell (before 2.7), 0."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", 0)
