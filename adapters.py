"""Pfeiffer bottleneck adapters for XLM-R, RoBERTa and BERT, written out by hand.

Pfeiffer et al., MAD-X, EMNLP 2020. Equations, parameter names and files are those of AdapterHub's library.

    from adapters import add_task_adapters, save_adapter
    blocks = add_task_adapters(model)           # any Hugging Face head; freezes the base model
    blocks[-1].requires_grad_(False)            # a block: one layer's adapter, the unit of unfreezing
    ...                                         # train with any loop: the head and the open blocks learn
    save_adapter(model, "task", "my_adapter")   # AdapterHub's on-disk format

In a layer, x is the attention sublayer's output and h the feed-forward sublayer's before its LayerNorm LN:

    x ─────────┬───────────────────────────────────────────┐
               ▼                                           ▼
    h ──┬────►(+)───► LN ───► down ───► ReLU ───► up ───►(+)(+)───► LN ───► layer output
        └─────────────────────────────────────────────────┘

that is  h' = up(ReLU(down(LN(h + x)))) + h  and  output = LN(h' + x), with the layer's own LN in both.
"""

import io
import json
import os
from pathlib import Path

import torch
from torch import nn

MODEL_TYPES = ("xlm-roberta", "roberta", "bert")  # post-LayerNorm encoders with `encoder.layer[N].output`


class BottleneckAdapter(nn.Module):
    """h' = up(ReLU(down(LN(h + x)))) + h through a bottleneck of hidden_size // reduction_factor units.

    Weights start as normal(0, 0.02), biases as 0: `up` is not zero, and a new adapter is not the identity.
    """

    def __init__(self, hidden_size: int, reduction_factor: int):
        super().__init__()
        bottleneck = int(hidden_size // reduction_factor) if reduction_factor > 0 else 0
        if bottleneck < 1:
            raise ValueError(f"reduction_factor must be in 1..{hidden_size}, not {reduction_factor}")
        self.reduction_factor = reduction_factor
        self.adapter_down = nn.Sequential(nn.Linear(hidden_size, bottleneck), nn.ReLU())
        self.adapter_up = nn.Linear(bottleneck, hidden_size)
        for linear in (self.adapter_down[0], self.adapter_up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, h: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return self.adapter_up(self.adapter_down(normed)) + h  # [B, T, H] -> [B, T, b] -> [B, T, H]


class AdaptedOutput(nn.Module):
    """A layer's output sublayer with room for adapters. It takes over the original's modules under their own
    names, so the base model's parameter names and checkpoints stay valid; with no active adapter it computes
    the very same numbers. It is a plain module, hence deepcopy, pickle, `.to()` and `state_dict()` work."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = original.dense, original.LayerNorm, original.dropout
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []  # names of the adapters in play, bottom of the stack first
        self.training = original.training

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        h = self.dropout(self.dense(hidden_states))  # [B, T, 4H] -> [B, T, H]
        for name in self.active:
            h = self.adapters[name](h, self.LayerNorm(h + input_tensor))
        return self.LayerNorm(h + input_tensor)


def add_task_adapters(model: nn.Module, reduction_factor: int = 16, name: str = "task") -> list[nn.Module]:
    """Patch one new Pfeiffer adapter into every encoder layer, make it the active one, freeze the base model.

    Returns the blocks, bottom layer first. The head keeps its `requires_grad`; the adapters have it set.
    Raises ValueError for a model type outside MODEL_TYPES, a name in use, or an impossible reduction factor.
    """
    layers = _encoder_layers(model)
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r} must be non-empty and without a dot")
    if any(isinstance(layer.output, AdaptedOutput) and name in layer.output.adapters for layer in layers):
        raise ValueError(f"the model already has an adapter named {name!r}: choose another name")
    blocks = [BottleneckAdapter(model.config.hidden_size, reduction_factor) for _ in layers]
    model.base_model.requires_grad_(False)
    for layer, block in zip(layers, blocks):
        if not isinstance(layer.output, AdaptedOutput):
            layer.output = AdaptedOutput(layer.output)
        weight = layer.output.dense.weight
        layer.output.adapters[name] = block.to(weight.device, weight.dtype).train(layer.training)
        layer.output.active = [name]
    return blocks


def save_adapter(model: nn.Module, name: str, folder: str | Path, with_head: bool = True) -> None:
    """Write the adapter (and the head beside it) in AdapterHub's format, each file whole or not at all.

    `adapter_config.json` and `pytorch_adapter.bin`, whose keys are the parameter names in the model.
    Raises ValueError if the model has no adapter of that name.
    """
    weights = {key: value for key, value in model.state_dict().items() if f".output.adapters.{name}." in key}
    if not weights:
        raise ValueError(f"the model has no adapter named {name!r}")
    block = next(layer.output.adapters[name] for layer in _encoder_layers(model))
    config = {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": block.reduction_factor,
        "non_linearity": "relu", "original_ln_before": True, "original_ln_after": True, "ln_before": False,
        "ln_after": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
        "is_parallel": False, "scaling": 1.0, "leave_out": [], "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
    }
    _write_folder(folder, "adapter_config.json", {"config": config, "name": name} | _model_facts(model),
                  "pytorch_adapter.bin", weights)
    if with_head:
        save_head(model, folder)


def save_head(model: nn.Module, folder: str | Path) -> None:
    """Write all parameters outside the base model as `head_config.json` and `pytorch_model_head.bin`."""
    base = model.base_model_prefix + "."
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(base)}
    config = {"config": None, "name": None, "num_labels": model.config.num_labels}
    config |= {"label2id": model.config.label2id} | _model_facts(model)
    _write_folder(folder, "head_config.json", config, "pytorch_model_head.bin", weights)


def _encoder_layers(model: nn.Module) -> nn.ModuleList:
    if model.config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"no adapters for model type {model.config.model_type!r}, only for {known}")
    layers = model.base_model.encoder.layer
    assert len(layers) == model.config.num_hidden_layers
    return layers


def _model_facts(model: nn.Module) -> dict:
    return {"hidden_size": model.config.hidden_size, "model_class": type(model).__name__,
            "model_name": model.config._name_or_path, "model_type": model.config.model_type}


def _write_folder(folder: str | Path, config_name: str, config: dict, weights_name: str, weights: dict):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch.save to a path would store the path's name: the same weights, other bytes
    torch.save({key: value.detach().cpu().clone() for key, value in weights.items()}, buffer)
    write_atomically(folder / weights_name, buffer.getvalue())
    write_atomically(folder / config_name, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
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
