"""Pfeiffer adapters, MAD-X language adapters and LoRA for XLM-R, RoBERTa, BERT and DeBERTa, written by hand.

Pfeiffer et al., MAD-X, EMNLP 2020; Hu et al., LoRA, ICLR 2022. Equations, parameter names and files are those
of AdapterHub's library (adapters 1.3), so its adapters load here and ours load there.

    add_language_adapter(model, "en", "AdapterHub/xlm-roberta-base-en-wiki_pfeiffer")   # or a folder; frozen
    blocks = add_task_adapters(model)           # or add_lora: one block per layer, the unit of unfreezing
    set_language(model, "en"); ...              # train with any loop: the head and the open blocks learn
    save_adapter(model, "task", "my_adapter")   # and load_adapter(model, "my_adapter") elsewhere
    set_language(model, "sw")                   # zero-shot: another language below the same task adapter

In a layer, x is the attention sublayer's output and h the feed-forward sublayer's before its LayerNorm LN:

    for each adapter of the stack, the language's below the task's:   h <- up(ReLU(down(LN(h + x)))) + h
    output of the layer:                                              LN(h + x)

with the layer's own LN throughout. DeBERTa-v2 and v3 work too, except for LoRA.

Adapters, LoRAs and the head are float32 on a model in half precision, too (but for a decoder that shares the
embeddings' weights). After `model.save_pretrained`, `from_pretrained` gives the model without its adapters.
"""

import io
import json
import math
import os
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

MODEL_TYPES = ("xlm-roberta", "roberta", "bert", "deberta-v2")  # post-LayerNorm: `encoder.layer[N].output`
ATTENTION = {"query": "q", "key": "k", "value": "v"}  # LoRA's targets, and what the files call them
NON_LINEARITIES = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_new": lambda: nn.GELU("tanh"), "swish": nn.SiLU,
                   "silu": nn.SiLU, "leakyrelu": nn.LeakyReLU, "tanh": nn.Tanh}

SEQ_BN = {  # AdapterHub's names for everything one can vary, with the values of a Pfeiffer adapter
    "mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu",
    "original_ln_before": True, "original_ln_after": True, "ln_before": False, "ln_after": False,
    "residual_before_ln": True, "adapter_residual_before_ln": False, "is_parallel": False, "scaling": 1.0,
    "use_gating": False, "cross_adapter": False, "dropout": 0.0, "phm_layer": False, "stochastic_depth": 0.0,
    "leave_out": [], "inv_adapter": None, "inv_adapter_reduction_factor": None,
}
LORA = {
    "architecture": "lora", "selfattn_lora": True, "intermediate_lora": False, "output_lora": False,
    "leave_out": [], "r": 8, "alpha": 8, "dropout": 0.0, "attn_matrices": ["q", "v"], "use_dora": False,
    "composition_mode": "add", "use_gating": False, "vera_d": None, "vera_b": None,
}


# ------------------------------------------------------------------------------------------------------------
# Modules
# ------------------------------------------------------------------------------------------------------------


class BottleneckAdapter(nn.Module):
    """h' = up(ReLU(down(LN(h + x)))) + h through a bottleneck of hidden_size // reduction_factor units.

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
        for name in self.stack:
            if name in self.adapters:
                h = self.adapters[name](h, input_tensor, self.LayerNorm)
        return self.LayerNorm(h + input_tensor)


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
        e1, e2 = self.halves(embedding)
        y2 = e2 - self.G(e1)
        return torch.cat([e1 - self.F(y2), y2], dim=-1).to(embedding.dtype)

    def halves(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = embedding.to(self.F[0].weight.dtype)
        return embedding[..., : self.half], embedding[..., self.half :]  # [B, T, H] -> twice [B, T, H / 2]


class InvertibleAdapters(nn.ModuleDict):
    """The invertible blocks by adapter name; and what else a patched model has to remember.

    It stands where AdapterHub has them, at `base_model.invertible_adapters`. Only the first adapter of the
    stack has its block in play: after the embeddings, and inverted before a masked-LM head's decoder.
    """

    def __init__(self):
        super().__init__()
        self.stack: list[str] = []  # the adapters in play, bottom first; every layer looks into this list
        self.configs: dict[str, dict] = {}
        self.languages: set[str] = set()
        self.handles: list = []
        self.trained: set[str] = set()  # what had `requires_grad` in the base model
        self.widened: list[nn.Parameter] = []  # the head's, if they were in half precision

    def in_play(self) -> InvertibleAdapter | None:
        return self[self.stack[0]] if self.stack and self.stack[0] in self else None


class LoRA(nn.Module):
    """What LoRA adds to a linear layer's output: (alpha / r) B A x. B starts as 0, so nothing at first.

    Until B has moved, the gradient of A is zero, and with it A's share of tr(F).
    """

    def __init__(self, size_in: int, size_out: int, r: int, alpha: float):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, size_in))
        self.lora_B = nn.Parameter(torch.zeros(size_out, r))
        self.scaling = alpha / r
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.lora_A.dtype)
        return x @ self.lora_A.T @ self.lora_B.T * self.scaling  # [B, T, in] -> [B, T, r] -> [B, T, out]


class LoRAs(nn.ModuleDict):
    """The LoRAs of one linear layer by name; a forward hook adds those in the stack to its output."""

    def __init__(self, linear: nn.Linear, stack: list[str]):
        super().__init__()
        self.stack, self.handle = stack, linear.register_forward_hook(_add_loras)


# Hooks find adapters through the module that calls them: a replica of nn.DataParallel has copies of its own.


def _add_loras(linear: nn.Linear, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    for name in linear.loras.stack:
        if name in linear.loras:
            output = (output + linear.loras[name](inputs[0])).to(output.dtype)
    return output


def _link(model: nn.Module, *_) -> None:
    """Tell the modules with hooks which the model's invertible adapters are."""
    base = model.base_model
    for module in filter(None, (base.embeddings, _decoder(model))):
        module.link = (base.invertible_adapters, base.get_input_embeddings())  # in a tuple: no submodules


def _after_embeddings(embeddings: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    adapter = embeddings.link[0].in_play()
    return adapter(output) if adapter else output


def _before_decoder(module: nn.Module, inputs: tuple, output: torch.Tensor | None = None) -> torch.Tensor:
    """The inverse block, on the decoder's input or, if that is no module, on the output of the one before."""
    adapters, embeddings = module.link
    adapter, hidden = adapters.in_play(), inputs[0] if output is None else output
    return (adapter.inverse(hidden) if adapter else hidden).to(embeddings.weight.dtype)  # tied to them


def _decoder(model: nn.Module) -> nn.Module | None:
    """A masked-LM head's decoder; in DeBERTa-v2's new head, which has none, the LayerNorm before it."""
    if hasattr(model, "lm_predictions"):
        return model.lm_predictions.lm_head.LayerNorm
    return model.get_output_embeddings()  # None in other models


def _cast_inputs(module: nn.Module, inputs: tuple) -> tuple:
    dtype = getattr(module, "weight", getattr(module, "bias", None)).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


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


def add_task_adapters(model: nn.Module, reduction_factor: float = 16, name: str = "task",
                      leave_out: tuple[int, ...] = ()) -> list[nn.Module]:
    """Patch one new Pfeiffer adapter into every encoder layer (but those of `leave_out`), and activate it.

    Returns the blocks, bottom layer first. The first adapter of any kind freezes the base model; the head
    keeps its `requires_grad`, and the new blocks have it set.
    On a model in half precision the blocks are float32, and so is the head from then on. Adapters are among
    the base model's modules: `model.save_pretrained` works, but `from_pretrained` then gives the plain model,
    to which `load_adapter` adds what `save_adapter` wrote.
    Raises ValueError for a model type outside MODEL_TYPES, a model inside another (nn.DataParallel), a name
    in use, or an impossible reduction factor.
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
    if not _is_number(r) or not isinstance(r, int):
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
        _load(model, source, name, language=True)
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
    modules = _modules(model, name)
    if not any(isinstance(module, LoRA) for module in modules.values()):
        return [module for path, module in modules.items() if path.startswith("encoder.")]
    by_layer: dict[str, dict[str, nn.Module]] = {}
    for path, module in modules.items():
        layer, target = path.removesuffix(f".loras.{name}").split(".attention.self.")
        by_layer.setdefault(layer, {})[target] = module
    return [nn.ModuleDict(pair) for pair in by_layer.values()]


@torch.no_grad()
def merge_lora(model: nn.Module, name: str = "task") -> None:
    """Fold a LoRA into the base model, W <- W + (alpha / r) B A, and drop it; ValueError if it is none."""
    modules, record = _modules(model, name), _record(model)
    if record.configs[name].get("architecture") != "lora":
        raise ValueError(f"adapter {name!r} is no LoRA: only a LoRA can be merged")
    for path, lora in modules.items():
        linear = model.base_model.get_submodule(path.removesuffix(f".loras.{name}"))
        linear.weight += lora.scaling * lora.lora_B @ lora.lora_A
        del linear.loras[name]
    del record.configs[name]
    record.stack[:] = [other for other in record.stack if other != name]


def remove_adapters(model: nn.Module) -> None:
    """Take out all that this file put in: the model has its own modules and `requires_grad` again."""
    record, base = _record(model), model.base_model
    for parameter in record.widened:
        parameter.data, parameter.grad = parameter.data.to(base.get_input_embeddings().weight.dtype), None
    for module in filter(None, (base.embeddings, _decoder(model))):
        del module.link
    for module in list(base.modules()):
        if isinstance(getattr(module, "loras", None), LoRAs):
            module.loras.handle.remove()
            del module.loras
    for layer in base.encoder.layer:
        layer.output.original[0].training = layer.output.training
        layer.output = layer.output.original[0]
    for handle in record.handles:
        handle.remove()
    del base.invertible_adapters
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in record.trained)


def _build(model: nn.Module, config: dict, name: str = "") -> dict[str, nn.Module]:
    """The new modules of an adapter by path below the base model, bottom to top, the invertible one last."""
    layers, size, modules = _base(model).encoder.layer, model.config.hidden_size, {}
    assert len(layers) == model.config.num_hidden_layers
    absent = set(config["leave_out"]) - set(range(len(layers)))
    if absent:
        raise ValueError(f"leave_out names layer {min(absent)}: the model has 0..{len(layers) - 1}")
    is_lora = config.get("architecture") == "lora"
    if is_lora and model.config.model_type == "deberta-v2":
        raise ValueError("no LoRA for model type 'deberta-v2', but add_task_adapters works")
    for index, layer in enumerate(layers):
        if index in config["leave_out"]:
            continue
        if not is_lora:
            modules[f"encoder.layer.{index}.output.adapters.{name}"] = BottleneckAdapter(size, config)
            continue
        for target, letter in ATTENTION.items():
            if letter in config["attn_matrices"]:
                linear = getattr(layer.attention.self, target)
                lora = LoRA(linear.in_features, linear.out_features, config["r"], config["alpha"])
                modules[f"encoder.layer.{index}.attention.self.{target}.loras.{name}"] = lora
    if config.get("inv_adapter"):
        if getattr(model.config, "embedding_size", size) != size:
            raise ValueError("no invertible adapter where embeddings are of another size than hidden states")
        modules[f"invertible_adapters.{name}"] = InvertibleAdapter(size, config)
    return modules


def _install(model: nn.Module, name: str, config: dict, modules: dict[str, nn.Module], language: bool):
    """Put `_build`'s modules in place; a language adapter is frozen, any other becomes the one in play."""
    _check_new(model, name)
    record, base = _patch(model), model.base_model
    for path, module in modules.items():
        place = path.rpartition(".")[0]  # a ModuleDict, beside a weight with the right device and type
        if place.endswith(".loras"):
            beside = base.get_submodule(place.removesuffix(".loras"))
            if not hasattr(beside, "loras"):
                beside.loras = LoRAs(beside, record.stack).train(beside.training)
        elif place.endswith(".adapters"):
            beside = base.get_submodule(place.removesuffix(".adapters")).dense
        else:
            beside = base.get_input_embeddings()
        dtype = torch.promote_types(beside.weight.dtype, torch.float32)
        module.to(beside.weight.device, dtype).train(beside.training)
        base.get_submodule(place)[name] = module.requires_grad_(not language)
    record.configs[name] = config
    if language:
        record.languages.add(name)
    else:
        record.stack[:] = [other for other in record.stack if other in record.languages] + [name]


def _patch(model: nn.Module) -> InvertibleAdapters:
    """Freeze the base model and give it room for adapters; once per model."""
    base = _base(model)
    if hasattr(base, "invertible_adapters"):
        return base.invertible_adapters
    record = InvertibleAdapters().train(base.training)
    record.trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    base.requires_grad_(False)
    for layer in base.encoder.layer:
        layer.output = AdaptedOutput(layer.output, record.stack)
    base.invertible_adapters = record
    _link(model)
    record.handles += [module.register_forward_pre_hook(_link) for module in {base, model}]
    record.handles.append(base.embeddings.register_forward_hook(_after_embeddings))
    decoder = _decoder(model)
    if isinstance(decoder, nn.LayerNorm):
        record.handles.append(decoder.register_forward_hook(_before_decoder))
    elif decoder is not None:
        record.handles.append(decoder.register_forward_pre_hook(_before_decoder))
    _widen_head(model, record)
    return record


def _widen_head(model: nn.Module, record: InvertibleAdapters) -> None:
    """Make a head in half precision float32, but for a decoder that shares the embeddings' weights."""
    half, of_base = (torch.float16, torch.bfloat16), set(model.base_model.parameters())
    own = {module: list(module.parameters(recurse=False)) for module in model.modules()}
    kept = of_base.union(*(parameters for parameters in own.values() if of_base & {*parameters}))
    for module, parameters in own.items():
        if parameters and kept.isdisjoint(parameters) and parameters[0].dtype in half:
            record.handles.append(module.register_forward_pre_hook(_cast_inputs))
            record.widened += parameters
            for parameter in parameters:
                parameter.data, parameter.grad = parameter.data.float(), None


def _base(model: nn.Module) -> nn.Module:
    """The encoder below the head, if there is one that adapters fit into."""
    if not hasattr(model, "config") or not hasattr(model, "base_model"):
        raise ValueError(f"{type(model).__name__} is no model of transformers: give the model itself (the "
                         "`.module` of one in nn.DataParallel)")
    if model.config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"no adapters for model type {model.config.model_type!r}, only for {known}")
    if not hasattr(model.base_model, "encoder"):
        raise ValueError(f"{type(model).__name__} hides its encoder: give the model that it wraps")
    return model.base_model


def _record(model: nn.Module) -> InvertibleAdapters:
    if not hasattr(_base(model), "invertible_adapters"):
        raise ValueError("the model has no adapters: add or load one first")
    return model.base_model.invertible_adapters


def _modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """An adapter's modules by path below the base model, bottom to top, the invertible one last."""
    if name not in _record(model).configs:
        known = ", ".join(_record(model).configs) or "none"
        raise ValueError(f"the model has no adapter named {name!r}; it has: {known}")
    kinds = (BottleneckAdapter, LoRA, InvertibleAdapter)
    return {path: module for path, module in model.base_model.named_modules()
            if path.endswith(f"s.{name}") and isinstance(module, kinds)}


def _check_new(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{name!r} cannot name an adapter: take a word without a dot that torch leaves free")
    if name in getattr(getattr(_base(model), "invertible_adapters", None), "configs", {}):
        raise ValueError(f"the model already has an adapter named {name!r}: choose another name")


# ------------------------------------------------------------------------------------------------------------
# Saving
# ------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, name: str, folder: str | Path, with_head: bool = True) -> None:
    """Write an adapter of any kind, and a task's head beside it, in AdapterHub's format, each file whole.

    `adapter_config.json` and `pytorch_adapter.bin`, whose keys are the parameter names in the model.
    Raises ValueError if the model has no adapter of that name.
    """
    modules, record, prefix = _modules(model, name), _record(model), model.base_model_prefix
    weights = {f"{prefix}.{path}.{key}": value for path, module in modules.items()
               for key, value in _file_weights(module).items()}
    is_language, is_invertible = name in record.languages, record.configs[name].get("inv_adapter")
    kind = {"type": "text_lang" if is_language else "text_task"} if is_language or is_invertible else {}
    facts = {"config": record.configs[name], "name": name} | kind | _model_facts(model)
    _write_folder(folder, "adapter_config.json", facts, "pytorch_adapter.bin", weights)
    if with_head and not is_language and _head(model):
        save_head(model, folder)


def save_head(model: nn.Module, folder: str | Path) -> None:
    """Write all parameters outside the base model as `head_config.json` and `pytorch_model_head.bin`."""
    facts = {"config": None, "name": None, "num_labels": model.config.num_labels,
             "label2id": model.config.label2id} | _model_facts(model)
    _write_folder(folder, "head_config.json", facts, "pytorch_model_head.bin", _head(model))


def _file_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's weights by AdapterHub's names: the LayerNorm before an adapter has two in its files."""
    weights = module.state_dict()
    if isinstance(module, BottleneckAdapter) and module.config["ln_before"]:
        for key in ("weight", "bias"):
            weights[f"adapter_norm_before.{key}"] = weights[f"adapter_down.0.{key}"]
    return weights


def _head(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters outside the base model; one that is tied to the embeddings is not among them."""
    base = set(map(id, model.base_model.parameters()))
    return {key: parameter for key, parameter in model.named_parameters() if id(parameter) not in base}


def _model_facts(model: nn.Module) -> dict:
    return {"hidden_size": model.config.hidden_size, "model_class": type(model).__name__,
            "model_name": model.config._name_or_path, "model_type": model.config.model_type,
            "version": "adapters.1.3.0"}  # of the format; without one, `gelu` would be taken for `gelu_new`


def _write_folder(folder: str | Path, config_name: str, config: dict, weights_name: str, weights: dict):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / weights_name, {key: value.detach().cpu().clone() for key, value in weights.items()})
    write_atomically(folder / config_name, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def save_tensors(path: Path, content: dict) -> None:
    """`torch.save`, whole or not at all, and with the same bytes wherever the file stands."""
    buffer = io.BytesIO()  # to a path, torch.save would store its name, and a full disk is no OSError
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write beside `path`, then rename: the file is the old or the new one, even on a full disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder_or_hub_id: str | Path, name: str | None = None,
                 language: bool | None = None) -> str:
    """Load a bottleneck adapter (with its invertible block) or a LoRA that AdapterHub's library or we saved.

    A task adapter or LoRA is in play and trainable at once. The head beside it, or in the same run's folder
    (then the one to name), is loaded with its labels' names if it was saved from the same class of model; a
    warning says so where the model's own head stays. A language adapter is frozen and waits for
    `set_language`. Which of the two it is, `language` says, or else its file's type. Without either, one with
    an invertible block is taken for a task adapter if a head other than a masked-LM head is beside it (the
    paper's code trains such, with `pfeiffer+inv`), or else for a language adapter, and a warning says so.
    A task adapter's invertible block is in play, as in AdapterHub's library, while no language adapter stands
    below: only a stack's first adapter has its block in play. It is trainable, but in no block of a layer.
    Returns the adapter's name: `name`, or else the file's.
    Raises FileNotFoundError if there is no such folder or hub repository, ValueError if its files are broken,
    do not fit the model, ask for what is not computed here or name the model's labels in another order. Then
    the model is as it was.
    """
    return _load(model, folder_or_hub_id, name, language)


def load_head(model: nn.Module, folder: str | Path) -> None:
    """Load the head that `save_head` or AdapterHub's library wrote. Raises as `load_adapter`."""
    _put_head(model, *_read_head(model, Path(folder)))


def _load(model: nn.Module, source: str | Path, name: str | None, language: bool | None) -> str:
    folder = head_folder = _fetch(source)
    if (folder / "adapter").is_dir() and not (folder / "adapter_config.json").is_file():  # of a run
        folder, head_folder = folder / "adapter", folder / "head"
    elif (folder / "model").is_dir():
        raise FileNotFoundError(f"{folder} has no adapter but a whole model, for from_pretrained, in model/")
    facts = _read_facts(folder / "adapter_config.json", model)
    config = _read_config(folder, facts)
    weights = {_modern(key).removeprefix(model.base_model_prefix + "."): value for key, value
               in _read_weights(model, folder, "adapter.safetensors", "pytorch_adapter.bin").items()}
    if language is None and (facts.get("type") or not config.get("inv_adapter")):
        language = facts.get("type") == "text_lang"
    head_facts = {}
    if not language and (head_folder / "head_config.json").is_file():
        head_facts = _read_facts(head_folder / "head_config.json", model)
    language = _guessed(source, head_facts) if language is None else language
    is_task = not language or facts.get("type") == "text_task"
    if is_task and not any(key.startswith("invertible_adapters.") for key in weights):
        config |= {"inv_adapter": None}  # early task adapters have one in their config and none in the file
    name = name or facts["name"]
    _check_new(model, name)
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
        modules = _build(model, config, facts["name"])
    expected = {f"{path}.{key}": value for path, module in modules.items()
                for key, value in _file_weights(module).items()}
    _check_fit(folder, expected, weights)
    head, kind = None, head_facts.get("model_class")
    if not language and kind == type(model).__name__:
        head = _read_head(model, head_folder)
    if not language and head is None and _head(model):
        reason = f"the one beside the adapter is of a {kind}" if kind else "there is none beside the adapter"
        warnings.warn(f"{source}: the model keeps its own head, since {reason}", stacklevel=3)
    for path, module in modules.items():
        module.load_state_dict({key: weights[f"{path}.{key}"] for key in module.state_dict()}, assign=True)
    _install(model, name, config, modules, language)
    if head:
        _put_head(model, *head)
    return name


def _guessed(source: str | Path, head: dict) -> bool:
    """Whether an adapter with an invertible block and no type is a language's, by the head beside it."""
    config = head.get("config")  # a flexible head's has its type
    is_masked_lm = "ForMaskedLM" in str(head.get("model_class")) or (
        isinstance(config, dict) and config.get("head_type") == "masked_lm")
    language = not head or is_masked_lm
    reason = f"the head is of a {head['model_class']}" if head else "no head is at hand"
    warnings.warn(f"{source} has an invertible block and no type, and {reason}: taken for a "
                  f"{'language' if language else 'task'} adapter; language={not language} makes it the other",
                  stacklevel=4)
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


def _read_facts(path: Path, model: nn.Module) -> dict:
    """The content of a config file, made for a model of this type and size."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no folder in AdapterHub's format: it has no {path.name}")
    try:
        facts = json.loads(path.read_bytes())
        assert {"config", "name", "model_type", "model_class"} <= facts.keys()
    except (ValueError, AttributeError, AssertionError):
        raise ValueError(f"{path} is damaged: it must be a JSON object with config, name, model_type and "
                         "model_class; save or download it again") from None
    for key in ("model_type", "hidden_size"):
        mine = getattr(model.config, key)
        if facts.get(key, mine) != mine:
            raise ValueError(f"{path} is for a model of {key} {facts[key]!r}, this one has {mine!r}")
    return facts


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_switch(value) -> bool:
    return isinstance(value, bool)


VARIABLE = {  # what a loaded config may set otherwise than SEQ_BN and LORA do
    "reduction_factor": _is_number, "scaling": _is_number, "alpha": _is_number,
    "original_ln_before": _is_switch, "ln_before": _is_switch, "ln_after": _is_switch,
    "residual_before_ln": _is_switch, "adapter_residual_before_ln": _is_switch,
    "r": lambda value: _is_number(value) and isinstance(value, int),
    "non_linearity": lambda value: isinstance(value, str) and value in NON_LINEARITIES,
    "leave_out": lambda value: isinstance(value, list) and all(isinstance(layer, int) for layer in value),
    "inv_adapter": lambda value: value in (None, "nice"),
    "inv_adapter_reduction_factor": lambda value: value is None or _is_number(value),
    "attn_matrices": lambda value: value and isinstance(value, list) and {*map(str, value)} <= {*"qkv"},
}
WITHOUT_EFFECT = re.compile(  # how weights start, AdapterFusion, and PHM layers, which phm_layer turns on
    r"init_weights\w*|attention_type|new_attention_norm|hypercomplex\w*|(?!phm_layer)\w*phm\w*")


def _read_config(folder: Path, facts: dict) -> dict:
    """The adapter's config, spelled out in today's terms; refused if this file does not compute it."""
    invertible = SEQ_BN | {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
    named = {"seq_bn": SEQ_BN, "pfeiffer": SEQ_BN, "seq_bn_inv": invertible, "pfeiffer+inv": invertible,
             "lora": LORA}
    given, version = facts["config"], str(facts.get("version", ""))
    if isinstance(given, str) and given in named:
        return dict(named[given])
    if not isinstance(given, dict):
        raise ValueError(f"{folder}: config {given!r} is none of {', '.join(named)}, nor spelled out")
    given = {key.lower(): value for key, value in given.items()}
    if not version and given.get("non_linearity") in ("gelu", "gelu_orig"):  # renamed since those files
        given["non_linearity"] = {"gelu": "gelu_new", "gelu_orig": "gelu"}[given["non_linearity"]]
    nested = given.get("invertible_adapter")
    if isinstance(nested, dict) and nested.get("non_linearity") == given.get("non_linearity"):
        del given["invertible_adapter"]
        given |= {"inv_adapter": nested.get("block_type"),
                  "inv_adapter_reduction_factor": nested.get("reduction_factor")}
    known = LORA if given.get("architecture") == "lora" else SEQ_BN | {"original_ln_before": False}
    for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
        if key in known and key not in given:
            raise ValueError(f"{folder}: its config lacks {key}")
    for key, value in given.items():
        if key in known:
            fits = VARIABLE[key](value) if key in VARIABLE else value == known[key]
        else:
            fits = not value or WITHOUT_EFFECT.fullmatch(key)
        if not fits:
            raise ValueError(f"{folder}: {key} {value!r} in its config is not supported")
    config = known | {key: value for key, value in given.items() if key in known}
    if known is LORA and re.match(r"adapters\.(0|1\.0)\.", version):
        config["alpha"] = config["r"]  # these versions scaled by 1 whatever alpha was
    return config


def _modern(key: str) -> str:
    """A weight's name as it has been spelled since adapter-transformers 2."""
    for old, new in (("layer_text_task_adapters.", "adapters."), ("layer_text_lang_adapters.", "adapters."),
                     ("invertible_lang_adapters.", "invertible_adapters.")):
        key = key.replace(old, new)
    return key


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
    """The tensors in the first of these files that exists."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no weights: neither {' nor '.join(names)}")
    most_bytes = 2**20 + 8 * sum(parameter.numel() for parameter in model.parameters())  # of any adapter
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            weights = load_file(path)  # checks the sizes it names against the file's
        else:
            weights = load_tensors(path, most_bytes)
        assert all(isinstance(key, str) and value.is_floating_point() for key, value in weights.items())
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise ValueError(f"{path} holds no readable weights ({type(error).__name__}): save or download it "
                         "again") from None
    return weights


def _read_head(model: nn.Module, folder: Path) -> tuple[list[tuple[nn.Parameter, torch.Tensor]], dict]:
    """Pairs of the model's parameters and the head's, and the head's names of labels, if they have any."""
    facts = _read_facts(folder / "head_config.json", model)
    weights = _read_weights(model, folder, "model_head.safetensors", "pytorch_model_head.bin")
    mine, tied = _head(model), model.state_dict().keys() - _head(model).keys()
    _check_fit(folder, mine, {key: value for key, value in weights.items() if key not in tied})
    try:
        names = {int(number): str(name) for name, number in (facts.get("label2id") or {}).items()}
        names = dict(sorted(names.items()))
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{folder}: label2id in head_config.json must have a number for each name") from None
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


def _check_fit(folder: Path, expected: dict, weights: dict) -> None:
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing:
        raise ValueError(f"{folder} does not fit the model: it lacks {min(missing)} ({len(missing)} weights)")
    if extra:
        raise ValueError(f"{folder} does not fit the model: it has also {min(extra)} ({len(extra)} weights)")
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            raise ValueError(f"{folder} does not fit the model: {key} has the shape "
                             f"{list(weights[key].shape)}, not {list(value.shape)}")
