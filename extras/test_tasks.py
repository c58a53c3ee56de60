"""A task of one's own: one more entry of TASKS, and it trains, is tested in every language and reported."""

import json
import os
import re
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from transformers import AutoModelForSequenceClassification

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
