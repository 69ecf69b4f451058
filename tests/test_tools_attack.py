"""A slot that is given to another row starts over: steps, restarts and starts."""

from __future__ import annotations

import torch
from toys import generator

from rbkit.tools.ascend import Batch, Plan, ascend
from rbkit.tools.norms import L2


def test_a_refilled_slot_has_all_its_restarts():
    """70 rows through 32 slots, none left early: each is started in restarts 0, 1, 2 and pays for all of them."""
    asked: list[tuple[int, int]] = []

    def start(ids, clean, restart):
        asked.extend(zip(ids.tolist(), restart.tolist(), strict=True))
        return clean

    def measure(x, context):
        return x.flatten(1).sum(1), torch.zeros(len(x), dtype=torch.bool)

    x = torch.rand(70, 2, 3, 4, generator=generator(0))
    plan = Plan(L2, 1.0, 0.1, 2, restarts=3, start=start)
    found = ascend(measure, plan, Batch(torch.arange(70), x, {}), block=32)
    assert found.forwards.tolist() == [9] * 70 and found.backwards.tolist() == [6] * 70
    assert sorted(asked) == [(row, restart) for row in range(70) for restart in range(3)]
