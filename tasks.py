"""The tasks: their data, how rows become token ids, how answers are scored, and the paper's presets.

Liu et al., NAACL 2024: Tables 3, 4 and 15 (presets), the results to compare with, and the rules of scoring.

    splits, labels = load_data(settings)                            # settings: unfreeze.py's
    examples = task.encode(splits["de"], tokenizer, 128, labels)    # task = TASKS["xnli"]
    outputs = predict(task, model, examples, collate, autocast)     # collate: examples -> batch
    scores, predictions = task.score(splits["de"], examples, outputs, "de", labels)

A fifth task is one more entry of TASKS: columns, languages, place on the hub, head, and three functions of
its kind (pairs, spans, choices, masked text). Scores are in percent; a place in a text counts its characters.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import string
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from pathlib import Path
from statistics import mean

import torch
from huggingface_hub import constants
from huggingface_hub.constants import HF_HUB_OFFLINE  # as the user set it
from huggingface_hub.utils import get_session
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (AutoModelForMaskedLM, AutoModelForMultipleChoice, AutoModelForQuestionAnswering,
                          AutoModelForSequenceClassification, DataCollatorForLanguageModeling)


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit status 2."""


# ------------------------------------------------------------------------------------------------------------
# Rows, from a folder or from the hub
# ------------------------------------------------------------------------------------------------------------


def reach_hub(settings) -> None:
    """Use the hub's cache alone if the hub does not answer: its client would retry for minutes."""
    constants.HF_HUB_OFFLINE = HF_HUB_OFFLINE
    if HF_HUB_OFFLINE or settings.data is not None and Path(settings.model).is_dir():
        return
    seconds = get_session().timeout = constants.HF_HUB_ETAG_TIMEOUT  # some calls of it have no limit
    try:  # in a thread: a search for the hub's address knows no limit of time
        answer = ThreadPoolExecutor(1).submit(get_session().head, constants.ENDPOINT, timeout=seconds)
        constants.HF_HUB_OFFLINE = answer.result(1.2 * seconds).status_code >= 500
    except Exception:  # the client raises its HTTP library's errors
        constants.HF_HUB_OFFLINE = True
    if constants.HF_HUB_OFFLINE:
        print(f"note: {constants.ENDPOINT} does not answer; what it gave before is read from the local cache")


def load_data(settings) -> tuple[dict[str, list[dict]], list]:
    """All rows by split (train, validation, then the test languages, English first), and the labels."""
    if settings.task == "mlm":
        return read_text(Path(settings.data)), []
    task, languages = TASKS[settings.task], test_languages(settings)
    train = read_split(settings, "train", "en")
    own = [column for column in task.optional_columns
           if any(isinstance(row, dict) and row.get(column) is not None for row in train.values())]
    columns, values = (*task.columns, *own), dict(task.values)
    absent = set(task.optional_columns) - set(own)
    splits = {"train": check_rows(train, columns, absent, values)}
    if "label" in columns:
        found = {row["label"] for row in splits["train"]}
        if len(found) < 2:
            place = next(iter(train))
            raise UserError(f"{place} and all other rows have one label, {found.pop()!r}: add others")
        if "label" not in values:  # integers by value, strings by alphabet
            values["label"] = sorted(found, key=lambda label: (isinstance(label, str), label))
            note_twins(values["label"])
    splits["validation"] = check_rows(read_split(settings, "validation", "en"), columns, absent, values)
    for language in languages:
        splits[language] = check_rows(read_split(settings, "test", language), columns, absent, values)
    return splits, list(values.get("label", []))


def sampled(rows: dict[str, list[dict]], settings) -> dict[str, list[dict]]:
    """What --train-examples and --test-examples leave: to train on by seed, to test on the same for all."""
    splits = {name: sample(of_split, settings.test_examples, seed=0) for name, of_split in rows.items()}
    train = sample(rows["train"], settings.train_examples, settings.seed, stratified=True)
    return splits | {"train": train, "validation": rows["validation"]}


def note_twins(labels: list) -> None:
    folded = [" ".join(str(label).casefold().split()) for label in labels]
    count = Counter(folded)
    if twins := [label for label, key in zip(labels, folded) if count[key] > 1]:
        print(f"note: labels that differ in type, case or white space alone count as different ones: {twins}")


def test_languages(settings) -> list[str]:
    """English, then those asked for, by default the task's."""
    task = TASKS[settings.task]
    known, where = [*(task.languages or ()), *task.other_languages], "on the hub"
    if settings.data is not None:
        folder, where = Path(settings.data), f"in {settings.data} (test.<language>.jsonl)"
        if not folder.is_dir():
            raise UserError(f"no data folder {folder}: --data must name one with {WANTED}")
        files = sorted(path.name for path in folder.iterdir() if path.is_file())
        known = sorted({name.split(".")[1] for name in files
                        if re.fullmatch(r"test\.[^.]+\.(jsonl|csv|tsv)", name)})
        if not known:
            listed = ", ".join(files[:5]) + ", …" * (len(files) > 5)
            raise UserError(f"{folder} has {listed or 'no files'} and no test data: --data needs {WANTED}")
    wanted = settings.languages.split(",") if settings.languages else task.languages or known
    for language in ("en", *wanted):
        if language not in known:
            raise UserError(f"{settings.task} has no language {language!r} {where}, only "
                            f"{', '.join(known)}: choose with --languages")
    return ["en", *(language for language in dict.fromkeys(wanted) if language != "en")]


def read_split(settings, split: str, language: str) -> dict[str, dict]:
    """The rows as they are, by the place that an error message names."""
    if settings.data is not None:
        return read_file(Path(settings.data), f"{split}.{language}")
    place = TASKS[settings.task].hub[split].format(language)
    if settings.task != "xcopa" or split != "test":
        return read_hub(place)
    if language == "en":  # the hub's copy of COPA hides the labels of its test pairs
        return read_split(settings, "validation", "en")
    rows, questions = read_hub(place), english_questions()
    if len(rows) != len(questions):
        raise UserError(f"{place} on the hub has {len(rows)} rows and English COPA {len(questions)}: they "
                        "must be parallel; give a folder with --data instead")
    return {place: row | {"question": question}
            for (place, row), question in zip(rows.items(), questions)}


@cache
def english_questions() -> list[str | None]:
    """Those of COPA's test pairs, row by row XCOPA's, whose own are wrong in five languages."""
    return [row.get("question") for row in read_hub("aps/super_glue/copa/test").values()]


WANTED = ("train.en.jsonl, validation.en.jsonl and test.<language>.jsonl (a JSON object a line), or the same "
          "as .csv or .tsv with a header line")


def read_file(folder: Path, name: str) -> dict[str, dict]:
    """The rows of the one file of that name, in any of the three formats."""
    paths = [path for ending in ("jsonl", "csv", "tsv") if (path := folder / f"{name}.{ending}").is_file()]
    if not paths:
        raise UserError(f"missing data file {folder / name}.jsonl: --data must hold {WANTED}")
    if len(paths) > 1:
        raise UserError(f"{paths[0]} and {paths[1].name}: only one of them can be meant; move the other away")
    rows = (read_lines if paths[0].suffix == ".jsonl" else read_table)(paths[0])
    if not rows:
        raise UserError(f"{paths[0]} is empty: it needs a row an example")
    return rows


def read_utf8(path: Path, errors: str = "strict") -> str:
    """The text of a file, without a byte-order mark."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:1000]:
        raise UserError(f"{path} is not text in UTF-8 but, it seems, in UTF-16: save it as UTF-8")
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8") from None


def read_lines(path: Path) -> dict[str, dict]:
    """A JSON object a line; None for a line that is none."""
    text = read_utf8(path, errors="surrogateescape")
    if text.lstrip()[:1] == "[":
        raise UserError(f"{path} is a JSON array: write one JSON object a line (jq -c '.[]' does)")
    rows = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if "\\u" in line:  # half a surrogate pair is JSON, but no text
                    line = json.dumps(row, ensure_ascii=False)
                line.encode()
            except (ValueError, RecursionError):
                row = None
            rows[f"{path}:{number}"] = row
    return rows


QUOTES = "a field with quotation marks must stand in quotes, with its own doubled"


def read_table(path: Path) -> dict[str, dict]:
    """CSV or TSV by Python's csv: quoted fields may hold line breaks. A label of digits is an integer."""
    csv.field_size_limit(2**31 - 1)
    rows, delimiter = {}, "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), delimiter=delimiter, strict=True)
    lines = filter(None, reader)  # no blank ones
    try:
        header = next(lines, [])
        for cells in lines:
            place = f"{path}:{reader.line_num}"
            if len(cells) != len({*header}):
                raise UserError(f"{place}: {len(cells)} fields, and {len({*header})} names in the header")
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                raise UserError(f"{place}: a quotation mark opens a field of several rows; {QUOTES}")
            row = rows[place] = dict(zip(header, (cell or None for cell in cells)))
            if re.fullmatch(r"0|-?[1-9]\d{0,17}", row.get("label") or ""):
                row["label"] = int(row["label"])
            with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):  # named later
                row["answers"] = json.loads(row["answers"])
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; {QUOTES}") from None
    return rows


WITHOUT_HUB = ("check the connection; without one, folders serve (python extras/demo.py makes two: --model "
               "demo/model --data demo/data)")


def read_hub(place: str) -> dict[str, dict]:
    """The rows of owner/name/config/split, from the hub's own parquet conversion, which runs no script.

    Downloads are kept in the hub's cache, so HF_HUB_OFFLINE=1 works after the first time.
    """
    import datasets
    from huggingface_hub import snapshot_download

    owner, name, config, split = place.split("/")
    try:
        folder = snapshot_download(f"{owner}/{name}", allow_patterns=f"{config}/{split}/*.parquet",
                                   repo_type="dataset", revision="refs/convert/parquet")
    except Exception as error:  # the client raises OSError, ValueError and its HTTP library's errors alike
        raise UserError(f"data {place} is not in the local cache and the hub does not give it "
                        f"({type(error).__name__}): {WITHOUT_HUB}") from None
    files = sorted(Path(folder, config, split).glob("*.parquet"))
    if not files:
        source = "local cache" if constants.HF_HUB_OFFLINE else "hub"
        raise UserError(f"the {source} has no parquet files for {place}: name a folder with --data")
    rows = {}
    for file in files:
        try:  # streamed, so that no second copy of the data is cached
            data = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            rows |= {f"{place}/{file.name}, row {number}": row for number, row in enumerate(data)}
        except Exception as error:  # whatever a damaged file provokes
            raise UserError(f"{file.resolve()} holds no readable data ({type(error).__name__}): delete it, "
                            "and the next run downloads it again") from None
    return rows


def check_rows(rows: dict[str, dict], columns: tuple[str, ...], absent: set[str], values: dict) -> list[dict]:
    """These columns of every row, which has none of `absent`; an error names the row's place."""
    for place, row in rows.items():
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object in UTF-8; each line must be one")
        for column in columns:
            value = row.get(column)
            if value is None:
                raise UserError(f"{place}: no column {column!r}; every row of every file needs "
                                f"{', '.join(columns)}")
            if column == "answers":
                check_answers(value, place)
            elif not isinstance(value, str) and (column != "label" or type(value) is not int):
                kind = "a string or an integer" if column == "label" else "a string"
                raise UserError(f"{place}: column {column!r} must be {kind}, not {value!r}")
            elif column in values and value not in values[column]:
                known = [repr(known) if column == "label" else known for known in values[column]]
                raise UserError(f"{place}: {column} {value!r} is not one of {', '.join(known[:5])}"
                                f"{', …' * (len(known) > 5)}")
        if given := [column for column in absent if row.get(column) is not None]:
            raise UserError(f"{place}: a column {given[0]!r}, which the training file lacks: all rows of all "
                            "files need it, or none")
    return [{column: row[column] for column in columns} for row in rows.values()]


def check_answers(answers: dict, place: str) -> None:
    try:
        fits = all(isinstance(text, str) and type(start) is int
                   for text, start in zip(answers["text"], answers["answer_start"], strict=True))
        assert fits and len(answers["text"]) > 0
    except (TypeError, KeyError, ValueError, AssertionError):
        raise UserError(f"{place}: answers must be {{'text': [string, …], 'answer_start': [integer, …]}}, "
                        "with one answer or more") from None


def sample(rows: list[dict], count: int | None, seed: int, stratified: bool = False) -> list[dict]:
    """`count` rows at random in their own order, or all; stratified: every label in its own share."""
    if count is None or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    if stratified and "label" in rows[0]:
        # The n-th of N rows of its label stands at (n + 1/2) / N: the first `count` hold each label's share.
        size, seen = Counter(row["label"] for row in rows), Counter()
        rank = {}
        for i in order:
            label = rows[i]["label"]
            rank[i] = (seen[label] + 0.5) / size[label]
            seen[label] += 1
        order.sort(key=rank.get)
    return [rows[i] for i in sorted(order[:count])]


def read_text(path: Path) -> dict[str, list[dict]]:
    """The lines of a text file: one in twenty is held out. If there are fewer, long ones are cut first."""
    if not path.is_file():
        raise UserError(f"missing text file {path}: --data takes a plain text file for mlm")
    text = read_utf8(path)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 20:
        lines = [piece for line in lines for piece in re.findall(r"\S.{0,999}(?!\S)|\S.{0,999}", line)]
    rows = [{"text": line} for line in lines]
    return {"train": [row for i, row in enumerate(rows) if i % 20], "validation": rows[::20]}


# ------------------------------------------------------------------------------------------------------------
# From rows to token ids, one dictionary of tensors per example, unpadded, and from these to a batch
# ------------------------------------------------------------------------------------------------------------


def encode_pairs(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """One text, or two in the order of the columns, and the number of its label."""
    columns = [[row[column] for row in rows] for column in rows[0] if column != "label"]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [tensors_of(encoded, i) | {"labels": labels.index(row["label"])} for i, row in enumerate(rows)]


def tensors_of(encoded: dict, i: int) -> dict[str, torch.Tensor]:
    """The i-th sequence that a tokenizer gives, each of its lists as a tensor [T]."""
    return {key: torch.tensor(values[i], dtype=torch.long) for key, values in encoded.items()}


def encode_choices(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """Premise and question with each choice: two sequences an example, one score each."""
    premises = [f"{row['premise']} What was the {row['question']}?" for row in rows]
    encoded = [tokenizer(premises, [row[choice] for row in rows], truncation=True, max_length=max_length)
               for choice in ("choice1", "choice2")]
    pairs = [[tensors_of(choice, i) for choice in encoded] for i in range(len(rows))]
    return [{key: [choice[key] for choice in pair] for key in pair[0]}
            | {"labels": labels.index(row["label"])} for pair, row in zip(pairs, rows)]


def encode_spans(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """Question and context, a long context in windows that overlap by 128 tokens (the stride).

    `offsets` [T, 2] has the characters of the context that a token covers, -1 elsewhere; `row` the question's
    number. A window without the whole of the first answer has start and end at its first token.
    """
    examples = []
    for number, row in enumerate(rows):
        question = row["question"].strip()
        start = tokenizer(question, add_special_tokens=False, truncation=True, max_length=max_length // 4,
                          return_offsets_mapping=True)["offset_mapping"]
        question = question[: start[-1][1] if start else 0]  # leaves room for the context
        windows = tokenizer(question, row["context"], truncation="only_second", max_length=max_length,
                            stride=min(128, max_length // 3), return_overflowing_tokens=True,
                            return_offsets_mapping=True)
        inputs = {key: windows[key] for key in tokenizer.model_input_names if key in windows}
        count = len(windows["input_ids"])
        for i in range(count):
            offsets = torch.tensor(windows["offset_mapping"][i], dtype=torch.int32)
            outside = torch.tensor([sequence != 1 for sequence in windows.sequence_ids(i)])
            offsets[outside] = -1
            covered = (0 if i == 0 else offsets[~outside][0, 0].item(),
                       len(row["context"]) if i == count - 1 else offsets[~outside][-1, 1].item())
            first, last = answer_tokens(offsets, row, covered)
            examples.append(tensors_of(inputs, i) | {"start_positions": first, "end_positions": last,
                                                     "row": number, "offsets": offsets})
    return examples


def answer_tokens(offsets: torch.Tensor, row: dict, covered: tuple[int, int]) -> tuple[int, int]:
    """The first and last token that share a character with the first answer; 0, 0 if it is not all here."""
    text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    end = start + len(text)
    shared = ((offsets[:, 1] > start) & (offsets[:, 0] < end)).nonzero()
    is_there = row["context"][max(start, 0) : end] == text and covered[0] <= start and end <= covered[1]
    return (shared[0].item(), shared[-1].item()) if is_there and len(shared) else (0, 0)


def stripped(context: str, start: int, end: int) -> tuple[int, str]:
    """The text between two characters without the white space around it, and where it starts."""
    text = context[start:end]
    return start + len(text) - len(text.lstrip()), text.strip()


def unreachable(rows: list[dict], examples: list[dict]) -> tuple[int, int]:
    """How many first answers are in no window (or not at their answer_start), and how many are in one but
    begin or end inside a token, so that no span of tokens is exactly the answer."""
    best = {}
    for example in examples:
        first, last = example["start_positions"], example["end_positions"]
        if first:
            row, offsets = rows[example["row"]], example["offsets"]
            _, text = stripped(row["context"], offsets[first, 0].item(), offsets[last, 1].item())
            exact = text == row["answers"]["text"][0].strip()
            best[example["row"]] = best.get(example["row"], False) or exact
    return len(rows) - len(best), sum(not exact for exact in best.values())


def encode_text(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """All lines, joined by the separator, in sequences of `max_length` tokens each; the rest is dropped."""
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer of --model has no mask token: masked-language modelling needs one")
    tokens, inner = array("i"), max_length - 2  # a sequence begins and ends with a special token
    for row in rows:
        tokens.extend(tokenizer(row["text"].strip(), add_special_tokens=False, verbose=False)["input_ids"])
        tokens.append(tokenizer.sep_token_id)
    if len(tokens) < inner:
        raise UserError(f"--data has too little text: {len(rows)} of its lines have {len(tokens)} tokens, a "
                        f"sequence takes {inner}, and each twentieth line is held out; lower --max-length")
    return [{"input_ids": torch.tensor([tokenizer.cls_token_id, *tokens[start : start + inner],
                                        tokenizer.sep_token_id])}
            for start in range(0, len(tokens) - inner + 1, inner)]


def tokens_of(example: dict) -> int:
    """What an example takes in a batch: its tokens; of several choices, each as long as the longest."""
    ids = example["input_ids"]
    return len(ids) * max(map(len, ids)) if isinstance(ids, list) else len(ids)


def pad(examples: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """One batch: sequences padded to the longest, [B, T] or, of several choices, [B, choices, T]."""
    padding, batch = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}, {}
    for key, first in examples[0].items():
        values = [example[key] for example in examples]
        if isinstance(first, int) and key != "row":
            batch[key] = torch.tensor(values)  # [B]
        elif key not in ("row", "offsets"):  # of the task's, not the model's
            sequences = [*chain(*values)] if isinstance(first, list) else values
            padded = pad_sequence(sequences, True, padding.get(key, 0), tokenizer.padding_side)
            batch[key] = padded.unflatten(0, (len(examples), -1)) if isinstance(first, list) else padded
    return batch


def mask_tokens(examples: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """One batch of sequences, 15 % of its tokens masked as BERT does it; `labels` has these."""
    return dict(DataCollatorForLanguageModeling(tokenizer)(examples))


# ------------------------------------------------------------------------------------------------------------
# Outputs and scores
# ------------------------------------------------------------------------------------------------------------


def class_logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**batch).logits  # [B, C]


def span_logits(model: nn.Module, batch: dict) -> torch.Tensor:
    output = model(**batch)
    return torch.stack([output.start_logits, output.end_logits], dim=1)  # [B, 2, T]


def masked_tokens(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [M] and correctness [M] of every masked token and its row [M]; no logits of any other token."""
    hidden, masked = model.base_model(batch["input_ids"])[0], batch["labels"] != -100  # [B, T, H]
    if hasattr(model, "lm_predictions"):  # DeBERTa-v2's new head
        logits = model.lm_predictions(hidden[masked], model.get_input_embeddings())  # [M, V]
    else:
        logits = (model.lm_head if hasattr(model, "lm_head") else model.cls)(hidden[masked])
    logits, labels = logits.float(), batch["labels"][masked]  # [M, V], [M]
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    return loss, logits.argmax(-1) == labels, masked.nonzero()[:, 0]


def masked_sums(model: nn.Module, batch: dict) -> torch.Tensor:
    """Of every sequence: the sum of losses, the number of tokens guessed right, and of masked tokens."""
    loss, right, row = masked_tokens(model, batch)
    values = torch.stack([loss, right, torch.ones_like(loss)], dim=1)  # [M, 3]
    return torch.zeros(len(batch["labels"]), 3, device=loss.device).index_add(0, row, values)  # [B, 3]


def model_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**batch).loss


def span_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """The model's own loss of start and end, but over real tokens: there, padding competes with them."""
    logits = span_logits(model, batch)  # [B, 2, T]
    if "attention_mask" in batch:
        logits = logits.masked_fill(batch["attention_mask"].flatten(1)[:, None] == 0, -torch.inf)
    positions = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)  # [B, 2]
    return nn.functional.cross_entropy(logits.flatten(0, 1), positions.flatten())


def masked_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """The model's own masked-LM loss, in a hundredth of the memory."""
    return masked_tokens(model, batch)[0].mean()


@torch.inference_mode()
def predict(task, model: nn.Module, examples: list[dict], collate: Callable, autocast: Callable,
            tokens: int | None = None) -> list[torch.Tensor]:
    """What `task.forward` gives for each example, in their order, computed in eval mode in batches of similar
    length with at most `tokens` tokens, padding included (by default 32,768 on CUDA, 1,024 on a CPU, where
    more is slower). Leaves the global random numbers alone."""
    model.eval()
    cost = [tokens_of(example) for example in examples]
    order = sorted(range(len(examples)), key=cost.__getitem__, reverse=True)
    outputs = [None] * len(examples)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    tokens = tokens or (32_768 if devices else 1024)
    with torch.random.fork_rng(devices), autocast():
        torch.manual_seed(0)  # the same masks each time
        while order:
            size = max(1, tokens // cost[order[0]])
            chosen, order = order[:size], order[size:]
            batch = task.forward(model, collate([examples[i] for i in chosen])).float().cpu()
            for i, output in zip(chosen, batch):
                outputs[i] = output
    return outputs


def accuracy(rows: list[dict], examples: list[dict], outputs: list, language: str, labels: list) -> tuple:
    predicted = [output.argmax().item() for output in outputs]
    right = [label == example["labels"] for label, example in zip(predicted, examples)]
    return {"accuracy": 100 * mean(right)}, [{"label": labels[label]} for label in predicted]


def answers(rows: list[dict], examples: list[dict], outputs: list, language: str, labels: list,
            rules: dict) -> tuple:
    """The best span over all windows of a question, scored by each of these rules."""
    best = [(-math.inf, 0, "")] * len(rows)
    for example, logits in zip(examples, outputs):
        number = example["row"]
        found = best_span(rows[number]["context"], example["offsets"], logits)
        best[number] = max(best[number], found, key=lambda span: span[0])
    scores = {}
    for suffix, words in rules.items():
        pairs = [[word_overlap(words(text, language), words(gold, language))
                  for gold in row["answers"]["text"]] for (_, _, text), row in zip(best, rows)]
        scores |= {f"f1{suffix}": 100 * mean(max(f1 for f1, _ in golds) for golds in pairs),
                   f"em{suffix}": 100 * mean(max(same for _, same in golds) for golds in pairs)}
    return scores, [{"id": row["id"], "text": text, "answer_start": start}
                    for (_, start, text), row in zip(best, rows)]


def best_span(context: str, offsets: torch.Tensor, logits: torch.Tensor) -> tuple[float, int, str]:
    """Score, first character and text of the likeliest span among the 20 best starts by the 20 best ends, all
    tokens of the context, of at most 30 tokens; score -inf and an empty text if there is none."""
    logits = logits[:, : len(offsets)].masked_fill(offsets[:, 0] < 0, -math.inf)  # [2, T]
    (start_score, end_score), (start, end) = logits.topk(min(20, logits.shape[1]))  # [2, 20] each
    score = start_score[:, None] + end_score  # [20, 20]
    length = end - start[:, None] + 1
    score[(length < 1) | (length > 30)] = -math.inf
    i, j = divmod(score.argmax().item(), score.shape[1])
    if score[i, j] == -math.inf:
        return -math.inf, 0, ""
    return score[i, j].item(), *stripped(context, offsets[start[i], 0].item(), offsets[end[j], 1].item())


def squad_words(text: str, language: str) -> list[str]:
    """An answer's words by SQuAD v1.1's rules, Chinese by character: how the paper scores XQuAD and MLQA."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return characters(text) if language == "zh" else re.sub(r"\b(a|an|the)\b", " ", text).split()


ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "ar": "\\sال^|ال",  # as published: it takes every ال, also inside a word
}


def mlqa_words(text: str, language: str) -> list[str]:
    """An answer's words by MLQA's own rules: all punctuation goes, then the language's articles."""
    text = "".join(character for character in text.lower() if not is_punctuation(character))
    if language in ARTICLES:
        text = re.sub(ARTICLES[language], " ", text)
    return characters(text) if language == "zh" else text.split()


def is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def characters(text: str) -> list[str]:
    """Each Chinese character and each punctuation mark by itself, the rest split at white space."""
    return "".join(f" {character} " if "\u4e00" <= character <= "\u9fa5" or is_punctuation(character)
                   else character for character in text).split()


def word_overlap(predicted: list[str], gold: list[str]) -> tuple[float, bool]:
    """F1 over the two multisets of words, 0 if they share none (two empty answers too), and equality."""
    shared = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0, predicted == gold


def masked_scores(rows: list[dict], examples: list[dict], outputs: list, language: str,
                  labels: list) -> tuple:
    """Percent of masked tokens guessed right, and their mean loss in nats."""
    loss, right, masked = torch.stack(outputs).sum(0).tolist()
    return {"accuracy": 100 * right / masked, "loss": loss / masked}, []


# ------------------------------------------------------------------------------------------------------------
# The tasks
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    columns: tuple[str, ...]
    languages: tuple[str, ...] | None  # those the paper tests, English first; None: every test file there is
    head: type
    encode: Callable  # (rows, tokenizer, max_length, labels) -> examples
    forward: Callable  # (model, batch) -> outputs [B, …]
    score: Callable  # (rows, examples, outputs, language, labels) -> ({metric: percent}, predictions)
    loss: Callable = model_loss  # (model, batch) -> loss to minimise
    batch: Callable = pad  # (examples, tokenizer) -> batch
    max_length: int = 128
    hub: dict = field(default_factory=dict)  # by split: owner/name/config/split, {} stands for the language
    training_set: str | None = None  # the paper's name of it, a key of PRESETS
    values: dict = field(default_factory=dict)  # by column: what it may hold; labels otherwise from training
    other_languages: tuple[str, ...] = ()  # on the hub, but not tested in the paper
    optional_columns: tuple[str, ...] = ()  # used where the training file has them


SQUAD = {"train": "rajpurkar/squad/plain_text/train", "validation": "rajpurkar/squad/plain_text/validation"}
COPA = {"train": "aps/super_glue/copa/train", "validation": "aps/super_glue/copa/validation"}

QUESTIONS = partial(
    Task, ("id", "context", "question", "answers"), training_set="squad", max_length=384,
    head=AutoModelForQuestionAnswering, encode=encode_spans, forward=span_logits, loss=span_loss)

TASKS = {
    "xnli": Task(
        ("premise", "hypothesis", "label"), values={"label": (0, 1, 2)}, training_set="mnli",
        languages=("en", "ar", "de", "el", "es", "hi", "ru", "sw", "th", "tr", "vi", "zh"),
        other_languages=("bg", "fr", "ur"),  # no language adapter for XLM-R
        hub={"train": "facebook/xnli/en/train", "validation": "facebook/xnli/en/validation",
             "test": "facebook/xnli/{}/test"},
        head=AutoModelForSequenceClassification, encode=encode_pairs, forward=class_logits, score=accuracy),
    "xquad": QUESTIONS(
        languages=("en", "ar", "de", "el", "es", "hi", "ru", "th", "tr", "vi", "zh"), other_languages=("ro",),
        hub=SQUAD | {"test": "google/xquad/xquad.{}/validation"},  # the name of its only split
        score=partial(answers, rules={"": squad_words})),
    "mlqa": QUESTIONS(
        languages=("en", "ar", "de", "es", "hi", "vi", "zh"),
        hub=SQUAD | {"test": "facebook/mlqa/mlqa.{0}.{0}/test"},
        score=partial(answers, rules={"": squad_words, "_mlqa": mlqa_words})),
    "xcopa": Task(
        ("premise", "choice1", "choice2", "question", "label"), training_set="copa",
        values={"label": (0, 1), "question": ("cause", "effect")},
        languages=("en", "et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"),
        hub=COPA | {"test": "cambridgeltl/xcopa/{}/test"},
        head=AutoModelForMultipleChoice, encode=encode_choices, forward=class_logits, score=accuracy),
    "classify": Task(  # any classification task on one text or a pair
        ("text", "label"), languages=None, optional_columns=("text_pair",),
        head=AutoModelForSequenceClassification, encode=encode_pairs, forward=class_logits, score=accuracy),
    "mlm": Task(  # a language adapter (MAD-X, section 3)
        ("text",), languages=(), max_length=512,
        head=AutoModelForMaskedLM, encode=encode_text, batch=mask_tokens,
        forward=masked_sums, score=masked_scores, loss=masked_loss),
}


# ------------------------------------------------------------------------------------------------------------
# The paper's presets and results
# ------------------------------------------------------------------------------------------------------------

# Epochs and learning rate (standard, scheduled), batch size, decay, k (LPFT, GU, FUN); others take GU's k.
PRESETS = {
    ("squad", "bert", "pfeiffer"): ((5, 5), (5e-4, 5e-4), 32, "linear", (800, 800, 800)),  # Table 3
    ("squad", "xlm-roberta", "pfeiffer"): ((15, 15), (2e-4, 5e-4), 32, "linear", (800, 800, 100)),
    ("copa", "bert", "pfeiffer"): ((500, 5000), (1e-4, 1e-5), 64, "constant", (800, 50, 50)),
    ("copa", "xlm-roberta", "pfeiffer"): ((500, 5000), (1e-4, 1e-5), 64, "constant", (800, 1000, 1000)),
    ("mnli", "bert", "pfeiffer"): ((15, 15), (5e-4, 5e-4), 128, "linear", (25, 800, 50)),
    ("mnli", "xlm-roberta", "pfeiffer"): ((15, 15), (5e-4, 5e-4), 128, "linear", (800, 800, 800)),
    # Table 15; it has no LPFT, which takes GU's k
    ("squad", "bert", "lora"): ((5, 5), (5e-4, 8e-4), 32, "linear", (800, 800, 800)),
    ("squad", "xlm-roberta", "lora"): ((15, 15), (5e-4, 5e-4), 32, "linear", (800, 800, 800)),
    ("copa", "bert", "lora"): ((500, 5000), (1e-4, 1e-4), 64, "constant", (50, 50, 100)),
    ("copa", "xlm-roberta", "lora"): ((500, 5000), (1e-4, 1e-4), 64, "constant", (100, 100, 200)),
    ("mnli", "bert", "lora"): ((15, 15), (5e-4, 5e-4), 128, "linear", (50, 50, 50)),
    ("mnli", "xlm-roberta", "lora"): ((15, 15), (5e-4, 5e-4), 128, "linear", (800, 800, 800)),
    ("classify", "xlm-roberta", "pfeiffer"): ((3, 3), (8e-4, 8e-4), 32, "linear", None),  # not the paper's
    ("mlm", "xlm-roberta", "pfeiffer"): ((100, 100), (1e-4, 1e-4), 64, "linear", (1, 1, 1)),
}
LOW_DATA = {  # Table 4, for up to 1,000, 5,000 and 10,000 training examples: epochs, learning rate, k
    ("squad", "bert"): (20, 5e-4, (10, 50, 50)),
    ("squad", "xlm-roberta"): (20, 5e-4, (10, 50, 50)),
    ("mnli", "bert"): (50, 5e-4, (1, 25, 25)),
    ("mnli", "xlm-roberta"): (50, 5e-4, (1, 25, 10)),
}
FULL_LR = 2e-5  # of --method full; not in the paper's tables
UNSCHEDULED = ("standard", "none", "full")  # all is open from the start, or never: k changes nothing


def preset(task: str, model_type: str, adapter: str, method: str, train_examples: int) -> tuple:
    """Epochs, learning rate, batch size, decay and k (None: by the number of steps) of the paper's tables.

    Low data has the same preset for both kinds of adapter. Models that are not BERT take XLM-R's preset.
    """
    training_set = TASKS[task].training_set or task
    model_type = "bert" if model_type == "bert" else "xlm-roberta"
    keys = ((training_set, model_type, adapter), (training_set, "xlm-roberta", "pfeiffer"))
    row = next(PRESETS[key] for key in keys if key in PRESETS)
    scheduled = method not in UNSCHEDULED
    epochs, lr, batch_size, decay, k = row[0][scheduled], row[1][scheduled], *row[2:]
    k = k and k[{"lpft": 0, "fun": 2}.get(method, 1)]
    if (training_set, model_type) in LOW_DATA and train_examples <= 10_000:
        epochs, lr, by_size = LOW_DATA[training_set, model_type]
        k = by_size[(train_examples > 1_000) + (train_examples > 5_000)]
    return epochs, FULL_LR if method == "full" else lr, batch_size, decay, k


def resolve(settings, model_type: str, layers: int, train_examples: int, sequences: int):
    """The settings with the preset of task, model, adapter, method and amount of data in place of None.

    Where there is no k, opening all blocks takes a fifth of the steps (kL/N = 0.2).
    """
    epochs, lr, batch_size, decay, k = preset(
        settings.task, model_type, settings.adapter, settings.method, train_examples)
    batch_size = settings.batch_size or batch_size
    epochs = None if settings.steps is not None else settings.epochs or epochs
    steps = epochs * math.ceil(sequences / batch_size) if settings.steps is None else settings.steps
    fisher_every = {"classify": 0, "mlm": 0, "xcopa": 50}.get(settings.task, 100)  # a point of its curves
    eval_every = 500 if settings.data is None else 0
    return dataclasses.replace(
        settings, epochs=epochs, steps=steps, batch_size=batch_size, lr=settings.lr or lr,
        decay=settings.decay or decay, k=settings.k or k or max(1, round(0.2 * steps / max(1, layers))),
        max_length=settings.max_length or TASKS[settings.task].max_length,
        fisher_batches=settings.fisher_batches or (41 if settings.fisher_labels == "official" else 4),
        eval_every=eval_every if settings.eval_every is None else settings.eval_every,
        fisher_every=fisher_every if settings.fisher_every is None else settings.fisher_every)
