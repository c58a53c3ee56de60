"""What the tests share: tiny models, data and runs of them, and the check of what must end in one line."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import linear

import adapters
import tasks
import unfreeze
from adapters import add_language_adapter, add_task_adapters, save_adapter, set_language
from extras import packing

transformers.utils.logging.disable_progress_bar()


HERE = Path(__file__).parents[1]
LAYERS, HIDDEN = 4, 16


# ---- models, adapters and their files ----------------------------------------------------------------------


def tiny_model(kind: str = "XLMRoberta", head: str = "SequenceClassification", **settings) -> nn.Module:
    torch.manual_seed(1)
    defaults = {
        "vocab_size": 60, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 40, "type_vocab_size": 1, "pad_token_id": 1,
        "num_labels": 2 if head == "QuestionAnswering" else 3, "initializer_range": 0.3}
    config = getattr(transformers, kind + "Config")(**defaults | settings)
    return getattr(transformers, kind + "For" + head)(config)


def batch(rows: int = 5, tokens: int = 7, choices: int | None = None) -> dict:
    torch.manual_seed(2)
    shape = (rows, tokens) if choices is None else (rows, choices, tokens)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., tokens - 3 :] = 0
    ids = torch.randint(5, 60, shape).masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, choices or 3, (rows,))}


def randomise(blocks: list[nn.Module], seed: int = 3) -> list[nn.Module]:
    torch.manual_seed(seed)
    for parameter in itertools.chain(*(block.parameters() for block in blocks)):
        nn.init.normal_(parameter, std=0.3)
    return blocks


def flat(modules: list[nn.Module]) -> list[torch.Tensor]:
    """A copy of each module's weights, in one row."""
    return [nn.utils.parameters_to_vector(module.parameters()).detach().clone() for module in modules]


def with_adapter(model: nn.Module, config: dict, language: bool = False) -> nn.Module:
    """The model with an adapter "task" of any config that a file may have, and random weights."""
    adapters._install(model, "task", config, adapters._build(model, config), language)
    randomise(list(adapters._modules(model, "task").values()))
    return model


def madx_model(head: str = "SequenceClassification", **settings) -> nn.Module:
    """Two languages of unlike weights, the first below a task adapter."""
    model = tiny_model(head=head, **settings).eval()
    for seed, name in enumerate(("en", "sw")):
        randomise(add_language_adapter(model, name), seed)
    if head != "MaskedLM":
        randomise(add_task_adapters(model, reduction_factor=4), 2)
    set_language(model, "en")
    return model


def through(net: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """A bottleneck without its residual, written out: net holds a projection, ReLU, and another projection."""
    return linear(linear(value, net[0].weight, net[0].bias).clamp(min=0), net[2].weight, net[2].bias)


def rewrite(folder: Path, config: dict | str | None = None, keys=lambda key: key, **facts) -> None:
    """Change an adapter's config (...: dropped), its other facts (None: dropped) and its weights' names."""
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text()) | facts
    if isinstance(config, dict) and isinstance(content["config"], dict):
        config = {key: value for key, value in (content["config"] | config).items() if value is not ...}
    content["config"] = config or content["config"]
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    torch.save({keys(key): value for key, value in weights.items()}, folder / "pytorch_adapter.bin")


def cut(name: str):
    """A change to a folder: half of this file is missing."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def inflate(name: str):
    """A change to a folder: this file is a small zip of the same kind that unpacks to 100 MB."""
    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**8))

    return change


class Bomb:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("the_bomb_went_off",)


def run_alone(code: str, folder: Path, python: str = sys.executable, **environment) -> str:
    run = subprocess.run([python, "-c", code], cwd=folder, text=True, capture_output=True,
                         env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


ADAPTERHUB = os.environ.get("ADAPTERHUB_PYTHON")  # of an environment with adapters==1.3.0, transformers 4.57
needs_adapterhub = pytest.mark.skipif(not ADAPTERHUB, reason=(
    "ADAPTERHUB_PYTHON does not name the Python of an environment with adapters==1.3.0"))


# ---- data, and what a run needs ----------------------------------------------------------------------------

WORDS = {"en": ["red", "blue", "cat", "dog"], "de": ["rot", "blau", "katze", "hund"],
         "zh-CN": ["红", "蓝", "猫", "狗"]}


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.getbasetemp() / "assets"  # one for test_core.py and the tests beside this file
    return folder if folder.exists() else make_assets(folder)


def make_assets(folder: Path) -> Path:
    """A tiny model with a word-level tokenizer, a colour-or-animal task in three languages, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "nice", *itertools.chain(*WORDS.values())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder / "model")
    tiny_model(hidden_size=64, hidden_dropout_prob=0.0).base_model.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name in ("train.en", "validation.en", "test.en", "test.de", "test.zh-CN"):
        words = WORDS[name.split(".")[1]]
        rows = [{"text": f"{'a nice ' * (i % 3)}{words[i % 4]}", "label": "colour" if i % 4 < 2 else "animal"}
                for i in range(42 if name == "train.en" else 12)]
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    pairs = torch.randint(4, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text("".join(  # a word's translation follows it
        f"{WORDS['en'][i]} {WORDS['de'][i]} nice\n" for i in pairs), encoding="utf-8")
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def languages(assets, tmp_path_factory) -> Path:
    """A folder of random language adapters, en and de, for the model of `assets`."""
    folder = tmp_path_factory.getbasetemp() / "languages"
    for seed, language in enumerate(("en", "de") if not folder.exists() else ()):
        model = transformers.XLMRobertaModel.from_pretrained(assets / "model")
        randomise(add_language_adapter(model, language), seed)
        save_adapter(model, language, folder / language)
    return folder


def command(assets: Path, out: Path | None, *options) -> list[str]:
    """Of a run of nine steps on the model and the data of `assets`; out None: where it goes by itself."""
    settings = "--steps 9 --batch-size 8 --lr 0.01 --k 2 --max-length 20 --device cpu".split()
    paths = ["--model", assets / "model", "--data", assets / "data", *(["--out", out] if out else [])]
    return ["classify", *map(str, paths), *settings, *map(str, options)]


def task_rows(task: str, language: str, count: int = 12) -> list[dict]:
    """Rows with the hub's columns, in the words of `assets`."""
    words = WORDS.get(language, WORDS["de"])
    if task == "xnli":
        return [{"premise": f"a nice {words[i % 4]}", "hypothesis": words[(i + i // 3) % 4], "label": i % 3}
                for i in range(count)]
    if task == "xcopa":
        return [{"premise": f"a {words[i % 4]}", "choice1": words[i % 4],
                 "choice2": f"nice {words[(i + 1) % 4]}", "question": ("cause", "effect")[i // 2 % 2],
                 "label": i % 2, "idx": i} for i in range(count)]
    if task in ("tag", "ner"):  # a colour is a name of two kinds, and of two words in a row or three
        tags = ["B-PER", "B-LOC", "O", "O"] if task == "tag" else [1, 5, 0, 0]
        inside = {"B-PER": "I-PER", "B-LOC": "I-LOC", "O": "O", 1: 2, 5: 6, 0: 0}
        return [{"tokens": ["a", "nice", *[words[i % 4]] * (1 + i % 3), ""],
                 ("tags" if task == "tag" else "ner_tags"): [
                     tags[2], tags[2], tags[i % 4], *[inside[tags[i % 4]]] * (i % 3), tags[2]]}
                for i in range(count)]
    rows = []
    for i in range(count):
        context = " ".join(["a", "nice", "a nice a"[: 1 + i % 8].strip(), words[i % 4], "nice"] * (1 + i % 3))
        start = context.index(words[i % 4])
        rows.append({"id": f"{language}-{i}", "title": "t", "context": context,
                     "question": f"{words[i % 4]} ?",
                     "answers": {"text": [words[i % 4]], "answer_start": [start]}})
    return rows


def write_task(folder: Path, task: str) -> Path:
    folder.mkdir()
    for name in ("train.en", "validation.en", "test.en", "test.de"):
        rows = task_rows(task, name.split(".")[1], 24 if name == "train.en" else 12)
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def task_command(task: str, assets: Path, data: Path, out: Path | None, *options) -> list[str]:
    paths = ["--model", assets / "model", "--data", data, *(["--out", out] if out else [])]
    settings = "--languages de --steps 6 --batch-size 8 --lr 0.01 --k 1 --max-length 20 --device cpu".split()
    return [task, *map(str, paths), *settings, *map(str, options)]


def mlm(assets: Path, out: Path, *options) -> list[str]:
    settings = "--language de --steps 12 --batch-size 8 --lr 0.01 --max-length 20 --save-every 3 --device cpu"
    paths = ["--model", assets / "model", "--data", assets / "text.txt", "--out", out]
    return ["mlm", *map(str, paths), *settings.split(), *map(str, options)]


def collator(model: nn.Module, tokenizer, device: str = "cpu", task: str = "classify"):
    return partial(packing.batch_on, torch.device(device), model,
                   partial(tasks.TASKS[task].batch, tokenizer=tokenizer))


def no_autocast():
    return torch.autocast("cpu", enabled=False)


def script(arguments: list[str], **how) -> subprocess.CompletedProcess:
    """unfreeze.py in a process of its own."""
    return subprocess.run([sys.executable, HERE / "unfreeze.py", *arguments], text=True, capture_output=True,
                          timeout=300, **how)


def start(arguments: list[str]) -> subprocess.Popen:
    """The same, not waited for."""
    return subprocess.Popen([sys.executable, HERE / "unfreeze.py", *arguments], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def cut_off(patch, calls: list[int]) -> list:
    """Interrupt the optimizer after these calls of its step; returns a list that grows with each call."""
    step, done = torch.optim.AdamW.step, []

    def failing(optimizer):
        done.append(step(optimizer))
        if len(done) in calls:
            raise KeyboardInterrupt(130)

    patch.setattr(torch.optim.AdamW, "step", failing)
    return done


@pytest.fixture(scope="session")
def stopped(assets, tmp_path_factory) -> Path:
    """The assets, and in `run` a run that stopped after six of nine steps."""
    folder = tmp_path_factory.mktemp("stopped") / "all"
    shutil.copytree(assets, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cut_off(patch, [7])
        assert unfreeze.main(command(Path("."), Path("run"), "--save-every", 3)) == 130
    return folder


# ---- what a run leaves, and what must end in one line ------------------------------------------------------


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def events_of(out: Path, kind: str) -> list[dict]:
    """The lines of a run's log that are of this kind: train, open, fisher or eval."""
    events = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == kind]


def validations_of(out: Path) -> dict[int, float]:
    """Accuracy in validation by step."""
    return {event["step"]: event["accuracy"] for event in events_of(out, "eval")
            if event["split"] == "validation"}


def contents(folder: Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome(out: Path) -> dict:
    """All that a run leaves, timings and paths aside."""
    results = results_of(out)
    del results["wall_seconds"], results["settings"]["out"], results["settings"]["overwrite"]
    files = {str(path): content for path, content in contents(out).items()}
    assert sorted(files) == [
        "adapter/adapter_config.json", "adapter/pytorch_adapter.bin", "head/head_config.json",
        "head/pytorch_model_head.bin", "log.jsonl",
        *(f"predictions/{language}.jsonl" for language in sorted(results["scores"])), "results.json"]
    return files | {"results.json": results}


def one_error(status: int, stderr: str, *messages: str) -> None:
    """Exit status 2, and the last line on stderr is the only one of an error; it holds the messages."""
    lines = stderr.strip().splitlines()
    assert status == 2 and lines, f"status {status}: {stderr}"
    assert lines[-1].startswith("error: ") and all(message in lines[-1] for message in messages), stderr
    assert stderr.count("error: ") == 1 and "Traceback" not in stderr, stderr


@pytest.fixture
def refused(tmp_path, capsys):
    """A check of a command that must not run: one error that holds the messages is all that stands on stderr,
    and no file or folder of tmp_path is another. With an environment, the command has a process of its own,
    in which the hub's client may say something before.
    """
    def check(arguments: list[str], *messages: str, environment: dict | None = None) -> None:
        before = contents(tmp_path), sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        if environment is None:
            status, stderr = unfreeze.main(arguments), capsys.readouterr().err
            assert len(stderr.splitlines()) == 1, stderr
        else:
            run = script(arguments, env=environment)
            status, stderr = run.returncode, run.stderr
        one_error(status, stderr, *messages)
        assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before

    return check
