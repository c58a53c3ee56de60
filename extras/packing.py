"""One pass without padding: between embeddings and head a batch is one row of its real tokens, [1, N, H].

    allow_packing(model)                                    # XLM-R, RoBERTa and BERT, with any head
    batch = batch_on(device, model, make, examples)         # make: examples -> padded batch with its mask
    model(**batch)                                          # heads and losses see what they always do
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = ("xlm-roberta", "roberta", "bert")  # types whose encoder can run so
GROUP_ROWS = {"cpu": 6}  # sequences that attention sees at a time; elsewhere all of the batch


class Packing:
    """Where the real tokens of a padded batch are. A batch that has one, as `packing`, runs packed. Positions
    are counted by the embeddings, which see the padded batch.

    mask: [B, T], on the CPU, so that nothing waits for the device, to which `move` takes a tensor. Attention
    sees `rows` sequences at a time, padded to their longest. So much padding stays, too, that the number of
    tokens is a multiple of `multiple`, or all of it."""

    def __init__(self, mask: torch.Tensor, move: Callable, rows: int, multiple: int = 1):
        kept, lacking = mask.clone(), -int(mask.sum()) % multiple
        kept.view(-1)[places(~mask)[:lacking]] = True
        self.shape, self.index, self.groups = mask.shape, move(places(kept)), []  # index: [N]
        for real, here in zip(mask.split(rows), kept.split(rows)):
            if len(mask) > rows:  # the others are as long as the batch
                real, here = (group[:, here.any(0)] for group in (real, here))  # [rows, longest]
            keys = None if real.all() else move(real[:, None, None])
            ways = numbers(here), places(here), here.view(-1, 1, 1)  # to the padded group and back
            self.groups.append((real.shape, int(here.sum()), keys, None if here.all() else [*map(move, ways)]))

    def tensors(self) -> list[torch.Tensor]:
        parts = (part for *_, keys, ways in self.groups for part in (keys, *(ways or ())))
        return [self.index, *(part for part in parts if part is not None)]


def places(mask: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [N]: of these tokens in the padded batch."""
    return mask.flatten().nonzero()[:, 0]


def numbers(mask: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B T]: for each place the number of its kept token, or any, whose output is dropped again."""
    return (mask.flatten().cumsum(0) - 1).clamp(min=0)


class Moved(torch.autograd.Function):
    """x[there], whose gradient is gathered, too: gradient[back], or zero where `kept` is False. (Autograd
    turns an index into a scatter, which on CUDA sorts the places in order to be deterministic.)"""

    @staticmethod
    def forward(context, x, there, back, kept):
        context.save_for_backward(back, kept)
        return x.index_select(0, there)

    @staticmethod
    def backward(context, gradient):
        back, kept = context.saved_tensors
        gradient = gradient.index_select(0, back)
        return gradient if kept is None else gradient * kept, None, None, None


def allow_packing(model: nn.Module) -> None:
    """From now on the model takes batches with a `packing`; a mask without one is applied unseen."""
    ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("packed", key_mask)
    model.set_attn_implementation("packed")
    encoder = model.base_model.encoder
    encoder.register_forward_pre_hook(remove_padding, with_kwargs=True)
    encoder.register_forward_hook(restore_padding, with_kwargs=True)


def key_mask(attention_mask: torch.Tensor | None = None, **_) -> torch.Tensor | None:
    """[B, T] -> [B, 1, 1, T]. The library's own would look whether anything is masked, and wait for that."""
    return None if attention_mask is None else attention_mask[:, None, None]


def remove_padding(_, inputs: tuple, keywords: dict) -> tuple | None:
    if packing := keywords.get("packing"):
        hidden = inputs[0].flatten(0, 1).index_select(0, packing.index)  # [B, T, H] -> [N, H]
        return (hidden[None], *inputs[1:]), keywords | {"attention_mask": None}


def restore_padding(_, inputs: tuple, keywords: dict, output):
    if packing := keywords.get("packing"):
        hidden = output.last_hidden_state[0]  # [N, H]
        padded = hidden.new_zeros(packing.shape.numel(), hidden.shape[1]).index_copy(0, packing.index, hidden)
        output.last_hidden_state = padded.unflatten(0, packing.shape)  # [B, T, H]
        return output


def packed_attention(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor,
                     dropout: float = 0.0, scaling: float | None = None, packing: Packing | None = None,
                     **keywords) -> tuple[torch.Tensor, None]:
    """Attention within each sequence of a packed batch: q, k and v are [1, heads, N, d]."""
    if packing is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, dropout, scaling, **keywords)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [N, heads, d]
    sizes, outputs = [tokens for _, tokens, *_ in packing.groups], []
    for (shape, _, keys, ways), *parts in zip(packing.groups, *(x.split(sizes) for x in (q, k, v))):
        if ways:
            number, place, is_kept = ways
            parts = [Moved.apply(x, number, place, None) for x in parts]  # -> [rows * longest, heads, d]
        parts = [x.unflatten(0, shape).transpose(1, 2) for x in parts]  # [rows, heads, longest, d]
        output = scaled_dot_product_attention(*parts, keys, dropout, scale=scaling)
        output = output.transpose(1, 2).flatten(0, 1)  # [rows * longest, heads, d]
        outputs.append(Moved.apply(output, place, number, is_kept) if ways else output)
    return torch.cat(outputs)[None], None


def batch_on(device: torch.device, model: nn.Module, make: Callable, examples: list[dict],
             is_packed: bool = True, multiple: int = 1) -> dict:
    """The examples as one batch on the device, without a wait for it; packed if the model allows it."""

    def move(value: torch.Tensor) -> torch.Tensor:
        return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

    batch, packing = make(examples), {}
    if model.config._attn_implementation == "packed" and "attention_mask" in batch:
        mask = batch["attention_mask"].flatten(0, -2).bool()  # [sequences, T]
        if mask.all():
            del batch["attention_mask"]
        elif is_packed:
            packing["packing"] = Packing(mask, move, GROUP_ROWS.get(device.type, len(mask)), multiple)
    return {key: move(value) for key, value in batch.items()} | packing
