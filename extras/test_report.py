"""Tests of `report`: tables, the paper's figures, bundles and pictures (see test_core.py)."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unfreeze
from extras import plots, report
from extras.conftest import HERE, command


def write_run(folder: Path, language_scores: dict, **facts) -> Path:
    """A run's results.json: what the contract promises and no more."""
    folder.mkdir(parents=True)
    targets = [scores for language, scores in language_scores.items() if language != "en"]
    average = {metric: sum(scores[metric] for scores in targets) / len(targets) for metric in targets[0]}
    (folder / "results.json").write_text(json.dumps({
        "task": "classify", "model": "m", "adapter": "pfeiffer", "method": "gu", "seed": 0, "k": 5,
        "steps": 9, "wall_seconds": 9, "order": [[0, 1], [5, 0]], "average": average,
        "scores": language_scores, "versions": {}} | facts))
    return folder


def tables_of(markdown: str) -> list[dict[str, list[str]]]:
    """Its tables, each as its rows by name; the heads stand under the empty name."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        assert set("".join(cells.pop(1))) == {"-"}  # Markdown's rule under the head
        tables.append({name: values for name, *values in cells})
    return tables


def printed_table(arguments: list, capsys) -> dict[str, list[str]]:
    assert unfreeze.main(["report", *map(str, arguments)]) == 0
    [table] = tables_of(capsys.readouterr().out)
    return table


def test_report_prints_means_and_deviations_over_seeds_and_pairs_methods_by_seed(tmp_path, capsys):
    for method, seed, average in (("gu", 1, 42), ("gu", 0, 40), ("standard", 0, 39), ("standard", 1, 38)):
        write_run(tmp_path / f"{method}-{seed}", method=method, seed=seed, language_scores={
            "en": {"accuracy": 80}, "de": {"accuracy": average + 1}, "sw": {"accuracy": average - 1}})
    (tmp_path / "unfinished").mkdir()
    assert printed_table(sorted(tmp_path.iterdir()), capsys) == {
        "": ["standard", "gu"], "seeds": ["2", "2"], "English, accuracy": ["80.0 ± 0.0", "80.0 ± 0.0"],
        "mean of targets, accuracy": ["38.5 ± 0.7", "41.0 ± 1.4"], "over standard": ["-", "+2.5 ± 2.1"],
        "its 95 % interval": ["-", "+1.0 to +4.0"], "in the weaker half": ["-", "+2.5 ± 2.1"],
        "lowest language": ["sw 37.5", "sw 40.0"], "de": ["39.5 ± 0.7", "42.0 ± 1.4"],
        "sw": ["37.5 ± 0.7", "40.0 ± 1.4"], "opened": ["1 0", "1 0"],
        "tau with top-down": ["1.00", "1.00"], "tr(F) first, highest, last": ["-", "-"],
        "seconds": ["9", "9"]}


def test_report_shows_what_was_validated_and_no_k_where_it_has_no_effect(tmp_path, capsys):
    scores = {"en": {"accuracy": 80}, "de": {"accuracy": 40}}
    tuned = {("standard", 5, 0.1): 70, ("standard", 9, 0.2): 72, ("gu", 3, 0.1): 71, ("gu", 4, 0.1): 73}
    for (method, k, lr), score in tuned.items():
        write_run(tmp_path / f"{method}-{k}", scores, method=method, settings={"k": k, "steps": 9, "lr": lr},
                  validation={"accuracy": score})
    rows = printed_table(sorted(tmp_path.iterdir()), capsys)
    assert rows[""] == ["standard, lr 0.1", "standard, lr 0.2", "gu, k 3", "gu, k 4"]
    assert rows["k"] == ["-", "-", "3", "4"] and rows["lr"] == ["0.1", "0.2", "0.1", "0.1"]
    assert rows["English validation, accuracy"] == ["70.0", "72.0", "71.0", "73.0"]
    assert unfreeze.main(["report", *map(str, tmp_path.glob("*-[35]"))]) == 0
    printed = capsys.readouterr().out  # one k has an effect, the title has it
    assert "2 languages, k 3, steps 9" in printed and "k" not in tables_of(printed)[0]


def test_report_tells_languages_estimators_and_orders_apart(tmp_path, capsys):
    standard = {"en": 90, "de": 60, "th": 50, "sw": 30, "qu": 20}
    for seed, gain in ((0, 4), (1, 6)):
        gained = standard | {"sw": 30 + gain, "qu": 20 + 2 * gain}  # of the weaker two, by 6 and 9 on average
        for method, scores, facts in (
                ("standard", standard, {"order": [[0, 0], [0, 1], [0, 2]]}),
                ("fun", gained, {"order": [[0, 2], [5, 0], [9, 1]]}),
                ("fun", gained, {"order": [[0, 0], [5, 1], [9, 2]],
                                 "settings": {"fisher_labels": "argmax"}})):
            write_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", method=method, seed=seed, **facts,
                      language_scores={language: {"accuracy": score} for language, score in scores.items()})
    write_run(tmp_path / "other", {language: {"accuracy": 90} for language in ("en", "a", "b", "c", "d")})
    tables = unfreeze.main(["report", *map(str, tmp_path.iterdir())]), capsys.readouterr().out
    assert tables[0] == 0 and tables[1].count("5 languages") == 2  # other languages, another table
    rows = printed_table([path for path in tmp_path.iterdir() if path.name != "other"], capsys)
    assert rows[""] == ["standard", "fun", "fun, argmax"]
    assert rows["over standard"] == ["-", "+3.8 ± 1.1", "+3.8 ± 1.1"]
    assert rows["in the weaker half"] == ["-", "+7.5 ± 2.1", "+7.5 ± 2.1"]
    assert rows["tau with top-down"] == ["-", "0.33", "-1.00"]


def test_full_stands_beside_every_kind_of_adapter_and_alone_by_itself(tmp_path, capsys):
    scores = {"en": {"accuracy": 80}, "de": {"accuracy": 40}}
    for number, facts in enumerate((
            {"adapter": "pfeiffer", "method": "standard"}, {"adapter": "lora", "method": "standard"},
            {"adapter": "lora", "method": "gu", "language_adapters": {"en": "en", "de": "de"}},
            {"adapter": "lora", "train_examples": 500}, {"adapter": "none", "method": "full", "order": []})):
        write_run(tmp_path / f"{number}", scores, **facts)
    assert unfreeze.main(["report", *map(str, sorted(tmp_path.iterdir()))]) == 0
    printed = capsys.readouterr().out
    heads = [table[""] for table in tables_of(printed)]
    assert heads == [["standard", "full"], ["standard, no language adapters", "gu", "full"], ["gu"]]
    assert printed.count("m, lora") == 2 and printed.count("m, pfeiffer") == 1 and "none, " not in printed
    assert unfreeze.main(["report", str(tmp_path / "4")]) == 0
    assert "m, none, 2 languages" in capsys.readouterr().out


def test_runs_without_language_adapters_have_columns_beside_those_above_some(tmp_path, capsys):
    above = {"en": "en", "de": "de", "fr": "en", "ur": "en"}
    scores = {("standard", 0): (80, 50, 40, 30), ("gu", 0): (80, 52, 42, 38), ("gu", 1): (80, 54, 45, 41)}
    for (method, seed), of_run in scores.items():
        for name, stacked, lost in (("above", above, 0), ("bare", {}, 12 if method == "gu" else 8)):
            of_language = {key: {"accuracy": score - lost} for key, score in zip(above, of_run)}
            write_run(tmp_path / f"{method}-{seed}-{name}", of_language, method=method, seed=seed,
                      language_adapters=stacked)
    write_run(tmp_path / "full", dict.fromkeys(above, {"accuracy": 90}), method="full", adapter="none")
    rows = printed_table(sorted(tmp_path.iterdir()), capsys)
    bare = ", no language adapters"
    assert rows[""] == ["standard", "standard" + bare, "gu", "gu" + bare, "full"]
    assert rows["seeds"] == ["1", "1", "2", "2", "1"]
    assert rows["over standard"] == ["-", "-", "+4.0", "+0.0", "-"]  # with seed 0 alone, each over its kind's
    assert rows["mean of unseen fr ur"] == ["35.0", "27.0", "41.5 ± 2.1", "29.5 ± 2.1", "90.0"]
    bare = printed_table(tmp_path.glob("*bare"), capsys)
    assert bare[""] == ["standard", "gu"] and not [name for name in bare if "unseen" in name]
    alone = printed_table([*tmp_path.glob("*above"), tmp_path / "full"], capsys)
    assert alone["over standard"] == ["-", "+4.0", "+50.0"]


def test_a_language_without_an_adapter_is_reported_with_and_without_the_english_one(
        assets, languages, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for choice in (languages, "none"):
        assert unfreeze.main(command(assets, None, "--language-adapters", choice)) == 0
    folders = [Path(f"runs/classify-model-data{name}-gu-0") for name in ("", "-no-language-adapters")]
    capsys.readouterr()
    rows = printed_table(folders, capsys)
    assert rows[""] == ["gu", "gu, no language adapters"]
    assert rows["mean of unseen zh-CN"] == rows["zh-CN"]


def test_averaged_runs_have_columns_of_their_own_and_gain_over_averaged_standard_training(study, capsys):
    gained = {"standard": 3, "gu": 1}  # by averaging
    for folder in map(Path, study[:4]):
        method = folder.name[:-2]
        results = json.loads((folder / "results.json").read_text())
        scores = {language: {"accuracy": score["accuracy"] + gained[method]}
                  for language, score in results["scores"].items()}
        write_run(folder.with_name(f"averaged-{folder.name}"), scores, method=method, seed=results["seed"],
                  order=results["order"], settings={"average": True, "k": 5, "steps": 9})
        shutil.copy(folder / "log.jsonl", folder.with_name(f"averaged-{folder.name}"))
    plain = reported(capsys, *study[:4])
    printed = reported(capsys, *study[:4], *Path(study[0]).parent.glob("averaged-*"))
    [rows], correlated = tables_of(printed), [line for line in plain.splitlines() if "Spearman" in line]
    assert rows[""] == ["standard", "standard, averaged", "gu", "gu, averaged"]
    assert rows["mean of targets, accuracy"] == ["50.5 ± 0.7", "53.5 ± 0.7", "55.5 ± 2.1", "56.5 ± 2.1"]
    assert rows["over standard"] == ["-", "-", "+5.0 ± 1.4", "+3.0 ± 1.4"]
    assert len(correlated) == 1 and correlated[0] in printed.splitlines()  # not of averaged runs


def test_report_gives_the_shape_of_the_curve_of_the_trace_averaged_over_seeds(tmp_path, capsys):
    curves = {0: {0: 4, 5: 8, 9: 3, 20: 99}, 1: {0: 2, 5: 4, 9: 1}}  # 20 is of one seed alone
    for seed, curve in curves.items():
        run = write_run(tmp_path / f"{seed}", {"en": {"accuracy": 80}, "de": {"accuracy": 40}}, seed=seed)
        (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (
            {"event": "fisher", "step": 0, "trace": [1, 1, 1], "trainable": [], "average": None},
            *({"event": "fisher", "step": step, "trace": [1e3, value - 1, value + 1], "trainable": [1, 2],
               "average": (1e3 + 2 * value) / 2} for step, value in curve.items()))))  # with the frozen one
    runs = [tmp_path / "0", tmp_path / "1"]
    assert printed_table(runs, capsys)["tr(F) first, highest, last"] == ["3, 6 at 5, 2"]
    log = (tmp_path / "1" / "log.jsonl").read_text()
    for trace in ("", ', "trace": [1, NaN]', ', "trace": [1]', ', "trace": [1, 2]', ', "trace": [NaN, 1, 2]'):
        (tmp_path / "1" / "log.jsonl").write_text(
            log + '{"event": "fisher", "step": 30, "trainable": [1]%s}\n' % trace)
        assert unfreeze.main(["report", *map(str, runs)]) == 2
        assert "log.jsonl is damaged" in capsys.readouterr().err


def test_the_readmes_tables_and_gains_are_what_report_prints(capsys):
    pages = [HERE / "README.md", *HERE.glob("extras/*.md")]
    for runs in re.findall(r"unfreeze.py report (extras/results/.*)", (HERE / "extras/STUDY.md").read_text()):
        assert unfreeze.main(["report", *(str(HERE / name) for name in runs.split())]) == 0
    printed = tables_of(capsys.readouterr().out)
    compared = [table for page in pages for table in tables_of(page.read_text(encoding="utf-8"))
                if "standard" in table.get("", ())]
    assert compared
    for table in compared:
        assert any(all(set(zip(table[""], cells)) <= set(zip(other[""], other.get(name, ())))
                       for name, cells in table.items()) for other in printed), table
    gains = {(cell.split(" ")[0], interval) for table in printed
             for cell, interval in zip(table["over standard"], table["its 95 % interval"])}
    quoted = {found for page in pages for found in re.findall(
        r"([+-]\d+\.\d) \(([+-]\d+\.\d to [+-]\d+\.\d)\)", page.read_text(encoding="utf-8"))}
    assert len(quoted) > 2 and quoted <= gains


def test_the_interval_is_as_wide_as_the_spread_over_seeds_and_over_languages_makes_it():
    torch.manual_seed(0)
    seeds, languages = torch.randn(40, 1), 2 * torch.randn(1, 60)
    low, high = map(float, report.interval((100 * (seeds + languages)).tolist()).split(" to "))
    error = 100 * math.sqrt(seeds.var(correction=0) / 40 + languages.var(correction=0) / 60)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)
    assert (high + low) / 2 == pytest.approx(100 * (seeds + languages).mean().item(), abs=error / 5)
    assert report.interval([[1.0, 2.0]]) == "-"


XLMR, MBERT = "FacebookAI/xlm-roberta-base", "google-bert/bert-base-multilingual-cased"


def papers_run(folder: Path, task: str, method: str = "gu", settings: dict | None = None,
               languages: str | None = None, **facts) -> Path:
    """A run in the paper's setting (Table 3 for XLM-R and gu), but for what is given; all scores are 60."""
    languages = languages or {"mlqa": "en ar de es hi vi zh", "xquad": "en ar de el es hi ru th tr vi zh",
                              "xcopa": "en et ht id it qu sw ta th tr vi zh",
                              "xnli": "en ar de el es hi ru sw th tr vi zh"}[task]
    metrics = {"mlqa": ["f1", "em", "f1_mlqa"], "xquad": ["f1", "em"]}.get(task, ["accuracy"])
    preset = {"mlqa": (15, 5e-4, 32, "linear", 800, 384), "xcopa": (5000, 1e-5, 64, "constant", 1000, 128),
              "xquad": (15, 5e-4, 32, "linear", 800, 384), "xnli": (15, 5e-4, 128, "linear", 800, 128)}[task]
    preset = dict(zip(("epochs", "lr", "batch_size", "decay", "k", "max_length"), preset))
    size = {"xnli": 392_702, "xcopa": 400}.get(task, 87_599)
    return write_run(folder, {language: dict.fromkeys(metrics, 60) for language in languages.split()}, **{
        "task": task, "method": method, "model": XLMR, "train_examples": size,
        "language_adapters": {language: language for language in languages.split()},
        "settings": preset | {"language_adapters": "auto"} | (settings or {})} | facts)


@pytest.mark.parametrize("task, method, facts, settings, figures", [
    ("xnli", "gu", {}, {}, ["73.44±0.24"]),
    ("xnli", "gu", {"train_examples": 5000}, {"epochs": 50, "k": 25}, ["64.15"]),
    ("xquad", "standard", {}, {"lr": 2e-4, "k": 3}, ["70.09±0.60", "53.77±0.40"]),  # k changes nothing there
    ("xquad", "gu", {"train_examples": 5000}, {"epochs": 20, "k": 50}, ["59.88", "-"]),
    ("xquad", "fun", {}, {"first": "top", "k": 100}, ["72.34±0.40", "55.21±0.63"]),
    ("xquad", "fun", {}, {"k": 100}, ["-", "-"]),  # Algorithm 1's form: not what the figure is of
    ("xnli", "rev", {}, {"first": "top"}, ["72.50"]),
    ("xnli", "rev", {}, {}, ["-"]),
    ("xcopa", "rand", {}, {"first": "top"}, ["57.05±0.42"]),
    ("xcopa", "lpft", {}, {"k": 800}, ["-"]),
    ("mlqa", "full", {"adapter": "none", "language_adapters": {}}, {"lr": 2e-5}, ["62.59", "-", "-"]),
    ("mlqa", "fun", {"adapter": "lora"}, {"first": "top"}, ["62.62", "-", "-"]),
    ("xquad", "fun", {"model": MBERT}, {"first": "top", "epochs": 5, "language_adapters": "auto,x"},
     ["63.25±0.26", "49.09±0.48"]),
])
def test_report_sets_the_papers_figure_and_the_difference_beside_a_run_in_its_setting(
        task, method, facts, settings, figures, tmp_path, capsys):
    run = papers_run(tmp_path / "run", task, method, settings=settings, **facts)
    rows = printed_table([run], capsys)
    label = f"{method}, top first" if "first" in settings else method
    assert rows[""] == [label]
    for metric, figure in zip(("", ", em", ", f1_mlqa"), figures):
        if figure == "-":
            assert f"the paper's{metric}" not in rows and f"difference{metric}" not in rows
        else:
            assert rows[f"the paper's{metric}"] == [figure]
            assert rows[f"difference{metric}"] == [f"{60 - float(figure.split('±')[0]):+.1f}"]
    assert unfreeze.main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "not the paper's setting" not in printed
    assert ("first rows" in printed) == (facts.get("train_examples") == 5000)
    assert ("its own questions" in printed) == (task == "xcopa" and figures != ["-"])
    assert ("(--first top)" in printed) == (method in ("fun", "rev") and "first" not in settings)
    assert ("the released form, of which" in printed) == ("first" in settings)
    assert ("optimistic" in printed) == (task == "xcopa")


@pytest.mark.parametrize("change, named", [
    ({"model": "demo/model"}, "model demo/model"),
    ({"languages": "en de"}, "2 languages"),
    ({"languages": "en ar bg el es hi ru sw th tr vi zh"}, "12 languages (others)"),
    ({"train_examples": 18_652}, "18,652 training examples"),
    ({"language_adapters": {}}, "no language adapters"),
    ({"language_adapters": dict.fromkeys("en ar de el es hi ru sw th tr vi zh".split(), None)},
     "no language adapters"),
    ({"language_adapters": {language: "en" if language in ("sw", "th") else language
                            for language in "en ar de el es hi ru sw th tr vi zh".split()}},
     "no language adapter for sw th"),
    ({"settings": {"language_adapters": "folder"}}, "language adapters folder"),
    ({"settings": {"language_adapters": "auto,own"}, "language_adapter_sources": {"de": "own/de"}},
     "language adapters auto,own"),
    ({"settings": {"test_examples": 100}}, "100 test examples"),
    ({"settings": {"data": "folder"}}, "data of a folder"),
    ({"settings": {"epochs": 3}}, "epochs 3"),
    ({"settings": {"epochs": None, "steps": 7}}, "7 steps"),
    ({"settings": {"lr": 1e-4, "k": 50}}, "lr 0.0001, k 50"),
    ({"settings": {"batch_size": 32}}, "batch size 32"),
    ({"settings": {"decay": "constant", "max_length": 64}}, "max length 64, decay constant"),
    ({"settings": {"average": True}}, "averaged weights"),
])
def test_report_names_what_differs_from_the_papers_setting_and_gives_no_difference(
        change, named, tmp_path, capsys):
    run = papers_run(tmp_path / "run", "xnli", **change)
    beside = [papers_run(tmp_path / "beside", "xnli", seed=1)] if "data of" in named else []
    for runs in [run, *beside], [*beside, run]:  # one such run in a column is enough
        assert unfreeze.main(["report", *map(str, runs)]) == 0
        printed = capsys.readouterr().out
        label = "gu, averaged" if named == "averaged weights" else "gu"
        assert f"* {label}: not the paper's setting, but {named}\n" in printed and "73.44±0.24 *" in printed
        assert "difference" not in tables_of(printed)[0]


@pytest.mark.parametrize("asked, more, figure", [
    (3000, {}, "73.44±0.24 *"), (5000, {"epochs": 50, "k": 25}, "64.15"), (None, {}, "73.44±0.24")])
def test_a_record_without_its_amount_of_data_has_that_of_its_settings(asked, more, figure, tmp_path, capsys):
    run = papers_run(tmp_path / "run", "xnli", settings={"train_examples": asked} | more)
    results = json.loads((run / "results.json").read_text())
    del results["train_examples"]
    (run / "results.json").write_text(json.dumps(results))
    assert unfreeze.main(["report", str(run)]) == 0
    assert re.search(rf"\| the paper's +\| {re.escape(figure)} +\|", capsys.readouterr().out)


def test_report_says_which_language_was_tested_with_what_and_what_chose_the_order(tmp_path, capsys):
    stacked = {"en": "en", "de": "de", "it": "it", "ur": "en"}
    sources = {"en": "AdapterHub/en", "de": "AdapterHub/de", "it": "folder/it"}
    for number, (method, first, batches) in enumerate((
            ("fun", None, 4), ("fun", None, 41), ("fun", "top", 41), ("rev", "top", 4), ("full", None, 4))):
        of_run = ({}, {}) if method == "full" else (stacked, sources)
        write_run(tmp_path / f"{number}", {language: {"accuracy": 60} for language in stacked}, method=method,
                  settings={"fisher_labels": "official", "fisher_batches": batches, "first": first},
                  language_adapters=of_run[0], language_adapter_sources=of_run[1])
    assert unfreeze.main(["report", *map(str, sorted(tmp_path.iterdir()))]) == 0
    printed = capsys.readouterr().out
    assert tables_of(printed)[0][""] == ["fun, official", "fun, official formula on 4 batches",
                                         "fun, official, top first", "rev, top first", "full"]
    assert ("language adapters: AdapterHub/en for en, AdapterHub/de for de, folder/it for it, AdapterHub/en "
            "for ur\n") in printed


def test_report_correlates_the_trace_of_the_weights_kept_with_scores_over_methods_and_seeds(tmp_path, capsys):
    # by run: measurements (of block 0; block 1 is frozen), validations, score of the target language
    runs = {("gu", 0): ([1, 9, 2], [10, 30, 20], 50), ("gu", 1): ([1, 2, 3], [10, 20, 30], 70),
            ("fun", 0): ([4, 3, 1], [10, 15, 20], 70), ("rev", 0): ([1, 3, 8], [10, 25, 25], 40),
            ("rev", 1): ([1, 1, 1], [10, 20, 40], 30)}
    for (method, seed), (traces, validations, score) in runs.items():
        run = write_run(tmp_path / f"{method}{seed}", {"en": {"accuracy": 80}, "de": {"accuracy": score}},
                        method=method, seed=seed)
        (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for step in range(3) for event in (
            {"event": "fisher", "step": 10 * step, "trace": [traces[step], 99], "trainable": [0]},
            {"event": "eval", "step": 10 * step + 5, "split": "validation", "accuracy": validations[step]}))
            # untrained weights are not kept, however well they score
            + '{"event": "eval", "step": 0, "split": "validation", "accuracy": 40}\n')
    # Kept: the first of the best, at steps 15 25 25 15 25. So tr(F) is 9 3 1 3 1, ranks 5 3.5 1.5 3.5 1.5,
    # highest 9 3 4 3 1, ranks 5 2.5 4 2.5 1; validation 30 30 20 25 40, ranks 3.5 3.5 1 2 5; targets 50 70
    # 70 40 30, ranks 3 4.5 4.5 2 1. Of these, less their mean 3: products over the root of the squares.
    expected = [value / math.sqrt(first * second) for value, first, second in (
        (2 * .5 + .5 * .5 + 1.5 * 2 - .5 - 1.5 * 2, 9, 9.5), (.5 * 1.5 - 1.5 * 1.5 - .5 + 1.5 * 2, 9, 9.5),
        (2 * .5 - .5 * .5 - 1 * 2 + .5 * 1 - 2 * 2, 9.5, 9.5), (-.5 * 1.5 + 1.5 + .5 + 2 * 2, 9.5, 9.5))]
    assert unfreeze.main(["report", *map(str, sorted(tmp_path.iterdir()))]) == 0
    line = ("Spearman's correlation of tr(F) per open block with validation and mean of targets "
            "{:.2f} and {:.2f}, of its highest {:.2f} and {:.2f} (5 runs, sampled labels)").format(*expected)
    assert line in capsys.readouterr().out.splitlines()
    for method, seed in (("fun", 0), ("rev", 0), ("rev", 1)):
        shutil.rmtree(tmp_path / f"{method}{seed}")
    assert unfreeze.main(["report", *map(str, sorted(tmp_path.iterdir()))]) == 0
    assert "Spearman" not in capsys.readouterr().out  # one method


@pytest.mark.parametrize("change", [
    "", "[]", "{}", {"scores": {}}, {"scores": {"de": {"accuracy": 1}}}, {"average": None}, {"order": [3]},
    {"scores": {"en": {"accuracy": "high"}}}, {"method": 3}, {"seed": "x"}, {"task": None},
    {"wall_seconds": None}, {"scores": {"en": {"accuracy": 1}, "de": {"f1": 1}}}, {"order": [["a", "b"]]},
    {"train_examples": []}, {"method": "fun", "settings": "all"}, {"language_adapters": "de"},
    {"settings": {"lr": [0.1]}}, {"average": {"accuracy": 99}}, {"average": {}}, {"order": [[0, 1], [5, 1]]},
    {"language_adapter_sources": {"en": 5}}, {"validation": {"accuracy": None}}, {"validation": 5},
    {"wall_seconds": math.nan}, {"seed": True}, {"average": {"accuracy": math.inf}}, {"order": [["03", 1]]},
    {"order": [[0, -1]]}, {"scores": {"en": {"accuracy": 10**400}}}])
def test_report_on_a_damaged_run_is_one_line(change, tmp_path, capsys):
    run = write_run(tmp_path / "run", {"en": {"accuracy": 80}, "de": {"accuracy": 40}})
    path = run / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if isinstance(change, dict) else change)
    before = path.read_bytes()
    assert unfreeze.main(["report", str(run)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "results.json is damaged" in error and "\n" not in error
    assert path.read_bytes() == before
    assert unfreeze.main(["report", str(tmp_path)]) == 2 and "no finished run" in capsys.readouterr().err
    assert unfreeze.main(["report"]) == 2 and "FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"method": "top"}, {"task": "xnly"}])
def test_report_leaves_a_run_of_an_unknown_task_or_method_out_and_says_so(change, tmp_path, capsys):
    scores = {"en": {"accuracy": 80}, "de": {"accuracy": 40}}
    runs = [write_run(tmp_path / "known", scores), write_run(tmp_path / "unknown", scores, **change)]
    assert unfreeze.main(["report", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert f"note: {runs[1]} is of" in printed and tables_of(printed)[0]["seeds"] == ["1"]
    assert unfreeze.main(["report", str(runs[1])]) == 2 and "no finished run" in capsys.readouterr().err


def test_report_averages_only_runs_that_differ_in_nothing_but_the_seed(tmp_path, capsys):
    def run(name: str, score: float, **facts) -> str:
        settings = {"lr": 1e-3, "k": 5, "steps": 9, "batch_size": 32, "max_length": 128, "seed": 0}
        seed, data = facts.pop("seed", 0), facts.pop("data", "one")
        method, more = facts.pop("method", "gu"), facts.pop("settings", {})
        scores = {language: {"accuracy": score} for language in ("en", "de")}
        return str(write_run(tmp_path / name, scores, seed=seed, method=method, data=data,
                             settings=settings | more | {"seed": seed}))

    same = [run("a", 40), run("b", 44, seed=1), run("s", 40, method="standard"),
            run("t", 40, method="standard", seed=1)]
    lower = run("c", 70, seed=2, settings={"lr": 1e-4})
    table = printed_table([*same, lower], capsys)
    assert table[""] == ["standard", "gu, lr 0.001", "gu, lr 0.0001"] and table["seeds"] == ["2", "2", "1"]
    assert table["lr"] == ["0.001", "0.001", "0.0001"] and table["over standard"][:2] == ["-", "+2.0 ± 2.8"]
    for other in ({"settings": {"batch_size": 8}}, {"settings": {"bf16": True}}, {"data": "two"},
                  {"settings": {"max_length": 64}}, {"settings": {"test_examples": 100}}):
        other = run(f"o{len(list(tmp_path.iterdir()))}", 90, seed=3, **other)
        assert unfreeze.main(["report", *same, other]) == 0
        printed = capsys.readouterr().out
        assert [table["seeds"] for table in tables_of(printed)] == [["2", "2"], ["1"]]
        assert "classify, m, pfeiffer, 2 languages, k 5, steps 9, lr 0.001, batch size" in printed
    harmless = {"fisher_every": 7, "save_every": 2, "out": "x", "device": "cpu"}
    harmless = run("h", 42, seed=4, settings=harmless)
    assert printed_table([*same, harmless], capsys)["seeds"] == ["2", "3"]
    again = run("again", 44, seed=1)
    assert unfreeze.main(["report", *same, again]) == 2
    assert f"{same[1]} and {again} are both gu with seed 1" in capsys.readouterr().err


def test_report_goes_into_head_and_any_terminal(tmp_path):
    scores = {"en": {"accuracy": 80}, **{f"l{i}": {"accuracy": 40} for i in range(3000)}}
    runs = [str(write_run(tmp_path / f"{seed}", scores, seed=seed)) for seed in range(2)]
    command = f"{sys.executable} {HERE / 'unfreeze.py'} report {' '.join(runs)}"
    for line, encoding in ((f"set -o pipefail; {command} | head -3", "utf-8"), (command, "ascii")):
        run = subprocess.run(["bash", "-c", line], capture_output=True,
                             env=os.environ | {"PYTHONIOENCODING": encoding})
        assert run.returncode == 0 and run.stderr == b"" and b"classify, m, pfeiffer" in run.stdout


def test_plots_show_curves_orders_and_scores(assets, tmp_path, capsys):
    runs = []
    for method in ("gu", "standard"):
        runs.append(str(tmp_path / method))
        assert unfreeze.main(command(assets, tmp_path / method, "--method", method)) == 0
    runs.append(str(write_run(tmp_path / "without a log", {"en": {"accuracy": 80}, "de": {"accuracy": 40}})))
    target = tmp_path / "curves.png"
    status = unfreeze.main(["report", *runs, "--plot", str(target)])
    if importlib.util.find_spec("matplotlib") is None:
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert status == 2 and error == "error: --plot needs matplotlib: pip install matplotlib"
    else:
        picture = target.read_bytes()
        assert status == 0 and picture.startswith(b"\x89PNG") and len(picture) > 20_000
        assert unfreeze.main(["report", *runs, "--plot", str(tmp_path / "curves.song")]) == 2
        assert "curves.song: name a .png, .pdf or .svg" in capsys.readouterr().err
        (tmp_path / "gu" / "log.jsonl").write_text("{")
        assert unfreeze.main(["report", *runs, "--plot", str(target)]) == 2
        assert "log.jsonl is damaged" in capsys.readouterr().err and target.read_bytes() == picture


# ---- bundles -----------------------------------------------------------------------------------------------


def logged_run(folder: Path, method: str, seed: int, traces=(4, 8, 3), score: float = 60, **facts) -> Path:
    """A run with measurements of tr(F) at steps 0, 5 and 9 (the open block's, and a frozen one's, 99), and
    validations at 5 and 9."""
    scores = {"en": {"accuracy": 90}, "de": {"accuracy": score}, "ml": {"accuracy": score - 20 + 2 * seed}}
    write_run(folder, scores, method=method, seed=seed, **facts)
    events = [{"event": "fisher", "step": step, "trace": [99, value], "trainable": [1], "average": value}
              for step, value in zip((0, 5, 9), traces)]
    events += [{"event": "eval", "step": step, "split": "validation", "accuracy": 10 * step + seed}
               for step in (5, 9)]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


@pytest.fixture
def study(tmp_path) -> list[str]:
    """Folders of runs of three methods; of the last, without a log, there are old settings."""
    place = tmp_path / "study"
    return [str(folder) for folder in (
        logged_run(place / "standard-0", "standard", 0), logged_run(place / "standard-1", "standard", 1),
        logged_run(place / "gu-0", "gu", 0, (9, 2, 1), 64, order=[[0, 1], [5, 0]]),
        logged_run(place / "gu-1", "gu", 1, (7, 4, 1), 66, order=[[0, 1], [5, 0]]),
        logged_run(place / "fun-0", "fun", 0, (9, 3, 1), 61, order=[[0, 1], [5, 0]]),
        logged_run(place / "fun-1", "fun", 1, (9, 3, 1), 63, order=[[0, 0], [5, 1]]),
        write_run(place / "old", {"en": {"accuracy": 1 / 3}, "de": {"accuracy": 40}, "ml": {"accuracy": 2}},
                  method="fun", seed=2, settings={"bf16": True, "k": 5, "steps": 9}))]


def reported(capsys, *arguments) -> str:
    assert unfreeze.main(["report", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    """The line of an error."""
    assert unfreeze.main(["report", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_bundle_gives_the_tables_of_the_folders_it_was_made_from_and_loses_nothing(study, tmp_path, capsys):
    bundle, again = tmp_path / "study.jsonl", tmp_path / "again.jsonl"
    tables = reported(capsys, *study)
    assert tables.count("| seeds") == 2 and "Spearman" in tables
    assert reported(capsys, *study, "--bundle", bundle) == tables == reported(capsys, bundle)
    for folder, line in zip(map(Path, study), bundle.read_text().splitlines(), strict=True):
        record, log = json.loads(line), folder / "log.jsonl"
        assert record["results"] == json.loads((folder / "results.json").read_text())
        events = log.read_text().splitlines() if log.exists() else []
        assert record["log"] == [json.loads(event) for event in events]
    for target in (again, bundle):  # a copy; the bundle itself
        assert reported(capsys, bundle, "--bundle", target) == tables
        assert again.read_bytes() == bundle.read_bytes()
    (tmp_path / "part.jsonl").write_text("".join(bundle.read_text().splitlines(keepends=True)[:3]))
    assert reported(capsys, tmp_path / "part.jsonl", *study[3:]) == tables  # bundles and folders together
    for picture in ("of-folders.svg", "of-bundle.svg") if importlib.util.find_spec("matplotlib") else ():
        reported(capsys, *(study if "folders" in picture else [bundle]), "--plot", tmp_path / picture)
    pictures = {path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert len(pictures) == (1 if importlib.util.find_spec("matplotlib") else 0)


def test_a_bundle_leaves_out_what_the_report_leaves_out_and_names_runs_by_line(study, tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    unknown = write_run(tmp_path / "unknown", {"en": {"accuracy": 80}, "de": {"accuracy": 40}}, method="top")
    bundle = tmp_path / "study.jsonl"
    printed = reported(capsys, *study, tmp_path / "unfinished", unknown, "--bundle", bundle)
    assert printed.startswith("note: ") and printed.count("is left out") == 2
    lines = bundle.read_text().splitlines(keepends=True)
    assert len(lines) == len(study)
    bundle.write_text(lines[0] + json.dumps({"results": json.loads(
        (unknown / "results.json").read_text()), "log": []}) + "\n" + lines[0])
    assert f"{bundle}:1 and {bundle}:3 are both standard with seed 0" in refused(capsys, bundle)
    bundle.write_text("".join(bundle.read_text().splitlines(keepends=True)[:2]))
    assert f"note: {bundle}:2 is of classify by top, unknown here" in reported(capsys, bundle)


@pytest.mark.parametrize("line", [
    b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"log": []}', b'{"results": {}}', {"results": {}},
    {"results": []}, {"results": "all"}, {"log": [1]}, {"log": 3}, {"log": None},
    {"log": [{"event": "fisher", "step": 3, "trainable": [1]}]},
    {"log": [{"event": "eval", "split": "validation", "step": 3, "accuracy": float("nan")}]}, {"more": 1}])
def test_a_damaged_line_of_a_bundle_is_named_in_one_line(line, study, tmp_path, capsys):
    bundle = tmp_path / "study.jsonl"
    reported(capsys, *study, "--bundle", bundle)
    lines = bundle.read_bytes().splitlines()
    lines[1] = line if isinstance(line, bytes) else json.dumps(json.loads(lines[1]) | line).encode()
    bundle.write_bytes(b"\n".join(lines) + b"\n")
    before = bundle.read_bytes()
    assert f"{bundle}:2 is damaged" in refused(capsys, bundle)
    assert bundle.read_bytes() == before


@pytest.mark.parametrize("name, content, message", [
    ("gu-0/log.jsonl", None, "no bundle"), ("notes.jsonl", b"by hand\n", "no bundle"),
    ("gu-0/results.json", None, "ends in .jsonl"), ("bundle", None, "ends in .jsonl")])
def test_only_a_bundle_is_overwritten_by_a_bundle(name, content, message, study, tmp_path, capsys):
    target = Path(study[0]).parent / name
    if content:
        target.write_bytes(content)
    before = target.read_bytes() if target.exists() else None
    line = refused(capsys, *study, "--bundle", target)
    assert f"--bundle {target}" in line and message in line
    assert (target.read_bytes() if target.exists() else None) == before
    assert not list(tmp_path.rglob("*.tmp"))


# ---- pictures ----------------------------------------------------------------------------------------------

with_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")


def drawn(letter: str, folders: list[str]):
    """The axes with one panel over runs of one table."""
    from matplotlib.figure import Figure

    runs = [run for folder in folders for run in report.read_runs(Path(folder))]
    [methods] = report.comparable(runs).values()
    axes = Figure().subplots()
    plots.PANELS[letter][1](axes, methods, plots.styles_of(methods))
    return axes


def points(axes, method: str, marker: str | None = None) -> list[list[tuple]]:
    """What is drawn in a method's colour, a list for each line."""
    lines = [line for line in axes.lines if line.get_color() == plots.COLOURS[method]]
    return [[*zip(*map(list, line.get_data()))] for line in lines if marker in (None, line.get_marker())]


@with_matplotlib
def test_plots_of_the_trace_have_mean_and_range_over_seeds_and_the_openings_of_gu(study):
    axes = drawn("a", study[:4])
    assert axes.get_yscale() == "log"
    assert points(axes, "standard") == [[(0, 4), (5, 8), (9, 3)]]
    assert points(axes, "gu", ".") == [[(0, 8), (5, 3), (9, 1)]]
    assert [step for step, _ in points(axes, "gu", "|")[0]] == [0, 5]
    corners = {tuple(corner) for corner in axes.collections[1].get_paths()[0].vertices}
    assert corners == {(0, 7), (0, 9), (5, 2), (5, 4), (9, 1)}


@with_matplotlib
def test_plots_of_the_order_have_the_mean_place_of_each_block(study):
    axes = drawn("b", study[:6])
    assert points(axes, "gu") == [[(0, 2), (1, 1)]] and points(axes, "fun") == [[(0, 1.5), (1, 1.5)]]
    assert points(axes, "standard") == [[(0, 2), (1, 1)]]  # its order is a run's default here


@with_matplotlib
def test_plots_of_validation_are_over_the_trace_measured_last(study):
    axes = drawn("c", study[:4])
    assert points(axes, "gu") == [[(2, 50), (1, 90)], [(4, 51), (1, 91)], [(3, 50.5), (1, 90.5)]]
    run = {"scores": {"en": {"accuracy": 0}}, "validations": [{"step": 4, "accuracy": 50}],
           "traces": [{"step": step, "average": step} for step in (0, 3, 5)]}
    assert plots.score_over_trace([run]) == ([3], [50])


@with_matplotlib
def test_plots_of_gains_name_the_weakest_language_first_with_intervals_over_seeds(study):
    axes = drawn("d", study[:4])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "all languages", "Malayalam (41)", "German (60)"]
    dots, intervals = points(axes, "gu", "o"), points(axes, "gu", "None")
    assert [x for [(x, _)] in dots] == [5, 5, 5] and [y for [(_, y)] in dots] == pytest.approx([0, 1, 2])
    assert [[x for x, _ in line] for line in intervals] == [[4, 6]] * 3  # of two seeds, 4 and 6 points
    assert all(low[1] == high[1] == dot[0][1] for (low, high), dot in zip(intervals, dots))
    assert axes.yaxis_inverted() and not points(axes, "standard", "o")
    [text] = drawn("d", study[2:4]).texts
    assert text.get_text() == "no runs of standard with the same seeds"


@with_matplotlib
def test_plots_of_each_block_have_the_mean_logarithm_over_seeds_and_the_openings(study, tmp_path):
    standard, gu = drawn("e", study[:4]).child_axes
    expected = {standard: [[99] * 3, [4, 8, 3]], gu: [[99] * 3, [63 ** 0.5, 8 ** 0.5, 1]]}  # 9*7, 2*4
    for part, blocks in expected.items():
        mesh, [openings] = part.collections[0], part.lines
        assert mesh.get_array().tolist() == [pytest.approx(values) for values in blocks]
        assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((1, 99))  # the same colours
        assert {*zip(*map(tuple, openings.get_data()))} == {(0, 1), (5, 0)}
    assert [part.get_title() for part in expected] == ["standard", "gu"]
    zero = logged_run(tmp_path / "zero", "gu", 0, traces=(0, 2, 0))
    [part] = drawn("e", [zero]).child_axes
    mesh = part.collections[0]
    assert mesh.norm(mesh.get_array()[1]).mask.tolist() == [True, False, True]  # 0 has no colour


@with_matplotlib
def test_plots_and_each_panel_alone_are_files_of_their_ending_with_the_same_bytes_each_time(
        study, tmp_path, capsys):
    def picture(name: str, *panel) -> bytes:
        assert reported(capsys, *study[:4], "--plot", tmp_path / name, *panel) == tables
        return (tmp_path / name).read_bytes()

    tables = reported(capsys, *study[:4])
    for ending, start in {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}.items():
        one, two = (picture(f"{name}.{ending}") for name in ("one", "two"))
        assert one == two and one.startswith(start)
    pictures = {one, *(picture(f"{panel}.svg", "--panel", panel) for panel in "abcde")}
    assert len(pictures) == 6
    assert "--panel" in refused(capsys, *study, "--panel", "f", "--plot", tmp_path / "f.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "there is something that is no file" in refused(capsys, *study, "--plot", tmp_path / "pipe.png")
    assert "name a .png, .pdf or .svg" in refused(capsys, *study, "--plot", tmp_path / "LICENSE")
    assert "--panel goes with --plot" in refused(capsys, *study, "--panel", "a")


@with_matplotlib
def test_plots_take_any_name_of_a_language_or_folder_and_a_trace_of_zeros(tmp_path, capsys):
    scores = {"en": {"accuracy": 80}, "$x_{$": {"accuracy": 40}, "de": {"accuracy": 40}}
    for method in ("gu", "standard"):
        write_run(tmp_path / method, scores, method=method, model="a$_{$")  # as a formula, an error
    for panel in ([], ["--panel", "e"]):
        reported(capsys, tmp_path / "gu", tmp_path / "standard", "--plot", tmp_path / "strange.png", *panel)
    flat = logged_run(tmp_path / "flat", "gu", 0, traces=(0, 0, 0))
    reported(capsys, flat, "--plot", tmp_path / "flat.png", "--panel", "a")
