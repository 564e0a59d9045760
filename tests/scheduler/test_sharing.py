"""Which decode rows are told to share a prefix. That their pages are the same, the simulated device checks."""

from random import Random

import pytest
from scheduler.simulation import Simulation, check_outputs, make, tokens_of

from hornbeam.core.plan import SharedPrefix, StepPlan

pytestmark = pytest.mark.pure


def decode_plans(simulation: Simulation) -> list[StepPlan]:
    """Run to the end; the plans of steps that only decode."""
    plans: list[StepPlan] = []
    plan_next = simulation.scheduler.plan

    def plan() -> StepPlan | None:
        made = plan_next()
        if made is not None and not made.chunks:
            plans.append(made)
        return made

    simulation.scheduler.plan = plan
    simulation.run()
    return plans


def groups_of(prompts: list[tuple[int, ...]], **options: object) -> tuple[SharedPrefix, ...]:
    simulation = Simulation(page_size=4, chunk=64, num_pages=400, **options)
    requests = [make(str(index), prompt, 8, ignore_eos=True) for index, prompt in enumerate(prompts)]
    simulation.submit(*requests)
    shared = {len(plan.decode): plan.shared for plan in decode_plans(simulation)}
    check_outputs(simulation, requests)
    return shared[len(prompts)]


def test_interleaved_groups() -> None:
    heads = [tokens_of(seed, 16) for seed in range(2)]
    prompts = [heads[i % 2] + tokens_of(10 + i, 5) for i in range(6)]
    groups = groups_of(prompts)
    assert sorted(group.rows for group in groups) == [(0, 2, 4), (1, 3, 5)]
    assert {group.num_tokens for group in groups} == {16}


def test_nothing_is_shared() -> None:
    assert groups_of([tokens_of(i, 12) for i in range(4)]) == ()
    assert groups_of([tokens_of(1, 16)] * 3, radix=False) == ()


def test_a_short_common_prefix_gives_way_to_longer_ones_below_it() -> None:
    root = tokens_of(0, 4)
    heads = [root + tokens_of(seed, 40) for seed in (1, 2)]
    prompts = [heads[i % 2] + tokens_of(10 + i, 5) for i in range(6)]
    assert {(group.rows, group.num_tokens) for group in groups_of(prompts)} == {((0, 2, 4), 44), ((1, 3, 5), 44)}


def test_a_long_common_prefix_is_kept_though_some_share_more() -> None:
    root = tokens_of(0, 40)
    heads = [root + tokens_of(1, 8), root + tokens_of(2, 8), root]
    prompts = [heads[i % 3] + tokens_of(10 + i, 5) for i in range(6)]
    assert groups_of(prompts) == (SharedPrefix(rows=(0, 1, 2, 3, 4, 5), num_tokens=40),)


@pytest.mark.parametrize("windows", [(None,), (None, 8), (8, None)])
def test_random_trees(windows: tuple[int | None, ...]) -> None:
    for seed in range(8):
        random = Random(seed)
        stems = [()]
        for index in range(6):
            stems.append(random.choice(stems) + tokens_of(100 * seed + index, random.randint(1, 20)))
        simulation = Simulation(windows=windows, window_pages=60, page_size=4, chunk=16, num_pages=120)
        requests = [
            make(str(i), random.choice(stems) + tokens_of(7 * i, random.randint(1, 9)), random.randint(2, 20))
            for i in range(20)
        ]
        simulation.submit(*requests)
        simulation.run()
        check_outputs(simulation, requests)
