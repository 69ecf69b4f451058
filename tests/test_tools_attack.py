"""A slot that is given to another row starts over: steps, restarts and starts."""

from __future__ import annotations

import torch
from toys import generator

from rbkit.tools import architectures, attack, models, sameness
from rbkit.tools.ascend import Plan, ascend
from rbkit.tools.flow import Flow, polling
from rbkit.tools.norms import L2
from rbkit.tools.slots import Batch


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


class _SlotDependent(torch.nn.Module):
    """A network whose second slot gets another answer than the same image would in any other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2 * 5 * 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.fc(images.flatten(1))
        return logits + torch.nn.functional.pad(logits[1:2] * 1e-3, (0, 0, 1, len(logits) - 2))


def test_a_row_that_depends_on_its_slot_is_noticed() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(7, 2, 5, 4), torch.zeros(7, dtype=torch.int64)
    odd = models.Evaluation(models.Classifier(_SlotDependent(), mean=[0.5], std=[0.25]), block=32)
    assert sameness.slots_matter(odd, images, labels)
    net = architectures.build("resnet8", num_classes=3, channels=2, width=8)
    plain = models.Evaluation(models.Classifier(net, mean=[0.5], std=[0.25]), block=64)
    assert not sameness.slots_matter(plain, torch.rand(7, 2, 8, 12), labels)


def test_without_refilling_a_block_keeps_its_rows() -> None:
    """Blocks are full at first and only drain: with 32 slots, 40 rows and 3 steps there are two blocks of 4 passes."""
    calls: list[int] = []
    net = architectures.build("resnet8", num_classes=3, channels=2, width=8)
    evaluation = models.Evaluation(models.Classifier(net, mean=[0.5], std=[0.25]), block=32)

    def counted(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return evaluation(images)

    batch = Batch(torch.arange(40), torch.rand(40, 2, 6, 5), {"label": torch.zeros(40, dtype=torch.int64)})
    plan = attack.pgd(norm="l2", eps=0.1, steps=3, until="end").plan()
    _, outcome = Flow(attack.objective(counted), plan, polling([batch]), block=32, refill=False).poll(True)
    assert calls == [32] * 8 and outcome.forwards.tolist() == [4] * 40
