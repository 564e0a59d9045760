"""The oracle itself, against attention as it is written in papers: one query at a time, over a plain list of keys."""

import pytest
import torch
from ops.paged import PAGE_SIZE, PagedCase, expected_output, make_case, make_shape
from torch import Tensor

pytestmark = pytest.mark.cpu


def by_definition(case: PagedCase, sinks: Tensor | None) -> Tensor:
    """[T, Hq, D] float64."""
    shape, rows, outputs = case.shape, case.rows, []
    queries = iter(case.q.double())
    for slot, length, num_queries in zip(rows.slots.tolist(), rows.lens.tolist(), rows.query_lens, strict=True):
        for end in range(length - num_queries + 1, length + 1):
            begin = 0 if shape.window is None else max(0, end - shape.window)
            cells = [rows.page_tables[slot, i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(begin, end)]
            keys, values = (pages.flatten(0, 1)[torch.stack(cells)].double() for pages in (case.k_pages, case.v_pages))
            for head, query in enumerate(next(queries)):
                kv_head = head * shape.num_kv_heads // shape.num_heads
                scores = keys[:, kv_head] @ query * shape.scale
                if shape.soft_cap is not None:
                    scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
                outputs.append(weights @ values[:, kv_head] / total)
    return torch.stack(outputs).view(case.q.shape)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_equals_the_definition(window: int | None, soft_cap: float | None, has_sinks: bool) -> None:
    torch.manual_seed(0)
    shape = make_shape(torch.device("cpu"), torch.float32, 6, 2, 8, window=window, soft_cap=soft_cap)
    sinks = torch.randn(6) if has_sinks else None
    case = make_case(shape, [1, 50, 17, 40], [1, 1, 17, 3])
    torch.testing.assert_close(expected_output(case, sinks), by_definition(case, sinks))
