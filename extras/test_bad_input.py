"""Bad input of all sorts, a line of a table each: one line on stderr with the remedy, exit status 2, and not
a file changed. Options, data, models, checkpoints; rows and tables; language adapters and text.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from extras.conftest import (Bomb, command, cut, inflate, mlm, rewrite, task_command, tiny_model, write_task)


# ---- options, data, models, checkpoints --------------------------------------------------------------------


def write(name: str, content: str | bytes | None):
    """A change to a folder: this content in place of what there is, or no file."""
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def change_json(name: str, **facts):
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | facts))

    return change


def change_checkpoint(edit):
    def change(folder: Path) -> None:
        saved = torch.load(folder / "run/checkpoint.pt", weights_only=True)
        torch.save(edit(saved), folder / "run/checkpoint.pt")

    return change


def rename_weights(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    save_file({"other." + key: value for key, value in load_file(path).items()}, path, {"format": "pt"})


def with_code(folder: Path) -> None:
    (folder / "model/code.py").write_text("open('the_bomb_went_off', 'w')\nclass Model: pass\nConfig = Model")
    change_json("model/config.json", model_type="new", auto_map={
        "AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"})(folder)


def split_weights(folder: Path) -> None:
    """The weights in a second file, outside of the model's folder."""
    keys = load_file(folder / "model/model.safetensors")
    (folder / "model/model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(keys, "../model-1.safetensors")}))
    (folder / "model/model-0.safetensors").write_bytes(b"")


ROW = '{"text": "red", "label": "colour"}\n'
TRAIN, CONFIG, TOKENIZER = "data/train.en.jsonl", "model/config.json", "model/tokenizer.json"


BAD_INPUTS = {
    # the command line
    "unknown task": ("xnly", None, "invalid choice: 'xnly'"),
    "no task": ("", None, "task"),
    "unknown method": ("--method top", None, "invalid choice: 'top'"),
    "no method": (["--method", ""], None, "--method is empty"),
    "no seed": (["--seed", ""], None, "--seed is empty"),
    "order of letters": ("--method order --order a,b", None, "--order must be the numbers of all blocks"),
    "order with an end": ("--method order --order 3,2,1,0,", None, "--order must be the numbers of all"),
    "another log": ("--out other", write("other/log.jsonl", "my notes\n"), "files that are not a run's"),
    "checkpoint without log": ("", lambda folder: (folder / "run/log.jsonl").unlink(),
                               "files that are not a run's"),
    "unknown adapter": ("--adapter prefix", None, "invalid choice: 'prefix'"),
    "unknown decay": ("--decay cosine", None, "invalid choice: 'cosine'"),
    "unknown device": ("--device tpu", None, "invalid choice: 'tpu'"),
    "unknown labels": ("--fisher-labels true", None, "invalid choice: 'true'"),
    "unknown option": ("--learning-rate 1", None, "unrecognized arguments: --learning-rate"),
    "shortened option": ("--meth gu", None, "unrecognized arguments: --meth"),
    "option without value": ("--seed", None, "expected one argument"),
    "unknown language": ("--languages de,xx", None, "classify has no language 'xx' in"),
    "language outside": ("--languages ../de", None, "classify has no language '../de' in"),
    "k 0": ("--k 0", None, "--k must be at least 1, not 0"),
    "k a fraction": ("--k 1.5", None, "invalid int value: '1.5'"),
    "a batch of all": ("--batch-size 9999999999", None, "--batch-size must be below 4294967296"),
    "no epochs": ("--epochs 0", None, "--epochs must be at least 1"),
    "steps -1": ("--steps -1", None, "--steps must be at least 0"),
    "batch size 0": ("--batch-size 0", None, "--batch-size must be at least 1"),
    "short": ("--max-length 15", None, "--max-length must be at least 16"),
    "long": ("--max-length 39", None, "more than the model's 38 positions"),
    "no training": ("--train-examples 0", None, "--train-examples must be at least 1"),
    "no test": ("--test-examples 0", None, "--test-examples must be at least 1"),
    "no Fisher batches": ("--fisher-batches 0", None, "--fisher-batches must be at least 1"),
    "Fisher every -1": ("--fisher-every -1", None, "--fisher-every must be at least 0"),
    "save every 0": ("--save-every 0", None, "--save-every must be at least 1"),
    "seed -1": ("--seed -1", None, "--seed must be at least 0"),
    "large seed": (f"--seed {2**32}", None, f"--seed must be below {2**32}"),
    "lr 0": ("--lr 0", None, "--lr must be a positive number"),
    "lr nan": ("--lr nan", None, "--lr must be a positive number, not nan"),
    "lr inf": ("--lr inf", None, "--lr must be a positive number, not inf"),
    "lr text": ("--lr fast", None, "invalid float value: 'fast'"),
    "epochs and steps": ("--epochs 1", None, "--epochs and --steps exclude each other"),
    "tf32 on a CPU": ("--precision tf32", None, "--precision tf32 is for CUDA: use fp32 or bf16"),
    "order missing": ("--method order", None, "--order"),
    "order without method": ("--order 3,2,1,0", None, "--order"),
    "order incomplete": ("--method order --order 3,2", None, "each of the blocks 0..3 once"),
    "order twice": ("--method order --order 3,2,1,1", None, "each of the blocks 0..3 once"),
    "the bottom one first": ("--first bottom", None, "invalid choice: 'bottom'"),
    "validation every -1": ("--eval-every -1", None, "--eval-every must be at least 0"),
    "another validation": ("--eval-every 5", None, "is of a run with --eval-every 0, not 5"),
    "order of words": ("--method order --order top", None, "--order must be the numbers of all blocks"),
    "language of a task": ("--language th", None, "--language is for mlm"),
    "language adapters": ("--language-adapters /no/such", None, "no adapter folder /no/such/en"),
    "out is a file": ("--out /dev/null", None, "/dev/null"),
    "out is not a run": ("--out data", None, "holds files that are not a run's"),
    # data
    "no folder": ("--data /no/such/folder", None, "no data folder /no/such/folder"),
    "data a file": ("--data " + TRAIN, None, "no data folder"),
    "missing file": ("", write("data/validation.en.jsonl", None), "missing data file"),
    "missing English test": ("", write("data/test.en.jsonl", None), "classify has no language 'en'"),
    "no language": (["--languages", ""], None, "classify has no language ''"),
    "a language called train": ("", write("data/test.train.jsonl", ROW), "cannot be called 'train'"),
    "a language in two columns": ("", write("data/test.d|e.jsonl", ROW), "cannot be called 'd|e'"),
    "not UTF-8": (["--language-adapters", "o\udcff"], None, "--language-adapters 'o\\udcff' is not UTF-8"),
    "empty file": ("", write("data/test.de.jsonl", ""), "test.de.jsonl is empty"),
    "no column": ("", write(TRAIN, ROW + '{"text": "a"}'), "train.en.jsonl:2: no column 'label'"),
    "null": ("", write(TRAIN, ROW + '{"text": null, "label": 1}'), "train.en.jsonl:2: no column 'text'"),
    "not JSON": ("", write(TRAIN, ROW + "red\n"), "train.en.jsonl:2: not a JSON object"),
    "after a blank line": ("", write(TRAIN, ROW + "\n" + "red"), "train.en.jsonl:3: not a JSON object"),
    "a number": ("", write(TRAIN, "5\n" + ROW), "train.en.jsonl:1: not a JSON object"),
    "a list": ("", write(TRAIN, ROW + '["red", "colour"]'), "train.en.jsonl:2: not a JSON object"),
    "a million brackets": ("", write(TRAIN, ROW + "[" * 10**6), "train.en.jsonl:2: not a JSON object"),
    "Latin-1": ("", write(TRAIN, ROW.replace("red", "grün").encode("latin-1")), "jsonl:1: not a JSON object"),
    "half a surrogate pair": ("", write("data/test.de.jsonl", ROW.replace("red", r"\ud800")), "in UTF-8"),
    "text a number": ("", write(TRAIN, '{"text": 1, "label": 1}'), "'text' must be a string"),
    "label a float": ("", write(TRAIN, '{"text": "a", "label": 1.5}'), "a string or an integer"),
    "label a switch": ("", write(TRAIN, '{"text": "a", "label": true}'), "a string or an integer"),
    "unseen label": ("", write("data/test.de.jsonl", ROW + ROW.replace("colour", "new")), ":2: label 'new'"),
    # the model
    "no model": ("--model /no/such/model", None, "cannot load model '/no/such/model'"),
    "no weights": ("", write("model/model.safetensors", None), "has no weights"),
    "a pickle": ("", lambda folder: torch.save(
        load_file(folder / "model/model.safetensors"), folder / "model/pytorch_model.bin")
        or write("model/model.safetensors", None)(folder), "put model.safetensors beside"),
    "cut weights": ("", lambda folder: os.truncate(folder / "model/model.safetensors", 999), "cannot load"),
    "another model's weights": ("", rename_weights, "its weights lack roberta."),
    "wrong sizes": ("", change_json(CONFIG, hidden_size=32), "cannot load model"),
    "weights elsewhere": ("", split_weights, "names files outside of the folder"),
    "no config": ("", write(CONFIG, None), "cannot load model"),
    "config not JSON": ("", write(CONFIG, "{"), "cannot load model"),
    "another kind of model": ("", change_json(CONFIG, model_type="gpt2"), "cannot load model"),
    "its own code": ("", with_code, "cannot load model"),
    "no tokenizer": ("", write(TOKENIZER, None), "cannot load model"),
    "broken tokenizer": ("", write(TOKENIZER, "{}"), "cannot load model"),
    "small vocabulary": ("", lambda folder: tiny_model(vocab_size=9).base_model.save_pretrained(
        folder / "model"), "more tokens than the model"),
    # a stopped run
    "another learning rate": ("--lr 0.02", None, "is of a run with --lr 0.01, not 0.02"),
    "another seed": ("--seed 7", None, "is of a run with --seed 0, not 7"),
    "other languages": ("--languages de", None, "is of a run with --languages None, not de"),
    "other data": ("", write(TRAIN, 41 * ROW + ROW.replace("colour", "animal")), "with data of fingerprint"),
    "cut checkpoint": ("", lambda folder: cut("checkpoint.pt")(folder / "run"), "damaged: pass --overwrite"),
    "empty checkpoint": ("", write("run/checkpoint.pt", ""), "damaged: pass --overwrite"),
    "no checkpoint at all": ("", write("run/checkpoint.pt", "torch"), "damaged: pass --overwrite"),
    "code in a checkpoint": ("", change_checkpoint(lambda saved: saved | {"state": Bomb()}), "damaged"),
    "a list in it": ("", change_checkpoint(lambda saved: [saved]), "damaged: pass --overwrite"),
    "no weights in it": ("", change_checkpoint(lambda saved: saved | {"learned": {}}), "damaged"),
    "wrong shapes in it": ("", change_checkpoint(lambda saved: saved | {"learned": {
        key: value[:1] for key, value in saved["learned"].items()}}), "damaged"),
    "wrong moments": ("", change_checkpoint(lambda saved: saved["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(3)) or saved), "damaged"),
    "a step too far": ("", change_checkpoint(lambda saved: saved | {"state": saved["state"] | {"step": 99}}),
                       "damaged"),
    "another schedule": ("", change_checkpoint(lambda saved: saved | {
        "unfreezer": saved["unfreezer"] | {"method": "rev"}}), "damaged"),
    "a bomb": ("", inflate("run/checkpoint.pt"), "damaged: pass --overwrite"),
    "no log": ("", write("run/log.jsonl", ""), "log.jsonl is damaged"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gives_one_line_and_changes_no_file(name, stopped, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options, change, message = BAD_INPUTS[name]
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    monkeypatch.chdir(folder)
    if change:
        change(folder)
    options = options.split() if isinstance(options, str) else options
    arguments = command(Path("."), Path("run"), "--save-every", 3, *options)
    refused(options if name in ("unknown task", "no task") else arguments, message)


# ---- data --------------------------------------------------------------------------------------------------


def as_table(content: str | bytes, ending: str = "csv"):
    def change(data: Path) -> None:
        (data / "train.en.jsonl").unlink()
        write(f"train.en.{ending}", content)(data)

    return change


def with_pair(name: str, number: int):
    def change(data: Path) -> None:
        lines = (data / name).read_text().splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | {"text_pair": "nice"})
        (data / name).write_text("\n".join(lines))

    return change


def only(*names: str):
    def change(data: Path) -> None:
        for path in data.iterdir():
            path.unlink()
        for name in names:
            (data / name).write_text("x")

    return change


BAD_DATA = {
    "an array": (write("train.en.jsonl", '\n[{"text": "red"}]'), "train.en.jsonl is a JSON array"),
    "UTF-16": (write("train.en.jsonl", ROW_16 := '{"text": "red"}'.encode("utf-16")), "in UTF-16"),
    "UTF-16 without a mark": (write("test.de.jsonl", ROW_16[2:]), "in UTF-16"),
    "UTF-16 table": (as_table("text,label\nred,colour\n".encode("utf-16")), "in UTF-16"),
    "Latin-1 table": (as_table("text,label\ngrün,colour\n".encode("latin-1")), "is not text in UTF-8"),
    "no header": (as_table("red,colour\ncat,animal\n"), "train.en.csv:2: no column 'text'"),
    "header alone": (as_table("text,label\n"), "train.en.csv is empty"),
    "short row": (as_table("text,label\nred,colour\nblue\n"), "train.en.csv:3: 1 fields, and 2 names"),
    "long row": (as_table("text,label\nred, blue,colour\n"), "train.en.csv:2: 3 fields, and 2 names"),
    "one name twice": (as_table("text,text\nred,colour\n"), "2 fields, and 1 names"),
    "empty cell": (as_table("text,label\nred,colour\nblue,\n"), "train.en.csv:3: no column 'label'"),
    "rows in one field": (as_table('text\tlabel\n"a\tx\nb"\ty\n', "tsv"), "tsv:3: a quotation mark opens"),
    "open quote": (as_table('text,label\n"red,colour\ncat,animal\n'), "csv:3: unexpected end of data"),
    "semicolons": (as_table("text;label\nred;colour\n"), "train.en.csv:2: no column 'text'"),
    "two formats": (write("test.de.csv", "text,label\n"), "test.de.jsonl and test.de.csv: only one"),
    "a folder of something else": (only("notes.txt"), "has notes.txt and no test data: --data needs"),
    "an empty folder": (only(), "has no files and no test data"),
    "a pair in one row": (with_pair("train.en.jsonl", 4), "train.en.jsonl:1: no column 'text_pair'"),
    "a pair in one test row": (with_pair("test.de.jsonl", 4), "test.de.jsonl:5: a column 'text_pair'"),
    "one label": (write("train.en.jsonl", 3 * ROW), "rows have one label, 'colour'"),
    "strings for integers": (write("train.en.jsonl", "".join(ROW.replace('"colour"', n) for n in "12")),
                             "label 'colour' is not one of 1, 2"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_read_is_one_line_that_says_what_it_is(name, assets, tmp_path, refused):
    change, message = BAD_DATA[name]
    shutil.copytree(assets / "data", tmp_path / "data")
    change(tmp_path / "data")
    refused(command(assets, tmp_path / "run", "--data", tmp_path / "data"), message)


BAD_ROWS = {
    "no answers": ("xquad", {"answers": None}, "no column 'answers'"),
    "answers a list": ("xquad", {"answers": ["red"]}, "answers must be"),
    "answers of two lengths": ("mlqa", {"answers": {"text": ["a"], "answer_start": []}}, "answers must be"),
    "no answer": ("mlqa", {"answers": {"text": [], "answer_start": []}}, "with one answer or more"),
    "answer a number": ("xquad", {"answers": {"text": [1], "answer_start": [0]}}, "answers must be"),
    "start a string": ("xquad", {"answers": {"text": ["a"], "answer_start": ["0"]}}, "answers must be"),
    "context a number": ("xquad", {"context": 3}, "'context' must be a string"),
    "id a number": ("xquad", {"id": 3}, "'id' must be a string"),
    "no choice": ("xcopa", {"choice2": None}, "no column 'choice2'"),
    "another question": ("xcopa", {"question": "why"}, "question 'why' is not one of cause, effect"),
    "label 2": ("xcopa", {"label": 2}, "label 2 is not one of 0, 1"),
    "label -1": ("xnli", {"label": -1}, "label -1 is not one of 0, 1, 2"),
    "label true": ("xnli", {"label": True}, "'label' must be a string or an integer"),
    "a word more": ("tag", {"tokens": ["a", "b", "c"], "tags": ["O", "O"]}, "3 tokens and 2 tags: every"),
    "a tag more": ("ner", {"tokens": ["a"], "ner_tags": [0, 0]}, "1 tokens and 2 ner_tags: every word needs"),
    "no words": ("tag", {"tokens": [], "tags": []}, "'tokens' must be a list with an entry a word"),
    "a sentence": ("tag", {"tokens": "a nice cat"}, "'tokens' must be a list with an entry a word"),
    "a word a number": ("tag", {"tokens": ["a", 1], "tags": ["O", "O"]}, "'tokens' must be a string, not 1"),
    "a tag a list": ("tag", {"tokens": ["a"], "tags": [["O"]]}, "'tags' must be a string or an integer"),
    "no tag": ("ner", {"tokens": ["a"], "ner_tags": [None]}, "'ner_tags' must be a string or an integer"),
    "tag 7": ("ner", {"tokens": ["a"], "ner_tags": [7]}, "ner_tags 7 is not one of 0, 1, 2, 3, 4, …"),
    "a name for a number": ("ner", {"tokens": ["a"], "ner_tags": ["O"]}, "ner_tags 'O' is not one of 0, 1"),
}


@pytest.mark.parametrize("file", ["train.en", "test.de"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_of_any_task_is_named_in_one_line(name, file, assets, tmp_path, refused):
    task, change, message = BAD_ROWS[name]
    path = write_task(tmp_path / "data", task) / f"{file}.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    path.write_text("\n".join(lines) + "\n")
    refused(task_command(task, assets, tmp_path / "data", tmp_path / "run"), f"error: {path}:4: ", message)


@pytest.mark.parametrize("file, tag, message", [
    ("test.de", "B-ORG", "tags 'B-ORG' is not one of 'B-LOC', 'B-PER', "),
    ("train.en", "S-PER", "tags 'S-PER' is no O, B-TYPE or I-TYPE (BIO), as others are"),
    ("train.en", "NOUN", "tags 'NOUN' is no O, B-TYPE"), ("train.en", "B-", "tags 'B-' is no O"),
    ("train.en", 3, "tags 3 is no O, B-TYPE")])
def test_an_unknown_tag_and_one_outside_of_the_scheme_are_named(
        file, tag, message, assets, tmp_path, refused):
    path = write_task(tmp_path / "data", "tag") / f"{file}.jsonl"
    with path.open("a") as lines:
        lines.write(json.dumps({"tokens": ["a", "b"], "tags": ["O", tag]}) + "\n")
    number = len(path.read_text().splitlines())
    refused(task_command("tag", assets, tmp_path / "data", tmp_path / "run"), f"{path}:{number}: ", message)


# ---- languages ---------------------------------------------------------------------------------------------

BAD_LANGUAGES = {
    "no such folder": (["--language-adapters", "/no/such"], None, "no adapter folder /no/such/en"),
    "no relative folder": (["--language-adapters", "such"], None, "no adapter folder such/en"),
    "no such folder beside the hub": (["--language-adapters", "auto,/no/such"], None, "no folder '/no/such'"),
    "no name beside the hub": (["--language-adapters", "auto,"], None, "auto,: no folder ''"),
    "no English adapter": ([], lambda folder: shutil.rmtree(folder / "en"), "languages/en: name one with"),
    "cut German": ([], lambda folder: cut("pytorch_adapter.bin")(folder / "de"), "holds no readable weights"),
    "another model's": ([], lambda folder: rewrite(folder / "de", hidden_size=768), "hidden_size 768"),
    "half a folder": ([], lambda folder: (folder / "de/adapter_config.json").unlink(), "no adapter_config"),
}


@pytest.mark.parametrize("name", BAD_LANGUAGES)
def test_bad_language_adapters_give_one_line_before_training(name, assets, languages, tmp_path, refused):
    options, change, message = BAD_LANGUAGES[name]
    shutil.copytree(languages, tmp_path / "languages")
    if change:
        change(tmp_path / "languages")
    source = ["--language-adapters", tmp_path / "languages"]
    refused(command(assets, tmp_path / "run", *source, *options), message)


@pytest.mark.parametrize("options, content, message", [
    (["--data", "/no/such.txt"], None, "/no/such.txt"), ([], b"\xff\xfe", "is not text in UTF-8"),
    ([], b"red\n", "--data has too little text"),
    (["--save-every", "0"], b"", "--save-every must be"),
    (["--lr", "0"], b"", "--lr must be"), (["--language", "../th"], b"", "--language must be a code"),
    (["--language", "to"], b"red\n" * 400, "'to' cannot name an adapter"),
    (["--max-length", "39"], b"red\n" * 400, "more than the model's 38"),
    (["--language", ""], b"", "--language must be a code"), (["--method", "gu"], b"", "leave --method"),
])
def test_bad_input_of_mlm_gives_one_line_and_status_2(options, content, message, assets, tmp_path, refused):
    arguments = mlm(assets, tmp_path / "de", *options)
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
        arguments += ["--data", str(tmp_path / "text.txt")]
    refused(arguments, message)
