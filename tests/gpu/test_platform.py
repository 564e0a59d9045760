"""The CUDA platform's promises: order, errors, uploads, graphs."""

import pytest
import torch

from hornbeam.platforms.contract import Platform

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def platform() -> Platform:
    from hornbeam.platforms.cuda import ENTRY

    assert ENTRY.supports(None) is None
    before = torch.cuda.current_stream()
    platform = ENTRY.create()
    yield platform
    torch.cuda.set_stream(before)


def test_facts(platform):
    facts = platform.facts()
    assert facts.name == "cuda"
    assert torch.cuda.get_device_name() in facts.device
    free, total = platform.free_memory()
    assert 0 < free <= total


def test_what_is_needed_meanwhile_is_no_weight(platform, caplog):
    caplog.set_level("INFO", "hornbeam.platforms.cuda")
    probed = torch.empty(1 << 30, dtype=torch.uint8, device=platform.device)
    del probed
    with platform.tagged("weights"):
        weight, scratch = (torch.empty(n << 28, dtype=torch.uint8, device=platform.device) for n in (2, 4))
        del scratch
    assert "memory for weights = 0.50 GiB" in caplog.text
    with platform.tagged("steps"):  # of which what they need stays in the allocator
        del weight
    assert "memory for steps = 0.00 GiB" in caplog.text


def test_submitted_work_runs_in_order_and_gives_its_result(platform):
    x = torch.zeros(1 << 20, device=platform.device)

    def add() -> object:
        x.add_(1)
        total = x.sum().to("cpu", non_blocking=True)
        return lambda: total.item()

    steps = [platform.submit(add) for _ in range(10)]
    assert [step.result() / (1 << 20) for step in steps] == list(range(1, 11))
    assert steps[0].wait(0)


def test_wait_gives_up_after_the_timeout(platform):
    step = platform.submit(lambda: torch.cuda._sleep(500_000_000) or (lambda: "done"))
    assert not step.wait(0.001)
    assert step.wait(10)
    assert step.result() == "done"


def test_an_error_of_the_work_is_raised_by_its_result(platform):
    def fail() -> object:
        raise ValueError("as told")

    step = platform.submit(fail)
    with pytest.raises(ValueError, match="as told"):
        step.result()
    assert platform.submit(lambda: lambda: 1).result() == 1


def test_uploads_are_not_overwritten_by_those_of_the_other_lane(platform):
    """Two steps under way, as in the engine's loop; later ones need more memory."""

    def upload(step: int) -> object:
        torch.cuda._sleep(20_000_000)
        seen = platform.upload(torch.full((3, 1000 << step), step), lane=step % 2)
        total = (seen * 2).float().mean().to("cpu", non_blocking=True)
        return lambda: total.item()

    before = platform.submit(lambda: upload(0))
    for step in range(1, 8):
        under_way = platform.submit(lambda step=step: upload(step))
        assert before.result() == 2 * (step - 1)
        before = under_way


def test_a_graph_replays_on_what_its_inputs_hold_now(platform):
    x = torch.zeros(8, device=platform.device)
    replay = platform.submit(lambda: _value(platform.capture(lambda: x * 2))).result()
    for number in (3.0, 5.0):

        def step(number: float = number) -> object:
            x.fill_(number)
            out = replay().clone()
            return lambda: out.tolist()

        assert platform.submit(step).result() == [2 * number] * 8


def test_outputs_of_graphs_share_memory(platform):
    size = 64 << 20
    before = torch.cuda.memory_allocated()
    replays = [
        platform.submit(lambda k=k: _value(platform.capture(lambda: torch.full((size,), k, device="cuda")))).result()
        for k in range(4)
    ]
    assert torch.cuda.memory_allocated() - before < 2 * 4 * size
    for k in (2, 0, 3, 1):

        def step(k: int = k) -> object:
            ends = replays[k]()[:: size - 1].to("cpu", non_blocking=True)
            return lambda: ends.tolist()

        assert platform.submit(step).result() == [k, k]


def test_float32_products_are_exact_to_float32(platform):
    a, b = (torch.randn(256, 256, dtype=torch.float64, device=platform.device) for _ in range(2))
    error = ((a.float() @ b.float()).double() - a @ b).abs().max().item()
    assert error < 1e-3, "TF32 leaves errors above 1e-2 here"


def _value(value: object) -> object:
    return lambda: value
