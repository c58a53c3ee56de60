"""The diagonal of the Fisher information of any blocks of a model, and its trace, from per-example gradients.

Liu et al. 2024 (FUN with Fisher), equation 1:  tr(F) = E_x E_{y ~ p(y|x)} || grad_w log p(y|x) ||^2

    from fisher import fisher_trace, fisher_diagonal
    blocks = [model.layers[0], model.layers[1]]            # any modules of the model
    trace = fisher_trace(model, batches, blocks)           # batches: dicts for model(**batch); [len(blocks)]
    diagonal = fisher_diagonal(model, batches, blocks)     # per block {parameter name: tensor of its shape}
    trace = fisher_trace(model, batches, blocks, labels="exact")   # all classes, not one draw per example

How: one backward pass over a batch gives the gradients g of log p with respect to the OUTPUTS of the blocks'
layers, for every example on its own, since no example influences another. A linear layer with inputs x_t and
output gradients g_t has the weight gradient sum_t g_t x_t^T, summed over tokens t BEFORE it is squared. No
weight gradient is formed, and `requires_grad` plays no part: frozen blocks are measured like open ones.
LayerNorm, Embedding and LoRA (y = s B A x is two such layers) work alike; any other parameter takes a pass
backward per example. Batch first: what layers see must be [B, ...] or, for multiple choice, [B * C, ...].
The official code takes the argmax label and squares the gradient of the batch mean: labels="official".
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import layer_norm

LABELS = ("sampled", "exact", "argmax", "gold", "official")
TARGETS = ("labels", "start_positions", "end_positions")  # batch entries that only "gold" reads
CHUNK = 2**24  # elements of per-example gradients held at a time


def fisher_trace(
    model: nn.Module,
    batches: Iterable[dict],
    blocks: list[nn.Module],
    labels: str = "sampled",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """tr(F) of each block: the mean over examples of || grad log p(y|x) ||^2, as float64 [len(blocks)].

    labels: "sampled" draws one y per example from the model's own output (equation 1) with `generator` (None:
    a fresh one with seed 0); "exact" takes the expectation over all C classes, in C backward passes; "argmax"
    the likeliest class; "gold" the batch's own labels (the empirical Fisher). "official" is the official
    repository's estimator: argmax, the squared gradient of the batch mean over the batch size, summed.
    The model runs in eval mode and returns `.logits` [B, C], or `.start_logits` and `.end_logits` [B, T] with
    log p = log p_start + log p_end, over positions where `attention_mask` ([B, T] or [B, 1, 1, T]) is not 0.
    Parameters, `.grad`, `requires_grad`, modes, hooks and the global random state are left as they were, also
    after an exception.
    Raises ValueError for unknown labels, no batches, a block without parameters, blocks that the model does
    not call, an output without logits, missing gold labels, or logits that are not finite.
    """
    traces: dict[nn.Parameter, torch.Tensor] = {}

    def add(parameter: nn.Parameter, x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor) -> None:
        traces[parameter] = traces.get(parameter, 0) + (weight * _squared_norms(x, g)).sum().double()

    count = _accumulate(model, batches, blocks, labels, generator, add)
    zero = torch.zeros_like(next(iter(traces.values()), torch.zeros((), dtype=torch.float64)))
    return torch.stack([sum((traces.get(parameter, zero) for parameter in block.parameters()), zero)
                        for block in blocks]) / count


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[dict],
    blocks: list[nn.Module],
    labels: str = "sampled",
    generator: torch.Generator | None = None,
) -> list[dict[str, torch.Tensor]]:
    """The diagonal of F: per block, by parameter name, the mean over examples of the squared gradient.

    Each tensor has its parameter's shape. Arguments, side effects (none) and errors as for `fisher_trace`,
    which is the sum of it, for less.
    """
    squares: dict[nn.Parameter, torch.Tensor] = {}

    def add(parameter: nn.Parameter, x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor) -> None:
        squares[parameter] = squares.get(parameter, 0) + _squares(x, g, weight, parameter.shape)

    count = _accumulate(model, batches, blocks, labels, generator, add)
    return [{name: squares.get(parameter, torch.zeros_like(parameter.detach())) / count
             for name, parameter in block.named_parameters()} for block in blocks]


@torch.enable_grad()
def _accumulate(model: nn.Module, batches: Iterable[dict], blocks: list[nn.Module], labels: str,
                generator: torch.Generator | None, add: Callable) -> int:
    """Call add(parameter, x, g, weight) for every batch, label and parameter; returns what to divide by."""
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, not {labels!r}")
    for index, block in enumerate(blocks):
        if not list(block.parameters()):
            raise ValueError(f"block {index} has no parameters")
    wanted = {parameter for block in blocks for parameter in block.parameters()}
    owners = {module: {name: parameter for name, parameter in module.named_parameters(recurse=False)
                       if parameter in wanted} for module in model.modules()}
    owners = {module: own for module, own in owners.items() if own}
    if not owners:
        raise ValueError("no block is part of the model")
    slow = _without_formula(owners)
    _warn(slow, owners)
    generator = generator or torch.Generator().manual_seed(0)
    examples = 0
    with _restored(model, wanted), _recorder(owners, slow) as tape:
        for batch in batches:
            log_p, calls = _forward(model, batch, slow, tape)
            size = len(log_p[0])
            mixed = {parameter for module, recorded in calls.items() for x, *_ in recorded if len(x) % size
                     for parameter in owners[module].values()}
            if mixed:  # a layer ran once for the whole batch, as for positions: no telling examples apart
                slow |= mixed
                _warn(mixed, owners)
                log_p, calls = _forward(model, batch, slow, tape)
            if not calls and not slow:
                raise ValueError("no block took part in the model's forward pass")
            draws = _draws(log_p, batch, labels, generator)
            for number, (chosen, weight) in enumerate(draws):
                last = number + 1 == len(draws)
                for parameter, x, g in _gradients(chosen, calls, owners, slow, keep_graph=not last):
                    if labels == "official":  # the whole batch as one example, its mean gradient over B
                        x = None if x is None else x.flatten(0, 1)[None]
                        add(parameter, x, g.flatten(0, 1)[None] / size, torch.ones_like(weight[:1]) / size)
                    else:
                        add(parameter, x, g, weight)
            examples += size
    if not examples:
        raise ValueError("no batches: the Fisher information needs at least one example")
    return 1 if labels == "official" else examples


def _is_lora(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling"))


def _without_formula(owners: dict[nn.Module, dict[str, nn.Parameter]]) -> set[nn.Parameter]:
    """The parameters that `_factors` has no formula for, or that two kinds of modules share."""
    kinds: dict[nn.Parameter, set] = {}
    for module, own in owners.items():
        kind = type(module) if type(module) in (nn.Linear, nn.LayerNorm, nn.Embedding) else None
        if _is_lora(module):
            kind = "LoRA"
        elif kind is nn.LayerNorm and len(module.normalized_shape) > 1:
            kind = None
        elif kind is nn.Embedding and (module.max_norm or module.scale_grad_by_freq):
            kind = None
        for parameter in own.values():
            kinds.setdefault(parameter, set()).add(kind)
    return {parameter for parameter, of in kinds.items() if None in of or len(of) > 1}


def _warn(slow: set[nn.Parameter], owners: dict[nn.Module, dict[str, nn.Parameter]]) -> None:
    names = {type(module).__name__ for module, own in owners.items() if slow & set(own.values())}
    if names:
        warnings.warn(f"parameters in {', '.join(sorted(names))} take a backward pass per example: slow",
                      stacklevel=4)


@contextmanager
def _restored(model: nn.Module, wanted: set[nn.Parameter]) -> Iterator[None]:
    """Eval mode; modes, `requires_grad` and the global random state come back on exit."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in wanted]
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _recorder(owners: dict, slow: set) -> Iterator[SimpleNamespace]:
    """While `tape.on`, `tape.calls` gets by module each call's input, its version, and the output's place in
    the graph (which, unlike the output, is still true when the model has changed the output in place)."""
    tape = SimpleNamespace(on=False, calls={})

    def record(module, arguments, keywords, output):
        if slow.issuperset(owners[module].values()):
            return output
        x = arguments[0] if arguments else next(iter(keywords.values()))
        if not output.requires_grad:  # below everything that is differentiated: the graph starts here
            output = output.detach().requires_grad_()
        output = output.clone()  # the model may change it in place, which no start and no view survives
        if tape.on:  # and not when gradient checkpointing calls again, inside the backward pass
            tape.calls.setdefault(module, []).append((x.detach(), x._version, get_gradient_edge(output)))
        return output

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in owners]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: nn.Module, batch: dict, slow: set, tape: SimpleNamespace) -> tuple[list, dict]:
    """log p of each output [B, C], and the recorded calls by module."""
    for parameter in slow:
        parameter.requires_grad_()
    tape.on, tape.calls = True, {}
    output = model(**{key: value for key, value in batch.items() if key not in TARGETS})
    tape.on = False
    return _log_probabilities(model, batch, output), tape.calls


def _log_probabilities(model: nn.Module, batch: dict, output) -> list[torch.Tensor]:
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is not None:
        parts = [logits]
    elif getattr(output, "start_logits", None) is not None:
        hidden = batch["attention_mask"].flatten(1) == 0 if "attention_mask" in batch else torch.tensor(False)
        parts = [part.masked_fill(hidden.to(part.device), -torch.inf)
                 for part in (output.start_logits, output.end_logits)]
    else:
        raise ValueError(f"{type(model).__name__} returned no `logits`, nor `start_logits`: it needs a head")
    for part in parts:
        if part.ndim != 2:
            raise ValueError(f"logits must be [B, C], not {list(part.shape)}")
        if not part.is_meta and not part.max(-1).values.isfinite().all():
            raise ValueError("the model's logits are not finite: the Fisher information is undefined")
    return [part.to(torch.promote_types(part.dtype, torch.float32)).log_softmax(-1) for part in parts]


def _draws(log_p: list[torch.Tensor], batch: dict, labels: str, generator: torch.Generator) -> list[tuple]:
    """Pairs of log p(y|x) [B] and weights [B] that stand for the expectation over y."""
    if labels == "exact":  # grad log p has mean zero, so the traces of independent start and end add up
        return [(part[:, y], part[:, y].detach().exp()) for part in log_p for y in range(part.shape[1])]
    chosen = torch.zeros_like(log_p[0][:, 0])
    for part, key in zip(log_p, ("labels",) if len(log_p) == 1 else ("start_positions", "end_positions")):
        if labels == "gold":
            if key not in batch:
                raise ValueError(f"labels='gold' needs {key!r} in every batch")
            y = batch[key].to(part.device)
        elif labels == "sampled" and not part.is_meta:
            p = part.detach().exp().to(generator.device)  # [B, C]
            y = torch.multinomial(p, 1, generator=generator)[:, 0].to(part.device)
        else:
            y = part.argmax(-1)
        is_class = (y >= 0) & (y < part.shape[1])  # the loss ignores other gold labels
        of_y = part.gather(1, y.clamp(0, part.shape[1] - 1)[:, None])[:, 0]
        chosen = chosen + torch.where(is_class, of_y, 0)
    return [(chosen, torch.ones_like(chosen).detach())]


def _gradients(chosen: torch.Tensor, calls: dict, owners: dict, slow: set, keep_graph: bool) -> Iterator:
    """(parameter, x, g) such that its gradient of log p(y|x) is, for each example, sum_t g_t x_t^T."""
    edges = [edge for recorded in calls.values() for *_, edge in recorded]
    by_edge = {}
    if edges:
        by_edge = dict(zip(edges, torch.autograd.grad(
            chosen.sum(), edges, retain_graph=keep_graph or bool(slow), allow_unused=True)))
    factors: dict[nn.Parameter, list[tuple]] = {}
    with torch.no_grad():
        for module, recorded in calls.items():
            for x, version, edge in recorded:
                if by_edge[edge] is None:
                    continue
                if x._version != version:
                    raise ValueError(f"the model changed the input of a {type(module).__name__} in place")
                x, g = _by_example(x, len(chosen)), _by_example(by_edge[edge], len(chosen))
                for name, parameter in owners[module].items():
                    if parameter not in slow:
                        factors.setdefault(parameter, []).append(_factors(module, name, x, g))
    for parameter, several in factors.items():  # all uses of a parameter are one sum: they lengthen T
        xs, gs = zip(*several)
        yield parameter, None if xs[0] is None else torch.cat(xs, 1), torch.cat(gs, 1)
    if slow:
        rows = [torch.autograd.grad(one, list(slow), retain_graph=True, allow_unused=True) for one in chosen]
        for parameter, column in zip(slow, zip(*rows)):
            column = [torch.zeros_like(parameter) if row is None else row for row in column]
            yield parameter, None, torch.stack(column).detach().flatten(1)[:, None]  # [B, 1, size]


def _by_example(value: torch.Tensor, examples: int) -> torch.Tensor:
    """[B, H], [B, T, H] or, for multiple choice, [B * C, T, H] -> [B, tokens, H]; ids -> [B, tokens]."""
    if not value.is_floating_point():
        return value.reshape(examples, -1)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return value.reshape(examples, -1, value.shape[-1])


def _factors(module: nn.Module, name: str, x: torch.Tensor, g: torch.Tensor) -> tuple:
    """x and g of the gradient sum_t g_t x_t^T of one parameter; x None: sum_t g_t; x integers: g_t's rows."""
    if name == "bias":
        return None, g
    if isinstance(module, nn.LayerNorm):
        return None, g * layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.Embedding):
        padding = -1 if module.padding_idx is None else module.padding_idx
        return x, g * (x != padding)[..., None]
    if name == "lora_A":
        return x, g @ module.lora_B.to(g.dtype) * module.scaling
    if name == "lora_B":
        return x @ module.lora_A.to(x.dtype).T, g * module.scaling
    return x, g


def _squared_norms(x: torch.Tensor | None, g: torch.Tensor) -> torch.Tensor:
    """|| sum_t g_t x_t^T ||^2 of each example [B], by the cheaper of two ways."""
    if x is None:
        return g.sum(1).square().sum(1)
    tokens, n_in, n_out = g.shape[1], x.shape[-1], g.shape[2]
    if not x.is_floating_point():  # the rows of equal ids add up
        return torch.cat([((i[:, :, None] == i[:, None]) * (h @ h.mT)).sum((1, 2))
                          for i, h in _chunks(tokens * tokens, x, g)])
    if tokens * (n_in + n_out) < n_in * n_out:  # sum_t,t' (g_t . g_t')(x_t . x_t')
        return torch.cat([((y @ y.mT) * (h @ h.mT)).sum((1, 2)) for y, h in _chunks(tokens * tokens, x, g)])
    return torch.cat([(h.mT @ y).square().sum((1, 2)) for y, h in _chunks(n_in * n_out, x, g)])


def _squares(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, shape: tuple) -> torch.Tensor:
    """sum_b weight_b (sum_t g_t x_t^T)^2, elementwise, in the parameter's shape."""
    if x is None:
        return (weight[:, None] * g.sum(1).square()).sum(0).reshape(shape)
    if x.is_floating_point():
        return sum((w[:, None, None] * (h.mT @ y).square()).sum(0)
                   for y, h, w in _chunks(x.shape[2] * g.shape[2], x, g, weight))
    keys, row = (torch.arange(len(x), device=x.device)[:, None] * shape[0] + x).unique(return_inverse=True)
    rows = torch.zeros(len(keys), g.shape[2], dtype=g.dtype, device=g.device)
    rows.index_add_(0, row.flatten(), g.flatten(0, 1))  # one row per example and token id
    total = torch.zeros(shape, dtype=g.dtype, device=g.device)
    return total.index_add_(0, keys % shape[0], weight[keys // shape[0], None] * rows.square())


def _chunks(size: int, *tensors: torch.Tensor) -> Iterable[tuple]:
    """The tensors in groups of examples, of which `size` elements each fit into CHUNK."""
    return zip(*(tensor.split(max(1, CHUNK // size)) for tensor in tensors))
