"""What a GPU wants: work recorded once and started at once, larger blocks, and products in TF32 where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def products(*, tf32: bool) -> Iterator[None]:
    """Matrix products and convolutions on a GPU in TF32 (10 bits of mantissa), or in float32; as before at the end."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def repeatable() -> None:
    """Let the same work on the same GPU give the same bits: no sum in the order in which threads happen to arrive.

    Source: PyTorch's notes on reproducibility. What has no such kernel warns, and goes on.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Recorded:
    """A function of tensors on a GPU, recorded as a CUDA graph at its first call and replayed at the others.

    A step of a small network is hundreds of short kernels, which Python starts more slowly than the GPU computes them. The
    function may read tensors that change in place between calls (weights), but none of its other shapes or numbers may
    change. `touched`: the tensors that it writes to as well, which recording leaves as they were. What cannot be recorded, as
    the code of a network that asks the GPU for numbers, is computed at each call.
    """

    def __init__(self, function: Callable[..., Tensor], *, touched: Sequence[Tensor] = ()) -> None:
        self.function, self.touched = function, touched
        self.graph: torch.cuda.CUDAGraph | None = None
        self.plain = False
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function gives; inputs of other shapes than the first are computed without the record."""
        if self.graph is None and not self.plain:
            self._try(inputs)
        if self.plain or [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            return self.function(*inputs)
        assert self.graph is not None and self.output is not None
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def _try(self, inputs: Sequence[Tensor]) -> None:
        before = [t.clone() for t in self.touched]
        try:
            self._record(inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # if the function itself is at fault, the next call tells
            self.plain = True
        for tensor, value in zip(self.touched, before, strict=True):
            tensor.copy_(value)

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.detach().clone() for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up in a first call, which must not be recorded
            self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = self.function(*self.inputs)
        self.graph = graph


class Reading:
    """Numbers on their way from a device to the program, which may go on until it needs them."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        """The numbers, once they are here."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return list(self.values.tolist())
