"""Runs with models, language adapters and data of the hub: a stand-in serves them on the loopback interface,
answers wrongly or not at all, or is gone.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import datasets
import pytest
import transformers

import unfreeze
from adapters import add_language_adapter, save_adapter
from extras.conftest import (command, cut, outcome, randomise, results_of, script, task_rows, write_rows)


class StandInHub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as downloading takes, over `folder/OWNER/NAME/FILE`."""

    folder: Path

    def do_GET(self):
        path = unquote(self.path.split("?")[0]).strip("/").removeprefix("api/").removeprefix("models/")
        path = path.split("/")
        kind = path.pop(0) if path[0] == "datasets" else ""
        repository, rest = self.folder / kind / "/".join(path[:2]), path[2:]
        fault = (self.folder / "fault").read_text() if (self.folder / "fault").exists() else ""
        if fault == "silent":
            time.sleep(60)
        elif fault:
            self.answer(int(fault), b"")
        elif not repository.is_dir():
            self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
        elif rest and rest[0] == "revision":
            facts = {"id": "/".join(path[:2]), "sha": "0" * 40, "siblings": []}
            self.answer(200, json.dumps(facts).encode())
        elif rest and rest[0] == "tree":
            files = [{"type": "file", "path": str(file.relative_to(repository)), "size": file.stat().st_size,
                      "oid": "0" * 40} for file in sorted(repository.rglob("*.parquet"))]
            self.answer(200, json.dumps(files).encode())
        else:
            file = repository / ("/".join(rest[2:]) if kind else path[-1])  # after resolve/REVISION
            if file.is_file():
                content = file.read_bytes()
                self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
            else:
                self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        headers |= {"X-Repo-Commit": "0" * 40, "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path_factory):
    """A folder that a stand-in hub serves, and the environment in which it is the hub."""
    folder = tmp_path_factory.mktemp("hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (StandInHub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    cache = str(tmp_path_factory.mktemp("cache"))
    yield folder, os.environ | {"HF_ENDPOINT": address, "HF_HOME": cache, "HF_HUB_OFFLINE": "0"}
    server.shutdown()
    server.server_close()


def serve(folder: Path, repository: str, config: str, split: str, rows: list[dict]) -> None:
    """Two parquet files, as the hub has of larger data."""
    place = folder / "datasets" / repository / config / split
    place.mkdir(parents=True)
    for number, part in enumerate((rows[:5], rows[5:])):
        data = datasets.Dataset.from_list(part)
        if "ner_tags" in data.column_names:  # numbers that stand for names, as the hub has them
            names = datasets.ClassLabel(names=["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"])
            data = data.cast_column("ner_tags", datasets.Sequence(names))
        data.to_parquet(place / f"000{number}.parquet")


@pytest.fixture
def task_hub(assets, languages, hub):
    """The stand-in hub with a model, two language adapters, and the data of four tasks."""
    folder, environment = hub
    shutil.copytree(assets / "model", folder / "someone/tiny")
    for language in ("en", "de"):
        shutil.copytree(languages / language, folder / f"AdapterHub/tiny-{language}-wiki_pfeiffer")
    for split in ("train", "validation"):
        serve(folder, "facebook/xnli", "en", split, task_rows("xnli", "en", 24))
        serve(folder, "rajpurkar/squad", "plain_text", split, task_rows("mlqa", "en", 24))
        serve(folder, "aps/super_glue", "copa", split, task_rows("xcopa", "en", 24))
        serve(folder, "unimelb-nlp/wikiann", "en", split, task_rows("ner", "en", 24))
    hidden = [row | {"label": -1, "question": "effect"} for row in task_rows("xcopa", "en")]
    serve(folder, "aps/super_glue", "copa", "test", hidden)
    wrong = [row | {"question": "cause"} for row in task_rows("xcopa", "it")]
    serve(folder, "cambridgeltl/xcopa", "it", "test", wrong)
    for language in ("en", "de"):
        serve(folder, "facebook/xnli", language, "test", task_rows("xnli", language))
        serve(folder, "unimelb-nlp/wikiann", language, "test", task_rows("ner", language))
        serve(folder, "facebook/mlqa", f"mlqa.{language}.{language}", "test", task_rows("mlqa", language))
    return folder, environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}


def hub_command(task: str, language: str, out: Path, *options) -> list[str]:
    settings = "--steps 4 --batch-size 8 --lr 0.01 --k 1 --max-length 20 --device cpu".split()
    return [task, "--model", "someone/tiny", "--languages", language, "--out", str(out), *settings, *options]


def test_auto_takes_the_hubs_adapters_for_a_hub_model(assets, languages, hub, tmp_path, refused):
    folder, environment = hub
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    shutil.copytree(assets / "model", folder / "someone/tiny")
    shutil.copytree(assets / "model", folder / "someone/other")
    for language in ("en", "de"):
        shutil.copytree(languages / language, folder / f"AdapterHub/tiny-{language}-wiki_pfeiffer")
    tiny, other = (command(assets, tmp_path / name, "--model", f"someone/{name}", "--overwrite")
                   for name in ("tiny", "other"))
    first = script(tiny, env=environment)
    assert first.returncode == 0, first.stderr
    assert "language adapters: en de; none for zh-CN, tested with the English one" in first.stdout
    assert results_of(tmp_path / "tiny")["language_adapters"] == {"en": "en", "de": "de", "zh-CN": "en"}
    none = script(other, env=environment)
    assert none.returncode == 0 and "no language adapters for someone/other" in none.stdout
    before = outcome(tmp_path / "tiny")
    again = script(tiny, env=offline)  # en and de are cached now; the hub has no zh-CN
    assert again.returncode == 0 and "none for zh-CN" in again.stdout, again.stderr
    assert outcome(tmp_path / "tiny") == before
    cache = environment["HF_HOME"] + "/hub/models--AdapterHub--tiny-{}-wiki_pfeiffer"
    for language, file in (("de", "snapshots/*/pytorch_adapter.bin"), ("en", "snapshots/*/*")):
        for path in Path(cache.format(language)).glob(file):
            path.unlink()
        missing = f"tiny-{language}-wiki_pfeiffer is not in the local cache"
        refused(tiny, missing, environment=offline)  # half an adapter, and none in English
    shutil.rmtree(cache.format("en"))
    shutil.rmtree(cache.format("de"))
    cut("pytorch_adapter.bin")(folder / "AdapterHub/tiny-de-wiki_pfeiffer")
    refused(tiny, "error: --language-adapters auto: ", "holds no readable weights", environment=environment)


def test_a_folder_fills_in_the_languages_that_the_hub_lacks(
        assets, languages, hub, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, environment = hub
    shutil.copytree(assets / "model", folder / "someone/tiny")
    shutil.copytree(languages / "en", folder / "AdapterHub/tiny-en-wiki_pfeiffer")
    model = transformers.XLMRobertaModel.from_pretrained(assets / "model")
    for seed, (language, name) in enumerate((("en", "en"), ("de", "de"), ("zh-CN", "other")), 7):
        randomise(add_language_adapter(model, language), seed)
        save_adapter(model, language, tmp_path / "own" / name)

    def mixed(out: str) -> list[str]:
        options = ["--model", "someone/tiny", "--language-adapters", "auto,own"]
        return command(assets, tmp_path / out, *options)

    first = script(mixed("first"), env=environment)  # the hub's English, the folder's German, no Chinese
    assert first.returncode == 0, first.stderr
    assert "language adapters: en de (own/de); none for zh-CN, tested with the English one" in first.stdout
    results = results_of(tmp_path / "first")
    assert results["language_adapters"] == {"en": "en", "de": "de", "zh-CN": "en"}
    assert results["language_adapter_sources"] == {
        "en": "AdapterHub/tiny-en-wiki_pfeiffer", "de": "own/de"}
    shutil.copytree(languages / "en", tmp_path / "same/en")  # the same adapters as one folder: the same bits
    shutil.copytree(tmp_path / "own/de", tmp_path / "same/de")
    assert unfreeze.main(command(assets, tmp_path / "one", "--language-adapters", tmp_path / "same")) == 0
    ends = [outcome(tmp_path / name) for name in ("first", "one")]
    weights = ("adapter/pytorch_adapter.bin", "head/pytorch_model_head.bin")
    assert all(ends[0][name] == ends[1][name] for name in (*weights, "log.jsonl", "predictions/de.jsonl"))
    offline = script(mixed("offline"), env=environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0 and outcome(tmp_path / "offline") == ends[0], offline.stderr
    shutil.copytree(languages / "de", folder / "AdapterHub/tiny-de-wiki_pfeiffer")  # the hub's comes first
    again = script(mixed("both"), env=environment)
    assert again.returncode == 0 and "language adapters: en de; none for zh-CN" in again.stdout, again.stderr
    shutil.rmtree(folder / "AdapterHub/tiny-en-wiki_pfeiffer")
    shutil.rmtree(tmp_path / "own/en")
    shutil.rmtree(environment["HF_HOME"])
    refused(mixed("none"), "no adapter folder own/en", environment=environment)  # English must be somewhere
    local = unfreeze.parse(command(assets, tmp_path / "local", "--language-adapters", f"auto,{languages}"))
    _, config = unfreeze.load_tokenizer(local)
    model, _ = unfreeze.build_model(local, config, [0, 1])
    # there are no adapters of the hub's for a local model
    assert unfreeze.load_language_adapters(local, model, ["en", "de", "zh-CN"]) == (
        {"en": "en", "de": "de", "zh-CN": "en"}, {name: str(languages / name) for name in ("en", "de")})


def test_tasks_run_from_the_hub_and_again_offline(task_hub, tmp_path, refused):
    folder, environment = task_hub
    for task, language in (("xnli", "de"), ("mlqa", "de"), ("xcopa", "it"), ("ner", "de")):
        run = script(hub_command(task, language, tmp_path / task), env=environment)
        assert run.returncode == 0, run.stderr
        results = results_of(tmp_path / task)
        assert list(results["scores"]) == ["en", language] and results["train_examples"] == 24
        assert results["language_adapters"] == {"en": "en", language: "en" if language == "it" else language}
        lines = {name: (tmp_path / task / f"predictions/{name}.jsonl").read_text()
                 for name in ("en", language)}
        assert len(lines["en"].splitlines()) == (24 if task == "xcopa" else 12)  # COPA's validation
        assert len(lines[language].splitlines()) == 12
        # from a folder with the same rows, above the same adapters: the same scores
        data = tmp_path / f"data-{task}"
        data.mkdir()
        for name, count in (("train.en", 24), ("validation.en", 24), (f"test.{language}", 12),
                            ("test.en", 24 if task == "xcopa" else 12)):
            write_rows(data / f"{name}.jsonl", [
                row | ({"question": "effect"} if task == "xcopa" and language in name else {})
                for row in task_rows(task, name.split(".")[1], count)])
        local = hub_command(task, language, tmp_path / f"local-{task}", "--data", str(data))
        run = script(local, env=environment)
        assert run.returncode == 0, run.stderr
        assert results_of(tmp_path / f"local-{task}")["scores"] == results["scores"]
    shutil.rmtree(folder)
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    run = script(hub_command("xnli", "de", tmp_path / "offline"), env=offline)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "offline/adapter/pytorch_adapter.bin").read_bytes() == \
        (tmp_path / "xnli/adapter/pytorch_adapter.bin").read_bytes()
    for parquet in Path(environment["HF_HOME"], "hub/datasets--facebook--xnli").rglob("*.parquet"):
        parquet.resolve().write_bytes(b"PAR1 but no more")
    refused(hub_command("xnli", "de", tmp_path / "damaged"), "holds no readable data", environment=offline)


@pytest.mark.parametrize("fault", [401, 404, 500, "silent", "gone"])
def test_a_hub_that_does_not_answer_as_it_should_is_one_line(fault, assets, task_hub, tmp_path, refused):
    folder, environment = task_hub
    if fault == "gone":
        environment |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    else:
        (folder / "fault").write_text(str(fault))
    refused(hub_command("xnli", "de", tmp_path / "run", "--model", str(assets / "model")),
            "data facebook/xnli/en/train is not in the local cache and the hub does not give it",
            environment=environment)


def test_hub_data_without_a_column_or_a_language_is_one_line(task_hub, tmp_path, refused):
    folder, environment = task_hub

    def check(task: str, languages: str, message: str) -> None:
        refused(hub_command(task, languages, tmp_path / "run"), message, environment=environment)

    check("xnli", "de,xx", "xnli has no language 'xx' on the hub, only en, ar, de")
    check("classify", "de", "no data of its own on the hub")
    shutil.rmtree(folder / "datasets/facebook/mlqa/mlqa.de.de")
    check("mlqa", "de", "the hub has no parquet files for facebook/mlqa/mlqa.de.de/test")
    shutil.rmtree(folder / "datasets/facebook/xnli/de")
    serve(folder, "facebook/xnli", "de", "test", [{"premise": "a", "label": 0}] * 9)
    check("xnli", "de", "facebook/xnli/de/test/0000.parquet, row 0: no column 'hypothesis'")


@pytest.mark.parametrize("fault", [500, "silent", "gone", "nowhere"])
def test_without_a_hub_one_line_says_what_works(fault, assets, task_hub, tmp_path, refused):
    folder, environment = task_hub
    if fault in ("gone", "nowhere"):
        environment |= {"HF_ENDPOINT": "http://127.0.0.1:9" if fault == "gone" else "http://no.host.invalid"}
    else:
        (folder / "fault").write_text(str(fault))
    for task, options in (("xnli", []), ("classify", ["--data", str(assets / "data")])):
        arguments = [task, "--model", "someone/tiny", *options, "--out", str(tmp_path / "run")]
        started = time.monotonic()
        refused(arguments, "--model demo/model --data demo/data", environment=environment)
        assert time.monotonic() - started < 20  # the issue is minutes of retries
