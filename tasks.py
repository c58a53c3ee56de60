"""The tasks: their data, how rows become token ids, how answers are scored, and the paper's presets.

Liu et al., NAACL 2024: Tables 3, 4 and 15 (presets) and the rules of scoring.

    splits, labels = load_data(settings)                            # settings: unfreeze.py's
    examples = task.encode(splits["de"], tokenizer, 128, labels)    # task = TASKS["xnli"]
    outputs = predict(task, model, examples, collate, autocast)     # collate: examples -> batch
    scores, predictions = task.score(splits["de"], examples, outputs, "de", labels)

First what all tasks share: rows, batches, outputs. Then each kind with all that is its own (pairs, choices,
spans, tags, masked text), then the presets. A further task is one more entry of TASKS and nothing else:

    TASKS["intent"] = dataclasses.replace(TASKS["classify"], columns=("utterance", "label"))

Scores are in percent; a place in a text counts its characters.
"""

import dataclasses
import json
import math
import re
import string
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (AutoModelForMaskedLM, AutoModelForMultipleChoice, AutoModelForQuestionAnswering,
                          AutoModelForSequenceClassification, AutoModelForTokenClassification,
                          DataCollatorForLanguageModeling)

from extras.rows import (UserError, blame, check_rows, labels_of, languages_in, read_file, read_hub,
                         read_utf8, sample)


class Preset(NamedTuple):
    epochs: tuple[int, int]  # of standard, none and full; of the schedules
    lr: tuple[float, float]  # likewise
    batch_size: int
    decay: str
    k: tuple[int, int, int] | None  # LPFT's, GU's and that of all others, FUN's; None: see `resolve`


@dataclass(frozen=True, kw_only=True)
class Task:
    """An example is a dictionary of one sequence's tensors, unpadded; a batch the keywords of the model."""

    # its data
    columns: tuple[str, ...]  # of every row: strings; by word, lists of them, the words and then their tags
    optional_columns: tuple[str, ...] = ()  # used where the training file has them
    is_by_word: bool = False  # every column is a list with an entry a word
    target: str = "label"  # the column that is predicted, strings or integers; another one by word alone
    values: dict = field(default_factory=dict)  # by column: the values allowed, a dictionary from these to
    #    what they are read as, or a function that reads one; the target's default: those of the training file
    languages: tuple[str, ...] | None = None  # tested, by default, English first; None: every test file
    other_languages: tuple[str, ...] = ()  # on the hub, too
    hub: dict = field(default_factory=dict)  # by split: owner/name/config/split, or language -> rows
    trains_language: bool = False  # a language adapter, on a text file: no test languages, no tr(F)
    # its kind
    head: type
    encode: Callable  # (rows, tokenizer, max_length, labels) -> examples
    batch: Callable  # (examples, tokenizer) -> batch
    forward: Callable  # (model, batch) -> outputs [B, …]
    loss: Callable  # (model, batch) -> loss to minimise
    score: Callable  # (rows, examples, outputs, language, labels) -> ({metric: percent}, predictions)
    unreachable: Callable | None = None  # (rows, examples) -> answers that no output can give, or not exactly
    # its settings
    max_length: int = 128
    fisher_every: int = 0  # steps between two reports of tr(F); 0: each epoch
    training_set: str | None = None  # the paper's name of it, a key of PRESETS
    preset: Preset = Preset((3, 3), (8e-4, 8e-4), 32, "linear", None)  # where PRESETS has none


TASKS: dict[str, Task] = {}  # by name; each kind adds its own below


# ------------------------------------------------------------------------------------------------------------
# Rows by split
# ------------------------------------------------------------------------------------------------------------


def load_data(settings) -> tuple[dict[str, list[dict]], list]:
    """All rows by split (train, validation, then the test languages, English first), and the labels."""
    task = TASKS[settings.task]
    if task.trains_language:
        return read_text(Path(settings.data)), []
    languages, train = test_languages(settings), read_split(settings, "train", "en")
    used = {column for row in train.values() for column, value in row.items() if value is not None}
    columns = [*task.columns, *(column for column in task.optional_columns if column in used)]
    absent, values = {*task.optional_columns} - used, dict(task.values)
    check = partial(check_rows, columns=columns, absent=absent, values=values, target=task.target,
                    is_by_word=task.is_by_word)
    splits = {"train": check(train)}
    if task.target in columns:
        found = labels_of(splits["train"], task.target, place=next(iter(train)))
        values.setdefault(task.target, found)
        if task.is_by_word:
            check_scheme(zip(train, splits["train"]), task.target, found)
    splits["validation"] = check(read_split(settings, "validation", "en"))
    for language in languages:
        splits[language] = check(read_split(settings, "test", language))
    labels = values.get(task.target, [])
    return splits, [*labels.values()] if isinstance(labels, dict) else [*labels]


def sampled(rows: dict[str, list[dict]], settings) -> dict[str, list[dict]]:
    """What --train-examples and --test-examples leave: to train on by seed, to test on the same for all."""
    train, validation, *languages = rows
    return {train: sample(rows[train], settings.train_examples, settings.seed, stratified=True),
            validation: rows[validation],
            **{language: sample(rows[language], settings.test_examples, seed=0) for language in languages}}


def test_languages(settings) -> list[str]:
    """English, then those asked for, by default the task's."""
    task, where = TASKS[settings.task], "on the hub"
    known = [*(task.languages or ()), *task.other_languages]
    if settings.data is not None:
        known, where = languages_in(Path(settings.data)), f"in {settings.data} (test.<language>.jsonl)"
    wanted = task.languages or known if settings.languages is None else settings.languages.split(",")
    wanted = list(dict.fromkeys(["en", *wanted]))  # each once
    for language in wanted:
        if language not in known:
            raise UserError(f"{settings.task} has no language {language!r} {where}, only "
                            f"{', '.join(known)}: choose with --languages")
        if language in ("train", "validation") or not language.isprintable() or "|" in language:
            raise UserError(f"a test language cannot be called {language!r}: rename its file, or choose "
                            "others with --languages")
    return wanted


def read_split(settings, split: str, language: str) -> dict[str, dict]:
    """The rows as they are, by the place that an error message names."""
    if settings.data is not None:
        return read_file(Path(settings.data), f"{split}.{language}")
    place = TASKS[settings.task].hub[split]
    return place(language) if callable(place) else read_hub(place.format(language))


# ------------------------------------------------------------------------------------------------------------
# From examples to batches, and from these to outputs
# ------------------------------------------------------------------------------------------------------------


IGNORED = -100  # the label of a token that is in no loss, no score and no tr(F)


def tensors_of(encoded: dict, i: int) -> dict[str, torch.Tensor]:
    """The i-th sequence that a tokenizer gives, each of its lists as a tensor [T]."""
    return {key: torch.tensor(values[i], dtype=torch.long) for key, values in encoded.items()}


def tokens_of(example: dict) -> int:
    """What an example takes in a batch: its tokens; of several choices, each as long as the longest."""
    ids = example["input_ids"]
    return len(ids) * max(map(len, ids)) if isinstance(ids, list) else len(ids)


def padding_of(tokenizer) -> dict[str, int]:
    """What a batch's entries are padded with, if not with 0."""
    return {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id,
            "labels": IGNORED}


def pad(examples: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """One batch: sequences padded to the longest, [B, T] or, of several choices, [B, choices, T]."""
    padding, batch = padding_of(tokenizer), {}
    for key, first in examples[0].items():
        if key in ("row", "offsets"):  # of the score's, not the model's
            continue
        values = [example[key] for example in examples]
        fill = partial(pad_sequence, batch_first=True, padding_value=padding.get(key, 0),
                       padding_side=tokenizer.padding_side)
        if isinstance(first, int):
            batch[key] = torch.tensor(values)  # [B]
        elif isinstance(first, list):
            batch[key] = fill([*chain(*values)]).unflatten(0, (len(examples), -1))  # [B, choices, T]
        else:
            batch[key] = fill(values)  # [B, T]
    return batch


@torch.inference_mode()
def predict(task: Task, model: nn.Module, examples: list[dict], collate: Callable, autocast: Callable,
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


# ------------------------------------------------------------------------------------------------------------
# Pairs of texts, and single ones
# ------------------------------------------------------------------------------------------------------------


def encode_pairs(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """One text, or two in the order of the columns, and the number of its label."""
    columns = [[row[column] for row in rows] for column in rows[0] if column != "label"]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [tensors_of(encoded, i) | {"labels": labels.index(row["label"])} for i, row in enumerate(rows)]


def accuracy(rows: list[dict], examples: list[dict], outputs: list, language: str, labels: list) -> tuple:
    predicted = [output.argmax().item() for output in outputs]
    right = [label == example["labels"] for label, example in zip(predicted, examples)]
    return {"accuracy": 100 * mean(right)}, [{"label": labels[label]} for label in predicted]


PAIRS = partial(Task, head=AutoModelForSequenceClassification, encode=encode_pairs, batch=pad,
                forward=lambda model, batch: model(**batch).logits,  # [B, C]
                loss=lambda model, batch: model(**batch).loss, score=accuracy)

TASKS["xnli"] = PAIRS(
    columns=("premise", "hypothesis", "label"), values={"label": (0, 1, 2)},
    languages=("en", "ar", "de", "el", "es", "hi", "ru", "sw", "th", "tr", "vi", "zh"),
    other_languages=("bg", "fr", "ur"),  # no language adapter for XLM-R
    hub={"train": "facebook/xnli/en/train", "validation": "facebook/xnli/en/validation",
         "test": "facebook/xnli/{}/test"},
    training_set="mnli", fisher_every=100)

TASKS["classify"] = PAIRS(columns=("text", "label"), optional_columns=("text_pair",))  # any data folder


# ------------------------------------------------------------------------------------------------------------
# Choices between two texts
# ------------------------------------------------------------------------------------------------------------


def encode_choices(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """Premise and question with each choice: two sequences an example, one score each."""
    premises = [f"{row['premise']} What was the {row['question']}?" for row in rows]
    encoded = [tokenizer(premises, [row[choice] for row in rows], truncation=True, max_length=max_length)
               for choice in ("choice1", "choice2")]
    pairs = [[tensors_of(choice, i) for choice in encoded] for i in range(len(rows))]
    return [{key: [choice[key] for choice in pair] for key in pair[0]}
            | {"labels": labels.index(row["label"])} for pair, row in zip(pairs, rows)]


COPA = "aps/super_glue/copa/"


def read_xcopa(language: str) -> dict[str, dict]:
    """XCOPA's test pairs with the questions of COPA's, row by row the same: its own are wrong in five
    languages. In English COPA's validation pairs: the hub's copy hides the labels of its test pairs."""
    if language == "en":
        return read_hub(COPA + "validation")
    place = f"cambridgeltl/xcopa/{language}/test"
    rows, english = read_hub(place), read_hub(COPA + "test")
    if len(rows) != len(english):
        raise UserError(f"{place} on the hub has {len(rows)} rows and English COPA {len(english)}: they must "
                        "be parallel; give a folder with --data instead")
    return {key: row | {"question": pair.get("question")}
            for (key, row), pair in zip(rows.items(), english.values())}


TASKS["xcopa"] = PAIRS(
    columns=("premise", "choice1", "choice2", "question", "label"),
    values={"label": (0, 1), "question": ("cause", "effect")},
    languages=("en", "et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"),
    hub={"train": COPA + "train", "validation": COPA + "validation", "test": read_xcopa},
    head=AutoModelForMultipleChoice, encode=encode_choices,  # scored as pairs are
    training_set="copa", fisher_every=50)


# ------------------------------------------------------------------------------------------------------------
# Spans of a context that answer a question
# ------------------------------------------------------------------------------------------------------------


def read_answers(answers: dict | str) -> dict:
    """All answers to a question: texts and where they start; in a table as JSON."""
    try:
        answers = json.loads(answers) if isinstance(answers, str) else answers
        pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        assert pairs and all(isinstance(text, str) and type(start) is int for text, start in pairs)
    except (TypeError, KeyError, ValueError, RecursionError, AssertionError):
        raise ValueError("answers must be {'text': [string, …], 'answer_start': [integer, …]}, with one "
                         "answer or more") from None
    return answers


def encode_spans(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """Question and context, a long context in windows that overlap by 128 tokens (the stride).

    `offsets` [T, 2] has the characters of the context that a token covers, -1 elsewhere; `row` the question's
    number. A window without the whole of the first answer has start and end at its first token.
    """
    return [window | {"row": number} for number, row in enumerate(rows)
            for window in windows_of(row, tokenizer, max_length)]


def windows_of(row: dict, tokenizer, max_length: int) -> list[dict]:
    """One question's, with its first answer where it is; an inner window covers what its tokens do."""
    question = row["question"].strip()
    start = tokenizer(question, add_special_tokens=False, truncation=True, max_length=max_length // 4,
                      return_offsets_mapping=True)["offset_mapping"]
    question = question[: start[-1][1] if start else 0]  # leaves room for the context
    encoded = tokenizer(question, row["context"], truncation="only_second", max_length=max_length,
                        stride=min(128, max_length // 3), return_overflowing_tokens=True,
                        return_offsets_mapping=True)
    inputs = {key: encoded[key] for key in tokenizer.model_input_names if key in encoded}
    windows, last = [], len(encoded["input_ids"]) - 1
    for i, places in enumerate(encoded["offset_mapping"]):
        offsets = torch.tensor(places, dtype=torch.int32)
        is_context = torch.tensor([sequence == 1 for sequence in encoded.sequence_ids(i)])
        offsets[~is_context] = -1
        covered = (offsets[is_context][0, 0].item() if i > 0 else 0,
                   offsets[is_context][-1, 1].item() if i < last else len(row["context"]))
        start, end = answer_tokens(offsets, row, covered)
        windows.append(tensors_of(inputs, i) | {"start_positions": start, "end_positions": end,
                                                "offsets": offsets})
    return windows


def answer_tokens(offsets: torch.Tensor, row: dict, covered: tuple[int, int]) -> tuple[int, int]:
    """The first and last token that share a character with the first answer; 0, 0 if it is not all here."""
    text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    end = start + len(text)
    shared = ((offsets[:, 1] > start) & (offsets[:, 0] < end)).nonzero()
    is_there = row["context"][max(start, 0) : end] == text and covered[0] <= start and end <= covered[1]
    return (shared[0].item(), shared[-1].item()) if is_there and len(shared) else (0, 0)


def unreachable(rows: list[dict], examples: list[dict]) -> tuple[int, int]:
    """How many first answers are in no window (or not at their answer_start), and how many are in one but
    begin or end inside a token, so that no span of tokens is exactly the answer."""
    is_exact = {}  # by row that has its answer in a window
    for example in examples:
        number, first, last = example["row"], example["start_positions"], example["end_positions"]
        if first:
            _, text = span(rows[number]["context"], example["offsets"], first, last)
            same = text == rows[number]["answers"]["text"][0].strip()
            is_exact[number] = is_exact.get(number, False) or same
    return len(rows) - len(is_exact), len(is_exact) - sum(is_exact.values())


def span(context: str, offsets: torch.Tensor, first: int, last: int) -> tuple[int, str]:
    """The text from one token to another without the white space around it, and where it starts."""
    start, end = offsets[first, 0].item(), offsets[last, 1].item()
    text = context[start:end]
    return start + len(text) - len(text.lstrip()), text.strip()


def span_logits(model: nn.Module, batch: dict) -> torch.Tensor:
    output = model(**batch)
    return torch.stack([output.start_logits, output.end_logits], dim=1)  # [B, 2, T]


def span_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """The model's own loss of start and end, but over real tokens: there, padding competes with them."""
    logits = span_logits(model, batch)  # [B, 2, T]
    if "attention_mask" in batch:
        logits = logits.masked_fill(batch["attention_mask"].flatten(1)[:, None] == 0, -torch.inf)
    positions = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)  # [B, 2]
    return nn.functional.cross_entropy(logits.flatten(0, 1), positions.flatten())


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
    return score[i, j].item(), *span(context, offsets, start[i], end[j])


def score_answers(rows: list[dict], examples: list[dict], outputs: list, language: str, labels: list,
                  rules: dict) -> tuple:
    """The best span over all windows of a question, scored by each of these rules."""
    best = [(-math.inf, 0, "")] * len(rows)
    for example, logits in zip(examples, outputs):
        number = example["row"]
        found = best_span(rows[number]["context"], example["offsets"], logits)
        best[number] = max(best[number], found, key=lambda guess: guess[0])
    scores = {}
    for suffix, words in rules.items():
        pairs = [[word_overlap(words(text, language), words(gold, language))
                  for gold in row["answers"]["text"]] for (_, _, text), row in zip(best, rows)]
        scores |= {f"f1{suffix}": 100 * mean(max(f1 for f1, _ in golds) for golds in pairs),
                   f"em{suffix}": 100 * mean(max(same for _, same in golds) for golds in pairs)}
    return scores, [{"id": row["id"], "text": text, "answer_start": start}
                    for (_, start, text), row in zip(best, rows)]


def word_overlap(predicted: list[str], gold: list[str]) -> tuple[float, bool]:
    """F1 over the two multisets of words, 0 if they share none (two empty answers too), and equality."""
    shared = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0, predicted == gold


ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "ar": "\\sال^|ال",  # as published: it takes every ال, also inside a word
}


def squad_words(text: str, language: str) -> list[str]:
    """An answer's words by SQuAD v1.1's rules, Chinese by character: how the paper scores XQuAD and MLQA."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return characters(text) if language == "zh" else re.sub(ARTICLES["en"], " ", text).split()


def mlqa_words(text: str, language: str) -> list[str]:
    """An answer's words by MLQA's own rules: all punctuation goes, then the language's articles."""
    text = "".join(character for character in text.lower() if not is_punctuation(character))
    text = re.sub(ARTICLES[language], " ", text) if language in ARTICLES else text
    return characters(text) if language == "zh" else text.split()


def is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def characters(text: str) -> list[str]:
    """Each Chinese character and each punctuation mark by itself, the rest split at white space."""
    return "".join(f" {character} " if "\u4e00" <= character <= "\u9fa5" or is_punctuation(character)
                   else character for character in text).split()


SQUAD = {"train": "rajpurkar/squad/plain_text/train", "validation": "rajpurkar/squad/plain_text/validation"}
SPANS = partial(
    Task, columns=("id", "context", "question", "answers"), values={"answers": read_answers},
    head=AutoModelForQuestionAnswering, encode=encode_spans, batch=pad, forward=span_logits, loss=span_loss,
    unreachable=unreachable, max_length=384, fisher_every=100, training_set="squad")

TASKS["xquad"] = SPANS(
    languages=("en", "ar", "de", "el", "es", "hi", "ru", "th", "tr", "vi", "zh"), other_languages=("ro",),
    hub=SQUAD | {"test": "google/xquad/xquad.{}/validation"},  # the name of its only split
    score=partial(score_answers, rules={"": squad_words}))

TASKS["mlqa"] = SPANS(
    languages=("en", "ar", "de", "es", "hi", "vi", "zh"),
    hub=SQUAD | {"test": "facebook/mlqa/mlqa.{0}.{0}/test"},
    score=partial(score_answers, rules={"": squad_words, "_mlqa": mlqa_words}))


# ------------------------------------------------------------------------------------------------------------
# A tag for each word
# ------------------------------------------------------------------------------------------------------------


def encode_words(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """Each word is tokenized by itself. Its tag stands at its first piece that shows a character (XLM-R
    begins most words of Chinese with a lone space). `row`: the sentence's number; a long one gives several
    examples."""
    is_blank = lru_cache(None)(lambda piece: not tokenizer.convert_tokens_to_string([piece]).strip())
    sentences, tags = zip(*(row.values() for row in rows))
    encoded, examples = read_words(sentences, tokenizer), []
    for row, sentence in enumerate(tags):
        pieces, first, inner = encoded.tokens(row), {}, []
        for place, word in enumerate(encoded.word_ids(row)):  # None: a special token
            if word is not None:
                inner.append(place)
                if word not in first or is_blank(pieces[first[word]]):
                    first[word] = place
        example = tensors_of(encoded, row) | {"labels": torch.full([len(pieces)], IGNORED)}
        numbers = [labels.index(sentence[word]) for word in first]
        example["labels"][list(first.values())] = torch.tensor(numbers)
        examples += [window | {"row": row}
                     for window in windows_in(example, inner[0], inner[-1] + 1, max_length)]
    return examples


def read_words(sentences: list[list[str]], tokenizer):
    """Their tokens. A word that the tokenizer drops (an empty one) is read again, as the unknown token."""
    read = partial(tokenizer, is_split_into_words=True, verbose=False)
    with blame("the tokenizer of --model does not give every word a token", "choose another model"):
        lacks_space = read(["a", "a"])["input_ids"] != tokenizer("a a")["input_ids"]
        words = [[" " * lacks_space + word for word in sentence] for sentence in sentences]
        encoded = read(words)
        if any(lost := dropped(words, encoded)):
            unknown = tokenizer.unk_token or ""
            words = [[unknown if i in numbers else word for i, word in enumerate(sentence)]
                     for sentence, numbers in zip(words, lost)]
            encoded = read(words)
            if any(dropped(words, encoded)):
                raise ValueError("a word without a token")
        return encoded


def dropped(sentences: list[list[str]], encoded) -> list[set[int]]:
    """By sentence, the numbers of the words without a token."""
    return [{*range(len(words))} - {*encoded.word_ids(row)} for row, words in enumerate(sentences)]


def windows_in(example: dict, start: int, end: int, max_length: int) -> list[dict]:
    """The example, or windows of a longer one, each with all special tokens (those outside of start..end).
    Neighbours share a quarter of a window; of that, each keeps the labels of the half on its own side, which
    has more context there."""
    length = len(example["labels"])
    if length <= max_length:
        return [example]
    width, windows = max_length - (length - end + start), []
    if width < 1:
        raise UserError(f"--max-length {max_length} is taken by the tokenizer's special tokens: raise it")
    shared = width // 4
    for first in range(start, end - shared, width - shared):
        last = min(first + width, end)
        seen = [*range(start), *range(first, last), *range(end, length)]
        own = slice(first + (shared // 2 if first > start else 0),
                    last - (shared - shared // 2 if last < end else 0))
        labels = torch.full([length], IGNORED)
        labels[own] = example["labels"][own]
        windows.append({key: value[seen] for key, value in (example | {"labels": labels}).items()})
    return [window for window in windows if (window["labels"] != IGNORED).any()]


def score_tags(rows: list[dict], examples: list[dict], outputs: list, language: str, labels: list) -> tuple:
    """Percent of words with the right tag; where the tags are BIO, before it F1 over entities."""
    guesses, gold = [[] for _ in rows], [[*row.values()][1] for row in rows]
    for example, logits in zip(examples, outputs):  # [C, T]: windows in order, each word tagged in one
        tagged = (example["labels"] != IGNORED).nonzero()[:, 0]
        guesses[example["row"]] += [labels[i] for i in logits[:, tagged].argmax(0)]
    right = [guess == tag for pair in zip(guesses, gold) for guess, tag in zip(*pair, strict=True)]
    scores = {"accuracy": 100 * mean(right)}
    if is_bio(labels):
        found, there = ({(row, *entity) for row, tags in enumerate(sentences) for entity in entities(tags)}
                        for sentences in (guesses, gold))
        scores = {"f1": 200 * len(found & there) / max(1, len(found) + len(there))} | scores
    return scores, [{"tags": tags} for tags in guesses]


def is_bio(tags: list) -> bool:
    return any(str(tag)[:2] in ("B-", "I-") for tag in tags)


def check_scheme(rows: Iterable[tuple[str, dict]], column: str, labels: list) -> None:
    """Refuse tags of which only some are BIO: it would not be known what the entities are."""
    odd = {tag for tag in labels if tag != "O" and not re.fullmatch("[BI]-.+", str(tag))}
    for place, row in rows if is_bio(labels) else ():
        if found := odd.intersection(row[column]):
            raise UserError(f"{place}: {column} {min(found, key=str)!r} is no O, B-TYPE or I-TYPE (BIO), "
                            "as others are: write all as BIO, or none")


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Type, first word and the one after the last of each entity, as CoNLL's script and seqeval read BIO: I-
    goes on with an entity of its type, and begins one elsewhere."""
    found, kind, first = [], None, 0
    for i, tag in enumerate([*tags, "O"]):
        if tag[0] == "I" and tag[2:] == kind:
            continue
        if kind:
            found.append((kind, first, i))
        kind, first = tag[2:], i
    return found


WIKIANN = dict(enumerate(["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]))
TAGS = partial(
    PAIRS, is_by_word=True, head=AutoModelForTokenClassification, encode=encode_words, score=score_tags,
    forward=lambda model, batch: model(**batch).logits.mT)  # [B, C, T]

TASKS["ner"] = TAGS(
    columns=("tokens", "ner_tags"), target="ner_tags", values={"ner_tags": WIKIANN},
    languages=tuple("en ja zh ar jv sw is my qu cdo ilo xmf mi mhr tk gn".split()),  # MAD-X's
    other_languages=tuple("af bg bn de el es et eu fa fi fr he hi hu id it ka kk ko ml mr ms nl pt ru ta te "
                          "th tl tr ur vi yo".split()),
    hub={"train": "unimelb-nlp/wikiann/en/train", "validation": "unimelb-nlp/wikiann/en/validation",
         "test": "unimelb-nlp/wikiann/{}/test"})

TASKS["tag"] = TAGS(columns=("tokens", "tags"), target="tags")  # any data folder


# ------------------------------------------------------------------------------------------------------------
# Masked text: a language adapter (MAD-X, section 3)
# ------------------------------------------------------------------------------------------------------------


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


def encode_text(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
    """All lines, joined by the separator, in sequences of `max_length` tokens each; the rest is dropped."""
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer of --model has no mask token: masked-language modelling needs one")
    special = tokenizer("")["input_ids"]  # not all tokenizers name theirs
    if len(special) != 2:
        raise UserError(f"the tokenizer of --model puts {len(special)} special tokens around a text: "
                        "masked-language modelling needs one before and one after")
    (first, last), tokens, inner = special, array("i"), max_length - 2
    for row in rows:
        tokens.extend(tokenizer(row["text"].strip(), add_special_tokens=False, verbose=False)["input_ids"])
        tokens.append(last)
    if len(tokens) < inner:
        raise UserError(f"--data has too little text: {len(rows)} of its lines have {len(tokens)} tokens, a "
                        f"sequence takes {inner}, and each twentieth line is held out; lower --max-length")
    return [{"input_ids": torch.tensor([first, *tokens[start : start + inner], last])}
            for start in range(0, len(tokens) - inner + 1, inner)]


def masked_tokens(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [M] and correctness [M] of every masked token and its row [M]; no logits of any other token."""
    hidden, masked = model.base_model(batch["input_ids"])[0], batch["labels"] != IGNORED  # [B, T, H]
    if hasattr(model, "lm_predictions"):  # DeBERTa-v2's new head
        logits = model.lm_predictions(hidden[masked], model.get_input_embeddings())  # [M, V]
    elif hasattr(model, "decoder"):  # ModernBERT
        logits = model.decoder(model.head(hidden[masked]))
    else:
        logits = (model.lm_head if hasattr(model, "lm_head") else model.cls)(hidden[masked])
    logits, labels = logits.float(), batch["labels"][masked]  # [M, V], [M]
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    return loss, logits.argmax(-1) == labels, masked.nonzero()[:, 0]


def masked_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """The model's own masked-LM loss, with logits of the masked tokens alone."""
    return masked_tokens(model, batch)[0].mean()


def masked_sums(model: nn.Module, batch: dict) -> torch.Tensor:
    """Of every sequence: the sum of losses, the number of tokens guessed right, and of masked tokens."""
    loss, right, row = masked_tokens(model, batch)
    values = torch.stack([loss, right, torch.ones_like(loss)], dim=1)  # [M, 3]
    return torch.zeros(len(batch["labels"]), 3, device=loss.device).index_add(0, row, values)  # [B, 3]


def masked_scores(rows: list[dict], examples: list[dict], outputs: list, language: str,
                  labels: list) -> tuple:
    """Percent of masked tokens guessed right, and their mean loss in nats."""
    loss, right, masked = torch.stack(outputs).sum(0).tolist()
    return {"accuracy": 100 * right / masked, "loss": loss / masked}, []


TASKS["mlm"] = Task(
    columns=("text",), languages=(), trains_language=True,
    head=AutoModelForMaskedLM, encode=encode_text,
    # 15 % of the tokens are masked as BERT does it
    batch=lambda examples, tokenizer: dict(DataCollatorForLanguageModeling(tokenizer)(examples)),
    forward=masked_sums, loss=masked_loss, score=masked_scores,
    max_length=512, preset=Preset((100, 100), (1e-4, 1e-4), 64, "linear", (1, 1, 1)))  # k is unused


# ------------------------------------------------------------------------------------------------------------
# The paper's presets
# ------------------------------------------------------------------------------------------------------------

PRESETS = {
    ("squad", "bert", "pfeiffer"): Preset((5, 5), (5e-4, 5e-4), 32, "linear", (800, 800, 800)),  # Table 3
    ("squad", "xlm-roberta", "pfeiffer"): Preset((15, 15), (2e-4, 5e-4), 32, "linear", (800, 800, 100)),
    ("copa", "bert", "pfeiffer"): Preset((500, 5000), (1e-4, 1e-5), 64, "constant", (800, 50, 50)),
    ("copa", "xlm-roberta", "pfeiffer"): Preset((500, 5000), (1e-4, 1e-5), 64, "constant", (800, 1000, 1000)),
    ("mnli", "bert", "pfeiffer"): Preset((15, 15), (5e-4, 5e-4), 128, "linear", (25, 800, 50)),
    ("mnli", "xlm-roberta", "pfeiffer"): Preset((15, 15), (5e-4, 5e-4), 128, "linear", (800, 800, 800)),
    # Table 15; it has no LPFT, which takes GU's k
    ("squad", "bert", "lora"): Preset((5, 5), (5e-4, 8e-4), 32, "linear", (800, 800, 800)),
    ("squad", "xlm-roberta", "lora"): Preset((15, 15), (5e-4, 5e-4), 32, "linear", (800, 800, 800)),
    ("copa", "bert", "lora"): Preset((500, 5000), (1e-4, 1e-4), 64, "constant", (50, 50, 100)),
    ("copa", "xlm-roberta", "lora"): Preset((500, 5000), (1e-4, 1e-4), 64, "constant", (100, 100, 200)),
    ("mnli", "bert", "lora"): Preset((15, 15), (5e-4, 5e-4), 128, "linear", (50, 50, 50)),
    ("mnli", "xlm-roberta", "lora"): Preset((15, 15), (5e-4, 5e-4), 128, "linear", (800, 800, 800)),
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
    """Epochs, learning rate, batch size, decay and k (None: by the number of steps): those of the paper's
    tables for its tasks, the task's own for others.

    Low data has the same preset for both kinds of adapter. Models that are not BERT take XLM-R's preset.
    """
    training_set = TASKS[task].training_set
    model_type = "bert" if model_type == "bert" else "xlm-roberta"
    row = PRESETS.get((training_set, model_type, adapter), TASKS[task].preset)
    is_scheduled = method not in UNSCHEDULED
    epochs, lr = row.epochs[is_scheduled], row.lr[is_scheduled]
    column = {"lpft": 0, "fun": 2}.get(method, 1)
    k = row.k and row.k[column]
    if (training_set, model_type) in LOW_DATA and train_examples <= 10_000:
        epochs, lr, by_size = LOW_DATA[training_set, model_type]
        k = by_size[(train_examples > 1_000) + (train_examples > 5_000)]
    if method == "full":
        lr = FULL_LR
    return epochs, lr, row.batch_size, row.decay, k


def resolve(settings, model_type: str, layers: int, train_examples: int, sequences: int):
    """The settings with the preset of task, model, adapter, method and amount of data in place of None.

    Where there is no k, opening all blocks takes a fifth of the steps (kL/N = 0.2).
    """
    task = TASKS[settings.task]
    epochs, lr, batch_size, decay, k = preset(
        settings.task, model_type, settings.adapter, settings.method, train_examples)
    batch_size = settings.batch_size or batch_size
    epochs = None if settings.steps is not None else settings.epochs or epochs
    steps = epochs * math.ceil(sequences / batch_size) if settings.steps is None else settings.steps
    presets = {
        "epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr, "decay": decay,
        "k": k or max(1, round(0.2 * steps / max(1, layers))), "max_length": task.max_length,
        "fisher_batches": 41 if settings.fisher_labels == "official" else 4,
        "fisher_every": task.fisher_every, "eval_every": 500 if settings.data is None else 0}
    missing = {name: value for name, value in presets.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **missing)
