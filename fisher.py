"""The trace of the Fisher information of each block of a model, from exact per-example gradients.

Liu et al. 2024 (FUN with Fisher), equation 1:  tr(F) = E_x E_{y ~ p(y|x)} || grad_w log p(y|x) ||^2

    from fisher import fisher_trace
    blocks = [model.layers[0], model.layers[1]]            # parameters in nn.Linear layers or in LoRA pairs
    trace = fisher_trace(model, batches, blocks)           # batches: dicts for model(**batch); [len(blocks)]
    trace = fisher_trace(model, batches, blocks, labels="exact")   # all classes, not one draw per example

How: one backward pass over a batch gives the gradients g of log p with respect to the OUTPUTS of the blocks'
linear layers, for every example on its own, since no example influences another. A layer with inputs x_t and
output gradients g_t has the weight gradient sum_t g_t x_t^T, summed over tokens t BEFORE it is squared. LoRA,
y = s B A x, is two such layers: A has the gradient sum_t s B^T g_t x_t^T, and B has sum_t s g_t (A x_t)^T. No
weight gradient is formed, and `requires_grad` plays no part: frozen blocks are measured like open ones.
The official code differs: it takes the argmax label and squares the gradient of the batch mean.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

LABELS = ("sampled", "exact")
TARGETS = ("labels", "start_positions", "end_positions")  # batch entries that are ignored


@torch.enable_grad()
def fisher_trace(
    model: nn.Module,
    batches: Iterable[dict],
    blocks: list[nn.Module],
    labels: str = "sampled",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """tr(F) of each block: the mean over examples of || grad log p(y|x) ||^2, as float64 [len(blocks)].

    labels: "sampled" draws one y per example from the model's own output (equation 1) with `generator` (None:
    a fresh one with seed 0); "exact" takes the expectation over all C classes, in C backward passes.
    The model runs in eval mode and must return `.logits` [B, C]. Parameters, `.grad`, modes, hooks and the
    global random state are left as they were, also after an exception.
    Raises ValueError for no batches, a block without parameters or with some outside nn.Linear and LoRA (a
    module with `lora_A`, `lora_B` and `scaling`), blocks that the model does not call, an output without
    logits, or logits that are not finite.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, not {labels!r}")
    linears = [_linear_layers(index, block) for index, block in enumerate(blocks)]  # LoRA pairs among them
    generator = generator or torch.Generator().manual_seed(0)
    trace, examples = torch.zeros(len(blocks), dtype=torch.float64), 0
    with _recorded(model, [linear for block in linears for linear in block]) as calls:
        for batch in batches:
            calls.clear()
            log_p = _log_probabilities(model, batch)  # [B, C]
            outputs = [output for recorded in calls.values() for _, output in recorded]
            if not outputs:
                raise ValueError("no block took part in the model's forward pass")
            for y, weight in _labels_and_weights(log_p.detach(), labels, generator):
                chosen = log_p.gather(1, y[:, None]).sum()
                gradients = torch.autograd.grad(chosen, outputs, retain_graph=True, allow_unused=True)
                gradient_of = dict(zip(map(id, outputs), gradients))
                for index, block in enumerate(linears):
                    for linear in block:
                        norms = _squared_norms(linear, calls.get(linear, []), gradient_of, len(y))  # [B]
                        trace[index] += (weight * norms).sum().item()  # Eq. 1
            examples += len(log_p)
    if not examples:
        raise ValueError("no batches: the trace of the Fisher information needs at least one example")
    return trace / examples


def _is_lora(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling"))


def _linear_layers(index: int, block: nn.Module) -> list[nn.Module]:
    owners = [module for module in block.modules() if list(module.parameters(recurse=False))]
    if not owners:
        raise ValueError(f"block {index} has no parameters")
    for module in owners:
        if not isinstance(module, nn.Linear) and not _is_lora(module):
            kind = type(module).__name__
            raise ValueError(f"block {index} has parameters in {kind}, only nn.Linear and LoRA work")
    return owners


@contextmanager
def _recorded(model: nn.Module, linears: list[nn.Module]) -> Iterator[dict]:
    """Eval mode and, by linear layer, the list of its calls as (input, output); all is restored on exit."""
    calls: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def record(linear, inputs, output):
        if not output.requires_grad:  # below the lowest trainable parameter: the graph starts here
            output.requires_grad_()
        calls.setdefault(linear, []).append((inputs[0].detach(), output))

    modes = [(module, module.training) for module in model.modules()]
    handles = [linear.register_forward_hook(record) for linear in linears]
    try:
        with torch.random.fork_rng():
            model.eval()
            yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _log_probabilities(model: nn.Module, batch: dict) -> torch.Tensor:
    output = model(**{key: value for key, value in batch.items() if key not in TARGETS})
    if getattr(output, "logits", None) is None:
        raise ValueError(f"{type(model).__name__} returned no `logits`: a classification head is needed")
    if not output.logits.isfinite().all():
        raise ValueError("the model's logits are not finite: the Fisher information is undefined")
    return output.logits.float().log_softmax(-1)


def _labels_and_weights(log_p: torch.Tensor, labels: str, generator: torch.Generator) -> list[tuple]:
    """Pairs of labels [B] and their weights [B] that stand for the expectation over y ~ p(y|x)."""
    p = log_p.exp()  # [B, C]
    if labels == "sampled":
        y = torch.multinomial(p.to(generator.device), 1, generator=generator)[:, 0].to(p.device)
        return [(y, torch.ones_like(p[:, 0]))]
    return [(torch.full_like(p[:, 0], c, dtype=torch.long), p[:, c]) for c in range(p.shape[1])]


@torch.no_grad()
def _squared_norms(linear: nn.Module, calls: list, gradient_of: dict, examples: int) -> torch.Tensor:
    """|| sum_t g_t x_t^T ||^2 + || sum_t g_t ||^2 of each example [B], over all calls of one linear layer."""
    calls = [(x, gradient_of[id(output)]) for x, output in calls if gradient_of[id(output)] is not None]
    if not calls:
        return torch.zeros(examples)

    def by_example(tensor):  # [B, H], [B, T, H] or, for multiple choice, [B * C, T, H] -> [B, tokens, H]
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return tensor.reshape(examples, -1, tensor.shape[-1])

    x = torch.cat([by_example(x) for x, _ in calls], dim=1)  # [B, T, in]; a layer called twice is one sum
    g = torch.cat([by_example(g) for _, g in calls], dim=1)  # [B, T, out]
    if _is_lora(linear):
        a, g = linear.lora_A.to(x.dtype), g * linear.scaling  # [r, in], [B, T, out]
        return _outer_norms(x, g @ linear.lora_B.to(g.dtype)) + _outer_norms(x @ a.T, g)
    norms = _outer_norms(x, g)
    return norms if linear.bias is None else norms + g.sum(1).square().sum(1)


def _outer_norms(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """|| sum_t g_t x_t^T ||^2 of each example [B], by the cheaper of two ways."""
    tokens, n_in, n_out = x.shape[1], x.shape[2], g.shape[2]
    if tokens * (n_in + n_out) < n_in * n_out:  # sum_t,t' (g_t . g_t')(x_t . x_t') is cheaper
        return ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
    return (g.mT @ x).square().sum((1, 2))  # [B, out, in]
