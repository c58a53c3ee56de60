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
backward per example, and so does one whose layer does not see [B, ...] (for multiple choice [B * C, ...]) or
that is used outside its layer: a second forward pass, of one example of the batch alone, tells which.
Heads: classes, spans, labels of positions (tags, language models), several labels at once, regression.
labels="official" is what the paper's code computes instead (see `fisher_trace`).
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, product
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import layer_norm, pad

LABELS = ("sampled", "exact", "argmax", "gold", "official")
FAMILY_OF_PROBLEM = {"single_label_classification": "classes", "multi_label_classification": "bernoulli",
                     "regression": "gaussian"}  # by a config's problem_type
TARGETS = ("labels", "start_positions", "end_positions")  # batch entries that the model does not see
CHUNK = 2**24  # elements of per-example gradients held at a time
PASSES = 4096  # backward passes that "exact" may take for labels of positions
CAUSAL = re.compile("ForCausalLM|ForConditionalGeneration|(?<!XLNet)(?<!With)LMHeadModel|ModelWithLMHead|"
                    "BertGenerationDecoder")  # transformers' names; XLNet and XLMWith… do not shift


def fisher_trace(model: nn.Module, batches: Iterable[dict], blocks: list[nn.Module], labels: str = "sampled",
                 generator: torch.Generator | None = None, draws: int = 1,
                 family: str | None = None) -> torch.Tensor:
    """tr(F) of each block: the mean over examples of || grad log p(y|x) ||^2, as float64 [len(blocks)].

    labels: "sampled" draws y from the model's own output (equation 1) with `generator` (None: a fresh one
    with seed 0), `draws` times from one forward pass; "exact" takes the expectation, in a backward pass for
    each class of each label (of positions at most 4,096); "argmax" the likeliest y; "gold" the batch's own
    labels (the empirical Fisher). "official" is the official repository's estimator: the sum over batches of
    || grad m ||^2 / B, where B is the first batch's size and m the mean of log p over all rows of logits of a
    batch, each with its likeliest y, padding and all. It is the paper's if fed as there: 41 batches of a
    shuffled loader, padded to 384 for spans.
    The model runs in eval mode. Its logits (or `.logits`) are [B, C], of one label, or [B, T, C], of a label
    of each position: log p is the sum over the positions that count, which are those whose `labels` [B, T]
    are not -100, or, in a batch without labels, whose attention mask (`decoder_attention_mask` of an
    encoder-decoder) is not 0, or, without a mask, all. Logits t of a causal model are of token t + 1 (see
    `_predicts_next`). Or it returns `.start_logits` and `.end_logits` [B, T]: log p is the sum of both, over
    the tokens of `attention_mask` ([B, T] or [B, 1, 1, T]).
    family: "classes"; "bernoulli", C independent labels, logits [B, C]; "gaussian", C values of mean `logits`
    and variance 1, which have no likeliest y; None: by `problem_type` and `num_labels` of the model's config.
    Parameters, `.grad`, `requires_grad`, modes, hooks and the global random state are left as they were, also
    after an exception. `torch.no_grad()` and `torch.inference_mode()` around the call make no difference.
    Raises ValueError for arguments and labels that do not fit, no batches, a block without parameters or that
    the model does not call, logits of no such kind or that are not finite, and a model in which one example
    of a batch changes the output of another.
    """
    def trace(parameter: nn.Parameter, gradient: Factors) -> torch.Tensor:
        return gradient.squared_norms().sum().double()  # Eq. 1: || grad log p(y|x) ||^2

    sums, count = _accumulate(model, batches, blocks, labels, generator, draws, family, trace)
    zero = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    return torch.stack([sum(sums.get(parameter, zero) for parameter in block.parameters())
                        for block in blocks]) / count  # Eq. 1: E_x


def fisher_diagonal(model: nn.Module, batches: Iterable[dict], blocks: list[nn.Module],
                    labels: str = "sampled", generator: torch.Generator | None = None, draws: int = 1,
                    family: str | None = None) -> list[dict]:
    """The diagonal of F: per block, by parameter name, the mean over examples of the squared gradient.

    Each tensor has its parameter's shape. Arguments, side effects (none) and errors as for `fisher_trace`,
    which is the sum of it, for less.
    """
    def squares(parameter: nn.Parameter, gradient: Factors) -> torch.Tensor:
        return gradient.squares(parameter.shape)

    sums, count = _accumulate(model, batches, blocks, labels, generator, draws, family, squares)
    return [{name: sums.get(parameter, torch.zeros_like(parameter.detach())) / count
             for name, parameter in block.named_parameters()} for block in blocks]


# ------------------------------------------------------------------------------------------------------------
# Equation 1: the gradients of single examples, as factors, and the loop over batches and labels
# ------------------------------------------------------------------------------------------------------------


class Sum(NamedTuple):
    """sum_t g_t: of a bias, of LayerNorm's weight, or of any parameter whose gradients are formed (T = 1)."""

    g: torch.Tensor  # [B, T, H]

    def squared_norms(self) -> torch.Tensor:  # [B]
        return self.g.sum(1).square().sum(1)

    def squares(self, shape: torch.Size) -> torch.Tensor:
        """The sum over examples of the squared gradient, elementwise, in the parameter's shape."""
        return self.g.sum(1).square().sum(0).reshape(shape)


class Products(NamedTuple):
    """sum_t g_t x_t^T: of a linear layer's weight."""

    x: torch.Tensor  # [B, T, n_in]
    g: torch.Tensor  # [B, T, n_out]

    def squared_norms(self) -> torch.Tensor:  # [B], by the cheaper of two ways
        tokens, n_in, n_out = self.g.shape[1], self.x.shape[2], self.g.shape[2]
        if tokens * (n_in + n_out) < n_in * n_out:  # sum_t,t' (g_t . g_t')(x_t . x_t')
            return torch.cat([((x @ x.mT) * (g @ g.mT)).sum((1, 2)) for x, g in _chunks(tokens**2, *self)])
        return torch.cat([(g.mT @ x).square().sum((1, 2)) for x, g in _chunks(n_in * n_out, *self)])

    def squares(self, shape: torch.Size) -> torch.Tensor:
        return sum((g.mT @ x).square().sum(0) for x, g in _chunks(self.x.shape[2] * self.g.shape[2], *self))


class Rows(NamedTuple):
    """An embedding's: g_t is added to row i_t of zeros."""

    i: torch.Tensor  # [B, T]
    g: torch.Tensor  # [B, T, H]

    def squared_norms(self) -> torch.Tensor:  # [B]; the rows of equal ids add up
        return torch.cat([((i[:, :, None] == i[:, None]) * (g @ g.mT)).sum((1, 2))
                          for i, g in _chunks(self.i.shape[1] ** 2, *self)])

    def squares(self, shape: torch.Size) -> torch.Tensor:
        (i, g), examples = self, torch.arange(len(self.i), device=self.i.device)
        keys, row = (examples[:, None] * shape[0] + i).unique(return_inverse=True)
        rows = torch.zeros(len(keys), g.shape[2], dtype=g.dtype, device=g.device)
        rows.index_add_(0, row.flatten(), g.flatten(0, 1))  # one row per example and token id
        total = torch.zeros(shape, dtype=g.dtype, device=g.device)
        return total.index_add_(0, keys % shape[0], rows.square())


Factors = Sum | Products | Rows


def _chunks(size: int, *tensors: torch.Tensor) -> Iterable[tuple]:
    """The tensors in groups of examples, or of positions, of which `size` elements each fit into CHUNK."""
    return zip(*(tensor.split(max(1, CHUNK // max(1, size))) for tensor in tensors))


def _factors(module: nn.Module, name: str, x: torch.Tensor, g: torch.Tensor) -> Factors:
    """The gradients of one parameter of a layer with inputs x and output gradients g, [B, T, ...]."""
    if name == "bias":
        return Sum(g)
    if isinstance(module, nn.LayerNorm):
        return Sum(g * layer_norm(x, module.normalized_shape, eps=module.eps))
    if isinstance(module, nn.Embedding):
        padding = -1 if module.padding_idx is None else module.padding_idx
        return Rows(x, g * (x != padding)[..., None])
    if name == "lora_A":  # y = s B A x: the gradient at A x is s B^T g
        return Products(x, g @ module.lora_B.to(g.dtype) * module.scaling)
    if name == "lora_B":
        return Products(x @ module.lora_A.to(x.dtype).T, g * module.scaling)
    return Products(x, g)


def _by_example(value: torch.Tensor, examples: int) -> torch.Tensor:
    """[B, H], [B, T, H] or, for multiple choice, [B * C, T, H] -> [B, tokens, H]; ids -> [B, tokens]."""
    if not value.is_floating_point():
        return value.reshape(examples, -1)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return value.reshape(examples, -1, value.shape[-1])


def _accumulate(model: nn.Module, batches: Iterable[dict], blocks: list[nn.Module], labels: str,
                generator: torch.Generator | None, draws: int, family: str | None,
                measure: Callable) -> tuple[dict, int]:
    """The sum of measure(parameter, gradient) by parameter over batches and labels; and what to divide by."""
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, not {labels!r}")
    if family not in (None, *FAMILY_OF_PROBLEM.values()):
        known = ", ".join(FAMILY_OF_PROBLEM.values())
        raise ValueError(f"family must be None or one of {known}, not {family!r}")
    if type(draws) is not int or draws < 1 or draws > 1 and labels != "sampled":
        raise ValueError(f"draws must be a whole number from 1, and 1 unless labels='sampled', not {draws!r}")
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    generator = generator or torch.Generator().manual_seed(0)
    owners = _owners(model, blocks)
    slow = _without_formula(owners)
    _warn(slow, owners)
    sums, examples, first, used = {}, 0, 0, set()
    with _restored(model), _recorder(model, owners, slow) as tape:
        tape.labels, tape.draws, tape.generator, tape.family = labels, draws, generator, family
        for batch in batches:
            inputs = {key: value.clone() if torch.is_tensor(value) and value.is_inference() else value
                      for key, value in batch.items() if key not in TARGETS}  # a clone autograd may save
            logits, calls = _checked_forward(tape, inputs)
            size = len(logits)
            if not size:
                continue
            examples, first = examples + size, first or size
            if logits.requires_grad:
                used.update(*(owners[module].values() for module in calls))
            for y in _terms(tape, logits, _given(tape, logits, batch)):
                for parameter, gradient in _gradients(tape, logits, y, calls):
                    used.add(parameter)
                    if labels == "official":  # the batch as one example [1, B T, H]: its mean gradient
                        gradient = type(gradient)(*(factor.flatten(0, 1)[None] for factor in gradient))
                        rows = size if tape.head == "bernoulli" else y.numel()  # of logits in this batch
                        gradient = gradient._replace(g=gradient.g / (rows * first**0.5))  # squared: / B
                    sums[parameter] = sums.get(parameter, 0) + measure(parameter, gradient)
    if not examples:
        raise ValueError("no batches: the Fisher information needs at least one example")
    if idle := [index for index, block in enumerate(blocks) if used.isdisjoint(block.parameters())]:
        who = "no block" if len(idle) == len(blocks) else f"not every block (not {', '.join(map(str, idle))})"
        raise ValueError(f"{who} took part in the model's forward pass")
    return sums, 1 if labels == "official" else examples * draws


def _forward(tape: SimpleNamespace, inputs: dict) -> tuple[torch.Tensor, dict]:
    """The logits, and the recorded calls by module."""
    if not tape.cut:
        for parameter in tape.slow:
            parameter.requires_grad_()
    tape.on, tape.calls = True, {}
    output = tape.model(**inputs)
    tape.on = False
    return _logits(tape, inputs, output), tape.calls


def _logits(tape: SimpleNamespace, batch: dict, output) -> torch.Tensor:
    """The logits as [B, T, C], T independent labels of C classes: T = 1 of one label, 2 of start and end;
    C = 2 of a Bernoulli, 1 of a Gaussian (its mean). Says in `tape.head` what they are of."""
    name, mask = type(tape.model).__name__, batch.get("attention_mask")
    if type(output) is tuple:
        raise ValueError(f"{name} returned a tuple: set `model.config.return_dict = True`, or return logits")
    if isinstance(output, dict):
        output = SimpleNamespace(**output)
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    is_span = logits is None and getattr(output, "start_logits", None) is not None
    if is_span:
        logits = torch.stack([output.start_logits, output.end_logits], 1)
        if mask is not None and tape.labels != "official":
            logits = logits.masked_fill(mask.flatten(1)[:, None].to(logits.device) == 0, -torch.inf)
    elif logits is None:
        raise ValueError(f"{name} returned no `logits`, nor `start_logits`: it needs a head")
    family = tape.family or ("classes" if is_span else _family(tape.model, logits))
    is_classes = family == "classes"
    most_dimensions, least_classes = (3, 2) if is_classes else (2, 1)
    if not 2 <= logits.ndim <= most_dimensions or logits.shape[-1] < least_classes:
        raise ValueError("logits must be [B, C] or [B, T, C] with two classes or more, or [B, C] with family="
                         f"'bernoulli' or 'gaussian', not {list(logits.shape)} with {family!r}")
    if not logits.is_meta and not (logits.max(-1).values if is_classes else logits).isfinite().all():
        raise ValueError("the model's logits are not finite: the Fisher information is undefined")
    if family == "gaussian" and tape.labels in ("argmax", "official"):
        raise ValueError(f"labels={tape.labels!r}: where a Gaussian is likeliest, its gradient is zero")
    tape.head = "spans" if is_span else "tokens" if logits.ndim == 3 else family
    if family == "bernoulli":  # sigmoid(z) is in the softmax of (0, z)
        return torch.stack([torch.zeros_like(logits), logits], 2)
    return logits if logits.ndim == 3 else logits.unsqueeze(1 if is_classes else 2)


def _family(model: nn.Module, logits: torch.Tensor) -> str:
    """That of the model's own loss, for which positions and choices are classes whatever the config says."""
    config = getattr(model, "config", None)
    if logits.ndim != 2 or "MultipleChoice" in type(model).__name__:
        return "classes"
    is_one = logits.shape[1] == 1 == getattr(config, "num_labels", None)
    problem = getattr(config, "problem_type", None)
    return FAMILY_OF_PROBLEM.get(problem, "gaussian" if is_one else "classes")


def _given(tape: SimpleNamespace, logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """y [B, T]: the batch's labels, or 0 where one is still to be chosen; -100 where none counts."""
    names = TARGETS[1:] if tape.head == "spans" else TARGETS[:1]
    if tape.labels == "gold" and not batch.keys() >= {*names}:
        raise ValueError(f"labels='gold' needs {' and '.join(map(repr, names))} in every batch")
    if tape.labels == "official" or tape.head != "tokens" and tape.labels != "gold":
        return torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    is_masked = names[0] not in batch
    if is_masked:
        names = ("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask",)
        batch = {names[0]: torch.ones(logits.shape[:2])} | batch
    columns = [torch.atleast_1d(torch.as_tensor(batch[name], device=logits.device)) for name in names]
    y = torch.cat([column[:, None].flatten(1) for column in columns], 1)
    if is_masked:
        what, y = "a mask", torch.where(y != 0, 0, -100)
    elif tape.head == "gaussian":
        what, is_fit = "finite", y.isfinite()
    else:
        what, is_fit = "whole numbers", y == y.long()
        if tape.head != "spans":  # a span may be cut off: out of range it counts for nothing, as in the loss
            what += f" below {logits.shape[2]}, or -100,"
            is_fit &= (y == -100) | (y >= 0) & (y < logits.shape[2])
    if y.shape != logits.shape[:2] or not (is_masked or is_fit.all()):
        raise ValueError(f"{' and '.join(map(repr, names))} must be {what} of shape {list(logits.shape[:2])},"
                         f" not {str(y.dtype)[6:]} of {list(y.shape)}")
    if tape.head == "tokens" and _predicts_next(tape.model, batch):
        y = pad(y[:, 1:], (0, 1), value=-100)
    return y if tape.head == "gaussian" else y.long()


def _predicts_next(model: nn.Module, batch: dict) -> bool:
    """Whether logits t are of token t + 1: by the name of the model's class, or of a base of it."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        if "decoder_input_ids" not in batch:  # some models would take input_ids for them
            raise ValueError("an encoder-decoder needs 'decoder_input_ids' in every batch: it sees no labels")
        return False
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft
    causal = [module for module in model.modules()
              if any(CAUSAL.search(kind.__name__) for kind in type(module).__mro__)]
    if causal and causal[0] is not model:
        raise ValueError(f"{type(model).__name__} holds a {type(causal[0]).__name__}: whether its logits are "
                         "of the next token is not known; measure the inner model")
    return bool(causal)


def _terms(tape: SimpleNamespace, logits: torch.Tensor, given: torch.Tensor) -> Iterator[torch.Tensor]:
    """For each backward pass y [B, T]: the label of each position, any number where it is yet to be drawn,
    -100 where none counts."""
    _, positions, classes = logits.shape
    if tape.labels != "exact":
        yield from [given] * tape.draws
        return
    if tape.head == "tokens" and positions * classes > PASSES:
        raise ValueError(f"labels='exact' would take {positions} x {classes} backward passes, over {PASSES}: "
                         "choose 'sampled', with many `draws`")
    places = torch.arange(positions, device=given.device)
    for t, c in product(range(positions), range(classes)):  # E grad log p = 0: labels' squares add up
        yield torch.where((given != -100) & (places == t), c, -100)


def _score(tape: SimpleNamespace, logits: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """d log p(y|x) / d logits [B, T, C]: onehot(y) - p, of a Gaussian y - z; 0 where no label counts.

    For "exact" times sqrt(p(y)), to have the square p ||grad log p||^2. Made by pieces of positions: it alone
    is as large as the logits."""
    score, last = torch.empty_like(logits), logits.shape[2] - 1
    labels, generator = tape.labels, tape.generator
    by_position = (tensor.transpose(0, 1) for tensor in (logits.detach(), score, given))  # [T, B, ...]
    for z, of_z, y in _chunks(4 * logits[:, 0].numel(), *by_position):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if tape.head == "gaussian":  # exact: E (y - z)^2 = 1, of the column that counts
            noise = torch.randn(y.shape, generator=generator, device=generator.device).to(z.device)
            of_z.copy_({"sampled": noise, "exact": y != -100, "gold": y - z[..., 0]}[labels][..., None])
            continue
        counts, p = (y >= 0) & (y <= last), z.log_softmax(-1).exp()
        if labels == "sampled" and not z.is_meta:
            rows = p.to(generator.device).flatten(0, 1)
            y = torch.multinomial(rows, 1, generator=generator).view(y.shape).to(z.device)  # Eq. 1: y ~ p
        elif labels not in ("gold", "exact"):
            y = z.argmax(-1)
        y = y.clamp(0, last)[..., None]
        weight = counts[..., None] * p.gather(2, y) ** (0.5 if labels == "exact" else 0)  # [T, B, 1]
        of_z.copy_((-p * weight).scatter_add_(2, y, weight))
    return score


def _gradients(tape: SimpleNamespace, logits: torch.Tensor, y: torch.Tensor, calls: dict) -> Iterator:
    """(parameter, its gradients of log p(y|x) for each example), from one backward pass to the outputs."""
    if not logits.requires_grad:
        return
    score, edges = _score(tape, logits, y), [edge for recorded in calls.values() for *_, edge in recorded]
    is_only = tape.labels != "exact" and tape.draws == 1 and not tape.slow
    found = edges and torch.autograd.grad(logits, edges, score, retain_graph=not is_only, allow_unused=True)
    by_edge = dict(zip(edges, found))
    factors: dict[nn.Parameter, list[tuple]] = {}
    with torch.no_grad():
        for module, recorded in calls.items():
            for x, version, edge in recorded:
                if by_edge[edge] is None:
                    continue
                if x._version != version:
                    raise ValueError(f"the model changed the input of a {type(module).__name__} in place")
                x, g = _by_example(x, len(logits)), _by_example(by_edge[edge], len(logits))
                for name, parameter in tape.owners[module].items():
                    if parameter not in tape.slow:
                        factors.setdefault(parameter, []).append(_factors(module, name, x, g))
    for parameter, uses in factors.items():
        gradient = uses[0]
        if len(uses) > 1:  # all uses of a parameter are one sum: they lengthen T
            gradient = type(gradient)(*(torch.cat(same, 1) for same in zip(*uses)))
        yield parameter, gradient
    if tape.slow:
        yield from _slow_gradients(logits, score, list(tape.slow))


def _slow_gradients(logits: torch.Tensor, score: torch.Tensor, slow: list[nn.Parameter]) -> Iterator:
    """As `_gradients`, from a backward pass per example."""
    rows = [torch.autograd.grad(z, slow, of_z, retain_graph=True, allow_unused=True)
            for z, of_z in zip(logits, score)]
    for parameter, column in zip(slow, zip(*rows)):
        if any(row is not None for row in column):
            column = [torch.zeros_like(parameter) if row is None else row for row in column]
            yield parameter, Sum(torch.stack(column).detach().reshape(len(rows), 1, -1))  # [B, 1, size]


# ------------------------------------------------------------------------------------------------------------
# Robustness: any module, no mark left, and which layers do not see the examples apart
# ------------------------------------------------------------------------------------------------------------


def _owners(model: nn.Module, blocks: list[nn.Module]) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """By module, its own parameters by name, of those that the blocks have."""
    wanted = {parameter for block in blocks for parameter in block.parameters()}
    for index, block in enumerate(blocks):
        if not list(block.parameters()):
            raise ValueError(f"block {index} has no parameters")
    if any(parameter.is_inference() for parameter in wanted):
        raise ValueError("the model was made inside torch.inference_mode(): make or load it outside")
    owners = {module: own for module in model.modules() if (own := {
        name: parameter for name, parameter in module._parameters.items() if parameter in wanted})}
    if any(getattr(module, "scale_grad_by_freq", False) for module in owners):
        raise ValueError("an Embedding with scale_grad_by_freq has no gradients of single examples")
    if not owners:
        raise ValueError("no block is part of the model")
    return owners


def _without_formula(owners: dict[nn.Module, dict[str, nn.Parameter]]) -> set[nn.Parameter]:
    """The parameters that `_factors` has no formula for, or that two kinds of modules share."""
    kinds: dict[nn.Parameter, set] = {}
    for module, own in owners.items():
        for name, parameter in own.items():  # weight_g and weight_orig are of weight norm and of pruning
            is_known = name in ("weight", "bias", "lora_A", "lora_B")
            kinds.setdefault(parameter, set()).add(_kind(module) if is_known else None)
    return {parameter for parameter, of in kinds.items() if None in of or len(of) > 1}


def _kind(module: nn.Module) -> type | str | None:
    """The kind of layer whose formulas hold for this module, or None."""
    if module._parameters.keys() == {"lora_A", "lora_B"} and hasattr(module, "scaling"):
        return "LoRA"
    if type(module) not in (nn.Linear, nn.LayerNorm, nn.Embedding) or "forward" in vars(module):
        return None
    is_odd = getattr(module, "max_norm", None) or len(getattr(module, "normalized_shape", ())) > 1
    return None if is_odd else type(module)


def _warn(slow: set[nn.Parameter], owners: dict, stacklevel: int = 4) -> None:
    names = {type(module).__name__ for module, own in owners.items() if slow & set(own.values())}
    if names:
        warnings.warn(f"parameters in {', '.join(sorted(names))} take a backward pass per example: slow",
                      stacklevel=stacklevel)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Eval mode, gradients for nothing but what asks for them; on exit all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    changing = [parameter for module, _ in modes for parameter in module.parameters(recurse=False)
                if getattr(module, "max_norm", None) or type(module).train is not nn.Module.train]
    copies = [parameter.detach().clone() for parameter in changing]
    try:
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            model.eval()
            model.requires_grad_(False)
            yield
    finally:
        for module, training in modes:  # parents first; by `train`, in which some layers merge and unmerge
            if module.training != training:
                module.train(training)
        for parameter, copy in zip(changing, copies):  # merged and unmerged, it may differ in the last bits
            parameter.data.copy_(copy)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _recorder(model: nn.Module, owners: dict, slow: set) -> Iterator[SimpleNamespace]:
    """While `tape.on`, `tape.calls` gets by module each call's input, its version, and the output's place in
    the graph (which, unlike the output, is still true when the model has changed the output in place).
    With `tape.cut`, outputs are cut off from the graph."""
    tape = SimpleNamespace(model=model, owners=owners, slow=slow, on=False, cut=False, calls={},
                           is_checked=False, known=set())  # of `_checked_forward`

    def record(module, arguments, keywords, output):
        if slow.issuperset(owners[module].values()) or not torch.is_grad_enabled():  # no gradient gets here
            return output
        x = arguments[0] if arguments else next(iter(keywords.values()))
        if tape.cut:
            tape.calls.setdefault(module, []).append((x, None, None))
            return output.detach()
        if not output.requires_grad:  # below everything that is differentiated: the graph starts here
            output = output.detach().requires_grad_()
        output = output.clone()  # the model may change it in place, which no start and no view survives
        if tape.on:  # and not when gradient checkpointing calls again, inside the backward pass
            tape.calls.setdefault(module, []).append((x.detach(), x._version, get_gradient_edge(output)))
        return output

    # first of all hooks: what others make of the output is no part of the layer
    handles = [module.register_forward_hook(record, with_kwargs=True, prepend=True) for module in owners]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _checked_forward(tape: SimpleNamespace, inputs: dict) -> tuple[torch.Tensor, dict]:
    """As `_forward`; of a first batch, and one in which examples have other shapes, it is checked that the
    layers see the examples apart: parameters of those that do not are slow from then on."""
    logits, calls = _forward(tape, inputs)
    size = len(logits)
    shapes = {(module, x.shape[0] / size if x.dim() else 0, x.dim(), x.is_floating_point() and x.shape[-1])
              for module, recorded in calls.items() for x, *_ in recorded if size > 1}  # one tells nothing
    if size and (not tape.is_checked or not shapes <= tape.known):
        tape.is_checked = True
        tape.known |= {shape for shape in shapes if shape[2] > 2}  # fewer: perhaps other rows next time
        if unfit := _unfit(tape, inputs, logits, calls):
            tape.slow |= unfit
            _warn(unfit, tape.owners, stacklevel=5)
            return _forward(tape, inputs)
    return logits, calls


def _unfit(tape: SimpleNamespace, inputs: dict, logits: torch.Tensor, calls: dict) -> set[nn.Parameter]:
    """The parameters whose gradients for single examples the layers' calls do not give.

    A layer that the batch calls another number of times than the example in its middle alone, or with another
    B-th of an input for this example, does not see examples apart: it is called once for all, as for
    positions, or has the batch in another dimension or order.
    Raises ValueError if the model itself mixes examples, or does not run on one.
    """
    size = len(logits)
    i = size // 2  # what comes before or after it in the batch would show
    lone_logits, lone_calls, unfit = _alone(tape, inputs, i, size)
    pairs = []  # a module, and two tensors that should be equal
    for module, recorded in calls.items():
        lone_ones = lone_calls.get(module, ())
        inputs_of = [(x, lone) for (x, *_), (lone, *_) in zip(recorded, lone_ones)]
        if len(recorded) != len(lone_ones) or not all(
                lone.dim() and x.shape == (size * len(lone), *lone.shape[1:]) for x, lone in inputs_of):
            unfit.update(tape.owners[module].values())
            continue
        pairs += [(module, x[i * len(lone) : (i + 1) * len(lone)], lone) for x, lone in inputs_of]
        if _kind(module) == "LoRA":
            pairs += [(module, *pair) for pair in _lora_gradients(module, inputs_of[0][1])]
    if logits.requires_grad:
        pairs += _gradients_by_weight(logits, calls, {module for module, *_ in pairs})
    if logits.is_meta:
        return unfit - tape.slow
    both = _chunks(4 * logits.shape[2], logits[i].detach(), lone_logits[0].detach())
    # a Gaussian's 1 makes the distance absolute where values are small
    outputs = ((None, *(pad(z, (0, 1), value=1) if tape.head == "gaussian" else z.float().softmax(-1)
                        for z in pair)) for pair in both)
    distances = [(module, torch.dist(one.float(), two.float()) / two.float().norm().clamp(min=1e-30))
                 for module, one, two in chain(pairs, outputs)]
    are_equal = (torch.stack([distance for _, distance in distances]) <= _tolerance(tape.model)).tolist()
    apart = {module for (module, _), is_equal in zip(distances, are_equal) if not is_equal}
    if None in apart:
        raise ValueError(f"{type(tape.model).__name__} gives an example another output alone than in a "
                         "batch: without gradients of single examples there is no Fisher information")
    return unfit.union(*(tape.owners[module].values() for module in apart)) - tape.slow


def _alone(tape: SimpleNamespace, inputs: dict, i: int, size: int) -> tuple[torch.Tensor, dict, set]:
    """The logits and calls of example i alone, and the parameters that are used outside their layer, too:
    with the layers' outputs cut off from the graph, the logits or a layer's input still depend on them."""
    fast = {parameter for own in tape.owners.values() for parameter in own.values()} - tape.slow
    for parameter in fast | tape.slow:
        parameter.requires_grad_(parameter in fast)
    tape.cut = True
    try:
        logits, calls = _forward(tape, {key: _one(value, i, size) for key, value in inputs.items()})
        assert len(logits) == 1, "it gives more than one output"
    except (RuntimeError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(f"{type(tape.model).__name__} does not run on one example alone: {error}") from error
    tape.cut, outside = False, set()
    reached = [logits, *(x for recorded in calls.values() for x, *_ in recorded)]
    if reached := [value.sum() for value in reached if value.requires_grad]:
        gradients = torch.autograd.grad(sum(reached), list(fast), allow_unused=True)
        outside = {parameter for parameter, gradient in zip(fast, gradients) if gradient is not None}
    for parameter in fast | tape.slow:
        parameter.requires_grad_(parameter in tape.slow)
    detached = {module: [(x.detach(), *rest) for x, *rest in recorded] for module, recorded in calls.items()}
    return logits, detached, outside


def _one(value, i: int, size: int):
    """Example i's share of a batch's entry; what is shared by all examples stays whole."""
    is_batched = isinstance(value, (list, tuple)) or isinstance(value, torch.Tensor) and value.dim()
    return value[i : i + 1] if is_batched and len(value) == size else value


def _gradients_by_weight(logits: torch.Tensor, calls: dict, modules: set[nn.Module]) -> list[tuple]:
    """For inputs [N, H], whose rows may be a selection of tokens, as an expert's are: the module, and the
    gradients of its rows weighted by b for those of example b, by us and by autograd."""
    flat = {edge: module for module in modules for x, _, edge in calls[module]
            if x.dim() == 2 and x.is_floating_point()}
    if not flat:
        return []
    weight = torch.arange(1.0, len(logits) + 1, device=logits.device)
    slope = torch.linspace(1, 2, logits.shape[2], device=logits.device)  # of any kind that is not constant
    plain, weighted = (torch.autograd.grad(
        logits, [*flat], (one[:, None, None] * slope).expand_as(logits).to(logits.dtype), retain_graph=True,
        allow_unused=True) for one in (torch.ones_like(weight), weight))
    return [(module, one.reshape(len(weight), -1) * weight[:, None], two.reshape(len(weight), -1))
            for module, one, two in zip(flat.values(), plain, weighted) if one is not None and one.numel()]


def _lora_gradients(module: nn.Module, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each parameter, its gradient by our formula and by autograd: not all that has lora_A is s B A x."""
    weights = {name: weight.detach().requires_grad_() for name, weight in module._parameters.items()}
    A, B = weights["lora_A"], weights["lora_B"]  # [r, in], [out, r]
    y, found = torch.func.functional_call(module, weights, (x,)), [torch.zeros_like(A), torch.zeros_like(B)]
    if not x.is_floating_point() or (*x.shape[-1:], *y.shape[-1:]) != (*A.shape[1:], *B.shape[:1]):
        return [(found[0], torch.ones_like(A))]  # something else altogether
    ones = torch.ones_like(y)
    if y.requires_grad:
        found = torch.autograd.grad(y, (A, B), ones, materialize_grads=True)
    ours = [_factors(module, name, _by_example(x, 1), _by_example(ones, 1)) for name in ("lora_A", "lora_B")]
    return [(g[0].T @ x[0], gradient) for (x, g), gradient in zip(ours, found)]


def _tolerance(model: nn.Module) -> float:
    """How far two ways to compute the same may be apart, by the precision of the model's arithmetic."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    kind = next(model.parameters()).device.type
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    is_tf32 = kind == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return 30 * max(1e-3 if is_tf32 else 3e-5, *(torch.finfo(dtype).eps for dtype in dtypes))
