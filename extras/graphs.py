"""A training step's forward and backward pass as a CUDA graph, which the device repeats without Python.

    run = Graphed(run, learned)         # run(batch) -> loss, leaves gradients; learned: all that ever trains
    loss = run(batch)                   # captured when a shape is first met, anew when a block opens

A base-size step launches some 1,600 kernels, which on a fast card takes longer than the kernels themselves.
The gradients are those of `run` itself, and dropout draws the same numbers. Batches must have few shapes:
those of `widened`, packed with `multiple=TOKENS`.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from extras.packing import Packing
from tasks import padding_of

LENGTH, TOKENS = 32, 512  # a sequence is padded to a multiple of the one, a packed batch to one of the other


class Graphed:
    def __init__(self, run: Callable, learned: Iterable[nn.Parameter]):
        self.run, self.learned, self.open, self.graphs = run, list(learned), None, {}

    def __call__(self, batch: dict) -> torch.Tensor:
        """The loss; it and the gradients are overwritten by the next call."""
        now = [parameter.requires_grad for parameter in self.learned]
        if now != self.open:  # the backward pass reaches down to another block
            self.open, self.graphs, self.pool = now, {}, torch.cuda.graph_pool_handle()
        new = [*inputs_in(batch)]
        shapes = tuple(value.shape for value in new)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(batch)
        graph, inputs, loss, gradients = self.graphs[shapes]
        for mine, value in zip(inputs, new):
            mine.copy_(value)
        graph.replay()
        for parameter, gradient in zip(self.learned, gradients):
            parameter.grad = gradient
        return loss

    def capture(self, batch: dict) -> tuple:
        """The graph, the tensors it reads, and those it writes: loss and gradients, None where frozen."""
        random, stream, graph = torch.cuda.get_rng_state(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(batch)  # libraries set themselves up in a pass that is not captured
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.learned:
            parameter.grad = None
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.run(batch)
        torch.cuda.set_rng_state(random)
        return graph, [*inputs_in(batch)], loss, [parameter.grad for parameter in self.learned]


def inputs_in(batch: dict) -> Iterator[torch.Tensor]:
    for value in batch.values():
        yield from value.tensors() if isinstance(value, Packing) else [value]


def widened(make: Callable, tokenizer, most: int, examples: list[dict]) -> dict[str, torch.Tensor]:
    """The batch that `make` gives, its sequences [.., T] padded to a multiple of LENGTH, at most `most`."""
    batch = make(examples)
    tokens = batch["input_ids"].shape[-1]
    more = max(0, min(-tokens % LENGTH, most - tokens))
    padding = padding_of(tokenizer)
    return batch | {name: nn.functional.pad(value, (0, more), value=padding.get(name, 0))
                    for name, value in batch.items() if value.dim() > 1}
