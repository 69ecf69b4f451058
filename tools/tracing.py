"""What a network's code does, told by tracing it: which BatchNorms fold into convolutions, which ReLUs may write in place."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

FRESH = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)  # their output is a tensor of its own, which their gradient does without
ADDITIONS: tuple[Any, ...] = (operator.add, torch.add)


def traced(net: nn.Module) -> fx.Graph:
    """What a network does, step by step; a graph without steps where its code cannot be traced, which then runs as it is."""
    try:
        return fx.Tracer().trace(net)
    except Exception:  # the code of the network is anybody's: tracing may raise anything
        return fx.Graph()


def single_pairs(net: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) names where the norm is the only user of the convolution and both run once."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts: dict[str, int] = {}
    for node in calls:
        counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    touched = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    owners = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    pairs = []
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        names = (str(source.target), str(node.target))
        conv, norm = net.get_submodule(names[0]), net.get_submodule(names[1])
        plain = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats
        # A weight that other modules share, or that a hook writes (weight_norm), is not this pair's to change.
        plain = plain and not conv._forward_pre_hooks and all(owners[id(p)] == 1 for p in conv.parameters())
        if plain and counts[names[0]] == counts[names[1]] == 1 and not touched & set(names):
            pairs.append(names)
    return pairs


def sparing_relus(net: nn.Module, graph: fx.Graph) -> list[nn.ReLU]:
    """ReLUs that may write over their input, since nothing else makes use of it.

    The numbers are the same, and some of the traffic with memory, of which a small network has much, is saved.
    """
    modules = dict(net.named_modules())
    free: dict[str, bool] = {}
    for node in graph.nodes:
        if node.op == "call_module" and type(modules[str(node.target)]) is nn.ReLU:
            name = str(node.target)
            free[name] = free.get(name, True) and all(_is_spare(source, modules) for source in node.all_input_nodes)
    return [
        relu for name, relu in modules.items() if isinstance(relu, nn.ReLU) and free.get(name) and not _is_hooked(relu)
    ]


def _is_hooked(module: nn.Module) -> bool:
    """Whether hooks of the network's own look at what the module gets or gives."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _is_spare(source: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the one user of what a step gives may write over it."""
    if source.op == "call_module":
        module = modules[str(source.target)]
        fresh = type(module) in FRESH and not _is_hooked(module)
    else:
        fresh = source.op == "call_function" and source.target in ADDITIONS
    return fresh and len(source.users) == 1
