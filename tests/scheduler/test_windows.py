"""Windowed cache groups: what is kept, what is dropped, what can be reused, and that tokens never depend on it."""

import pytest
from scheduler.simulation import Simulation, check_outputs, make, reference, tokens_of
from scheduler.test_scheduler import workload

from hornbeam.core.errors import ConfigError

pytestmark = pytest.mark.pure

SHAPES = [((None, 8), 20), ((None, 3, 11), 24), ((6,), 30), ((8, None), 300)]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize(
    ("windows", "window_pages"), [((None, 8), 20), ((None, 3, 11), 24), ((6,), 30), ((8, None), 300)]
)
@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 90), (4, 300), (2, 45)])
def test_same_tokens(
    depth: int, radix: bool, windows: tuple[int | None, ...], window_pages: int, page_size: int, num_pages: int
) -> None:
    simulation = Simulation(
        depth=depth,
        radix=radix,
        windows=windows,
        window_pages=window_pages if page_size > 1 else 2 * window_pages,
        page_size=page_size,
        num_pages=num_pages,
        chunk=16,
    )
    requests = workload()
    if windows == (6,):
        requests = [request for request in requests if len(request.prompt_ids) < 40]
    simulation.submit(*requests)
    simulation.run()
    check_outputs(simulation, requests)
    again = [make("again" + r.rid, r.prompt_ids + reference(r)[0][:-1], 5, namespace=r.namespace) for r in requests]
    again = [request for request in again if len(request.prompt_ids) < 50]
    simulation.submit(*again)
    simulation.run()
    check_outputs(simulation, again)


def test_a_long_request_needs_few_pages_of_a_windowed_group() -> None:
    simulation = Simulation(windows=(None, 8), window_pages=14, num_pages=200, chunk=64, page_size=4)
    request = make("a", tokens_of(1, 500), 200, ignore_eos=True)
    simulation.submit(request)
    simulation.run()
    check_outputs(simulation, [request])
    assert simulation.ends["a"].num_retractions == 0


def test_the_next_turn_finds_its_window() -> None:
    for radix_pages in (14, 60):
        simulation = Simulation(windows=(None, 8), window_pages=radix_pages, page_size=4)
        first = make("first", tokens_of(1, 30), 41, ignore_eos=True)
        simulation.submit(first)
        while simulation.scheduler.has_work:
            simulation.step()
            simulation.scheduler.check()
        second = make("second", first.prompt_ids + tuple(simulation.tokens["first"]) + (5, 6), 3)
        simulation.submit(second)
        simulation.run()
        check_outputs(simulation, [second])
        assert simulation.ends["second"].num_cached == 68  # of 70 written rows


def test_a_hit_ends_where_every_window_is_whole_and_tombstones_heal() -> None:
    simulation = Simulation(windows=(None, 8), window_pages=14, num_pages=200, chunk=16, page_size=4)
    long = tokens_of(1, 200)

    def cached(rid: str, length: int) -> int:
        request = make(rid, (*long[:length], 5), 1)
        simulation.submit(request)
        while simulation.scheduler.has_work:
            simulation.step()
            simulation.scheduler.check()
        check_outputs(simulation, [request])
        return simulation.ends[rid].num_cached

    assert cached("a", 200) == 0
    assert cached("b", 200) == 200
    assert cached("c", 40) == 0  # the rows are there, but not the window before token 40
    assert cached("d", 40) == 40
    assert cached("e", 200) == 200  # what was healed has not cost what was there
    simulation.run()


def test_a_windowed_group_that_holds_no_window_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="a window of 8 tokens needs pages for 36 tokens, but has 28"):
        Simulation(windows=(None, 8), window_pages=8, num_pages=200, chunk=16, page_size=4)
