"""Scheduled unfreezing of task adapters for zero-shot cross-lingual transfer, in one plain PyTorch loop.

Liu, Pfeiffer, Vulić, Gurevych. FUN with Fisher: Improving Generalization of Adapter-Based Cross-lingual
Transfer with Scheduled Unfreezing. NAACL 2024 (Algorithm 1; the tasks and presets are in tasks.py).

    python unfreeze.py xnli --method fun                                 # XLM-R base, the paper's preset
    python unfreeze.py classify --data demo/data --model demo/model      # after python extras/demo.py
    python unfreeze.py mlm --language th --data thai.txt                 # a language adapter the hub lacks
    python unfreeze.py report runs/*                                     # a table over finished runs

    from unfreeze import Unfreezer                                       # the schedule in a loop of your own
    unfreezer = Unfreezer(blocks, "gu", k=800); ...; unfreezer.step(i)   # before training step i

Train on English only, open the adapters block by block, report tr(F), select on English validation, test in
every language. Departures from the official code: GU opens its second block after k steps (there 2k - 1),
FUN, rand, rev and order choose their first block, too (there and with --first top, it is the top one), tr(F)
is equation 1 (see fisher.py).
"""

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS; read when CUDA starts
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # during the slow imports; main() has its own

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from torch import nn
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForMaskedLM, AutoModelForQuestionAnswering,
                          AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer)

from adapters import (add_language_adapter, add_lora, add_task_adapters, save_adapter, save_head,
                      set_language)
from extras.graphs import TOKENS, Graphed, widened
from extras.packing import PACKED, allow_packing, batch_on
from extras.rows import HF_HUB_OFFLINE, WITHOUT_HUB, UserError, reach_hub
from extras.run import (DATA, Run, copied, describe, fingerprint, identity_of, introduce, is_out_of_memory,
                        put, report_trace, restore_state, run_folder, save_state, say, write_lines)
from fisher import LABELS, fisher_trace
from tasks import TASKS, load_data, predict, resolve, sampled, tokens_of


# ------------------------------------------------------------------------------------------------------------
# Algorithm 1: which blocks open at which step. To be cut out and pasted, with these imports:
#     import math, operator; from collections.abc import Callable; import torch; from torch import nn
# ------------------------------------------------------------------------------------------------------------


SELECT = {  # by method: (frozen blocks, bottom to top; the Unfreezer) -> those that open in this interval
    "standard": lambda frozen, schedule: frozen,
    "gu": lambda frozen, schedule: frozen[-1:],
    "lpft": lambda frozen, schedule: frozen if schedule.interval >= 1 else [],
    "rand": lambda frozen, schedule: [frozen[torch.randint(len(frozen), (), generator=schedule.generator)]],
    "fun": lambda frozen, schedule: largest(frozen, schedule.score),
    "rev": lambda frozen, schedule: frozen[:1],
    "order": lambda frozen, schedule: [next(block for block in schedule.order if block in frozen)],
    "none": lambda frozen, schedule: [],  # the head alone
}


def largest(frozen: list[int], score: Callable) -> list[int]:
    """The frozen block with the largest score, of equals the higher; a single one needs no measurement."""
    if len(frozen) == 1:
        return frozen
    scores = [float(value) for value in score()]
    if len(scores) <= frozen[-1] or not all(map(math.isfinite, scores)):
        raise ValueError(f"score() must return one finite number per block, not {scores}")
    return [max(frozen, key=lambda block: (scores[block], block))]


class Unfreezer:
    """Algorithm 1: freezes all blocks, then opens (`requires_grad`) those due before each training step.

    blocks: modules, bottom to top, with parameters of their own. method: a key of SELECT. k: the interval in
    steps. score: a callable that returns a number per block, called only by methods that choose by it, as FUN
    does by tr(F). order: all blocks in their order, for "order". first: "top" opens the top block at step 0,
    as the official code does, and the method chooses from step k on. Give the optimizer ALL parameters of all
    blocks, once: a frozen one has `grad=None` and is skipped, no decay, momentum or state.
    Raises ValueError for no blocks (but with "none"), shared parameters, or an impossible method, k, score,
    order, first or choice.
    """

    def __init__(self, blocks: list[nn.Module], method: str, k: int, score: Callable | None = None,
                 order: list[int] | None = None, seed: int = 0, first: str | None = None):
        blocks, order = list(blocks), None if order is None else list(order)
        if method not in SELECT:
            raise ValueError(f"unknown method {method!r}: choose one of {', '.join(SELECT)}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a whole number of steps, at least 1, not {k!r}")
        if method == "order" and sorted(order or []) != list(range(len(blocks))):
            raise ValueError(f"order must hold each of the blocks 0..{len(blocks) - 1} once, not {order!r}")
        if first not in (None, "top") or first and method in ("standard", "lpft", "none"):
            raise ValueError(f"first must be None or, but for standard, lpft and none, 'top', not {first!r}")
        if not blocks and method != "none":
            raise ValueError("no blocks: the schedule needs one module or more that it can open")
        owned = [set(block.parameters()) for block in blocks]
        if not all(owned):
            raise ValueError(f"block {owned.index(set())} has no parameters: opening it would train nothing")
        if len(set().union(*owned)) < sum(map(len, owned)):
            raise ValueError("two blocks share a parameter: they would open together")
        if method == "fun" and score is None:
            self._no_score()
        self.blocks, self.method, self.k, self.order, self.first = blocks, method, k, order, first
        self.score, self.generator = score or self._no_score, torch.Generator().manual_seed(seed)
        self.history: list[tuple[int, int]] = []  # (step, block) in the order of opening
        self.interval = 0  # the number of the one whose choice is due
        self._set_requires_grad()

    @property
    def trainable(self) -> list[int]:
        return sorted(block for _, block in self.history)

    def step(self, i: int) -> list[int]:
        """Open the blocks due before training step i (from 0), return them; a repeated call opens nothing.

        Every k steps an interval begins, each with its own choice; after steps left out, several at once."""
        opened = []
        self.interval = max(self.interval, i // self.k - len(self.blocks))  # of a long leap the last ones
        while self.interval <= i // self.k and len(self.history) < len(self.blocks):
            frozen = [block for block in range(len(self.blocks)) if block not in self.trainable]
            method = "gu" if self.first == "top" and not self.history else self.method
            chosen = [operator.index(block) for block in SELECT[method](frozen, self)]
            if not {*chosen} <= {*frozen} or len({*chosen}) < len(chosen):
                raise ValueError(f"{method} chose {chosen}, which are not frozen blocks, each once: {frozen}")
            self.history += [(i, block) for block in chosen]
            self._set_requires_grad()
            self.interval += 1
            opened += chosen
        return opened

    def state_dict(self) -> dict:
        return {"method": self.method, "k": self.k, "blocks": len(self.blocks), "order": self.order,
                "first": self.first, "history": [list(entry) for entry in self.history],
                "intervals": self.interval, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was saved. Raises ValueError if it belongs to another schedule."""
        mine = self.state_dict()
        for key in ("method", "k", "blocks", "order", "first"):
            if state.get(key) != mine[key]:
                raise ValueError(f"the saved schedule has {key} {state.get(key)!r}, this one {mine[key]!r}")
        self.history, self.interval = [tuple(entry) for entry in state["history"]], state["intervals"]
        self.generator.set_state(state["generator"])
        self._set_requires_grad()

    def _set_requires_grad(self) -> None:
        for index, block in enumerate(self.blocks):
            is_open = index in self.trainable
            block.requires_grad_(is_open)
            if not is_open:
                block.zero_grad()  # to None: with a gradient of zeros AdamW would still decay

    def _no_score(self) -> None:
        raise ValueError("this method needs `score`, a callable that returns one number per block")


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------


def option(default, text: str, least: int | None = None, **keywords):
    if least is not None:
        keywords["type"] = partial(at_least, least)
    return field(default=default, metadata={"help": text} | keywords)


def at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if not least <= value < 2**32:
        bound = f"at least {least}" if value < least else f"below {2**32}"
        raise argparse.ArgumentTypeError(f"must be {bound}, not {value}")
    return value


@dataclass(frozen=True)
class Settings:
    """The command line. None: not asked for, or filled in by `complete`, with the paper's preset for one."""

    task: str
    method: str = option(None, "which blocks open when (default: gu); several in quotes: a run of each")
    order: str | None = option(None, "for --method order: all blocks, first opened first", metavar="11,10,…")
    first: str | None = option(None, "the official code's form of rand, fun, rev and order: the top block "
                               "opens at step 0", choices=["top"])
    k: int | None = option(None, "steps between two openings", least=1)
    adapter: str = option("pfeiffer", "what is trained in each layer", choices=["pfeiffer", "lora"])
    model: str = option("FacebookAI/xlm-roberta-base", "a folder or a hub name: XLM-R, RoBERTa, BERT, "
                        "DeBERTa-v2/v3, ModernBERT; with --method full any encoder")
    language_adapters: str = option("auto", "stacked below the task's: the hub's for a hub model, none, or "
                                    "those in FOLDER/<language>; auto,FOLDER: these where the hub has none",
                                    metavar="auto|none|FOLDER|auto,FOLDER")
    data: str | None = option(None, "folder with train.en.jsonl, validation.en.jsonl, test.<language>.jsonl, "
                              "or .csv or .tsv (default: the hub); for mlm a text file in UTF-8")
    languages: str | None = option(None, "tested beside English (default: the task's, or all in the folder)",
                                   metavar="de,sw,…")
    language: str | None = option(None, "for mlm: the language's code, and the adapter's name")
    epochs: int | None = option(None, "passes over the training data", least=1)
    steps: int | None = option(None, "training steps, instead of --epochs; 0 tests untrained", least=0)
    lr: float | None = option(None, "learning rate at the start", type=float)
    decay: str | None = option(None, "of the learning rate", choices=["linear", "constant"])
    batch_size: int | None = option(None, "training sequences per step", least=1)
    max_length: int | None = option(None, "tokens per sequence; texts are cut, contexts and sentences split",
                                    least=16)
    train_examples: int | None = option(None, "train on a random sample of this size", least=1)
    test_examples: int | None = option(None, "test on a fixed random sample of each language", least=1)
    seed: int = option(0, "of head, adapters, dropout, data order and Rand; several in quotes, too", least=0)
    fisher_every: int | None = option(None, "steps between two reports of tr(F); 0: each epoch", least=0)
    fisher_labels: str = option("sampled", "labels of tr(F)", choices=list(LABELS))
    fisher_batches: int | None = option(None, "training batches per measurement of tr(F) (default: 4, for "
                                        "official 41)", least=1)
    eval_every: int | None = option(None, "steps between two validations; 0: ends of epochs, at least 50 "
                                    "steps apart (default: 500 with data from the hub, else 0)", least=0)
    average: bool = option(False, "test the mean of the weights at all validations but the untrained one, "
                           "frozen blocks as they are, in place of the best weights", action="store_true")
    device: str | None = option(None, "default: cuda when there is one", choices=["cpu", "cuda"])
    precision: str | None = option(None, "bf16 is autocast (default: tf32 on CUDA, fp32 on a CPU)",
                                   choices=["fp32", "tf32", "bf16"])
    whole_batches: bool = option(False, "pad each batch to its longest example (default: XLM-R, RoBERTa "
                                 "and BERT run without padding)", action="store_true")
    cuda_graphs: bool = option(False, "repeat a step's kernels without Python, on CUDA: faster where a card "
                               "waits for launches (XLM-R, RoBERTa and BERT)", action="store_true")
    save_every: int = option(500, "steps between two checkpoints", least=1)
    out: str | None = option(None, "the run's folder (default: runs/TASK-MODEL-METHOD-SEED)")
    overwrite: bool = option(False, "start anew, and replace a finished run", action="store_true")


def check(settings: Settings) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    for name, value in dataclasses.asdict(settings).items():
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            raise UserError(f"--{name.replace('_', '-')} {value!r} is not UTF-8: choose another name")
    if settings.lr is not None and not 0 < settings.lr < math.inf:
        raise UserError(f"--lr must be a positive number, not {settings.lr}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if settings.precision == "tf32" and device_of(settings).type != "cuda":
        raise UserError("--precision tf32 is for CUDA: use fp32 or bf16")
    if settings.cuda_graphs and (device_of(settings).type != "cuda" or TASKS[settings.task].trains_language):
        raise UserError("--cuda-graphs is for tasks on a CUDA device: leave it out")
    if settings.epochs and settings.steps is not None:
        raise UserError("--epochs and --steps exclude each other: give one of them")
    if (settings.method == "order") != (settings.order is not None):
        raise UserError("--method order and --order 11,10,… go together: give both or neither")
    if settings.order is not None and not re.fullmatch(r"\d+(,\d+)*", settings.order):
        raise UserError(f"--order must be the numbers of all blocks, as in 11,10,…, not {settings.order!r}")
    if settings.data is None and not TASKS[settings.task].hub:
        raise UserError(f"--data is missing: {settings.task} has no data of its own on the hub")
    if not TASKS[settings.task].trains_language:
        if settings.language is not None:
            raise UserError("--language is for mlm: --languages names those that a task is tested in")
    elif not re.fullmatch(r"[\w-]+", settings.language or ""):
        raise UserError(f"--language must be a code such as th or zh-CN, not {settings.language!r}")
    elif (settings.method, settings.adapter) != ("standard", "pfeiffer"):
        raise UserError("mlm trains a language adapter as a whole: leave --method and --adapter out")


# ------------------------------------------------------------------------------------------------------------
# Training: the loop
# ------------------------------------------------------------------------------------------------------------


def train(settings: Settings) -> None:
    """One run, from the data to results.json in its folder; a stopped one goes on from its checkpoint."""
    started, device = time.time(), device_of(settings)
    task, out = TASKS[settings.task], run_folder(settings)
    reach_hub(settings)
    rows, labels = load_data(settings)  # by split: train, validation, then the test languages
    splits = sampled(rows, settings)
    tokenizer, config = load_tokenizer(settings)
    encoded = encode(settings, splits, tokenizer, labels)
    examples = encoded["train"]
    settings = complete(settings, config, len(splits["train"]), len(examples))  # with its presets
    torch.manual_seed(settings.seed)
    model, blocks = build_model(settings, config, labels)
    languages, sources = load_language_adapters(settings, model, list(splits)[2:])
    model.to(device)
    collate, autocast = make_ready(settings, model, tokenizer, examples)
    # ONE optimizer over all that will ever train: built from the open blocks, it would never step later ones
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=settings.lr, weight_decay=0.0, fused=True)
    forward_and_backward = training_pass(settings, model, tokenizer, collate, autocast, learned)
    losses = Losses(settings, len(examples))
    padded = partial(collate, is_packed=False)  # fisher.py tells examples apart by the first dimension
    traces = Traces(settings, model, blocks, examples, padded, autocast, losses)
    unfreezer = new_unfreezer(settings, blocks, traces.measure)

    run = Run(out, identity_of(dataclasses.asdict(settings), fingerprint(rows)))
    if run.is_finished():
        print(f"{out} is finished and kept (--overwrite redoes it)")
        return
    stride = steps_between_validations(settings, len(examples))
    introduce(settings, splits, encoded, len(blocks), stride, last_opening(settings, len(blocks)), languages,
              sources, device)
    state = restore_state(run, learned, optimizer, unfreezer) or run.start_anew()
    losses.read = state.pop("losses")
    evaluate = partial(evaluate_split, task, model, labels, collate, autocast)
    validate = partial(evaluate, splits["validation"], encoded["validation"], settings.language or "en")
    keep = keep_mean if settings.average else keep_best
    asked_to_stop = note_stop_signals()  # the step under way is finished first

    progress = tqdm(range(state["step"], settings.steps + 1), initial=state["step"], total=settings.steps,
                    desc=settings.method, mininterval=1, dynamic_ncols=True, disable=None)  # off a terminal
    for step in progress:  # look, then train; after the last step only look
        is_end = step == settings.steps
        traces.begin(step)
        if step % stride == 0 or is_end:
            with stopping_at_once():  # all is in the checkpoint
                scores, _ = validate()
            run.log("eval", step, split="validation", language=settings.language or "en", **scores)
            keep(state, scores, step, learned)
            state.setdefault("untrained", scores)
        opened = [] if is_end else unfreezer.step(step)  # Algorithm 1: add the blocks SELECT() names to S
        if opened:
            run.log("open", step, blocks=opened)
        if blocks and not task.trains_language and (is_end or traces.is_due()):
            report_trace(run, step, traces.measure(), unfreezer.trainable, state["averages"])
        if is_end:
            break

        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        loss = forward_and_backward([examples[i] for i in batch_of(settings, step, len(examples))])
        norm = nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()  # a frozen block has grad=None and is left alone
        optimizer.zero_grad()
        losses.add(loss, norm)

        done, is_stopping = step + 1, bool(asked_to_stop)
        is_saved = is_stopping or done == settings.steps or 0 in (done % settings.save_every, done % stride)
        if is_saved or done % 10 == 0:
            losses.look(done)
        if done % 10 == 0 or done == settings.steps:
            loss = losses.take_mean()
            run.log("train", step, loss=loss, lr=learning_rate(settings, step))
            say(progress, f"loss {loss:.3f}, open {len(unfreezer.trainable)}/{len(blocks)}", done)
        if is_saved:
            if task.trains_language:
                save_weights(out, settings, model, tokenizer)  # usable from now on
            seconds = state["seconds"] + time.time() - started
            save_state(run, learned, optimizer, unfreezer,
                       state | {"step": done, "seconds": seconds, "losses": losses.read})
        if is_stopping:
            raise KeyboardInterrupt(128 + asked_to_stop[0])

    on_stop_signals(stop_now)
    if asked_to_stop:  # after the last step, which is in the checkpoint
        raise KeyboardInterrupt(128 + asked_to_stop[0])
    if state["kept"] is not None:
        put(state["kept"], learned)
    if settings.average:  # the mean's own scores
        state["validation"], _ = validate()
    scores = test_zero_shot(run, model, blocks, languages, splits, encoded, evaluate, settings.steps)
    save_weights(out, settings, model, tokenizer)
    run.finish(describe(settings, scores) | {
        "order": unfreezer.history, "kept_step": state["kept_step"], "validation": state["validation"],
        "untrained": state["untrained"], "data": run.identity[DATA], "train_examples": len(splits["train"]),
        "language_adapters": languages, "language_adapter_sources": sources,
        "wall_seconds": round(state["seconds"] + time.time() - started, 1)})


# ------------------------------------------------------------------------------------------------------------
# Training: the parts of the loop, in its order
# ------------------------------------------------------------------------------------------------------------

PRECISION = {"cuda": "tf32", "cpu": "fp32"}  # by default


def device_of(settings: Settings) -> torch.device:
    return torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def encode(settings: Settings, splits: dict[str, list[dict]], tokenizer, labels: list) -> dict:
    """By split, an example for each of its sequences."""
    task = TASKS[settings.task]
    length = settings.max_length or task.max_length
    encoded = {name: task.encode(rows, tokenizer, length, labels) for name, rows in splits.items()}
    if not all(map(tokens_of, itertools.chain(*encoded.values()))):
        raise UserError("--data has texts without a token, and the tokenizer adds none: take them out")
    return encoded


def complete(settings: Settings, config, train_examples: int, sequences: int) -> Settings:
    """The settings with the task's preset, and the device's precision, in place of None."""
    blocks = 0 if settings.method == "full" else config.num_hidden_layers
    settings = resolve(settings, config.model_type, blocks, train_examples, sequences)
    return dataclasses.replace(settings, precision=settings.precision or PRECISION[device_of(settings).type])


def make_ready(settings: Settings, model: nn.Module, tokenizer, examples: list[dict]) -> tuple:
    """Set precision and determinism, allow packing, refuse a model in which padding counts.

    Returns `collate`, examples -> batch on the device, and `autocast`."""
    task, device, is_packable = TASKS[settings.task], device_of(settings), model.config.model_type in PACKED
    torch.use_deterministic_algorithms(True, warn_only=not is_packable)
    if is_packable:
        allow_packing(model)
    elif settings.cuda_graphs:
        raise UserError(f"--cuda-graphs is for {', '.join(PACKED)}, no {model.config.model_type}: leave it "
                        "out")
    collate = partial(batch_on, device, model, partial(task.batch, tokenizer=tokenizer),
                      is_packed=not settings.whole_batches)
    torch.set_float32_matmul_precision("highest")  # TF32's rounding would look as if padding counted
    if not task.trains_language:  # its sequences are of one length
        check_padding(task, model, examples, collate)
    torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
    return collate, partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.precision == "bf16")


@torch.inference_mode()
def check_padding(task, model: nn.Module, examples: list[dict], collate: Callable) -> None:
    """Refuse a model that does not run, or in which the padding of a batch changes what an example gives."""
    short, long = (choose(examples[:256], key=tokens_of) for choose in (min, max))
    name = model.config.model_type
    try:
        alone, padded = (task.forward(model.eval(), collate(rows))[0] for rows in ([short], [short, long]))
    except Exception as error:  # an unknown model may raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"--model: a {name} does not run here ({reason(error)}); choose another "
                        "kind") from None
    padded = padded[..., : alone.shape[-1]]  # spans have a logit for each token
    if not torch.allclose(padded, alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item()):
        raise UserError(f"--model: in a {name}, padding changes the output, and so would the batch; choose "
                        "another kind")


def training_pass(settings: Settings, model: nn.Module, tokenizer, collate: Callable, autocast: Callable,
                  learned: dict[str, nn.Parameter]) -> Callable:
    """What a step does to its examples: one forward and one backward pass; returns the loss."""
    task = TASKS[settings.task]

    def one_pass(batch: dict) -> torch.Tensor:
        with autocast():
            loss = task.loss(model, batch)
        loss.backward()  # reaches down to the lowest open block and no further
        return loss.detach()

    if settings.cuda_graphs:
        one_pass = Graphed(one_pass, learned.values())
        make = partial(widened, partial(task.batch, tokenizer=tokenizer), tokenizer, settings.max_length)
        collate = partial(batch_on, model.device, model, make, is_packed=not settings.whole_batches,
                          multiple=TOKENS)
    return lambda examples: one_pass(collate(sorted(examples, key=tokens_of)))  # for attention's groups


class Losses:
    """Loss and norm of the gradient of each step, on the device until the loop looks: that waits for it."""

    def __init__(self, settings: Settings, sequences: int):
        self.settings, self.sequences, self.waiting = settings, sequences, []
        self.read: list[float] = []  # losses since the last mean

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        self.waiting.append(torch.stack([loss.float(), norm]))

    def look(self, done: int) -> None:
        """Read the values of the steps before `done`. Raises UserError for one that is NaN or infinite."""
        values = torch.stack(self.waiting).tolist() if self.waiting else []
        for step, (loss, norm) in enumerate(values, done - len(values)):
            if not math.isfinite(loss + norm):
                batch = ", ".join(map(str, batch_of(self.settings, step, self.sequences)))
                rate = learning_rate(self.settings, step)
                raise UserError(f"the loss is {loss:g} and its gradient's norm {norm:g} at step {step} "
                                f"(learning rate {rate:g}, training sequences {batch}): lower --lr, and pass "
                                "--overwrite if the run has a checkpoint")
        self.read += [loss for loss, _ in values]
        self.waiting = []

    def take_mean(self) -> float:
        value, self.read = mean(self.read), []
        return value


class Traces:
    """tr(F) of all blocks: measured once a step, if asked for; FUN's choice and the report share it."""

    def __init__(self, settings: Settings, model: nn.Module, blocks: list[nn.Module], examples: list[dict],
                 collate: Callable, autocast: Callable, losses: Losses):
        self.settings, self.model, self.blocks, self.examples = settings, model, blocks, examples
        self.collate, self.autocast, self.losses = collate, autocast, losses
        self.every = settings.fisher_every or steps_per_epoch(settings, len(examples))

    def begin(self, step: int) -> None:
        self.step, self.trace = step, None

    def is_due(self) -> bool:
        """At this step FUN has measured, or a report is due."""
        return self.trace is not None or self.step % self.every == 0

    def measure(self) -> list[float]:
        if self.trace is None:
            self.losses.look(self.step)  # one that is not finite is named first
            settings, seed = self.settings, self.settings.seed * 100_003 + self.step
            generator = torch.Generator().manual_seed(seed)  # not training's
            batches = fisher_batches(settings, self.examples, generator, self.collate)
            try:
                with self.autocast():
                    self.trace = fisher_trace(
                        self.model, batches, self.blocks, settings.fisher_labels, generator).tolist()
            except ValueError as error:
                remedies = {"not finite": "lower --lr", "labels=": "choose other --fisher-labels"}
                remedy = next((remedy for part, remedy in remedies.items() if part in str(error)),
                              "choose another --model")
                raise UserError(f"no tr(F) at step {self.step}: {error}; {remedy}") from None
        return self.trace


def fisher_batches(settings: Settings, examples: list, generator: torch.Generator, collate: Callable) -> list:
    """Randomly drawn training batches for one measurement (all, if there are fewer), grouped by length, but
    not for the official estimator, whose value depends on the grouping: a loader shuffles."""
    size = settings.batch_size
    order = torch.randperm(len(examples), generator=generator)[: settings.fisher_batches * size].tolist()
    chosen = [examples[i] for i in order]
    if settings.fisher_labels != "official":
        chosen.sort(key=tokens_of)
    return [collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]


def new_unfreezer(settings: Settings, blocks: list[nn.Module], score: Callable) -> Unfreezer:
    order = settings.order and [int(block) for block in settings.order.split(",")]
    method = "none" if settings.method == "full" else settings.method
    try:
        return Unfreezer(blocks, method, settings.k, score, order, settings.seed, settings.first)
    except ValueError as error:
        raise UserError(f"--order {settings.order}: {error}") from None


def last_opening(settings: Settings, blocks: int) -> int:
    """The step before which the last block opens; 0 for a method of a user's own: it is not known."""
    intervals = {"lpft": 1} | dict.fromkeys(("gu", "rand", "fun", "rev", "order"), blocks - 1)
    return settings.k * intervals.get(settings.method, 0)


def evaluate_split(task, model: nn.Module, labels: list, collate: Callable, autocast: Callable,
                   rows: list[dict], examples: list[dict], language: str) -> tuple[dict, list[dict]]:
    """The scores in percent by metric, and a prediction for each row."""
    outputs = predict(task, model, examples, collate, autocast)
    if any(output.isnan().any() for output in outputs):
        raise UserError("the model's outputs are not numbers: lower --lr, or choose another --model, and "
                        "pass --overwrite")
    return task.score(rows, examples, outputs, language, labels)


def steps_per_epoch(settings: Settings, sequences: int) -> int:
    return math.ceil(sequences / settings.batch_size)


def steps_between_validations(settings: Settings, sequences: int) -> int:
    """--eval-every, or with 0 ends of epochs that are at least 50 steps apart: an epoch of COPA has 7."""
    epoch = steps_per_epoch(settings, sequences)
    return settings.eval_every or epoch * math.ceil(50 / epoch)


def keep_best(state: dict, scores: dict, step: int, learned: dict[str, nn.Parameter]) -> None:
    """Of equal validations the first; the untrained weights only until others are there."""
    metric = next(iter(scores))
    if state["kept"] is None or scores[metric] > state["validation"][metric]:
        state |= {"kept": copied(learned) if step else None, "kept_step": step, "validation": scores}


def keep_mean(state: dict, scores: dict, step: int, learned: dict[str, nn.Parameter]) -> None:
    """The mean of the weights at all validations (Schmidt, Vulić, Glavaš, ACL 2023) but the untrained one."""
    if step:
        state["count"] += 1
        state["kept"] = state["kept"] or copied(learned)
        for name, parameter in learned.items():  # mean + (weights - mean) / count
            state["kept"][name].lerp_(parameter.detach(), 1 / state["count"])


def test_zero_shot(run: Run, model: nn.Module, blocks: list[nn.Module], languages: dict, splits: dict,
                   encoded: dict, evaluate: Callable, step: int) -> dict[str, dict]:
    """The scores by language, each above the adapter that `languages` names: the task adapter stays."""
    scores = {}
    for language in tqdm(languages, desc="testing", disable=None):
        if blocks:
            set_language(model, languages[language])
        scores[language], predictions = evaluate(splits[language], encoded[language], language)
        run.log("eval", step, split="test", language=language, **scores[language])
        write_lines(run.out / "predictions" / f"{language}.jsonl", predictions)
    return scores


def learning_rate(settings: Settings, step: int) -> float:
    return settings.lr * (1 - step / settings.steps if settings.decay == "linear" else 1)  # no warm-up


@lru_cache(maxsize=1)
def train_order(seed: int, epoch: int, sequences: int) -> list[int]:
    """Every sequence once, in an order that depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(sequences, generator=generator).tolist()


def batch_of(settings: Settings, step: int, sequences: int) -> list[int]:
    """The numbers of the sequences that a step trains on."""
    epoch, position = divmod(step, steps_per_epoch(settings, sequences))
    start = position * settings.batch_size
    return train_order(settings.seed, epoch, sequences)[start : start + settings.batch_size]


# ------------------------------------------------------------------------------------------------------------
# Building and saving the model
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def blame_model(settings: Settings):
    """Whatever damaged or hostile files of a model provoke becomes one line for the user."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        why = reason(error)
        remedy = "--model takes a folder with config.json, model.safetensors and a tokenizer, or a hub name"
        if isinstance(error, OSError) and constants.HF_HUB_OFFLINE and not Path(settings.model).is_dir():
            why, remedy = "not in the local cache, and the hub is not reached", WITHOUT_HUB
        raise UserError(f"cannot load model {settings.model!r} ({why}): {remedy}") from None


def reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_tokenizer(settings: Settings) -> tuple:
    """The tokenizer and the config of --model."""
    folder = Path(settings.model)
    if folder.is_dir() and not list(folder.glob("model*.safetensors")):
        raise UserError(f"model folder {folder} has no weights: put model.safetensors beside its config.json")
    with blame_model(settings):
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
        if tokenizer.pad_token is None or len(tokenizer) > config.vocab_size:
            raise ValueError("its tokenizer has no padding token, or more tokens than the model")
        tokenizer.padding_side = "right"  # Gemma's, which mmBERT took over, pads left
    return tokenizer, config


def build_model(settings: Settings, config, labels: list) -> tuple[nn.Module, list[nn.Module]]:
    """The model with the task's head, in float32, and its blocks; weights come from safetensors only."""
    head = TASKS[settings.task].head
    with blame_model(settings):
        for index in Path(settings.model).glob("*.index.json"):  # of a model in several files
            if any(Path(name).name != name for name in json.loads(index.read_bytes())["weight_map"].values()):
                raise ValueError(f"{index} names files outside of the folder")
        own_head_fits = set_labels(config, head, labels)
        model, loaded = head.from_pretrained(
            settings.model, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True)
        check_weights(settings, model, loaded, own_head_fits)
    try:
        blocks = add_blocks(settings, model)
    except ValueError as error:
        raise UserError(f"--model {settings.model}: {error}; --method full may train it") from None
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    taken = getattr(embeddings, "padding_idx", None)  # where positions are counted from the one after it
    positions = getattr(config, "max_position_embeddings", 0) - (0 if taken is None else taken + 1)
    if 0 < positions < settings.max_length:
        raise UserError(f"--max-length {settings.max_length} is more than the model's {positions} positions")
    return model, blocks


def set_labels(config, head: type, labels: list) -> bool:
    """Give the head its outputs; returns whether a checkpoint's own head can be for the same labels."""
    before = config.id2label, config.problem_type
    if head is AutoModelForQuestionAnswering:
        config.num_labels = 2  # start and end, whatever the model was trained for before
    elif head in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        names = [str(label) for label in labels]
        if len({*names}) < len(names):  # 1 and "1"
            names = [repr(label) for label in labels]
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        config.problem_type = "single_label_classification"
        unnamed = {i: f"LABEL_{i}" for i in config.id2label}
        return before[0] in (config.id2label, unnamed) and before[1] in (None, config.problem_type)
    return True


def check_weights(settings, model: nn.Module, loaded: dict, own_head_fits: bool) -> None:
    """Refuse a checkpoint without all of the encoder; a head of its own that does not fit is made anew."""
    sizes = {entry if isinstance(entry, str) else entry[0] for entry in loaded["mismatched_keys"]}
    lacking, encoder = sizes | set(loaded["missing_keys"]), model.base_model_prefix + "."
    of_encoder = {key for key in lacking if key.startswith(encoder)}
    poolers = {key for key in of_encoder if ".pooler." in key and key not in sizes}
    if lost := sorted(of_encoder - poolers):  # they would be random
        raise ValueError(f"its weights lack {lost[0]} and {len(lost) - 1} more")
    if poolers:
        print(f"note: {settings.model} has no pooler: a random one takes its place"
              + ", frozen" * (settings.method != "full"))
    head = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(encoder)}
    if head.keys() <= set(loaded["missing_keys"]) or TASKS[settings.task].head is AutoModelForMaskedLM:
        return
    if own_head_fits and lacking.isdisjoint(head):
        print(f"note: {settings.model} has a head of its own, which training starts from")
        return
    print(f"note: {settings.model} has a head for other labels; a new one is trained")
    fresh = dict(type(model)(model.config).named_parameters())
    for name, parameter in head.items():
        parameter.data.copy_(fresh[name])


def add_blocks(settings, model: nn.Module) -> list[nn.Module]:
    """What trains beside the head, bottom to top; with --method full there are no blocks, and all trains."""
    if settings.method == "full":
        return []
    if not TASKS[settings.task].trains_language:
        return add_lora(model) if settings.adapter == "lora" else add_task_adapters(model)
    blocks = add_language_adapter(model, settings.language)
    set_language(model, settings.language)
    return [block.requires_grad_(True) for block in blocks]


def load_language_adapters(settings, model: nn.Module, languages: list[str]) -> tuple[dict, dict]:
    """Load the language adapters, English first; returns by language the one to stack (None: no adapter), and
    by adapter the hub repository or the folder that it is from."""
    source, sources = settings.language_adapters, {}
    folder = source.removeprefix("auto,")
    is_hub = source.split(",")[0] == "auto" and not Path(settings.model).is_dir()
    if source == "none" or settings.method == "full":
        return dict.fromkeys(languages), {}
    if folder != source and not (folder and Path(folder).is_dir()):
        raise UserError(f"--language-adapters {source}: no folder {folder!r}; it must hold LANGUAGE/ folders")
    for language in languages:
        of_hub = f"AdapterHub/{Path(settings.model).name}-{language}-wiki_pfeiffer"
        for place in [of_hub] * is_hub + [Path(folder, language)] * (source != "auto"):
            try:
                add_language_adapter(model, language, place)
                sources[language] = str(place)
                break
            except ValueError as error:  # offline by choice, what the cache lacks counts as lacking on the hub
                if language == "en" or isinstance(place, Path) or not HF_HUB_OFFLINE or \
                        try_to_load_from_cache(place, "adapter_config.json"):
                    raise UserError(f"--language-adapters {source}: {error}") from None
            except FileNotFoundError as error:  # the task adapter trains above English
                if isinstance(place, Path) and (place.is_dir() or language == "en"):
                    raise UserError(f"--language-adapters {source}: {error}") from None
        if not sources:  # none in English, and no folder that must have it
            return dict.fromkeys(languages), {}
    if sources:
        set_language(model, "en")
    return {language: language if language in sources else "en" for language in languages}, sources


def save_weights(out: Path, settings, model: nn.Module, tokenizer) -> None:
    """What was trained, in AdapterHub's format; with --method full the whole model, in Hugging Face's."""
    if settings.method == "full":
        temporary = out / "model.tmp"
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except Exception as error:  # these libraries' own kinds
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(None, str(error).splitlines()[0], temporary) from None
        shutil.rmtree(out / "model", ignore_errors=True)
        temporary.rename(out / "model")
    elif TASKS[settings.task].trains_language:
        save_adapter(model, settings.language, out)  # the folder is the adapter
        save_head(model, out)
    else:
        save_adapter(model, "task", out / "adapter", with_head=False)
        save_head(model, out / "head")


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def refuse(message: str):
    message = message.removeprefix("argument ").replace(": must be", " must be", 1)
    raise UserError(f"{message} (see python unfreeze.py --help)")


def parse(arguments: list[str]) -> Settings:
    parser = argparse.ArgumentParser(prog="unfreeze.py", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("task", choices=list(TASKS), help="or `report FOLDER…`: tables over finished runs")
    for entry in dataclasses.fields(Settings)[1:]:
        choices = {"choices": [*SELECT, "full"]} if entry.name == "method" else {}  # new ones of a user, too
        parser.add_argument("--" + entry.name.replace("_", "-"), default=entry.default,
                            **entry.metadata, **choices)
    parser.add_argument("--bf16", action="store_const", const="bf16", dest="precision",
                        help="short for --precision bf16")
    given = vars(parser.parse_args(arguments))
    given["method"] = given["method"] or ("standard" if TASKS[given["task"]].trains_language else "gu")
    if given["method"] == "full":  # it has none of either
        given |= {"adapter": "pfeiffer", "language_adapters": "none"}
    if given["method"] in ("standard", "gu", "lpft", "none", "full"):  # the same in either form
        given["first"] = None
    return Settings(**given)


def runs_of(arguments: list[str]) -> list[Settings]:
    """One run or, where --method or --seed names several ("gu fun", "0 1 2 3"), one for each pair."""
    several = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    several.error = refuse
    several.add_argument("--method", type=str.split)
    several.add_argument("--seed", type=str.split)
    given, others = several.parse_known_args(arguments)
    for name, values in vars(given).items():
        if values == []:
            refuse(f"--{name} is empty")
    pairs = itertools.product([["--seed", seed] for seed in given.seed or []] or [[]],
                              [["--method", method] for method in given.method or []] or [[]])
    runs = [parse([*others, *method, *seed]) for seed, method in pairs]
    if len({*map(run_folder, runs)}) < len(runs):
        raise UserError("a comparison has folders of its own: leave --out out, and name every run once")
    return runs


def compare(runs: list[Settings]) -> None:
    """One run after the other, what is finished is kept, then the table."""
    for settings in runs:
        check(settings)
    for settings in runs:
        train(settings)
    if len(runs) > 1:
        from extras.report import report
        report([str(run_folder(settings)) for settings in runs])


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, which would fault it in anew, page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def note_stop_signals() -> list[int]:
    """From now on a stop signal is noted in the list returned; a second one stops at once."""
    asked: list[int] = []

    def note(number: int, _) -> None:
        asked.append(number)
        on_stop_signals(stop_now)

    on_stop_signals(note)
    return asked


@contextlib.contextmanager
def stopping_at_once():
    before = signal.getsignal(signal.SIGTERM)
    on_stop_signals(stop_now)
    yield
    on_stop_signals(before)


def on_stop_signals(act: Callable) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, act)


def stop_now(number: int, _) -> None:
    raise KeyboardInterrupt(128 + number)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a user's mistake, 130 or 143 interrupted."""
    keep_freed_memory()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    on_stop_signals(stop_now)
    try:
        if arguments[:1] == ["report"]:
            from extras.report import report
            report(arguments[1:])
        else:
            compare(runs_of(arguments))
        sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'writing the run'}: {error.strerror or error}; check the path, its "
              "permissions and the space on its disk, or choose another --out", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory: lower --batch-size or --max-length (with --overwrite if the run has a "
              "checkpoint), or run where more is free", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("interrupted: the same command goes on from the last checkpoint, or starts if there is none "
              "(leave --overwrite out)", file=sys.stderr)
        return interrupt.args[0]


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed
    sys.stdout.reconfigure(errors="replace")  # a terminal may have no ±
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # at once: what a closed pipe or a full disk has refused is not tried again
