"""Rows of every format and task, their samples, and the windows of questions' contexts."""

import csv
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import tasks
import unfreeze
from extras.conftest import WORDS, command, results_of, task_command, write_rows, write_task


# ---- rows and formats --------------------------------------------------------------------------------------


def csv_of(rows: list[dict], delimiter: str = ",") -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def rewritten(data: Path, change, ending: str = "jsonl") -> None:
    """Every file of the folder anew: change(rows, their lines) as bytes."""
    for path in list(data.iterdir()):
        content = path.read_bytes()
        path.unlink()
        rows = [json.loads(line) for line in content.splitlines()]
        path.with_suffix(f".{ending}").write_bytes(change(rows, content))


FORMATS = {  # all of them hold the rows of the assets
    "a byte-order mark": ("jsonl", lambda rows, content: b"\xef\xbb\xbf" + content),
    "blank lines": ("jsonl", lambda rows, content: content.replace(b"\n", b"\r\n\n  \n")),
    "csv": ("csv", lambda rows, content: csv_of(rows)),
    "csv with a byte-order mark": ("csv", lambda rows, content: b"\xef\xbb\xbf" + csv_of(rows)),
    "tsv and a blank line": ("tsv", lambda rows, content: csv_of(rows, "\t") + b"\r\n"),
    "more columns": ("csv", lambda rows, content: csv_of([
        row | {"id": "7", "text_pair": ""} for row in rows])),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_any_format_are_the_rows(name, assets, tmp_path):
    ending, change = FORMATS[name]
    shutil.copytree(assets / "data", tmp_path / "data")
    expected, labels = tasks.load_data(unfreeze.parse(command(assets, tmp_path / "run")))
    rewritten(tmp_path / "data", change, ending)
    found = tasks.load_data(unfreeze.parse(command(assets, tmp_path / "run", "--data", tmp_path / "data")))
    assert found == (expected, labels)


@pytest.mark.parametrize("task", ["xnli", "xquad", "xcopa", "tag", "ner"])
def test_tables_of_every_task_are_read_with_their_integers_and_answers(task, assets, tmp_path):
    for name in ("lines", "table"):
        write_task(tmp_path / name, task)

    def marked(row: dict) -> dict:
        """With quotes and a line break inside its first field."""
        mark, first = ', "so"\r\nsaid', next(iter(row))
        value = row[first]
        return row | {first: [word + mark for word in value] if isinstance(value, list) else value + mark}

    def cells(rows: list[dict], _) -> bytes:
        return csv_of([{column: json.dumps(value) if isinstance(value, (dict, list)) else value
                        for column, value in marked(row).items()} for row in rows])

    rewritten(tmp_path / "table", cells, "csv")
    lines, table = (tasks.load_data(unfreeze.parse(task_command(task, assets, tmp_path / name, tmp_path)))
                    for name in ("lines", "table"))
    assert table == ({name: list(map(marked, rows)) for name, rows in lines[0].items()}, lines[1])


def test_labels_that_look_alike_are_said_once(assets, tmp_path, capsys):
    shutil.copytree(assets / "data", tmp_path / "data")
    labels = ["on", "on ", 1, "1", "off", "On"]
    rewritten(tmp_path / "data", lambda rows, _: "".join(
        json.dumps(row | {"label": labels[i % 6]}) + "\n" for i, row in enumerate(rows)).encode())
    assert unfreeze.main(command(assets, tmp_path / "run", "--data", tmp_path / "data", "--steps", 1)) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "differ in type" in line]
    names = json.loads((tmp_path / "run/head/head_config.json").read_text())["label2id"]
    assert names == {"1": 0, "'1'": 1, "'On'": 2, "'off'": 3, "'on'": 4, "'on '": 5}
    assert len(notes) == 1 and notes[0].endswith(" ones: [1, '1', 'On', 'on', 'on ']")


def test_pairs_of_texts_subsets_bf16_and_a_chosen_language(assets, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(assets / "data", data)
    for path in data.iterdir():
        rows = [json.loads(line) | {"text_pair": "nice"} for line in path.read_text().splitlines()]
        write_rows(path, rows)
    options = ["--data", data, "--train-examples", 20, "--test-examples", 5, "--languages", "de", "--bf16"]
    assert unfreeze.main(command(assets, tmp_path / "run", *options)) == 0
    scores = results_of(tmp_path / "run")["scores"]
    assert list(scores) == ["en", "de"]
    assert all(score["accuracy"] % 20 == 0 for score in scores.values())  # of 5 examples


def test_a_sample_keeps_the_order_and_is_the_same_for_the_same_seed():
    rows = list(range(100))
    picked = [tasks.sample(rows, 10, seed) for seed in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2]
    assert picked[0] == sorted(set(picked[0])) and len(picked[0]) == 10
    assert picked[0][-1] > 50 and tasks.sample(rows, None, 3) == tasks.sample(rows, 500, 3) == rows


@pytest.mark.parametrize("count", [1, 7, 10, 33, 99, 100])
def test_a_stratified_sample_holds_every_label_in_its_share(count):
    rows = [{"label": label, "number": number} for number, label in enumerate("a" * 60 + "b" * 30 + "c" * 10)]
    picked = [tasks.sample(rows, count, seed, stratified=True) for seed in (0, 0, 1)]
    assert picked[0] == picked[1] and (picked[0] != picked[2] or count == 100)
    for rows_ in picked:
        numbers = [row["number"] for row in rows_]
        assert len(numbers) == count and numbers == sorted(set(numbers))
        for label, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
            assert abs(sum(row["label"] == label for row in rows_) - share * count) < 1


# ---- choices and windows -----------------------------------------------------------------------------------


def test_choices_are_premise_and_question_with_each_choice(assets):
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "model")
    row = {"premise": "a cat", "choice1": "red", "choice2": "blue dog", "question": "effect", "label": 1}
    example, = tasks.encode_choices([row], tokenizer, 30, [0, 1])
    assert example["labels"] == 1
    assert [ids.tolist() for ids in example["input_ids"]] == [
        tokenizer("a cat What was the effect?", choice)["input_ids"] for choice in ("red", "blue dog")]


def windowed(assets: Path, rows: list[dict], length: int) -> list[dict]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "model")
    return tasks.encode_spans(rows, tokenizer, length, [])


def question_row(context: str, answer: str, start: int | None = None, question: str = "red ?") -> dict:
    start = context.index(answer) if start is None else start
    return {"id": "q", "context": context, "question": question,
            "answers": {"text": [answer], "answer_start": [start]}}


@pytest.mark.parametrize("length", [16, 20, 38])
def test_windows_cover_the_context_and_every_answer_comes_back(length, assets):
    generator = torch.Generator().manual_seed(1)
    words = [*itertools.chain(*WORDS.values()), "\U0001f600", "ทำ", "हिन्दी"]  # beyond 16 bits; combining
    for count in (1, 3, 40, 90):
        tokens = [words[i] for i in torch.randint(len(words), (count,), generator=generator).tolist()]
        context = "  ".join(tokens)
        first = torch.randint(count, (), generator=generator).item()
        answer = "  ".join(tokens[first : first + 3])
        row = question_row(context, answer, len("  ".join(tokens[:first])) + 2 * (first > 0), " red " * 30)
        examples = windowed(assets, [row], length)
        seen, held = set(), 0
        for example in examples:
            ids, offsets = example["input_ids"], example["offsets"]
            assert len(ids) == len(offsets) == len(example["attention_mask"]) <= length
            seen |= {position for start, end in offsets.tolist() for position in range(start, end)}
            if example["start_positions"]:
                start, end = offsets[example["start_positions"], 0], offsets[example["end_positions"], 1]
                assert context[start:end] == answer
                held += 1
                logits = torch.zeros(2, len(ids))
                logits[0, example["start_positions"]] = logits[1, example["end_positions"]] = 9
                found = tasks.best_span(context, offsets, logits)
                assert found[1:] == (row["answers"]["answer_start"][0], answer)
        assert held and seen >= {i for i, character in enumerate(context) if character != " "}
        assert tasks.unreachable([row], examples) == (0, 0)
        assert (len(examples) > 1) == (count > length - 4 - length // 4)


@pytest.mark.parametrize("row, expected", [
    (question_row("red cat dog", "at"), (0, 1)),  # inside a token
    (question_row("red cat dog", "cat", 5), (1, 0)),  # not at its answer_start
    (question_row("red cat dog", "cat", 999), (1, 0)),
    (question_row("red cat dog", "cat", -7), (1, 0)),
    (question_row(" ".join(["red"] * 80), " ".join(["red"] * 60)), (1, 0)),  # longer than any window
    (question_row("", "", 0), (1, 0)),
    (question_row("red cat dog", "cat", question=""), (0, 0)),
])
def test_answers_that_no_span_of_tokens_gives_are_counted(row, expected, assets):
    assert tasks.unreachable([row], windowed(assets, [row], 38)) == expected


def test_the_likeliest_window_answers_and_the_best_gold_answer_counts(assets):
    rows = [question_row(" ".join(["red", "blue", "cat", "dog"] * 20), "blue cat"),
            question_row("red cat", "red")]
    rows[1]["answers"] = {"text": ["red cat", "cat"], "answer_start": [0, 4]}
    examples = windowed(assets, rows, 20)
    outputs = [torch.zeros(2, len(example["input_ids"]) + 5) for example in examples]  # as padded in a batch
    chosen = next(i for i, example in enumerate(examples) if i > 0 and example["offsets"][-2, 0] > 0)
    inside = (examples[chosen]["offsets"][:, 0] >= 0).nonzero()[2:4, 0]
    outputs[chosen][0, inside[0]] = outputs[chosen][1, inside[1]] = 3
    outputs[-1][:, -7] = 1  # "cat", the last token of the context but one, is followed by </s>
    rules = {"": tasks.squad_words, "_mlqa": tasks.mlqa_words}
    scores, predictions = tasks.score_answers(rows, examples, outputs, "en", [], rules)
    start = examples[chosen]["offsets"][inside[0], 0].item()
    end = examples[chosen]["offsets"][inside[1], 1].item()
    assert predictions[0] == {"id": "q", "text": rows[0]["context"][start:end], "answer_start": start}
    assert predictions[1] == {"id": "q", "text": "cat", "answer_start": 4}
    first = tasks.word_overlap(rows[0]["context"][start:end].split(), ["blue", "cat"])
    assert scores == {f"{name}{rule}": pytest.approx(50 * (value + 1))
                      for rule in rules for name, value in zip(("f1", "em"), first)}
