"""Scheduled unfreezing of task adapters for zero-shot cross-lingual transfer, in one plain PyTorch loop.

Liu, Pfeiffer, Vulić, Gurevych. FUN with Fisher: Improving Generalization of Adapter-Based Cross-lingual
Transfer with Scheduled Unfreezing. NAACL 2024 (Algorithm 1, Table 3).

    python unfreeze.py xnli --data FOLDER --method fun                   # XLM-R base by the paper's preset
    python unfreeze.py classify --data demo/data --model demo/model      # after python extras/demo.py
    python unfreeze.py mlm --language th --data thai.txt                 # a language adapter the hub lacks
    python unfreeze.py report runs/*                                     # a table over finished runs

    from unfreeze import Unfreezer                                       # the schedule in a loop of your own
    unfreezer = Unfreezer(blocks, "gu", k=800); ...; unfreezer.step(i)   # before training step i

Train on English only, open the adapters block by block, report tr(F), select on English validation, test in
every language. Departures from the official code: GU opens its second block after k steps (there 2k), FUN
chooses its first block by tr(F) too (there it is the top one), tr(F) is equation 1 (see fisher.py).
"""

import argparse
import dataclasses
import io
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS; read when CUDA starts
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer,
                          DataCollatorForLanguageModeling, DataCollatorWithPadding)

from adapters import (add_language_adapter, add_lora, add_task_adapters, save_adapter, save_head,
                      set_language, write_atomically)
from fisher import LABELS, fisher_trace
from tasks import PRESETS, TASKS, UserError, accuracy, encode, load_data, read_text


# ------------------------------------------------------------------------------------------------------------
# Algorithm 1: which blocks open at which step
# ------------------------------------------------------------------------------------------------------------


def largest_trace(frozen: list[int], score: Callable) -> list[int]:
    """The frozen block with the largest tr(F), of equals the higher; a single one needs no measurement."""
    if len(frozen) == 1:
        return frozen
    trace = [float(value) for value in score()]
    if len(trace) <= frozen[-1] or not all(map(math.isfinite, trace)):
        raise ValueError(f"score() must return one finite number per block, not {trace}")
    return [max(frozen, key=lambda block: (trace[block], block))]


SELECT = {  # by method: from the frozen blocks, bottom to top, to those that open in this interval
    "standard": lambda frozen, **_: frozen,
    "gu": lambda frozen, **_: frozen[-1:],
    "lpft": lambda frozen, interval, **_: frozen if interval >= 1 else [],
    "rand": lambda frozen, generator, **_: [frozen[torch.randint(len(frozen), (), generator=generator)]],
    "fun": lambda frozen, score, **_: largest_trace(frozen, score),
    "rev": lambda frozen, **_: frozen[:1],
    "order": lambda frozen, order, **_: [next(block for block in order if block in frozen)],
    "none": lambda **_: [],  # the head alone
}


class Unfreezer:
    """Algorithm 1: freezes all blocks, then opens (`requires_grad`) those due before each training step.

    blocks: modules, bottom to top. method: a key of SELECT. k: the interval in steps. score: a callable that
    returns a number per block, called only when FUN chooses. order: all blocks in their order, for "order".
    Give the optimizer ALL parameters of all blocks, once: a frozen one has `grad=None` and is skipped, no
    decay, momentum or state. Raises ValueError for an impossible method, k, score or order.
    """

    def __init__(self, blocks: list[nn.Module], method: str, k: int, score: Callable | None = None,
                 order: list[int] | None = None, seed: int = 0):
        if method not in SELECT:
            raise ValueError(f"unknown method {method!r}: choose one of {', '.join(SELECT)}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a whole number of steps, at least 1, not {k!r}")
        if method == "fun" and score is None:
            raise ValueError("method 'fun' needs `score`, a callable that returns one number per block")
        if method == "order" and sorted(order or []) != list(range(len(blocks))):
            raise ValueError(f"order must hold each of the blocks 0..{len(blocks) - 1} once, not {order!r}")
        self.blocks, self.method, self.k, self.score, self.order = list(blocks), method, k, score, order
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[tuple[int, int]] = []  # (step, block) in the order of opening
        self._set_requires_grad()

    @property
    def trainable(self) -> list[int]:
        return sorted(block for _, block in self.history)

    def step(self, i: int) -> list[int]:
        """Open the blocks due before training step i (from 0), return them; a repeated call opens nothing."""
        frozen = [block for block in range(len(self.blocks)) if block not in self.trainable]
        due = i % self.k == 0 and i <= self.k * len(self.blocks) and all(step < i for step, _ in self.history)
        if not frozen or not due:
            return []
        opened = SELECT[self.method](frozen=frozen, interval=i // self.k, score=self.score, order=self.order,
                                     generator=self.generator)
        self.history += [(i, block) for block in opened]
        self._set_requires_grad()
        return opened

    def state_dict(self) -> dict:
        return {"method": self.method, "k": self.k, "blocks": len(self.blocks), "order": self.order,
                "history": [list(entry) for entry in self.history], "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was saved. Raises ValueError if it belongs to another schedule."""
        mine = self.state_dict()
        for key in ("method", "k", "blocks", "order"):
            if state[key] != mine[key]:
                raise ValueError(f"the saved schedule has {key} {state[key]!r}, this one {mine[key]!r}")
        self.history = [tuple(entry) for entry in state["history"]]
        self.generator.set_state(state["generator"])
        self._set_requires_grad()

    def _set_requires_grad(self) -> None:
        for index, block in enumerate(self.blocks):
            block.requires_grad_(index in self.trainable)
            if index not in self.trainable:
                block.zero_grad(set_to_none=True)  # with a gradient of zeros AdamW would still decay


# ------------------------------------------------------------------------------------------------------------
# Settings and presets
# ------------------------------------------------------------------------------------------------------------


def option(default, text: str, **keywords):
    return field(default=default, metadata={"help": text} | keywords)


@dataclass(frozen=True)
class Settings:
    """The command line. None stands for the preset of task, model and method, filled in by `resolve`."""

    task: str
    method: str = option("gu", "which blocks open when", choices=list(SELECT))
    order: str | None = option(None, "for --method order: all blocks, first opened first", metavar="11,10,…")
    k: int | None = option(None, "steps between two openings", type=int)
    adapter: str = option("pfeiffer", "what is trained in each layer", choices=["pfeiffer", "lora"])
    model: str = option("FacebookAI/xlm-roberta-base", "a folder or a hub name (XLM-R, RoBERTa, BERT)")
    language_adapters: str = option("auto", "stacked below the task's: the hub's for a hub model, none, or "
                                    "those in FOLDER/<language>", metavar="auto|none|FOLDER")
    data: str | None = option(None, "folder with train.en.jsonl, validation.en.jsonl, test.<language>.jsonl")
    languages: str | None = option(None, "tested beside English (default: the task's)", metavar="de,sw,…")
    epochs: int | None = option(None, "passes over the training data", type=int)
    steps: int | None = option(None, "training steps, instead of --epochs", type=int)
    lr: float | None = option(None, "learning rate at the start", type=float)
    decay: str = option("linear", "of the learning rate", choices=["linear", "constant"])
    batch_size: int | None = option(None, "training examples per step", type=int)
    max_length: int = option(128, "tokens per example; longer ones are cut", type=int)
    train_examples: int | None = option(None, "train on a random sample of this size", type=int)
    test_examples: int | None = option(None, "test on a fixed random sample of each language", type=int)
    seed: int = option(0, "of head, adapters, dropout, data order and Rand", type=int)
    fisher_every: int = option(0, "steps between two reports of tr(F); 0: each epoch", type=int)
    fisher_labels: str = option("sampled", "labels of tr(F)", choices=list(LABELS))
    fisher_batches: int = option(4, "training batches per measurement of tr(F)", type=int)
    device: str | None = option(None, "default: cuda when there is one", choices=["cpu", "cuda"])
    bf16: bool = option(False, "bfloat16 autocast", action="store_true")
    out: str | None = option(None, "the run's folder (default: runs/TASK-MODEL-METHOD-SEED)")
    overwrite: bool = option(False, "replace a finished run", action="store_true")


@dataclass(frozen=True)
class LanguageSettings:
    """The command line of `mlm`, with the paper's recipe for a language adapter that the hub lacks."""

    task: str
    language: str = option(None, "the language's code, and the adapter's name", required=True)
    data: str = option(None, "a text file in UTF-8, a sentence or a paragraph a line", required=True)
    model: str = option("FacebookAI/xlm-roberta-base", "a folder or a hub name (XLM-R, RoBERTa, BERT)")
    epochs: int = option(100, "passes over the text", type=int)
    steps: int | None = option(None, "training steps, instead of --epochs", type=int)
    lr: float = option(1e-4, "learning rate at the start, linear to zero", type=float)
    batch_size: int = option(64, "sequences per step", type=int)
    max_length: int = option(512, "tokens per sequence", type=int)
    seed: int = option(0, "of the adapter, dropout, masks and data order", type=int)
    save_every: int = option(500, "steps between two saves", type=int)
    device: str | None = option(None, "default: cuda when there is one", choices=["cpu", "cuda"])
    bf16: bool = option(False, "bfloat16 autocast", action="store_true")
    out: str | None = option(None, "the adapter's folder (default: runs/mlm-MODEL/LANGUAGE)")
    overwrite: bool = option(False, "start anew, and replace a finished run", action="store_true")


def resolve(settings: Settings, model_type: str, layers: int, train_examples: int) -> Settings:
    """Fill in the presets. Where Table 3 has no k, opening takes a fifth of the steps (kL/N = 0.2)."""
    preset = PRESETS.get((settings.task, model_type)) or PRESETS[settings.task, "xlm-roberta"]
    batch_size = settings.batch_size or preset["batch_size"]
    per_epoch = math.ceil(train_examples / batch_size)
    epochs = None if settings.steps else settings.epochs or preset["epochs"]
    steps = settings.steps or epochs * per_epoch
    by_method = preset["k"] or {"gu": max(1, round(0.2 * steps / layers))}
    k = settings.k or by_method.get(settings.method, by_method["gu"])
    return dataclasses.replace(settings, k=k, epochs=epochs, steps=steps, lr=settings.lr or preset["lr"],
                               batch_size=batch_size)


def check(settings: Settings | LanguageSettings) -> None:
    """Refuse numbers that cannot work, before anything is loaded or written."""
    least_values = {"k": 1, "epochs": 1, "steps": 1, "batch_size": 1, "max_length": 8, "train_examples": 1,
                    "test_examples": 1, "seed": 0, "fisher_every": 0, "fisher_batches": 1, "save_every": 1}
    for name, least in least_values.items():
        value = getattr(settings, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if settings.seed >= 2**32:
        raise UserError(f"--seed must be below {2**32}, not {settings.seed}")
    if settings.lr is not None and not 0 < settings.lr < math.inf:
        raise UserError(f"--lr must be a positive number, not {settings.lr}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if isinstance(settings, LanguageSettings):
        if not re.fullmatch(r"[\w-]+", settings.language):
            raise UserError(f"--language must be a code such as th or zh-CN, not {settings.language!r}")
        return
    if settings.epochs and settings.steps:
        raise UserError("--epochs and --steps exclude each other: give one of them")
    if (settings.method == "order") != (settings.order is not None):
        raise UserError("--method order and --order 11,10,… go together: give both or neither")
    if settings.data is None:
        raise UserError(f"--data is missing: name the folder that holds train.en.jsonl for {settings.task}")


# ------------------------------------------------------------------------------------------------------------
# Model and language adapters
# ------------------------------------------------------------------------------------------------------------


def seeded_device(settings: Settings | LanguageSettings) -> torch.device:
    """The device to train on, with random numbers from the seed and deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(settings.seed)
    return torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(settings: Settings | LanguageSettings, head: type, patch: Callable, **config):
    """Tokenizer, model with this head, and what `patch` adds to it; weights come from safetensors only."""
    folder = Path(settings.model)
    if folder.is_dir() and not list(folder.glob("model*.safetensors")):
        raise UserError(f"model folder {folder} has no weights: put model.safetensors beside its config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model = head.from_pretrained(settings.model, use_safetensors=True, **config)
        added = patch(model)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load model {settings.model!r} ({reason}): --model takes a folder with "
                        "config.json, model.safetensors and a tokenizer, or a hub name") from None
    positions = model.config.max_position_embeddings - (2 if "roberta" in model.config.model_type else 0)
    if settings.max_length > positions:
        raise UserError(f"--max-length {settings.max_length} is more than the model's {positions} positions")
    return tokenizer, model, added


def load_language_adapters(settings: Settings, model: nn.Module, languages: list[str]) -> dict:
    """Load the language adapters, English first; returns by language the one to stack (None: no adapter)."""
    source, is_hub = settings.language_adapters, settings.language_adapters == "auto"
    if source == "none" or (is_hub and Path(settings.model).is_dir()):
        return dict.fromkeys(languages)
    stacked = {}
    for language in languages:
        place = Path(source, language)
        if is_hub:
            place = f"AdapterHub/{Path(settings.model).name}-{language}-wiki_pfeiffer"
        try:
            add_language_adapter(model, language, place)
            stacked[language] = language
        except ValueError as error:
            raise UserError(f"--language-adapters {source}: {error}") from None
        except FileNotFoundError as error:
            if not is_hub and (place.is_dir() or language == "en"):  # the task adapter trains above English
                raise UserError(f"--language-adapters {source}: {error}") from None
            if language == "en":
                return dict.fromkeys(languages)
            stacked[language] = "en"
    return stacked


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def train(settings: Settings) -> None:
    """One run, from the data to results.json in its folder."""
    started = time.time()
    check(settings)
    out = run_folder(settings, f"-{settings.method}-{settings.seed}")
    splits, texts, labels = load_data(settings)
    device = seeded_device(settings)
    names = [str(label) for label in labels]
    tokenizer, model, blocks = load_model(
        settings, AutoModelForSequenceClassification,
        {"pfeiffer": add_task_adapters, "lora": add_lora}[settings.adapter],
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    languages = load_language_adapters(settings, model, list(splits)[2:])  # after train and validation
    set_language(model, languages["en"])
    model.to(device)
    settings = resolve(settings, model.config.model_type, len(blocks), len(splits["train"]))
    for name, rows in splits.items():
        splits[name] = encode(rows, texts, labels, tokenizer, settings.max_length)
    examples, pad = splits["train"], DataCollatorWithPadding(tokenizer)

    def collate(examples: list[dict]) -> dict:
        return {key: value.to(device) for key, value in pad(examples).items()}

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16)

    # ONE optimizer over all that will ever train: built from the open blocks, it would never step later ones.
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.lr, weight_decay=0.0)
    factor = {"linear": lambda step: 1 - step / settings.steps, "constant": lambda step: 1.0}[settings.decay]
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)  # no warm-up

    traces: dict[int, list[float]] = {}  # by step: FUN's choice and the report share one measurement
    averages: list[float] = []

    def trace() -> list[float]:
        if step not in traces:
            generator = torch.Generator().manual_seed(settings.seed * 100_003 + step)  # not training's
            batches = fisher_batches(settings, examples, generator, collate)
            try:
                with autocast():
                    measured = fisher_trace(model, batches, blocks, settings.fisher_labels, generator)
            except ValueError as error:  # the logits are not finite
                raise UserError(f"no tr(F) at step {step}: {error}; lower --lr") from None
            traces[step] = measured.tolist()
        return traces[step]

    try:
        given = [int(block) for block in settings.order.split(",")] if settings.order else None
        unfreezer = Unfreezer(blocks, settings.method, settings.k, trace, given, settings.seed)
    except ValueError as error:
        raise UserError(f"--order {settings.order}: {error}") from None
    introduce(settings, splits, len(blocks), languages, device)
    log = start_log(out)
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    losses, best, best_accuracy = [], None, -1.0
    progress = tqdm(range(settings.steps), desc=settings.method, mininterval=1, dynamic_ncols=True)
    for step in progress:
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = train_order(settings.seed, epoch, len(examples))
        opened = unfreezer.step(step)  # Algorithm 1: add the blocks that SELECT() names to S
        if opened:
            log("open", step, blocks=opened)
        if step in traces or step % (settings.fisher_every or per_epoch) == 0:
            report_trace(log, step, trace(), unfreezer.trainable, averages)

        model.train()
        chosen = order[position * settings.batch_size : (position + 1) * settings.batch_size]
        with autocast():
            loss = model(**collate([examples[i] for i in chosen])).loss
        loss.backward()  # reaches down to the lowest open block and no further
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()  # a frozen block has grad=None and is left alone
        optimizer.zero_grad()
        decay.step()

        losses.append(loss.detach())
        if (step + 1) % 10 == 0 or step + 1 == settings.steps:  # the only read-back from the device
            value, losses = torch.stack(losses).mean().item(), []
            if not math.isfinite(value):
                raise UserError(f"the loss is {value} near step {step}: lower --lr (now {settings.lr})")
            log("train", step, loss=value, lr=decay.get_last_lr()[0])
            progress.set_postfix_str(f"loss {value:.3f}, open {len(unfreezer.trainable)}/{len(blocks)}")
        if position + 1 == per_epoch or step + 1 == settings.steps:
            validation = accuracy(model, splits["validation"], collate, autocast)
            log("eval", step, split="validation", language="en", accuracy=validation)
            if validation > best_accuracy:
                best, best_accuracy = [parameter.detach().clone() for parameter in learned], validation
    step = settings.steps
    report_trace(log, step, trace(), unfreezer.trainable, averages)

    with torch.no_grad():
        for parameter, value in zip(learned, best):
            parameter.copy_(value)
    scores = {}
    for language in tqdm(languages, desc="testing"):
        set_language(model, languages[language])  # zero-shot: the task adapter stays
        scores[language] = {"accuracy": accuracy(model, splits[language], collate, autocast)}
        log("eval", step, split="test", language=language, **scores[language])
    save_adapter(model, "task", out / "adapter", with_head=False)
    save_head(model, out / "head")
    save_results(out, settings, unfreezer.history, scores, languages, best_accuracy, time.time() - started)


def save_results(out: Path, settings: Settings, order: list, scores: dict, languages: dict, validation: float,
                 seconds: float) -> None:
    """Write results.json, the last file of a run: it marks the run as finished."""
    targets = [score["accuracy"] for language, score in scores.items() if language != "en"]
    results = {
        "task": settings.task, "method": settings.method, "adapter": settings.adapter,
        "model": settings.model, "seed": settings.seed, "k": settings.k, "steps": settings.steps,
        "order": order, "scores": scores,
        "average": {"accuracy": mean(targets)} if targets else {}, "validation": {"accuracy": validation},
        "language_adapters": languages, "settings": dataclasses.asdict(settings),
        "wall_seconds": round(seconds, 1), "versions": versions(),
    }
    write_json(out / "results.json", results)
    print(f"{out}: English {scores['en']['accuracy']:.1f}, mean of {len(targets)} target languages "
          f"{mean(targets or [math.nan]):.1f}, {seconds:.0f} s")


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__}


def run_folder(settings: Settings | LanguageSettings, default: str) -> Path:
    """Where the run goes; a finished run there is refused unless --overwrite."""
    out = Path(settings.out or f"runs/{settings.task}-{Path(settings.model).name}{default}")
    if (out / "results.json").exists() and not settings.overwrite:
        raise UserError(f"{out} holds a finished run: choose another --out or pass --overwrite")
    return out


def start_log(out: Path, keep: bool = False) -> Callable:
    """Begin log.jsonl in the run's folder; returns log(event, step, **fields), which appends one line."""
    out.mkdir(parents=True, exist_ok=True)
    if not keep:
        (out / "checkpoint.pt").unlink(missing_ok=True)
        (out / "log.jsonl").write_text("")
    (out / "results.json").unlink(missing_ok=True)  # from here on the folder holds a run in progress

    def log(event: str, step: int, **fields) -> None:
        with (out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step} | fields) + "\n")

    return log


def introduce(settings: Settings, splits: dict, blocks: int, languages: dict, device: torch.device) -> None:
    """Print the resolved settings, so that nothing that shaped a run is hidden."""
    print(f"\n{settings.task}, {settings.method}: {len(splits['train'])} training examples, {settings.steps} "
          f"steps of {settings.batch_size}, lr {settings.lr:g}, k {settings.k}, {blocks} blocks, seed "
          f"{settings.seed}, {device}; {len(splits['validation'])} validation examples; "
          f"test languages {' '.join(languages)}")
    own = [language for language, stacked in languages.items() if language == stacked]
    lacking = [language for language, stacked in languages.items() if language != stacked]
    if own:
        print(f"language adapters: {' '.join(own)}" + (
            f"; none for {' '.join(lacking)}, tested with the English one" if lacking else ""), flush=True)
    elif settings.language_adapters != "none":
        print(f"no language adapters for {settings.model}; --language-adapters FOLDER adds them", flush=True)
    last = settings.k * {"standard": 0, "none": 0, "lpft": 1}.get(settings.method, blocks - 1)
    if last >= settings.steps:
        print(f"note: k {settings.k} would open the last block at step {last} of {settings.steps}; lower --k")


def train_order(seed: int, epoch: int, examples: int) -> list[int]:
    """Every example once, in an order that depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(examples, generator=generator).tolist()


def fisher_batches(settings: Settings, examples: list, generator: torch.Generator, collate: Callable) -> list:
    """Randomly drawn training batches for one measurement, grouped by length."""
    size = settings.batch_size
    chosen = torch.randperm(len(examples), generator=generator)[: settings.fisher_batches * size].tolist()
    chosen = sorted((examples[i] for i in chosen), key=lambda example: len(example["input_ids"]))
    return [collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]


def report_trace(log: Callable, step: int, trace: list[float], trainable: list[int], averages: list[float]):
    """Log and print tr(F): a number per block, bottom to top, and the paper's average per trainable block.
    The log has the moving average over ten measurements too."""
    average = sum(trace) / len(trainable) if trainable else None
    averages += [average] if trainable else []
    smooth = mean(averages[-10:]) if averages else None
    log("fisher", step, trace=trace, trainable=trainable, average=average, moving_average=smooth)
    if step == 0:
        names = "".join(f"{'b' + str(block):>6} " for block in range(len(trace)))
        tqdm.write("tr(F) of each block, b0 at the bottom, * open; average: the sum over the number of open")
        tqdm.write(f" step  average |{names}")
    cells = (f"{value:.2g}".removeprefix("0") or "0" for value in trace)
    row = "".join(f"{cell:>6}{'*' if block in trainable else ' '}" for block, cell in enumerate(cells))
    tqdm.write(f"{step:>5} {'-' if average is None else format(average, '.3g'):>8} |{row}")


# ------------------------------------------------------------------------------------------------------------
# A language adapter, by masked-language modelling (MAD-X, section 3)
# ------------------------------------------------------------------------------------------------------------


def train_language(settings: LanguageSettings) -> None:
    """Train a new language adapter on a text file; its folder then serves as one of --language-adapters.

    All that is random in a step (dropout, masks) comes from the seed and the step's number, and the order of
    the sequences from seed and epoch, so a run continued from its checkpoint ends in the very same bits.
    The adapter learns, and the masked-LM head with it; the base model is frozen.
    """
    started = time.time()
    check(settings)
    out = run_folder(settings, f"/{settings.language}")
    device = seeded_device(settings)
    tokenizer, model, modules = load_model(settings, AutoModelForMaskedLM,
                                           lambda model: add_language_adapter(model, settings.language))
    for module in modules:
        module.requires_grad_(True)
    set_language(model, settings.language)
    model.to(device)
    sequences = read_text(Path(settings.data), tokenizer, settings.max_length)  # [N, T]
    is_held_out = torch.arange(len(sequences)) % 20 == 0
    held_out, sequences = sequences[is_held_out][:64], sequences[~is_held_out]
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def loss_of(chosen: torch.Tensor, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        inputs = mask([{"input_ids": sequence} for sequence in chosen])
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            return masked_loss(model, *(inputs[key].to(device) for key in ("input_ids", "labels")))

    @torch.inference_mode()
    def report_loss(step: int) -> float:
        model.eval()  # the same masks each time
        loss = mean(loss_of(part, seed=i).item() for i, part in enumerate(held_out.split(8)))
        log("eval", step, split="validation", language=settings.language, loss=loss)
        return loss

    per_epoch = math.ceil(len(sequences) / settings.batch_size)
    steps = settings.steps or settings.epochs * per_epoch
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=settings.lr, weight_decay=0.0)
    done, losses = restore(out, settings, learned, optimizer)
    print(f"\nmlm, {settings.language}: {len(sequences)} sequences of {settings.max_length} tokens, {steps} "
          f"steps of {settings.batch_size}, lr {settings.lr:g}, seed {settings.seed}, {device}, {done} done")
    log = start_log(out, keep=done > 0)
    losses = losses or [report_loss(0)]  # at step 0 and at each save
    for step in tqdm(range(done, steps), initial=done, total=steps, desc=settings.language, mininterval=1):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == done:
            order = train_order(settings.seed, epoch, len(sequences))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / steps)
        model.train()
        chosen = order[position * settings.batch_size : (position + 1) * settings.batch_size]
        loss = loss_of(sequences[chosen], settings.seed * 100_000_007 + step)
        loss.backward()
        nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings.save_every == 0 or step + 1 == steps:
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss is {loss.item()} at step {step}: lower --lr (now {settings.lr})")
            log("train", step, loss=loss.item())
            losses.append(report_loss(step + 1))
            save_adapter(model, settings.language, out)
            save_checkpoint(out, settings, learned, optimizer, step + 1, losses)
    save_head(model, out)
    write_json(out / "results.json", {
        "task": "mlm", "language": settings.language, "model": settings.model, "seed": settings.seed,
        "steps": steps, "losses": losses, "settings": dataclasses.asdict(settings),
        "wall_seconds": round(time.time() - started, 1), "versions": versions()})
    (out / "checkpoint.pt").unlink()
    print(f"{out}: masked-LM loss on held-out text {losses[0]:.3f} before, {losses[-1]:.3f} after")


def masked_loss(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The model's own masked-LM loss, with the vocabulary's logits computed at the masked tokens only."""
    head = model.lm_head if hasattr(model, "lm_head") else model.cls
    hidden, masked = model.base_model(input_ids)[0], labels != -100  # [B, T, H]; -100: not masked
    return nn.functional.cross_entropy(head(hidden[masked]).float(), labels[masked])  # [M, V], [M]


def save_checkpoint(out: Path, settings: LanguageSettings, learned: dict, optimizer, step: int, losses: list):
    """Write checkpoint.pt: all that the rest of the run depends on, except the frozen base model."""
    state = {"settings": dataclasses.asdict(settings), "step": step, "optimizer": optimizer.state_dict(),
             "losses": losses, "learned": {name: parameter.detach() for name, parameter in learned.items()},
             "log_bytes": (out / "log.jsonl").stat().st_size}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(out / "checkpoint.pt", buffer.getvalue())


def restore(out: Path, settings: LanguageSettings, learned: dict, optimizer) -> tuple[int, list]:
    """Continue from checkpoint.pt if there is one; returns the number of steps done and the losses so far."""
    path = out / "checkpoint.pt"
    if settings.overwrite or not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, step, losses, log_bytes = (state[key] for key in ("settings", "step", "losses", "log_bytes"))
    except Exception:  # whatever a damaged file provokes
        raise UserError(f"{path} is damaged: pass --overwrite to start anew") from None
    for name, value in dataclasses.asdict(settings).items():
        if value != saved.get(name) and name not in ("out", "overwrite", "save_every", "device"):
            raise UserError(f"{path} is of a run with --{name.replace('_', '-')} {saved.get(name)}, not "
                            f"{value}: give the same options, or --overwrite to start anew")
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(state["learned"][name])
    optimizer.load_state_dict(state["optimizer"])
    os.truncate(out / "log.jsonl", log_bytes)  # what was logged after the checkpoint is done again
    return step, losses


# ------------------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------------------


def report(folders: list[str]) -> None:
    """Print a Markdown table per task and model over finished runs: methods by row, mean ± std over seeds."""
    tables: dict[str, dict[str, list[dict]]] = {}
    for folder in folders:
        try:
            run = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
            stacked = ", above language adapters" * any(run.get("language_adapters", {}).values())
            title = f"{run['task']}, {run['model']}, {run['adapter']}{stacked}"
            tables.setdefault(title, {}).setdefault(run["method"], []).append(run)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"no readable results.json in {folder}: report takes finished runs") from None
    if not tables:
        raise UserError("report needs folders of finished runs, for example runs/*")
    for title, methods in tables.items():
        methods = {method: methods[method] for method in SELECT if method in methods} | methods
        print(f"\n{title}\n")
        rows = [["method", "seeds", "English", "mean of targets", "over standard", "five weakest languages",
                 "opening order", "seconds"]]
        rows += [report_row(method, runs, methods.get("standard", [])) for method, runs in methods.items()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        rows.insert(1, ["-" * width for width in widths])
        for row in rows:
            print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        for method, runs in methods.items():
            for run in runs if len({opening_order(run) for run in runs}) > 1 else []:
                print(f"\n{method}, seed {run['seed']}, opened {opening_order(run)}", end="")
        print()


def report_row(method: str, runs: list[dict], standard: list[dict]) -> list[str]:
    """One method's cells; "over standard" pairs runs of one seed and gives mean ± std of the differences."""
    baseline = {run["seed"]: run["average"].get("accuracy", math.nan) for run in standard}
    gains = [run["average"].get("accuracy", math.nan) - baseline[run["seed"]]
             for run in runs if run["seed"] in baseline and method != "standard"]
    by_language = [(mean(run["scores"][language]["accuracy"] for run in runs), language)
                   for language in runs[0]["scores"] if language != "en"]
    orders = {opening_order(run) for run in runs}
    return [method, str(len(runs)), spread([run["scores"]["en"]["accuracy"] for run in runs]),
            spread([run["average"].get("accuracy", math.nan) for run in runs]), spread(gains, "+"),
            ", ".join(f"{language} {value:.1f}" for value, language in sorted(by_language)[:5]),
            orders.pop() if len(orders) == 1 else "by seed, below",
            f"{mean(run['wall_seconds'] for run in runs):.0f}"]


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± sample standard deviation; the mean alone of a single value, a dash of none."""
    if not values:
        return "-"
    return f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def opening_order(run: dict) -> str:
    """The blocks in the order of opening, 0 at the bottom."""
    steps = {step for step, _ in run["order"]}
    if len(steps) == 1 and len(run["order"]) > 1:
        return f"all at step {steps.pop()}"
    return " ".join(str(block) for _, block in run["order"]) or "none"


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> Settings | LanguageSettings:
    kind = LanguageSettings if arguments[:1] == ["mlm"] else Settings
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="unfreeze.py", description=summary, allow_abbrev=False)

    def refuse(message: str):
        raise UserError(f"{message} (see python unfreeze.py --help)")

    parser.error = refuse
    parser.add_argument("task", choices=[*TASKS, "mlm"], help="or `report FOLDER…`: a table of finished runs")
    for entry in dataclasses.fields(kind)[1:]:
        parser.add_argument("--" + entry.name.replace("_", "-"), default=entry.default, **entry.metadata)
    return kind(**vars(parser.parse_args(arguments)))


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a user's mistake, 130 or 143 interrupted."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def stop(number, _):
        raise KeyboardInterrupt(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        if arguments[:1] == ["report"]:
            report(arguments[1:])
        else:
            settings = parse(arguments)
            train_language(settings) if isinstance(settings, LanguageSettings) else train(settings)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'writing the run'}: {error.strerror or error}; check the path, its "
              "permissions and the space on its disk, or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        what = "continues from the last save, if any" if arguments[:1] == ["mlm"] else "starts the run anew"
        print(f"interrupted: the same command {what}", file=sys.stderr)
        return interrupt.args[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
