"""Pfeiffer adapters, MAD-X language adapters and LoRA for XLM-R, RoBERTa, BERT, DeBERTa and ModernBERT.

Pfeiffer et al., MAD-X, EMNLP 2020; Hu et al., LoRA, ICLR 2022. Written by hand, with the equations, parameter
names and files of AdapterHub's library (adapters 1.3): its adapters load here and ours load there.

    add_language_adapter(model, "en", "AdapterHub/xlm-roberta-base-en-wiki_pfeiffer")   # or a folder; frozen
    blocks = add_task_adapters(model)           # or add_lora: one block per layer, the unit of unfreezing
    set_language(model, "en"); ...              # train with any loop: the head and the open blocks learn
    save_adapter(model, "task", "my_adapter")   # and load_adapter(model, "my_adapter") elsewhere
    set_language(model, "sw")                   # zero-shot: another language below the same task adapter

A layer from the attention sublayer's output x on, with the layer's own LayerNorm LN in both places. From h to
h it goes once for each adapter of the stack, the language's below the task's:

    x --+-- feed-forward --> h --+------------------------------(+)--> h --(+)--> LN --> output
        |                        |                               |          |
        |                       (+)--> LN --> down --> ReLU --> up          |
        |                        |                                          |
        +------------------------+------------------------------------------+

ModernBERT's layers have LN before: of the attention sublayer's output z, x is LN(z), `down` reads h + x, and
the output is z + h.

Adapters, LoRAs and the head are float32 on a model in half precision, too (but for a decoder that shares the
embeddings' weights). After `model.save_pretrained`, `from_pretrained` gives the model without its adapters.
"""

import errno
import io
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn


class Family(NamedTuple):
    """Where a model has what adapters change: in each layer, `output` is LayerNorm(dropout(dense(h)) + x) or,
    in a pre-norm model, the layer is z + mlp(LayerNorm(z))."""

    layers: str  # of the base model
    attention: dict[str, str]  # in a layer, the linear layers that a LoRA may add to; none: no LoRA
    is_pre_norm: bool = False


BERT = Family("encoder.layer", {"query": "attention.self.query", "key": "attention.self.key",
                                "value": "attention.self.value"})
FAMILIES = {"xlm-roberta": BERT, "roberta": BERT, "bert": BERT, "deberta-v2": BERT._replace(attention={}),
            "modernbert": Family("layers", attention={}, is_pre_norm=True)}
ATTENTION = {"query": "q", "key": "k", "value": "v"}  # LoRA's targets, and what the files call them
NON_LINEARITIES = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_new": lambda: nn.GELU("tanh"), "swish": nn.SiLU,
                   "silu": nn.SiLU, "leakyrelu": nn.LeakyReLU, "tanh": nn.Tanh}


# ------------------------------------------------------------------------------------------------------------
# Modules
# ------------------------------------------------------------------------------------------------------------


class BottleneckAdapter(nn.Module):
    """h' = up(ReLU(down(LN(h + x)))) + h through a bottleneck of hidden_size // reduction_factor units.

    `config` has AdapterHub's names for what may be otherwise, as SEQ_BN does.
    Weights start as normal(0, 0.02), biases as 0: `up` is not zero, and a new adapter is not the identity.
    """

    def __init__(self, hidden_size: int, config: dict):
        super().__init__()
        self.config, bottleneck = config, _bottleneck(hidden_size, config["reduction_factor"])
        down = [nn.Linear(hidden_size, bottleneck), NON_LINEARITIES[config["non_linearity"]]()]
        if config["ln_before"]:
            down.insert(0, nn.LayerNorm(hidden_size))
        self.adapter_down = nn.Sequential(*down)
        self.adapter_up = nn.Linear(bottleneck, hidden_size)
        if config["ln_after"]:
            self.adapter_norm_after = nn.LayerNorm(hidden_size)
        self.apply(_start_as_bert)

    @property
    def adapter_norm_before(self) -> nn.LayerNorm:  # transformers saves no weights under two names
        return self.adapter_down[0]

    def forward(self, h: torch.Tensor, x: torch.Tensor, layer_norm: nn.Module) -> torch.Tensor:
        config = self.config
        read = layer_norm(h + x) if config["original_ln_before"] else h
        residual = h if config["residual_before_ln"] else read
        down = self.adapter_down(read.to(self.adapter_up.weight.dtype))  # [B, T, H] -> [B, T, b]
        up = self.adapter_up(down)  # [B, T, b] -> [B, T, H]
        if not config["ln_after"]:
            h = torch.add(residual, up, alpha=config["scaling"])
        elif config["adapter_residual_before_ln"]:
            h = self.adapter_norm_after(torch.add(residual, up, alpha=config["scaling"]))
        else:
            h = residual + self.adapter_norm_after(config["scaling"] * up)
        return h.to(residual.dtype)


class AdaptedOutput(nn.Module):
    """A layer's output sublayer with room for adapters. It takes over the original's modules under their own
    names, so the base model's parameter names and checkpoints stay valid; with no active adapter it computes
    the very same numbers. It is a plain module, hence deepcopy, pickle, `.to()` and `state_dict()` work."""

    def __init__(self, original: nn.Module, stack: list[str]):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = original.dense, original.LayerNorm, original.dropout
        self.adapters = nn.ModuleDict().train(original.training)
        self.stack = stack  # one list for the whole model
        self.original = (original,)  # in a tuple, so that it is no submodule
        self.training = original.training

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        h = self.dropout(self.dense(hidden_states))  # [B, T, 4H] -> [B, T, H]
        return self.LayerNorm(_through_stack(self, h, input_tensor) + input_tensor)


class OutputAdapters(nn.Module):
    """A pre-norm layer's adapters, for what its `mlp` gives: AdapterHub has them beside it, in the layer."""

    def __init__(self, stack: list[str], training: bool):
        super().__init__()
        self.adapters, self.LayerNorm = nn.ModuleDict(), nn.Identity()  # x is normalised already
        self.stack = stack
        self.train(training)


def _through_stack(output: nn.Module, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    for name in output.stack:
        if name in output.adapters:
            h = output.adapters[name](h, x, output.LayerNorm)
    return h


def _after_mlp(mlp: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return _through_stack(mlp.link[0], output, inputs[0])


class LoRA(nn.Module):
    """What LoRA adds to a linear layer's output: (alpha / r) B A x. B starts as 0, so nothing at first.

    Until B has moved, the gradient of A is zero, and with it A's share of tr(F).
    """

    def __init__(self, linear: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r))
        self.scaling = alpha / r
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.lora_A.dtype)
        return x @ self.lora_A.T @ self.lora_B.T * self.scaling  # [B, T, in] -> [B, T, r] -> [B, T, out]


def _add_loras(linear: nn.Linear, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    for name in linear.loras.stack:
        if name in linear.loras:
            output = (output + linear.loras[name](inputs[0])).to(output.dtype)
    return output


class InvertibleAdapter(nn.Module):
    """NICE coupling of the halves e = [e1, e2] of an embedding: y1 = e1 + F(e2), y2 = e2 + G(y1)."""

    def __init__(self, hidden_size: int, config: dict):
        super().__init__()

        def between(size_in: int, size_out: int) -> nn.Sequential:
            bottleneck = _bottleneck(size_in, config["inv_adapter_reduction_factor"])
            return nn.Sequential(nn.Linear(size_in, bottleneck), NON_LINEARITIES[config["non_linearity"]](),
                                 nn.Linear(bottleneck, size_out))

        self.half = hidden_size // 2
        self.F = between(hidden_size - self.half, self.half)
        self.G = between(self.half, hidden_size - self.half)
        self.apply(_start_as_bert)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        e1, e2 = self.halves(embedding)
        y1 = e1 + self.F(e2)
        return torch.cat([y1, e2 + self.G(y1)], dim=-1).to(embedding.dtype)

    def inverse(self, embedding: torch.Tensor) -> torch.Tensor:
        y1, y2 = self.halves(embedding)
        e2 = y2 - self.G(y1)
        return torch.cat([y1 - self.F(e2), e2], dim=-1).to(embedding.dtype)

    def halves(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = embedding.to(self.F[0].weight.dtype)
        return embedding[..., : self.half], embedding[..., self.half :]  # [B, T, H] -> twice [B, T, H / 2]


def _bottleneck(size: int, reduction_factor: float) -> int:
    if not _is_number(reduction_factor) or size // reduction_factor < 1:
        raise ValueError(f"reduction_factor must be in 1..{size}, not {reduction_factor}")
    return int(size // reduction_factor)


def _start_as_bert(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------
# Adding, swapping, removing
# ------------------------------------------------------------------------------------------------------------


class AdapterRecord(nn.ModuleDict):
    """What a patched model knows of its adapters; and, by name, their invertible blocks.

    It stands where AdapterHub has those blocks, at `base_model.invertible_adapters`. Only the block of the
    stack's first adapter is in play: after the embeddings, and inverted before a masked-LM head's decoder.
    """

    def __init__(self):
        super().__init__()
        self.stack: list[str] = []  # the adapters in play, bottom first; every layer looks into this list
        self.configs: dict[str, dict] = {}
        self.placed: dict[str, dict[Place, nn.Module]] = {}  # an adapter's modules, as `_build` gives them
        self.languages: set[str] = set()
        self.handles: list = []  # of hooks
        self.trained: set[str] = set()  # what had `requires_grad` in the base model
        self.widened: list[nn.Parameter] = []  # the head's, if they were in half precision

    def in_play(self) -> InvertibleAdapter | None:
        return self[self.stack[0]] if self.stack and self.stack[0] in self else None


def add_task_adapters(model: nn.Module, reduction_factor: float = 16, name: str = "task",
                      leave_out: tuple[int, ...] = ()) -> list[nn.Module]:
    """Patch one new Pfeiffer adapter into every encoder layer (but those of `leave_out`), and activate it.

    Returns the blocks, bottom layer first. The first adapter of any kind freezes the base model; the head
    keeps its `requires_grad`, and the new blocks have it set.
    Raises ValueError for a model type outside FAMILIES, a model inside another (nn.DataParallel), a name in
    use, or an impossible reduction factor.
    """
    config = SEQ_BN | {"reduction_factor": reduction_factor, "leave_out": list(leave_out)}
    _install(model, name, config, _build(model, config), language=False)
    return adapter_blocks(model, name)


def add_lora(model: nn.Module, r: int = 8, alpha: float = 8, targets: tuple[str, ...] = ("query", "value"),
             name: str = "task", leave_out: tuple[int, ...] = ()) -> list[nn.Module]:
    """Add a LoRA to the attention of every encoder layer, and activate it; otherwise as `add_task_adapters`.

    A block holds all of one layer, by target: query, key, value. Raises ValueError as above.
    """
    if not targets or not set(targets) <= set(ATTENTION):
        raise ValueError(f"targets must be some of {', '.join(ATTENTION)}, not {targets!r}")
    if not _is_count(r):
        raise ValueError(f"r must be a whole number, at least 1, not {r!r}")
    config = LORA | {"r": r, "alpha": alpha, "leave_out": list(leave_out),
                     "attn_matrices": [letter for target, letter in ATTENTION.items() if target in targets]}
    _install(model, name, config, _build(model, config), language=False)
    return adapter_blocks(model, name)


def add_language_adapter(model: nn.Module, name: str, source: str | Path | None = None,
                         reduction_factor: float = 2, invertible: bool = True) -> list[nn.Module]:
    """Add a MAD-X language adapter: frozen, and not in play before `set_language`.

    source: an AdapterHub folder or hub id. None: a new one to be trained by masked-language modelling, with
    this reduction factor in the layers and, if `invertible`, in the block at the embeddings.
    Returns its modules, the layers' bottom to top. Raises as `add_task_adapters` and `load_adapter`.
    """
    if source is not None:
        load_adapter(model, source, name, language=True)
    else:
        config = SEQ_BN | {"reduction_factor": reduction_factor}
        if invertible:
            config |= {"inv_adapter": "nice", "inv_adapter_reduction_factor": reduction_factor}
        _install(model, name, config, _build(model, config), language=True)
    return list(_modules(model, name).values())


def set_language(model: nn.Module, name: str | None) -> None:
    """Stack this language adapter below the task adapter, in place of any other; None: no language adapter.

    Weights, modes and `requires_grad` are not touched, and the cost does not depend on the model's size.
    Raises ValueError, with a list of the languages there are, for one that was not added.
    """
    record = _record(model)
    if name is not None and name not in record.languages:
        known = ", ".join(sorted(record.languages)) or "none"
        raise ValueError(f"no language adapter {name!r} in the model; loaded: {known}")
    tasks = [other for other in record.stack if other not in record.languages]
    record.stack[:] = tasks if name is None else [name, *tasks]


def adapter_blocks(model: nn.Module, name: str) -> list[nn.Module]:
    """The blocks of an adapter or a LoRA, bottom layer first: one for each layer that has it."""
    by_layer: dict[int, dict[str, nn.Module]] = {}
    for place, module in _modules(model, name).items():
        if place.layer is not None:
            by_layer.setdefault(place.layer, {})[place.part] = module
    return [parts.get("output") or nn.ModuleDict(parts) for parts in by_layer.values()]


@torch.no_grad()
def merge_lora(model: nn.Module, name: str = "task") -> None:
    """Fold a LoRA into the base model, W <- W + (alpha / r) B A, and drop it; ValueError if it is none."""
    modules, record = _modules(model, name), _record(model)
    if not _is_lora(record.configs[name]):
        raise ValueError(f"adapter {name!r} is no LoRA: only a LoRA can be merged")
    for place, lora in modules.items():
        place.beside.weight += lora.scaling * lora.lora_B @ lora.lora_A
        del place.beside.loras[name]
    del record.configs[name], record.placed[name]
    record.stack[:] = [other for other in record.stack if other != name]


def remove_adapters(model: nn.Module) -> None:
    """Take out all that this file put in: the model has its own modules and `requires_grad` again."""
    record, base = _record(model), model.base_model
    for handle in record.handles:
        handle.remove()
    for module in list(model.modules()):
        for extra in ("loras", "link"):
            if hasattr(module, extra):
                delattr(module, extra)
    for layer in _layers(model):
        if _family(model).is_pre_norm:
            del layer.output_adapters
        else:
            layer.output.original[0].training = layer.output.training
            layer.output = layer.output.original[0]
    del base.invertible_adapters
    for parameter in record.widened:
        parameter.data, parameter.grad = parameter.data.to(base.get_input_embeddings().weight.dtype), None
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in record.trained)


class Place(NamedTuple):
    """Where one of an adapter's modules stands."""

    layer: int | None  # None: at the embeddings
    part: str  # of the layer: "output", or a LoRA's target
    path: str  # in the base model and in files, of what holds the modules of this place by adapter
    beside: nn.Module  # the linear layer before it, or the embeddings: has device, type and mode


def _build(model: nn.Module, config: dict) -> dict[Place, nn.Module]:
    """The new modules of an adapter, bottom to top, the invertible one last; the model is not touched."""
    family, layers, size = _family(model), _layers(model), model.config.hidden_size
    assert len(layers) == model.config.num_hidden_layers
    if absent := set(config["leave_out"]) - set(range(len(layers))):
        raise ValueError(f"leave_out names layer {min(absent)}: the model has 0..{len(layers) - 1}")
    if _is_lora(config) and not family.attention:
        raise ValueError(f"no LoRA for model type {model.config.model_type!r}, but add_task_adapters works")
    modules = {}
    for i, layer in enumerate(layers):
        if i in config["leave_out"]:
            continue
        if not _is_lora(config):
            name = "output_adapters" if family.is_pre_norm else "output"
            beside = layer.mlp.Wo if family.is_pre_norm else layer.output.dense
            place = Place(i, "output", f"{family.layers}.{i}.{name}.adapters", beside)
            modules[place] = BottleneckAdapter(size, config)
            continue
        for target, name in family.attention.items():
            if ATTENTION[target] in config["attn_matrices"]:
                place = Place(i, target, f"{family.layers}.{i}.{name}.loras", layer.get_submodule(name))
                modules[place] = LoRA(place.beside, config["r"], config["alpha"])
    if config.get("inv_adapter"):
        if getattr(model.config, "embedding_size", size) != size:
            raise ValueError("no invertible adapter where embeddings are of another size than hidden states")
        place = Place(None, "", "invertible_adapters", model.get_input_embeddings())
        modules[place] = InvertibleAdapter(size, config)
    return modules


def _install(model: nn.Module, name: str, config: dict, modules: dict[Place, nn.Module], language: bool):
    """Put `_build`'s modules in place; a language adapter is frozen, any other becomes the one in play."""
    _check_new(model, name)
    record = _patch(model)
    for place, module in modules.items():
        beside = place.beside
        if _is_lora(config) and not hasattr(beside, "loras"):
            beside.loras = nn.ModuleDict().train(beside.training)
            beside.loras.stack = record.stack
            record.handles.append(beside.register_forward_hook(_add_loras))
        dtype = torch.promote_types(beside.weight.dtype, torch.float32)
        module.to(beside.weight.device, dtype).train(beside.training).requires_grad_(not language)
        model.base_model.get_submodule(place.path)[name] = module
    record.configs[name], record.placed[name] = config, modules
    if language:
        record.languages.add(name)
    else:
        record.stack[:] = [other for other in record.stack if other in record.languages] + [name]


def _patch(model: nn.Module) -> AdapterRecord:
    """Freeze the base model and give it room for adapters; once per model."""
    base = model.base_model
    if not hasattr(base, "invertible_adapters"):
        base.invertible_adapters = record = AdapterRecord().train(base.training)
        record.trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
        base.requires_grad_(False)
        for layer in _layers(model):
            if _family(model).is_pre_norm:
                layer.output_adapters = OutputAdapters(record.stack, layer.training)
                record.handles.append(layer.mlp.register_forward_hook(_after_mlp))
                model.config.reference_compile = False  # of transformers 4: compiled, it may miss later hooks
            else:
                layer.output = AdaptedOutput(layer.output, record.stack)
        _hook_invertible(model, record)
        _widen_head(model, record)
    return base.invertible_adapters


# ------------------------------------------------------------------------------------------------------------
# What the story stands on: what fits, the hooks of the invertible block, a head in half precision
# ------------------------------------------------------------------------------------------------------------


def _is_lora(config: dict) -> bool:
    return config.get("architecture") == "lora"


def _family(model: nn.Module) -> Family:
    """Where the model has what adapters change. Raises ValueError if it is none that they fit into."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is not None and kind not in FAMILIES:
        raise ValueError(f"no adapters for model type {kind!r}, only for {', '.join(FAMILIES)}")
    if kind is None or not hasattr(getattr(model, "base_model", None), "embeddings"):
        raise ValueError(f"{type(model).__name__} is no model of transformers: give the model itself (the "
                         "`.module` of one in nn.DataParallel)")
    return FAMILIES[kind]


def _layers(model: nn.Module) -> nn.Module:
    path = _family(model).layers
    return model.base_model.get_submodule(path)


def _record(model: nn.Module) -> AdapterRecord:
    _family(model)
    if not hasattr(model.base_model, "invertible_adapters"):
        raise ValueError("the model has no adapters: add or load one first")
    return model.base_model.invertible_adapters


def _modules(model: nn.Module, name: str) -> dict[Place, nn.Module]:
    """An adapter's modules, bottom to top, the invertible one last."""
    placed = _record(model).placed
    if name not in placed:
        raise ValueError(f"the model has no adapter named {name!r}; it has: {', '.join(placed) or 'none'}")
    return placed[name]


def _check_new(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{name!r} cannot name an adapter: take a word without a dot that torch leaves free")
    if hasattr(model.base_model, "invertible_adapters") and name in _record(model).configs:
        raise ValueError(f"the model already has an adapter named {name!r}: choose another name")


def _hook_invertible(model: nn.Module, record: AdapterRecord) -> None:
    base, decoder = model.base_model, _decoder(model)
    _link(model)
    record.handles += [module.register_forward_pre_hook(_link) for module in {base, model}]
    record.handles.append(base.embeddings.register_forward_hook(_after_embeddings))
    if decoder is not None:
        is_norm = isinstance(decoder, nn.LayerNorm)
        register = decoder.register_forward_hook if is_norm else decoder.register_forward_pre_hook
        record.handles.append(register(_before_decoder))


def _link(model: nn.Module, *_) -> None:
    """Tell the modules with hooks, which know nothing else, the record of the model that calls them, and the
    adapters of their layer: each replica of nn.DataParallel has its own."""
    base = model.base_model
    is_checkpointing = base.training and getattr(_layers(model)[0], "gradient_checkpointing", False)
    for module in filter(None, (base.embeddings, _decoder(model))):
        # in a tuple: no submodules
        module.link = (base.invertible_adapters, base.get_input_embeddings(), is_checkpointing)
    for layer in _layers(model) if _family(model).is_pre_norm else ():
        layer.mlp.link = (layer.output_adapters,)


def _decoder(model: nn.Module) -> nn.Module | None:
    """A masked-LM head's decoder; in DeBERTa-v2's new head, which has none, the LayerNorm before it."""
    if hasattr(model, "lm_predictions"):
        return model.lm_predictions.lm_head.LayerNorm
    return model.get_output_embeddings()  # None in other models


def _after_embeddings(embeddings: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    record, _, is_checkpointing = embeddings.link
    if adapter := record.in_play():
        output = adapter(output)
    if is_checkpointing and torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()  # a reentrant checkpoint passes gradients on if its inputs ask for them alone
    return output


def _before_decoder(module: nn.Module, inputs: tuple, output: torch.Tensor | None = None) -> torch.Tensor:
    """The inverse block, on the decoder's input or, if that is no module, on the output of the one before."""
    record, embeddings, _ = module.link
    adapter, hidden = record.in_play(), inputs[0] if output is None else output
    return (adapter.inverse(hidden) if adapter else hidden).to(embeddings.weight.dtype)  # tied to them


def _widen_head(model: nn.Module, record: AdapterRecord) -> None:
    """Make a head in half precision float32, but for a decoder that shares the embeddings' weights."""
    half, of_base = (torch.float16, torch.bfloat16), set(model.base_model.parameters())
    own = {module: set(module.parameters(recurse=False)) for module in model.modules()}
    kept = of_base.union(*(parameters for parameters in own.values() if parameters & of_base))
    for module, parameters in own.items():
        if kept.isdisjoint(parameters) and any(parameter.dtype in half for parameter in parameters):
            record.handles.append(module.register_forward_pre_hook(_cast_inputs))
            record.widened += parameters
            for parameter in parameters:
                parameter.data, parameter.grad = parameter.data.float(), None


def _cast_inputs(module: nn.Module, inputs: tuple) -> tuple:
    dtype = getattr(module, "weight", getattr(module, "bias", None)).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


# ------------------------------------------------------------------------------------------------------------
# AdapterHub's files
# ------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, name: str, folder: str | Path, with_head: bool = True) -> None:
    """Write an adapter of any kind, and a task's head beside it, in AdapterHub's format, each file whole.

    `adapter_config.json` and `pytorch_adapter.bin`, whose keys are the parameter names in the model.
    Raises ValueError if the model has no adapter of that name.
    """
    weights = {f"{model.base_model_prefix}.{key}": value
               for key, value in _file_weights(_modules(model, name), name).items()}
    config, is_language = _record(model).configs[name], name in _record(model).languages
    facts = {"config": config, "name": name}
    if is_language or config.get("inv_adapter"):
        facts["type"] = "text_lang" if is_language else "text_task"
    _write(model, Path(folder), "adapter_config.json", facts, "pytorch_adapter.bin", weights)
    if with_head and not is_language and _head(model):
        save_head(model, folder)


def save_head(model: nn.Module, folder: str | Path) -> None:
    """Write all parameters outside the base model as `head_config.json` and `pytorch_model_head.bin`."""
    facts = {"config": None, "name": None, "num_labels": model.config.num_labels,
             "label2id": model.config.label2id}
    _write(model, Path(folder), "head_config.json", facts, "pytorch_model_head.bin", _head(model))


def _write(model: nn.Module, folder: Path, config_name: str, facts: dict, weights_name: str, weights: dict):
    facts |= {"hidden_size": model.config.hidden_size, "model_class": type(model).__name__,
              "model_name": model.config._name_or_path, "model_type": model.config.model_type,
              "version": "adapters.1.3.0"}  # of the format; without one, `gelu` would be taken for `gelu_new`
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / weights_name, {key: value.detach().cpu().clone() for key, value in weights.items()})
    write_atomically(folder / config_name, (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode())


def _file_weights(modules: dict[Place, nn.Module], name: str) -> dict[str, torch.Tensor]:
    """An adapter's weights by AdapterHub's names: the LayerNorm before a bottleneck has two in its files."""
    weights = {}
    for place, module in modules.items():
        own = module.state_dict()
        if isinstance(module, BottleneckAdapter) and module.config["ln_before"]:
            own |= module.adapter_norm_before.state_dict(prefix="adapter_norm_before.")
        weights |= {f"{place.path}.{name}.{key}": value for key, value in own.items()}
    return weights


def _head(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters outside the base model; one that is tied to the embeddings is not among them."""
    of_base = set(model.base_model.parameters())
    return {key: parameter for key, parameter in model.named_parameters() if parameter not in of_base}


def save_tensors(path: Path, content: dict) -> None:
    """`torch.save`, whole or not at all, and with the same bytes wherever the file stands."""
    buffer = io.BytesIO()  # to a path, torch.save would store its name, and a full disk is no OSError
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write beside `path`, then rename: the file is the old or the new one, even on a full disk.

    Raises OSError, too, for a folder or a device in its place."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "there is something that is no file", str(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_adapter(model: nn.Module, folder_or_hub_id: str | Path, name: str | None = None,
                 language: bool | None = None) -> str:
    """Load a bottleneck adapter (with its invertible block) or a LoRA that AdapterHub's library or we saved.

    A task adapter or LoRA is in play and trainable at once. The head beside it, or in the same run's folder
    (then the one to name), is loaded with its labels' names if it was saved from the same class of model; a
    warning says so where the model's own head stays. A language adapter is frozen and waits for
    `set_language`. Which of the two it is, `language` says, or else its file's type, or else, if it has an
    invertible block, the head beside it: any but a masked-LM head is a task's (the paper's code trains such,
    with `pfeiffer+inv`), and a warning says what it was taken for. A task adapter's own invertible block is
    trainable, in no block of a layer, and in play while no language adapter stands below.
    Returns the adapter's name: `name`, or else the file's.
    Raises FileNotFoundError if there is no such folder or hub repository, ValueError if its files are broken,
    do not fit the model, ask for what is not computed here or name the model's labels in another order. Then
    the model is as it was.
    """
    folder = head_folder = _fetch(folder_or_hub_id)
    if (folder / "adapter").is_dir() and not (folder / "adapter_config.json").is_file():  # of a run
        folder, head_folder = folder / "adapter", folder / "head"
    elif (folder / "model").is_dir():
        raise FileNotFoundError(f"{folder} has no adapter but a whole model, for from_pretrained, in model/")
    facts = _read_facts(folder / "adapter_config.json", model)
    config = _read_config(folder, facts)
    weights = _read_weights(model, folder, "adapter.safetensors", "pytorch_adapter.bin")
    if language is None and (facts.get("type") or not config.get("inv_adapter")):
        language = facts.get("type") == "text_lang"
    head_facts = {}
    if not language and (head_folder / "head_config.json").is_file():
        head_facts = _read_facts(head_folder / "head_config.json", model)
    language = _guessed(folder_or_hub_id, head_facts) if language is None else language
    is_task = not language or facts.get("type") == "text_task"
    if is_task and not any(key.startswith("invertible_adapters.") for key in weights):
        config |= {"inv_adapter": None}  # early task adapters have one in their config and none in the file

    name = name or facts["name"]
    _check_new(model, name)
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
        modules = _build(model, config)
    _check_fit(folder, _file_weights(modules, facts["name"]), weights)
    head, kind = None, head_facts.get("model_class")
    if not language and kind == type(model).__name__:
        head = _read_head(model, head_folder)
    elif not language and _head(model):
        reason = f"the one beside the adapter is of a {kind}" if kind else "there is none beside the adapter"
        warnings.warn(f"{folder_or_hub_id}: the model keeps its own head, since {reason}", stacklevel=2)

    # all is read and fits: only now is the model touched
    for place, module in modules.items():
        prefix = f"{place.path}.{facts['name']}."
        module.load_state_dict({key: weights[prefix + key] for key in module.state_dict()}, assign=True)
    _install(model, name, config, modules, language)
    if head:
        _put_head(model, *head)
    return name


def load_head(model: nn.Module, folder: str | Path) -> None:
    """Load the head that `save_head` or AdapterHub's library wrote. Raises as `load_adapter`."""
    _put_head(model, *_read_head(model, Path(folder)))


def _guessed(source: str | Path, head: dict) -> bool:
    """Whether an adapter with an invertible block and no type is a language's, by the head beside it."""
    config = head.get("config")  # a flexible head's has its type
    is_masked_lm = "ForMaskedLM" in str(head.get("model_class")) or (
        isinstance(config, dict) and config.get("head_type") == "masked_lm")
    language = not head or is_masked_lm
    reason = f"the head is of a {head['model_class']}" if head else "no head is at hand"
    warnings.warn(f"{source} has an invertible block and no type, and {reason}: taken for a "
                  f"{'language' if language else 'task'} adapter; language={not language} makes it the other",
                  stacklevel=3)
    return language


def _fetch(source: str | Path) -> Path:
    """The folder itself, or the hub repository's files in the local cache; a Path is always a folder."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise FileNotFoundError(f"no adapter folder {source}: name one with adapter_config.json, or a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
    try:
        config = hf_hub_download(source, "adapter_config.json")
        try:
            hf_hub_download(source, "pytorch_adapter.bin")
        except EntryNotFoundError:
            hf_hub_download(source, "adapter.safetensors")
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"no adapter {source}: neither a folder nor a hub repository") from None
    except Exception as error:  # the client's other errors differ from version to version
        raise ValueError(f"adapter {source} is not in the local cache and the hub does not give it "
                         f"({type(error).__name__}): check the connection, or name a folder") from None
    return Path(config).parent


@contextmanager
def _undamaged(path: Path, problem: str) -> Iterator[None]:
    """Whatever a damaged or hostile file provokes, in one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} {problem} ({type(error).__name__}): save or download it again") from None


def _read_facts(path: Path, model: nn.Module) -> dict:
    """The content of a config file, made for a model of this type and size."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no folder in AdapterHub's format: it has no {path.name}")
    needed = ("config", "name", "model_type", "model_class")
    with _undamaged(path, f"is damaged or no JSON object with {', '.join(needed)}"):
        facts = json.loads(path.read_bytes())
        assert facts.keys() >= {*needed}
    for key in ("model_type", "hidden_size"):
        mine = getattr(model.config, key)
        if facts.get(key, mine) != mine:
            raise ValueError(f"{path} is for a model of {key} {facts[key]!r}, this one has {mine!r}")
    return facts


def load_tensors(path: Path, most_bytes: int, device: str | torch.device = "cpu") -> dict:
    """`torch.load` without running any code in the file. Raises ValueError, before anything is unpacked, if
    there are more than so many bytes to unpack, and whatever a damaged file provokes."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    if size > most_bytes:
        raise ValueError(f"{path} unpacks to {size} bytes, more than the {most_bytes} that it could need")
    return torch.load(path, map_location=device, weights_only=True)


def _read_weights(model: nn.Module, folder: Path, *names: str) -> dict[str, torch.Tensor]:
    """The tensors in the first of these files that exists, by their names in the base model or the head."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no weights: neither {' nor '.join(names)}")
    most_bytes = 2**20 + 8 * sum(parameter.numel() for parameter in model.parameters())  # of any adapter
    with _undamaged(path, "holds no readable weights"):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            weights = load_file(path)  # checks the sizes it names against the file's
        else:
            weights = load_tensors(path, most_bytes)
        assert all(isinstance(key, str) and value.is_floating_point() for key, value in weights.items())
    for old, new in OLD_NAMES:
        weights = {key.replace(old, new): value for key, value in weights.items()}
    return {key.removeprefix(model.base_model_prefix + "."): value for key, value in weights.items()}


def _check_fit(folder: Path, expected: dict, weights: dict) -> None:
    """The file's tensors must have exactly these names and shapes."""
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or extra:
        what = f"lacks {min(missing)} ({len(missing)}" if missing else f"has also {min(extra)} ({len(extra)}"
        raise ValueError(f"{folder} does not fit the model: it {what} weights)")
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            raise ValueError(f"{folder} does not fit the model: {key} has the shape "
                             f"{list(weights[key].shape)}, not {list(value.shape)}")


def _read_head(model: nn.Module, folder: Path) -> tuple[list[tuple[nn.Parameter, torch.Tensor]], dict]:
    """Pairs of the model's parameters and the head's, and the head's names of labels, if they have any."""
    path, mine = folder / "head_config.json", _head(model)
    facts = _read_facts(path, model)
    weights = _read_weights(model, folder, "model_head.safetensors", "pytorch_model_head.bin")
    tied = model.state_dict().keys() - mine.keys()
    _check_fit(folder, mine, {key: value for key, value in weights.items() if key not in tied})
    with _undamaged(path, "has no number for each name in label2id"):
        names = {int(number): str(name) for name, number in (facts.get("label2id") or {}).items()}
    names = dict(sorted(names.items()))
    own = {number: str(name) for number, name in model.config.id2label.items()}
    if names != own and sorted(names.values()) == sorted(own.values()):
        order = ", ".join(names.values())
        raise ValueError(f"{folder} has the labels {order}, the model has them in another order: give the "
                         "model this id2label")
    is_named = names.keys() == own.keys() and any(name != f"LABEL_{i}" for i, name in names.items())
    return [(parameter, weights[key]) for key, parameter in mine.items()], names if is_named else {}


def _put_head(model: nn.Module, weights: list[tuple[nn.Parameter, torch.Tensor]], names: dict) -> None:
    for parameter, value in weights:
        parameter.data.copy_(value)
    if names:
        model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_count(value) -> bool:
    return _is_number(value) and isinstance(value, int)


def _is_layers(value) -> bool:
    return isinstance(value, list) and all(isinstance(layer, int) for layer in value)


def _is_switch(value) -> bool:
    return isinstance(value, bool)


def _is_letters(value) -> bool:
    return isinstance(value, list) and set() < {*map(str, value)} <= {*ATTENTION.values()}


OLD_NAMES = (("layer_text_task_adapters.", "adapters."), ("layer_text_lang_adapters.", "adapters."),
             ("invertible_lang_adapters.", "invertible_adapters."))  # before adapter-transformers 2
BOTTLENECK = {  # AdapterHub's key: a Pfeiffer adapter's value; others that a file may set, or a test of them
    "reduction_factor": (16, _is_number), "scaling": (1.0, _is_number), "leave_out": ([], _is_layers),
    "non_linearity": ("relu", (*NON_LINEARITIES,)), "original_ln_before": (True, _is_switch),
    "ln_before": (False, _is_switch), "ln_after": (False, _is_switch), "inv_adapter": (None, ("nice",)),
    "residual_before_ln": (True, _is_switch), "adapter_residual_before_ln": (False, _is_switch),
    "inv_adapter_reduction_factor": (None, lambda value: value is None or _is_number(value)),
    "mh_adapter": (False, ()), "output_adapter": (True, ()), "original_ln_after": (True, ()),
    "is_parallel": (False, ()), "use_gating": (False, ()), "cross_adapter": (False, ()), "dropout": (0.0, ()),
    "phm_layer": (False, ()), "stochastic_depth": (0.0, ()),
}
LOW_RANK = {  # the same for a LoRA
    "r": (8, _is_count), "alpha": (8, _is_number),
    "attn_matrices": (["q", "v"], _is_letters), "leave_out": ([], _is_layers), "architecture": ("lora", ()),
    "composition_mode": ("add", ()), "selfattn_lora": (True, ()), "intermediate_lora": (False, ()),
    "output_lora": (False, ()), "dropout": (0.0, ()), "use_gating": (False, ()), "use_dora": (False, ()),
    "vera_d": (None, ()), "vera_b": (None, ()),
}
SEQ_BN = {key: value for key, (value, _) in BOTTLENECK.items()}
LORA = {key: value for key, (value, _) in LOW_RANK.items()}
INVERTIBLE = SEQ_BN | {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
NAMED = {"seq_bn": SEQ_BN, "pfeiffer": SEQ_BN, "seq_bn_inv": INVERTIBLE, "pfeiffer+inv": INVERTIBLE,
         "lora": LORA}
WITHOUT_EFFECT = re.compile(  # how weights start, AdapterFusion, and PHM layers, which phm_layer turns on
    r"init_weights\w*|attention_type|new_attention_norm|hypercomplex\w*|(?!phm_layer)\w*phm\w*")


def _read_config(folder: Path, facts: dict) -> dict:
    """The adapter's config, every key of it in today's terms; refused if this file does not compute it."""
    given, version = facts["config"], str(facts.get("version", ""))
    if isinstance(given, str) and given in NAMED:
        return dict(NAMED[given])
    if not isinstance(given, dict):
        raise ValueError(f"{folder}: config {given!r} is none of {', '.join(NAMED)}, nor spelled out")
    given = {"original_ln_before": False} | {key.lower(): value for key, value in given.items()}
    if not version and given.get("non_linearity") in ("gelu", "gelu_orig"):  # renamed since those files
        given["non_linearity"] = {"gelu": "gelu_new", "gelu_orig": "gelu"}[given["non_linearity"]]
    nested = given.get("invertible_adapter")
    if isinstance(nested, dict) and nested.get("non_linearity") == given.get("non_linearity"):
        del given["invertible_adapter"]
        given |= {"inv_adapter": nested.get("block_type"),
                  "inv_adapter_reduction_factor": nested.get("reduction_factor")}
    table = LOW_RANK if _is_lora(given) else BOTTLENECK
    for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
        if key in table and key not in given:
            raise ValueError(f"{folder}: its config lacks {key}")
    for key, value in given.items():  # one that is not known must be off, or without effect here
        default, others = table.get(key, (None, lambda value: not value or WITHOUT_EFFECT.fullmatch(key)))
        if not (others(value) if callable(others) else value in (default, *others)):
            raise ValueError(f"{folder}: {key} {value!r} in its config is not supported")
    config = {key: given.get(key, default) for key, (default, _) in table.items()}
    if table is LOW_RANK and re.match(r"adapters\.(0|1\.0)\.", version):
        config["alpha"] = config["r"]  # these versions scaled by 1 whatever alpha was
    return config
