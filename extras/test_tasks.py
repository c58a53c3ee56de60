"""A task of one's own: one more entry of TASKS, and it trains, is tested in every language and reported.
Tags: which piece has a word's, windows of long sentences, and the F1 of entities.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import tasks
import unfreeze
from extras.conftest import HERE, events_of, one_error, results_of, write_rows

SNIPPETS = re.findall(r"^```python\n(.*?)^```$", (HERE / "README.md").read_text("utf-8"), re.M | re.S)
SNIPPET, = (snippet for snippet in SNIPPETS if 'TASKS["intent"]' in snippet)


def renamed(data: Path, folder: Path, **names) -> Path:
    """The files of a data folder with other names of columns."""
    folder.mkdir()
    for path in data.iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{names.get(column, column): value for column, value in row.items()} for row in rows]
        write_rows(folder / path.name, rows)
    return folder


def labels(path: Path, column: str = "label") -> list:
    return [json.loads(line)[column] for line in path.read_text().splitlines()]


def test_a_task_of_ten_lines_trains_is_tested_and_reported(assets, tmp_path):
    (tmp_path / "mine.py").write_text(SNIPPET)
    data = renamed(assets / "data", tmp_path / "data", text="utterance")

    def run(*options) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "mine.py", *map(str, options)], cwd=tmp_path, text=True, capture_output=True,
            env=os.environ | {"PYTHONPATH": str(HERE)})

    options = ["intent", "--model", assets / "model", "--data", data, "--method", "fun", "--device", "cpu"]
    first = run(*options)
    assert first.returncode == 0, first.stderr
    results = results_of(tmp_path / "runs/intent-model-data-fun-0")
    settings = results["settings"]
    assert [settings[name] for name in ("epochs", "lr", "batch_size", "decay")] == [3, 8e-4, 32, "linear"]
    assert results["steps"] == 6 and settings["max_length"] == 20  # 42 rows: two steps an epoch
    assert list(results["scores"]) == ["en", "de"] and "lr 0.0008 linear, k 1" in first.stdout
    second = run(*options, "--epochs", 20, "--lr", 0.01, "--out", "learnt")
    assert second.returncode == 0, second.stderr
    results = results_of(tmp_path / "learnt")
    assert results["validation"]["accuracy"] > max(80, results["untrained"]["accuracy"] + 20)
    guesses, gold = labels(tmp_path / "learnt/predictions/en.jsonl"), labels(data / "test.en.jsonl")
    right = mean(guess == label for guess, label in zip(guesses, gold, strict=True))
    assert results["scores"]["en"]["accuracy"] == pytest.approx(100 * right)
    table = run("report", "learnt", "runs/intent-model-data-fun-0")
    assert table.returncode == 0 and "intent" in table.stdout, table.stderr
    (data / "test.de.jsonl").write_text('{"text": "rot", "label": "colour"}\n')
    error = run(*options, "--overwrite")
    one_error(error.returncode, error.stderr, "test.de.jsonl:1: no column 'utterance'; every row")


def test_a_task_with_functions_of_its_own_is_one_entry_too(assets, tmp_path, monkeypatch):
    """Of a title and a body, encoded as one text, with a preset of its own and the mean recall of labels."""
    def encode(rows: list[dict], tokenizer, max_length: int, labels: list) -> list[dict]:
        encoded = tokenizer([f"{row['title']} {row['body']}" for row in rows], truncation=True,
                            max_length=max_length)
        return [tasks.tensors_of(encoded, i) | {"labels": labels.index(row["label"])}
                for i, row in enumerate(rows)]

    def recall(rows: list[dict], examples: list[dict], outputs: list, language: str, labels: list) -> tuple:
        guesses = [labels[output.argmax()] for output in outputs]
        count = Counter(row["label"] for row in rows)
        right = Counter(guess for guess, row in zip(guesses, rows) if guess == row["label"])
        return ({"recall": 100 * mean(right[label] / count[label] for label in count)},
                [{"guess": guess} for guess in guesses])

    monkeypatch.setitem(tasks.TASKS, "topic", tasks.Task(
        columns=("title", "body", "label"), values={"label": ("animal", "colour")},
        head=AutoModelForSequenceClassification, encode=encode, batch=tasks.pad,
        forward=lambda model, batch: model(**batch).logits, loss=lambda model, batch: model(**batch).loss,
        score=recall, max_length=30, fisher_every=25,
        preset=tasks.Preset((9, 20), (1e-3, 0.01), 16, "linear", (1, 2, 3))))
    folder = renamed(assets / "data", tmp_path / "data", text="title")
    for path in folder.iterdir():
        rows = [json.loads(line) | {"body": "nice"} for line in path.read_text().splitlines()]
        write_rows(path, rows)
    options = ["--model", str(assets / "model"), "--data", str(folder), "--device", "cpu"]
    assert unfreeze.main(["topic", *options, "--method", "fun", "--out", str(tmp_path / "run")]) == 0
    results = results_of(tmp_path / "run")
    settings, steps = results["settings"], 20 * 3  # 42 rows in batches of 16
    assert [settings[name] for name in ("epochs", "steps", "lr", "batch_size", "decay", "k")] == [
        20, steps, 0.01, 16, "linear", 3]
    assert [step for step, _ in results["order"]] == [0, 3, 6, 9]
    assert [event["step"] for event in events_of(tmp_path / "run", "fisher")] == [0, 3, 6, 25, 50, 60]
    assert results["average"].keys() == {"recall"} and results["validation"]["recall"] > 80
    guesses = labels(tmp_path / "run/predictions/en.jsonl", "guess")
    rows = labels(folder / "test.en.jsonl")
    shares = [mean(guess == row for guess, row in zip(guesses, rows) if row == label) for label in set(rows)]
    assert results["scores"]["en"]["recall"] == pytest.approx(100 * mean(shares))


# ---- tags --------------------------------------------------------------------------------------------------

TEXT = "the cat sat on the mat , unbelievably so ; แมวนั่งบนเสื่อ 我们 喜欢 猫 。 die Katze sitzt"


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Of XLM-R's kind (a space is a piece's first character), RoBERTa's (likewise, in bytes), or BERT's."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>") if kind == "bert" else models.BPE(
        unk_token=None if kind == "roberta" else "<unk>"))
    tokenizer.normalizer = normalizers.Strip() if kind == "xlm-r" else None
    tokenizer.pre_tokenizer = {
        "xlm-r": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        "roberta": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "bert": pre_tokenizers.BertPreTokenizer()}[kind]
    tokenizer.decoder = {"xlm-r": decoders.Metaspace(), "roberta": decoders.ByteLevel(),
                         "bert": decoders.WordPiece()}[kind]
    trainer = (trainers.WordPieceTrainer if kind == "bert" else trainers.BpeTrainer)(
        vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", unk_token="<unk>")


SENTENCES = [TEXT.split(), ["the", "", "cat", "\u200b", " "], [""], ["unbelievably" * 3, "the"], ["我们", "喜欢"],
             random.Random(1).choices(TEXT.split(), k=150)]


@pytest.mark.parametrize("most", [16, 40, 10_000])
@pytest.mark.parametrize("kind", ["xlm-r", "roberta", "bert"])
def test_every_word_has_its_tag_once_at_its_first_piece_where_most_is_around_it(kind, most):
    tokenizer, labels = tokenizer_of(kind), ["N", "V", "X"]
    rows = [{"tokens": words, "tags": [labels[(i + len(word)) % 3] for i, word in enumerate(words)]}
            for words in SENTENCES]
    examples = tasks.TASKS["tag"].encode(rows, tokenizer, most, labels)
    for number, row in enumerate(rows):
        # each word by itself, as it stands in a text; nothing of it is left: unknown
        pieces = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] or [3]
                  for word in row["tokens"]]
        blank = {tokenizer.convert_tokens_to_ids(piece) for piece in ("▁", "Ġ")} - {3}  # no piece of the word
        places = [sum(map(len, pieces[:i])) + (piece[0] in blank and len(piece) > 1)
                  for i, piece in enumerate(pieces)]  # of first pieces
        ids, found, around, start = [id for piece in pieces for id in piece], {}, {}, 0
        windows = [example for example in examples if example["row"] == number]
        assert len(windows) == 1 or sum(map(len, pieces)) + 2 > most
        for window in windows:
            inner = window["input_ids"][1:-1].tolist()
            assert (window["input_ids"][0], window["input_ids"][-1]) == (0, 2) and len(inner) + 2 <= most
            start = next(i for i in range(start, len(ids)) if ids[i : i + len(inner)] == inner)
            for place, tag in enumerate(window["labels"][1:-1].tolist(), start):
                if tag != -100:
                    assert place not in found
                    found[place] = labels[tag]
                around.setdefault(place, []).append(
                    (min(place - start, start + len(inner) - 1 - place), tag != -100))
            assert window["labels"][0] == window["labels"][-1] == -100
        assert [found[place] for place in places] == row["tags"] and len(found) == len(places)
        for place in places:
            nearest = dict(map(reversed, around[place]))  # tagged or not: tokens to the nearer end
            is_at_end = place in (0, 1, len(ids) - 1)  # of the sentence, a lone space before it or not
            assert nearest[True] >= nearest.get(False, 0) - 1 or is_at_end
    alone = tasks.TASKS["tag"].encode(rows[1:2], tokenizer, most, labels)[0]
    assert torch.equal(alone["input_ids"], next(one for one in examples if one["row"] == 1)["input_ids"])


SEQEVAL = """
    PpoLl PpoLl 100, ppoLl PpoLl 100, PPpol Pppol 40, Ppl PpL 100, ooo ooo 0, ooo oPo 0, Poo ooo 0,
    Pplpo Plppo 0, PpPp Pppp 0, lloLl LloLL 40, pol Pol 100, oLoLoo oLoPPo 40, oploPopPo oplopopPP 90.909091,
    poppopLLpooopp plppopLLpooopl 75, oLpllopPLPoLolPoolLl oLplpoplLPoPoLPoplLL 59.259259,
    LooPLoLLpoPopooLlpoPPoolPpooLo LooPLpolpoPLpooLlloPPoplPpoooo 73.333333"""  # seqeval 1.2.2's f1_score
BIO = {"P": "B-PER", "p": "I-PER", "L": "B-LOC", "l": "I-LOC", "o": "O"}


@pytest.mark.parametrize("cases, f1", [
    *(([case.split()[:2]], float(case.split()[2])) for case in SEQEVAL.split(",")),
    ([case.split()[:2] for case in SEQEVAL.split(",")], 65.079365)])  # all sentences as one corpus
def test_scores_of_tags_are_seqevals_and_the_share_of_right_words(cases, f1):
    labels = list(BIO.values())
    gold, guesses = ([[BIO[tag] for tag in case[side]] for case in cases] for side in (0, 1))
    rows = [{"tokens": ["a"] * len(tags), "tags": tags} for tags in gold]
    examples, outputs = [], []
    for number, tags in enumerate(guesses):  # in windows of three words, each between two other tokens
        for start in range(0, len(tags), 3):
            right = torch.tensor([labels.index(tag) for tag in tags[start : start + 3]])
            examples.append({"row": number, "labels": torch.tensor([-100, *[0] * len(right), -100])})
            outputs.append(torch.nn.functional.one_hot(torch.tensor([4, *right, 4, 4]), 5).T.float())
    scores, predictions = tasks.TASKS["tag"].score(rows, examples, outputs, "en", labels)
    same = [guess == tag for pair in zip(guesses, gold) for guess, tag in zip(*pair)]
    assert list(scores) == ["f1", "accuracy"] and scores["f1"] == pytest.approx(f1)
    assert scores["accuracy"] == pytest.approx(100 * mean(same))
    assert predictions == [{"tags": tags} for tags in guesses]


def test_tags_that_are_not_bio_have_no_entities():
    rows, labels = [{"tokens": ["a", "b"], "tags": ["NOUN", "O"]}], ["NOUN", "O"]
    examples, outputs = [{"row": 0, "labels": torch.tensor([0, 1])}], [torch.tensor([[1.0, 1], [0, 0]])]
    scores, _ = tasks.TASKS["tag"].score(rows, examples, outputs, "en", labels)
    assert scores == {"accuracy": 50}
