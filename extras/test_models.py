"""Models of every kind in a run, right or refused, and language adapters that a run trains itself."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

import tasks
import unfreeze
from adapters import add_language_adapter, save_adapter, set_language
from extras.conftest import (HIDDEN, WORDS, command, contents, flat, mlm, one_error, randomise, results_of,
                             task_command, tiny_model, write_rows, write_task)


def model_folder(folder: Path, assets: Path, kind: str, dtype: torch.dtype | None = None,
                 head: str | None = None, **settings) -> Path:
    """A model of another kind with the assets' tokenizer."""
    torch.manual_seed(4)
    shutil.copytree(assets / "model", folder)
    defaults = {"vocab_size": 60, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
                "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 1,
                "initializer_range": 0.3}
    config = transformers.AutoConfig.for_model(kind, **defaults | settings)
    model = getattr(transformers, "AutoModel" + (f"For{head}" if head else "")).from_config(config)
    model.to(dtype).save_pretrained(folder)
    return folder


def run_in(folder: Path, assets: Path, model: Path, *options) -> dict:
    assert unfreeze.main(command(assets, folder, "--model", model, *options)) == 0
    return results_of(folder)


def stored(out: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in (out / "adapter/pytorch_adapter.bin", out / "head/pytorch_model_head.bin")
            for key, value in torch.load(path, weights_only=True).items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_saved_in_half_precision_trains_as_the_same_weights_in_float32(dtype, assets, tmp_path):
    half = model_folder(tmp_path / "half", assets, "xlm-roberta", dtype)
    shutil.copytree(half, tmp_path / "whole")
    model = transformers.AutoModel.from_pretrained(half).float()
    assert json.loads((half / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    model.save_pretrained(tmp_path / "whole")
    runs = {}
    for name in ("half", "whole"):
        run_in(tmp_path / f"run-{name}", assets, tmp_path / name, "--method", "fun", "--adapter", "lora")
        runs[name] = stored(tmp_path / f"run-{name}")
    assert all(torch.equal(value, runs["whole"][key]) and value.dtype == torch.float32
               for key, value in runs["half"].items())


MODERN = {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
KINDS = {  # model types with masks of all sorts: windows, causal ones, lengths; some of them do not run here
    "xlm-roberta": {}, "bert": {}, "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": MODERN | {"local_attention": 8, "global_attn_every_n_layers": 2}, "electra": {},
    "eurobert": MODERN | {"mask_token_id": 4}, "rembert": {}, "camembert": {}, "distilbert": {}, "xlm": {},
    "canine": {}, "gpt2": {}, "gemma3_text": {}, "albert": {}, "mpnet": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_predicts_the_saved_model_predicts_alone_or_its_type_is_refused(
        kind, assets, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    random.seed(0)
    rows = [{"text": " ".join(random.choices(WORDS["en"], k=1 + i % 15)), "label": "ab"[i % 2]}
            for i in range(48)]
    for name in ("train.en", "validation.en", "test.en"):
        write_rows(data / f"{name}.jsonl", rows)
    model = model_folder(tmp_path / "model", assets, kind, **KINDS[kind])
    options = ["--data", data, "--method", "full", "--steps", 6, "--lr", 1e-3, "--languages", "en"]
    if status := unfreeze.main(command(assets, tmp_path / "run", "--model", model, *options)):
        error = capsys.readouterr().err
        one_error(status, error, "--model")
        assert error.startswith("error: ") and kind not in tuple(KINDS)[:6]
        return
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    lines = (tmp_path / "run/predictions/en.jsonl").read_text().splitlines()
    said = [json.loads(line)["label"] for line in lines]
    with torch.no_grad():
        logits = [saved(**tokenizer(row["text"], return_tensors="pt")).logits[0] for row in rows]
    assert said == [saved.config.id2label[row.argmax().item()] for row in logits]


@pytest.mark.parametrize("method", ["gu", "fun", "lpft", "full"])
def test_deberta_trains_by_every_method(method, assets, tmp_path):
    settings = KINDS["deberta-v2"] | {"norm_rel_ebd": "layer_norm", "share_att_key": True,
                                      "position_buckets": 4, "position_biased_input": False,
                                      "type_vocab_size": 0}  # version 3's
    model = model_folder(tmp_path / "model", assets, "deberta-v2", **settings)
    results = run_in(tmp_path / "run", assets, model, "--method", method)
    assert len(results["order"]) == (0 if method == "full" else 2)


@pytest.mark.parametrize("method, opened", [
    ("gu", [[0, 1], [2, 0]]), ("rev", [[0, 0], [2, 1]]), ("lpft", [[2, 0], [2, 1]]), ("fun", None),
    ("none", []), ("full", [])])
def test_modernbert_trains_by_every_method_above_its_language_adapters(
        method, opened, assets, tmp_path, capsys):
    folder = model_folder(tmp_path / "model", assets, "modernbert", **KINDS["modernbert"])
    for seed, language in enumerate(("en", "de")):
        model = transformers.AutoModel.from_pretrained(folder)
        randomise(add_language_adapter(model, language), seed)
        save_adapter(model, language, tmp_path / "languages" / language)
    below = [] if method == "full" else ["--language-adapters", tmp_path / "languages"]
    options = ["--method", method, *below]
    run_in(tmp_path / "start", assets, folder, *options, "--steps", 0)
    results = run_in(tmp_path / "run", assets, folder, *options)
    if method == "fun":
        opened = [[0, results["order"][0][1]], [2, 1 - results["order"][0][1]]]
    assert results["order"] == opened
    assert ("language adapters: en de; none for zh-CN" in capsys.readouterr().out) == (method != "full")
    if method == "full":
        before, after = (load_file(tmp_path / run / "model/model.safetensors") for run in ("start", "run"))
    else:
        before, after = stored(tmp_path / "start"), stored(tmp_path / "run")
        assert sum("model.layers." in key for key in after) == 2 * 4
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved == {key for key in after if method != "none" or "layers." not in key}


def test_modernbert_learns_a_language_and_a_task_above_it(assets, tmp_path, capsys):
    folder = model_folder(tmp_path / "model", assets, "modernbert", **KINDS["modernbert"])
    for language in ("en", "de"):
        out = tmp_path / "languages" / language
        assert unfreeze.main(mlm(assets, out, "--model", folder, "--language", language, "--steps", 40)) == 0
        results = results_of(out)
        assert results["validation"]["loss"] < 0.9 * results["untrained"]["loss"]
    run_in(tmp_path / "run", assets, folder, "--language-adapters", tmp_path / "languages")
    assert "language adapters: en de; none for zh-CN" in capsys.readouterr().out


def test_a_tokenizer_that_pads_left_and_names_no_separator_gives_the_same_runs(assets, tmp_path, refused):
    right, left = (model_folder(tmp_path / side, assets, "modernbert", **KINDS["modernbert"])
                   for side in ("right", "left"))
    path = left / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"padding_side": "left", "cls_token": None, "sep_token": None}
    path.write_text(json.dumps(content))
    tokenizer = transformers.AutoTokenizer.from_pretrained(left)
    assert tokenizer.sep_token_id is None and tokenizer.padding_side == "left"
    data = write_task(tmp_path / "data", "xquad")
    for model in (right, left):
        assert unfreeze.main(task_command("xquad", assets, data, model / "run", "--model", model)) == 0
        assert unfreeze.main(mlm(assets, model / "de", "--model", model)) == 0
    assert contents(right / "run/predictions") == contents(left / "run/predictions")
    for file in ("run/adapter/pytorch_adapter.bin", "de/pytorch_adapter.bin"):
        assert (right / file).read_bytes() == (left / file).read_bytes()
    path = left / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    refused(mlm(assets, tmp_path / "de", "--model", left), "puts 0 special tokens around a text")


@pytest.mark.parametrize("legacy", [True, False])
def test_deberta_learns_a_language_with_its_old_and_its_new_head(legacy, assets, tmp_path):
    model = tiny_model("DebertaV2", "MaskedLM", legacy=legacy).eval()
    ids = torch.randint(5, 60, (3, 9))
    inputs = {"input_ids": ids, "labels": torch.where(torch.rand(3, 9) < 0.5, ids, -100)}
    torch.testing.assert_close(tasks.masked_loss(model, inputs), model(**inputs).loss)
    add_language_adapter(model, "th")
    set_language(model, "th")
    adapter, seen = randomise([model.base_model.invertible_adapters["th"]])[0], {}
    transform = model.cls.predictions.transform if legacy else model.lm_predictions.lm_head
    transform.LayerNorm.register_forward_hook(
        lambda _, inputs, output: seen.update(output=output), prepend=True)
    logits = model(input_ids=ids).logits  # the inverse block stands before the product with the embeddings
    bias = model.cls.predictions.decoder.bias if legacy else model.lm_predictions.lm_head.bias
    expected = linear(adapter.inverse(seen["output"]), model.get_input_embeddings().weight, bias)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    folder = model_folder(tmp_path / "model", assets, "deberta-v2", legacy=legacy)
    (tmp_path / "text.txt").write_text("\n".join("a nice red cat and a blue dog" for _ in range(200)))
    arguments = mlm(assets, tmp_path / "run", "--data", tmp_path / "text.txt", "--model", folder)
    assert unfreeze.main(arguments) == 0 and (tmp_path / "run/adapter_config.json").is_file()


@pytest.mark.parametrize("kind", ["xlm-roberta", "modernbert", "deberta-v2", "electra", "distilbert"])
def test_a_checkpoint_without_a_layer_is_refused_whatever_its_type(kind, assets, tmp_path, refused):
    model = model_folder(tmp_path / "model", assets, kind, **KINDS[kind])
    weights = load_file(model / "model.safetensors")
    kept = {key: value for key, value in weights.items() if ".1." not in key}
    assert len(kept) < len(weights)
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    refused(command(assets, tmp_path / "run", "--model", model, "--method", "full"), "its weights lack")


@pytest.mark.parametrize("head, is_kept", [
    ({"num_labels": 3}, False), ({"num_labels": 2, "problem_type": "regression"}, False),
    ({"num_labels": 2}, True),
    ({"id2label": {0: "colour", 1: "animal"}, "label2id": {"colour": 0, "animal": 1}}, False),
    ({"id2label": {0: "animal", 1: "colour"}, "label2id": {"animal": 0, "colour": 1}}, True)])
def test_a_head_for_other_labels_is_made_anew_and_said(head, is_kept, assets, tmp_path, capsys):
    model = model_folder(tmp_path / "model", assets, "xlm-roberta", head="SequenceClassification", **head)
    run_in(tmp_path / "run", assets, model, "--method", "none", "--steps", 0)
    printed = capsys.readouterr().out
    assert ("has a head of its own, which training starts from" in printed) == is_kept
    assert ("has a head for other labels; a new one is trained" in printed) != is_kept
    old = load_file(model / "model.safetensors")["classifier.dense.weight"]
    new = torch.load(tmp_path / "run/head/pytorch_model_head.bin", weights_only=True)
    assert torch.equal(old, new["classifier.dense.weight"]) == is_kept
    assert new["classifier.out_proj.weight"].shape == (2, HIDDEN)


# ---- a language adapter of your own ------------------------------------------------------------------------


def test_text_becomes_sequences_without_loss(assets):
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "model")
    splits = tasks.read_text(assets / "text.txt")
    lines = (assets / "text.txt").read_text().splitlines()
    assert [row["text"] for row in splits["validation"]] == lines[::20] and len(splits["train"]) == 380
    examples = tasks.encode_text(splits["train"], tokenizer, 20, [])
    ids = torch.stack([example["input_ids"] for example in examples])
    assert ids.shape == (380 * 4 // 18, 20)
    assert (ids[:, 0] == tokenizer.cls_token_id).all() and (ids[:, -1] == tokenizer.sep_token_id).all()
    words = tokenizer.convert_ids_to_tokens(ids[:, 1:-1].flatten().tolist())
    kept = [line for i, line in enumerate(lines) if i % 20]
    assert " ".join(words).replace(" </s> ", "\n").startswith("\n".join(kept[:370]))


@pytest.mark.parametrize("text, pieces", [
    ("word " * 1000, 5), ("字" * 3000, 3), ("word " * 1000 + "\n\nred\n", 6)])
def test_a_text_of_one_long_line_is_cut_and_nothing_is_lost(text, pieces, tmp_path):
    (tmp_path / "text.txt").write_text("\ufeff" + text, encoding="utf-8")
    splits = tasks.read_text(tmp_path / "text.txt")
    lines = [row["text"] for row in splits["validation"][:1] + splits["train"]]
    assert len(lines) == pieces and "".join("".join(lines).split()) == "".join(text.split())
    assert all(len(line) <= 1000 and not line.startswith("ord") for line in lines)


@pytest.mark.parametrize("kind", ["XLMRoberta", "Bert", "DebertaV2", "ModernBert"])
def test_the_masked_loss_is_the_models_own(kind):
    model = tiny_model(kind, "MaskedLM").eval()
    randomise(add_language_adapter(model, "en"))
    set_language(model, "en")
    ids = torch.randint(5, 60, (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.7, -100)
    expected = model(ids, labels=labels).loss
    inputs = {"input_ids": ids, "labels": labels}
    torch.testing.assert_close(tasks.masked_loss(model, inputs), expected, rtol=1e-5, atol=0)
    loss, right, masked = tasks.masked_sums(model, inputs).T  # by sequence
    logits = model(ids).logits
    for row in range(3):
        chosen = labels[row] != -100
        torch.testing.assert_close(loss[row], nn.functional.cross_entropy(
            logits[row][chosen], labels[row][chosen], reduction="sum"), rtol=1e-5, atol=0)
        assert right[row] == (logits[row].argmax(-1) == labels[row])[chosen].sum()
        assert masked[row] == chosen.sum()


def test_a_language_adapter_is_learnt_and_usable_at_once(assets, tmp_path, capsys, refused):
    assert unfreeze.main(mlm(assets, tmp_path / "de", "--steps", 150, "--save-every", 50)) == 0
    assert unfreeze.main(mlm(assets, tmp_path / "en", "--language", "en")) == 0
    results = results_of(tmp_path / "de")
    assert results["validation"]["loss"] < 0.7 * results["untrained"]["loss"]
    assert results["validation"]["accuracy"] > 2 * results["untrained"]["accuracy"]
    assert sorted(path.name for path in (tmp_path / "de").iterdir()) == [
        "adapter_config.json", "head_config.json", "log.jsonl", "pytorch_adapter.bin",
        "pytorch_model_head.bin", "results.json"]
    base = transformers.AutoModelForMaskedLM.from_pretrained(assets / "model")
    assert "roberta.embeddings.word_embeddings.weight" in base.state_dict()
    assert not any("embeddings" in key for key in torch.load(tmp_path / "de" / "pytorch_model_head.bin"))
    assert unfreeze.main(command(assets, tmp_path / "run", "--language-adapters", tmp_path)) == 0
    assert "language adapters: en de; none for zh-CN" in capsys.readouterr().out
    refused(mlm(assets, tmp_path / "de"), "holds a finished run")


def test_language_adapters_do_not_change_how_head_and_task_adapter_start(assets, languages):
    starts = []
    for source in ("none", languages):
        torch.manual_seed(0)
        settings = unfreeze.parse(command(assets, Path("none"), "--language-adapters", source))
        model, blocks = unfreeze.build_model(settings, unfreeze.load_tokenizer(settings)[1], [0, 1])
        unfreeze.load_language_adapters(settings, model, ["en", "de"])
        starts.append([*flat([*blocks, model.classifier]), torch.get_rng_state()])
    assert all(map(torch.equal, *starts))
