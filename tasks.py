"""The tasks: their columns and languages, JSON lines in, token ids out, and how they are scored.

A local folder holds train.en.jsonl, validation.en.jsonl and test.<language>.jsonl, one JSON object a line.

    splits, texts, labels = load_data(settings)                          # settings: unfreeze.py's
    examples = encode(splits["train"], texts, labels, tokenizer, 128)    # token ids, mask and label, unpadded
    percent = accuracy(model, examples, collate, autocast)
"""

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit status 2."""


@dataclass(frozen=True)
class Task:
    """A classification task on one text or a pair: its columns, labels and the paper's test languages."""

    texts: tuple[str, ...]
    optional_text: str | None = None  # used where the training file has it
    labels: tuple | None = None  # None: those of the training file
    languages: tuple[str, ...] | None = None  # None: every test file there is


TASKS = {
    "xnli": Task(("premise", "hypothesis"), labels=(0, 1, 2),  # the paper leaves out bg, fr and ur
                 languages=("en", "ar", "de", "el", "es", "hi", "ru", "sw", "th", "tr", "vi", "zh")),
    "classify": Task(("text",), optional_text="text_pair"),
}

# Table 3. k: LPFT / GU / FUN; methods of which the table says nothing take GU's.
PRESETS = {
    ("xnli", "bert"): {"epochs": 15, "lr": 5e-4, "batch_size": 128, "k": {"lpft": 25, "gu": 800, "fun": 50}},
    ("xnli", "xlm-roberta"): {"epochs": 15, "lr": 5e-4, "batch_size": 128, "k": {"gu": 800}},
    ("classify", "xlm-roberta"): {"epochs": 3, "lr": 8e-4, "batch_size": 32, "k": None},  # not the paper's
}


def read_rows(path: Path, texts: tuple[str, ...], labels: list | None) -> list[dict]:
    """The rows of one file; every one is checked, and an error names file and line."""
    if not path.is_file():
        raise UserError(f"missing data file {path}: --data must hold train.en.jsonl, validation.en.jsonl and "
                        "test.<language>.jsonl")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError:
                row = None
            check_row(row, f"{path}:{number}", texts, labels)
            rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: it needs one JSON object a line")
    return rows


def check_row(row: dict, place: str, texts: tuple[str, ...], labels: list | None) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object in UTF-8; each line must be one")
    for column in (*texts, "label"):
        if row.get(column) is None:
            raise UserError(f"{place}: no column {column!r}; each line needs {', '.join((*texts, 'label'))}")
    for column in texts:
        if not isinstance(row[column], str):
            raise UserError(f"{place}: column {column!r} must be a string, not {row[column]!r}")
    if type(row["label"]) not in (int, str):
        raise UserError(f"{place}: label {row['label']!r} must be a string or an integer")
    if labels is not None and row["label"] not in labels:
        raise UserError(f"{place}: label {row['label']!r} is not one of the training labels "
                        f"({', '.join(map(str, labels[:5]))}{', …' * (len(labels) > 5)})")


def load_data(settings) -> tuple[dict[str, list[dict]], tuple[str, ...], list]:
    """The splits (train, validation, one per test language, English first), the text columns, the labels."""
    task, folder = TASKS[settings.task], Path(settings.data)
    texts, train = task.texts, read_rows(folder / "train.en.jsonl", task.texts, task.labels)
    if task.optional_text in train[0]:
        texts = (*task.texts, task.optional_text)
        train = read_rows(folder / "train.en.jsonl", texts, task.labels)
    found = {row["label"] for row in train}  # integers by value, strings by alphabet
    labels = list(task.labels or sorted(found, key=lambda label: (isinstance(label, str), label)))
    splits = {"train": train, "validation": read_rows(folder / "validation.en.jsonl", texts, labels)}
    for language in test_languages(settings, folder):
        rows = read_rows(folder / f"test.{language}.jsonl", texts, labels)
        splits[language] = sample(rows, settings.test_examples, seed=0)  # every run tests on the same ones
    splits["train"] = sample(train, settings.train_examples, settings.seed)
    return splits, texts, labels


def sample(rows: list[dict], count: int | None, seed: int) -> list[dict]:
    """`count` rows at random in their own order, or all: files are often sorted by label."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [rows[i] for i in chosen.sort().values]


def test_languages(settings, folder: Path) -> list[str]:
    """English, then those asked for, by default the task's."""
    there = sorted(path.name.split(".")[1] for path in folder.glob("test.*.jsonl"))
    wanted = settings.languages.split(",") if settings.languages else TASKS[settings.task].languages or there
    for language in ("en", *wanted):
        if language not in there:
            known = ", ".join(there) or "no language"
            raise UserError(f"no file test.{language}.jsonl in {folder}, only for {known}: use --languages")
    return ["en", *(language for language in dict.fromkeys(wanted) if language != "en")]


def encode(rows: list[dict], texts: tuple[str, ...], labels: list, tokenizer, max_length: int) -> list[dict]:
    """One dictionary of token ids, attention mask and label number per row, unpadded."""
    columns = [[row[column] for row in rows] for column in texts]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [{key: values[i] for key, values in encoded.items()} | {"labels": labels.index(row["label"])}
            for i, row in enumerate(rows)]


@torch.inference_mode()
def accuracy(model: nn.Module, examples: list[dict], collate: Callable, autocast: Callable) -> float:
    """Percent of examples classified right, computed in eval mode in batches of similar length."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))
    right = 0
    for start in range(0, len(by_length), 64):
        batch = collate(by_length[start : start + 64])
        with autocast():
            right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return 100 * right / len(examples)


def read_text(path: Path, tokenizer, length: int) -> torch.Tensor:
    """The tokens of a text file in sequences [N, length]: lines joined by the separator, the rest dropped."""
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer of --model has no mask token: masked-language modelling needs one")
    tokens, inner = array("i"), length - 2  # a sequence begins and ends with a special token
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                tokens.extend(tokenizer(line.strip(), add_special_tokens=False, verbose=False)["input_ids"])
                tokens.append(tokenizer.sep_token_id)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: --data takes a plain text file") from None
    if len(tokens) < 2 * inner:
        raise UserError(f"{path} has {len(tokens)} tokens: two sequences of --max-length need {2 * inner}")
    rows = torch.tensor(tokens)[: len(tokens) // inner * inner].view(-1, inner)
    first = torch.full_like(rows[:, :1], tokenizer.cls_token_id)
    last = torch.full_like(rows[:, :1], tokenizer.sep_token_id)
    return torch.cat([first, rows, last], dim=1).long()  # [N, length - 2] -> [N, length]
