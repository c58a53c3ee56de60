"""Runs and their folders: stopped, killed, failing and finished ones, what they measure, and several at once.

    python -m extras.test_runs --kill 40    # kills so many runs at random instants, compares how they end
"""

import argparse
import contextlib
import dataclasses
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tasks
import unfreeze
from adapters import load_adapter
from extras.conftest import (HERE, command, contents, cut_off, events_of, make_assets, mlm, one_error,
                             outcome, results_of, script, start, task_command, tiny_model, validations_of,
                             write_task)


# ---- stopped and killed runs -------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was_and_says_so(stopped, tmp_path, capsys, monkeypatch):
    shutil.copytree(stopped, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    for out in ("run", "whole"):
        assert unfreeze.main(command(Path("."), Path(out), "--save-every", 3)) == 0
        assert ("continuing from step 6" in capsys.readouterr().out) == (out == "run")
    assert outcome(Path("run")) == outcome(Path("whole"))


def test_a_checkpoint_holds_what_is_trained_and_not_the_model(stopped):
    saved = torch.load(stopped / "run/checkpoint.pt", weights_only=True)
    trained = sum(value.numel() for value in saved["learned"].values())
    assert not any("word_embeddings" in name or "query" in name for name in saved["learned"])
    assert (stopped / "run/checkpoint.pt").stat().st_size < 4 * (4 * trained) + 100_000


def wait_for(path: Path, run: subprocess.Popen) -> None:
    """Until there is such a file, or the run ends."""
    while not path.exists() and run.poll() is None:
        time.sleep(0.0002)


def test_only_one_process_works_in_a_folder_until_it_dies(assets, tmp_path, capsys, refused):
    arguments = command(assets, tmp_path / "run", "--steps", 100_000, "--save-every", 5)
    run = start(arguments)
    try:
        wait_for(tmp_path / "run" / "checkpoint.pt", run)
        for options in ([], ["--overwrite"], ["--seed", "1"]):
            status = unfreeze.main([*arguments, *options])
            one_error(status, capsys.readouterr().err, "another process is at work in")
    finally:
        run.kill()
        run.wait()
    refused([*arguments, "--seed", "1"], "is of a run with --seed 0, not 1")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_asked_to_stop_finishes_its_step_saves_and_continues_to_the_same_bits(
        number, status, assets, tmp_path):
    options = ["--steps", 60, "--save-every", 1000, "--method", "fun", "--fisher-every", 1]
    assert unfreeze.main(command(assets, tmp_path / "whole", *options)) == 0
    arguments = command(assets, tmp_path / "run", *options)
    run = start(arguments)
    while not (tmp_path / "run/log.jsonl").exists() or b'"step": 5' not in (
            tmp_path / "run/log.jsonl").read_bytes():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.001)
    run.send_signal(number)
    error = run.communicate()[1]
    assert run.returncode == status and "Traceback" not in error
    assert "interrupted: the same command goes on from the last checkpoint" in error.splitlines()[-1]
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert 5 <= saved["state"]["step"] < 54  # not the one that an epoch's end would have written
    assert unfreeze.main(arguments) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_run_asked_to_stop_after_its_last_step_stops_before_the_tests(assets, tmp_path, monkeypatch):
    arguments = command(assets, tmp_path / "run", "--fisher-every", 1)
    measure, calls = unfreeze.fisher_trace, []

    def asked_at_the_end(*given):
        calls.append(given)
        if len(calls) == 10:  # after step 9 of 9
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*given)

    monkeypatch.setattr(unfreeze, "fisher_trace", asked_at_the_end)
    assert unfreeze.main(arguments) == 143 and not (tmp_path / "run/predictions").exists()
    monkeypatch.undo()
    assert unfreeze.main(arguments) == 0
    assert unfreeze.main(command(assets, tmp_path / "whole", "--fisher-every", 1)) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def survive(assets: Path, folder: Path, kills: int, seed: int = 0):
    """Kill (SIGKILL) so many runs of four methods at random instants, a third of them inside the writing of
    a checkpoint, a third twice; yields for each what happened, and whether it left what it should have.
    """
    chance, whole, seconds = random.Random(seed), {}, {}
    for number in range(kills):
        method, kind = ("gu", "fun", "lpft", "rand")[number % 4], ("anywhere", "writing", "twice")[number % 3]
        options = ["--method", method, "--steps", 150, "--k", 20, "--save-every", 7, "--fisher-every", 10]
        if method not in whole:
            started = time.time()
            assert start(command(assets, folder / method, *options)).wait() == 0
            whole[method], seconds[method] = outcome(folder / method), time.time() - started
        out, steps = folder / str(number), []
        while len(steps) < 1 + (kind == "twice"):
            run = start(command(assets, out, *options))
            if kind == "writing":
                wait_for(out / "checkpoint.pt", run)
                time.sleep(chance.uniform(0, 0.2))
                wait_for(out / "checkpoint.pt.tmp", run)
            elif steps or chance.random() < 0.2:  # also while it loads
                time.sleep(chance.uniform(0, seconds[method]))
            else:
                wait_for(out / "log.jsonl", run)
                time.sleep(chance.uniform(0, seconds[method] / 2))
            run.kill()
            if run.wait() == 0:  # it was faster: once more, from the start
                shutil.rmtree(out)
                steps.clear()
                continue
            saved = out / "checkpoint.pt"
            steps.append(torch.load(saved, weights_only=True)["state"]["step"] if saved.exists() else 0)
        torn = ", while it wrote a checkpoint" * (out / "checkpoint.pt.tmp").exists()
        finished = (out / "results.json").exists() or start(command(assets, out, *options)).wait() == 0
        (out / "checkpoint.pt").unlink(missing_ok=True)  # killed after the results, before the last deletion
        yield (f"{method}, killed {kind}{torn}, continued from step {' and '.join(map(str, steps))}",
               finished and outcome(out) == whole[method])


def test_killed_runs_end_in_the_very_same_bits(assets, tmp_path):
    reports = list(survive(assets, tmp_path, 3, seed=time.time_ns()))
    assert all(same for _, same in reports), reports


def test_a_killed_mlm_run_continues_to_the_very_same_bits(assets, tmp_path, capsys, refused):
    assert unfreeze.main(mlm(assets, tmp_path / "whole")) == 0
    for _ in range(2):  # killed twice, the second time inside the continued run
        run = start(mlm(assets, tmp_path / "cut"))
        path = tmp_path / "cut" / "checkpoint.pt"
        seen = path.stat().st_mtime_ns if path.exists() else 0
        while run.poll() is None and (not path.exists() or path.stat().st_mtime_ns == seen):
            time.sleep(0.001)
        run.kill()
        run.wait()
        assert path.exists() and not (tmp_path / "cut" / "results.json").exists()
    refused(mlm(assets, tmp_path / "cut", "--lr", 0.02), "is of a run with --lr 0.01, not 0.02")
    assert unfreeze.main(mlm(assets, tmp_path / "cut")) == 0
    assert "continuing from step" in capsys.readouterr().out
    whole, again = tmp_path / "whole", tmp_path / "cut"
    ends = [contents(out) | {Path("results.json"): results_of(out)["validation"]} for out in (whole, again)]
    assert ends[0] == ends[1]


# ---- runs that fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what, message", [
    ("loss", "the loss is nan and its gradient's norm nan"), ("gradient", "its gradient's norm nan"),
])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(
        what, message, assets, tmp_path, capsys, monkeypatch):
    calls, task, step = [], tasks.TASKS["classify"], 5 if what == "gradient" else 6

    def spoiled_loss(model, inputs):
        calls.append(task.loss(model, inputs))
        if len(calls) - 1 == step and what == "gradient":  # the derivative of sqrt at 0 is infinite
            return calls[-1] + (model.classifier.out_proj.bias - model.classifier.out_proj.bias).sqrt().sum()
        return calls[-1] * math.nan if len(calls) - 1 == step else calls[-1]

    monkeypatch.setitem(tasks.TASKS, "classify", dataclasses.replace(task, loss=spoiled_loss))
    arguments = command(assets, tmp_path / "run", "--steps", 20, "--save-every", 3, "--fisher-every", 100)
    rows = unfreeze.train_order(0, step // 6, 42)[step % 6 * 8 :][:8]
    one_error(unfreeze.main(arguments), capsys.readouterr().err, message,
              f"at step {step} (learning rate {0.01 * (1 - step / 20):g}, ",
              f"training sequences {', '.join(map(str, rows))}): lower --lr")
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == (3 if what == "gradient" else 6)
    assert all(value.isfinite().all() for value in saved["learned"].values())


@pytest.mark.parametrize("options", ["--method full", "--average"])
def test_weights_that_the_last_step_has_spoilt_are_not_scored(options, assets, tmp_path, capsys):
    arguments = command(assets, tmp_path / "run", *options.split(), "--steps", 1, "--lr", 1e38)
    one_error(unfreeze.main(arguments), capsys.readouterr().err, "error: ", "lower --lr")
    assert not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), None])
def test_out_of_memory_is_one_line_with_the_remedy(error, assets, tmp_path, capsys, monkeypatch):
    def failing(*_):
        if error is None:
            torch.empty(2**60)  # what PyTorch makes of too large a tensor on the CPU
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    one_error(unfreeze.main(command(assets, tmp_path / "run")), capsys.readouterr().err,
              "error: out of memory: lower --batch-size or --max-length")


@pytest.mark.parametrize("method", ["fun", "full"])
def test_a_disk_that_is_full_at_any_write_costs_one_line_and_no_file(method, assets, tmp_path, capsys):
    options = ["--method", method, "--save-every", 4, "--fisher-every", 1]
    assert unfreeze.main(command(assets, tmp_path / "whole", *options)) == 0
    whole = contents(tmp_path / "whole")
    sizes = sorted({len(content) for content in whole.values()})
    failed = 0
    for limit in [1, *(size - 1 for size in sizes), sizes[-1] * 2 if method == "fun" else sizes[-1] * 3]:
        out = tmp_path / str(limit)
        capsys.readouterr()
        with file_size(limit):  # each file fails in turn, and the checkpoint
            status = unfreeze.main(command(assets, out, *options))
        if status:
            one_error(status, capsys.readouterr().err, "space on its disk")
            assert not (out / "results.json").exists()
            failed += 1
            assert unfreeze.main(command(assets, out, *options)) == 0
        again = contents(out)
        for path in whole.keys() | again.keys():
            assert path.name == "results.json" or again[path] == whole[path], path
    assert failed >= 5


@contextlib.contextmanager
def file_size(limit: int):
    """No file grows beyond so many bytes in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- finished runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory) -> Path:
    """The assets, and in `run` a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "all"
    shutil.copytree(assets, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert unfreeze.main(command(Path("."), Path("run"))) == 0
    return folder


@pytest.fixture
def at_finished(finished, tmp_path, monkeypatch) -> None:
    """A copy of it is the working folder."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "copy"))


def test_overwriting_leaves_nothing_of_the_run_before(at_finished):
    again = command(Path("."), Path("run"), "--seed", 1, "--languages", "de", "--overwrite")
    assert unfreeze.main(again) == 0
    results = outcome(Path("run"))["results.json"]  # no predictions in zh-CN are left
    assert results["seed"] == 1 and list(results["scores"]) == ["en", "de"]


@pytest.mark.parametrize("options, changed, message", [
    ("", None, None), ("--save-every 2", None, None),
    ("--seed 1", None, "with --seed 0, not 1"), ("--lr 0.02", None, "with --lr 0.01, not 0.02"),
    ("--steps 8", None, "with --steps 9, not 8"), ("--languages de", None, "with --languages None, not de"),
    ("--adapter lora", None, "with --adapter pfeiffer, not lora"),
    ("", "train.en", "with data of fingerprint"), ("", "test.de", "with data of fingerprint")])
def test_a_finished_run_is_kept_only_if_it_is_the_one_asked_for(
        options, changed, message, at_finished, capsys, refused):
    if changed:
        with Path(f"data/{changed}.jsonl").open("a") as file:
            file.write('{"text": "red", "label": "colour"}\n')
    arguments = command(Path("."), Path("run"), *options.split())
    if message:
        refused(arguments, "holds a finished run " + message)
    else:
        before = contents(Path("run"))
        assert unfreeze.main(arguments) == 0 and "is finished and kept" in capsys.readouterr().out
        assert contents(Path("run")) == before


def test_precision_shapes_a_run_is_kept_and_told_apart(assets, tmp_path, refused):
    names = {"default": [], "short": ["--bf16"], "long": ["--precision", "bf16"],
             "single": ["--precision", "fp32"]}
    for name, options in names.items():
        assert unfreeze.main(command(assets, tmp_path / name, *options)) == 0
    runs = {name: outcome(tmp_path / name) for name in names}
    assert runs["default"] == runs["single"] and runs["short"] == runs["long"]
    assert runs["default"]["adapter/pytorch_adapter.bin"] != runs["short"]["adapter/pytorch_adapter.bin"]
    kept = [runs[name]["results.json"]["settings"]["precision"] for name in names]
    assert kept == ["fp32", "bf16", "bf16", "fp32"]
    refused(command(assets, tmp_path / "short"), "a finished run with --precision bf16, not fp32")


def test_full_is_the_same_run_whatever_the_adapter_would_be(assets, tmp_path, capsys):
    full = command(assets, tmp_path / "run", "--method", "full", "--steps", 1)
    assert unfreeze.main([*full, "--adapter", "lora"]) == 0 and unfreeze.main(full) == 0
    assert "is finished and kept" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="has no adapter but a whole model"):
        load_adapter(tiny_model(), tmp_path / "run")


# ---- what a run measures and when --------------------------------------------------------------------------


@pytest.mark.parametrize("every, steps", [(0, [0, 51, 52]), (3, [0, 3, 6, 7]), (100, [0, 7])])
def test_validation_comes_as_often_as_asked_for_and_selects(every, steps, assets, tmp_path):
    data = write_task(tmp_path / "data", "xnli")  # 3 steps an epoch
    options = ["--steps", steps[-1], "--eval-every", every]
    assert unfreeze.main(task_command("xnli", assets, data, tmp_path / "run", *options)) == 0
    found = validations_of(tmp_path / "run")
    assert list(found) == steps
    results = results_of(tmp_path / "run")
    assert found[results["kept_step"]] == results["validation"]["accuracy"] == max(found.values())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """All that a run has trained, in float64."""
    files = [*out.glob("*/*.bin"), *out.glob("model/*.safetensors")]
    found = [torch.load(path) if path.suffix == ".bin" else load_file(path) for path in files]
    return {name: value.double() for weights in found for name, value in weights.items()}


@pytest.mark.parametrize("options", ["--method gu", "--method rev --adapter lora", "--method full"])
def test_averaging_tests_the_mean_of_the_weights_at_the_validations(options, assets, tmp_path):
    shutil.copytree(assets / "data", tmp_path / "data")
    shutil.copy(tmp_path / "data/validation.en.jsonl", tmp_path / "data/test.de.jsonl")
    shared = [*options.split(), "--decay", "constant", "--data", tmp_path / "data"]  # the steps do not count
    found = {}
    for name, more in {"4": "--steps 4 --eval-every 100", "8": "--steps 8 --eval-every 100",
                       "9": "--eval-every 100", "last": "--eval-every 100 --average",
                       "best": "--eval-every 4", "mean": "--eval-every 4 --average"}.items():
        assert unfreeze.main(command(assets, tmp_path / name, *shared, *more.split())) == 0
        found[name] = weights_of(tmp_path / name)
    for name, value in found["mean"].items():
        snapshots = torch.stack([found[steps][name] for steps in "489"])
        torch.testing.assert_close(value, snapshots.mean(0), rtol=1e-6, atol=1e-7)
        assert torch.equal(found["last"][name], snapshots[-1])  # the mean of a single one
    assert all(any(not torch.equal(found["mean"][name], found[steps][name]) for name in found["mean"])
               for steps in ("4", "8", "9", "best"))
    best, mean = results_of(tmp_path / "best"), results_of(tmp_path / "mean")
    assert mean["settings"]["average"] and mean["kept_step"] is None
    assert mean["untrained"] == best["untrained"]
    assert mean["validation"] == mean["scores"]["de"]  # the same rows
    for kind in ("train", "open", "fisher"):  # training is the same
        assert events_of(tmp_path / "mean", kind) == events_of(tmp_path / "best", kind)
    assert validations_of(tmp_path / "mean") == validations_of(tmp_path / "best")


def test_a_stopped_run_with_averaging_goes_on_to_the_same_bits(assets, tmp_path, monkeypatch):
    options = ["--eval-every", 2, "--save-every", 3, "--average"]
    assert unfreeze.main(command(assets, tmp_path / "whole", *options)) == 0
    for status in (130, 130, 0):  # from the checkpoints after 3 and 6 steps to the end
        with monkeypatch.context() as patch:
            cut_off(patch, [4])
            assert unfreeze.main(command(assets, tmp_path / "run", *options)) == status
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_no_steps_test_the_untrained_model(assets, tmp_path):
    data = write_task(tmp_path / "data", "xquad")
    assert unfreeze.main(task_command("xquad", assets, data, tmp_path / "run", "--steps", 0)) == 0
    results = results_of(tmp_path / "run")
    assert results["steps"] == 0 and results["order"] == [] and results["validation"] == results["untrained"]


def test_results_do_not_depend_on_the_progress_bar_or_on_what_is_measured(assets, tmp_path):
    outcomes = []
    for name, options in (("a", "--fisher-every 1"), ("b", "--fisher-every 5"), ("c", "--save-every 1")):
        arguments = command(assets, tmp_path / name, "--method", "fun", *options.split())
        if name == "a":  # on a terminal
            ours, theirs = pty.openpty()
            termios.tcsetwinsize(theirs, (24, 120))
            run = subprocess.run([sys.executable, HERE / "unfreeze.py", *arguments], timeout=300,
                                 stdout=subprocess.DEVNULL, stderr=theirs)
            shown = os.read(ours, 2**16).decode()
            assert "9/9" in shown and "loss" in shown and "open 4/4" in shown
        else:
            run = script(arguments)
            assert not run.stderr and "step 9 of 9: loss" in run.stdout
        assert run.returncode == 0
        files = outcome(tmp_path / name)
        del files["results.json"]["settings"], files["log.jsonl"]
        outcomes.append(files)
    assert outcomes[0] == outcomes[1] == outcomes[2]


# ---- several runs ------------------------------------------------------------------------------------------


def test_a_run_is_called_after_its_data_where_the_task_has_none_of_its_own():
    def name(*arguments: str) -> str:
        return str(unfreeze.run_folder(unfreeze.parse([*arguments])))

    assert name("classify", "--model", "m", "--data", "some/where/") == "runs/classify-m-where-gu-0"
    assert name("classify", "--model", "demo/model", "--data", "demo/data") == "runs/demo-gu-0"
    assert name("xnli", "--data", "some/where") == "runs/xnli-xlm-roberta-base-gu-0"
    assert name("xnli", "--average") == "runs/xnli-xlm-roberta-base-average-gu-0"
    assert name("mlm", "--language", "th", "--data", "x") == "runs/mlm-xlm-roberta-base/th"


def test_several_methods_and_seeds_are_single_runs_and_then_the_table(
        assets, tmp_path, capsys, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    several = command(assets, None, "--method", "gu rev", "--seed", "1 0")
    assert unfreeze.main(several) == 0
    table = re.sub(" +", " ", capsys.readouterr().out)
    assert "| | gu | rev |\n" in table and "| seeds | 2 | 2 |\n" in table
    assert unfreeze.main(command(assets, Path("alone"), "--method", "rev", "--seed", 1)) == 0
    assert sorted(os.listdir("runs")) == [f"classify-model-data-{method}-{seed}"
                                          for method in ("gu", "rev") for seed in (0, 1)]
    assert outcome(Path("runs/classify-model-data-rev-1")) == outcome(Path("alone"))
    refused([*several, "--out", "elsewhere"], "leave --out out, and name every run once")
    refused([*several, "--seed", "1 1"], "name every run once")
    refused([*several, "--method", "gu top"], "'top'")


def test_the_top_block_first_is_another_run_where_it_differs(assets, tmp_path, capsys, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    arguments = command(assets, None, "--seed", 3)
    both = [*arguments, "--method", "standard gu fun rev rand", "--first", "top", "--fisher-every", "9"]
    assert unfreeze.main(both) == 0 and unfreeze.main([*arguments, "--method", "rev"]) == 0
    assert sorted(os.listdir("runs")) == [f"classify-model-data-{name}-3" for name in (
        "gu", "rev", "standard", "top-fun", "top-rand", "top-rev")]
    orders = {path.name[20:-2]: results_of(path)["order"] for path in Path("runs").iterdir()}
    assert orders["top-rev"] == [[0, 3], [2, 0], [4, 1], [6, 2]]
    assert orders["rev"] == [[0, 0], [2, 1], [4, 2], [6, 3]]
    assert orders["top-fun"][0] == orders["top-rand"][0] == orders["gu"][0] == [0, 3]
    fisher = events_of(Path("runs/classify-model-data-top-fun-3"), "fisher")
    assert [event["step"] for event in fisher] == [0, 2, 4, 9]  # reports at 0 and 9, choices at 2 and 4
    frozen = {0, 1, 2}
    for event, (_, opened) in zip(fisher[1:3], orders["top-fun"][1:]):
        assert opened == max(frozen, key=event["trace"].__getitem__)
        frozen.remove(opened)
    out = ["--out", "runs/classify-model-data-rev-3"]
    refused([*arguments, "--method", "rev", "--first", "top", *out],
            "holds a finished run with --first None, not top")
    assert unfreeze.main([*arguments, "--method", "gu", "--first", "top", "--fisher-every", "9"]) == 0
    again = ["--method", "lpft standard", "--first", "top", "--fisher-every", "9"]
    assert unfreeze.main([*arguments, *again]) == 0
    assert "standard-3 is finished and kept" in capsys.readouterr().out  # the same run either way
    assert "classify-model-data-lpft-3" in os.listdir("runs")


def test_all_makes_every_run_once_continues_and_ends_in_the_table(assets, tmp_path, monkeypatch):
    data = write_task(tmp_path / "data", "xcopa")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"VIRTUAL_ENV": "active", "PATH": path}

    def run_all(*options) -> subprocess.CompletedProcess:
        arguments = task_command("xcopa", assets, data, None, *options)
        return subprocess.run(["bash", HERE / "run.sh", "xcopa", "all", *arguments[1:]], cwd=tmp_path,
                              text=True, capture_output=True, env=environment)

    shared = ["--adapter", "lora", "--train-examples", 20, "--save-every", 2]
    options, single = ["--method", "lpft gu", "--seed=0 1", *shared], ["--method", "gu", "--seed", 1, *shared]
    with monkeypatch.context() as patch:
        cut_off(patch, [4])
        interrupted = tmp_path / "runs/xcopa-model-lora-20-gu-1"
        assert unfreeze.main(task_command("xcopa", assets, data, interrupted, *single)) == 130
    first = run_all(*options)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("continuing from step 2") == 1
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == [f"xcopa-model-lora-20-{method}-{seed}" for method in ("gu", "lpft") for seed in (0, 1)]
    before = [(path, path.stat().st_mtime_ns) for path in (tmp_path / "runs").rglob("*")]
    again = run_all(*options)
    assert again.returncode == 0 and again.stdout.count("is finished and kept") == 4
    assert before == [(path, path.stat().st_mtime_ns) for path in (tmp_path / "runs").rglob("*")]
    assert "|  " in again.stdout and "lpft" in again.stdout.split("is finished and kept")[-1]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a single run has the same name
    assert unfreeze.main(task_command("xcopa", assets, data, None, *single)) == 0
    assert os.listdir("runs") == ["xcopa-model-lora-20-gu-1"]
    refusal = run_all("--out", "x")
    one_error(refusal.returncode, refusal.stderr, "error: a comparison has folders of its own")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Kill runs at random instants and compare how they end.")
    arguments.add_argument("--kill", type=int, required=True, metavar="N", help="how many runs")
    with tempfile.TemporaryDirectory() as temporary:
        number, good = arguments.parse_args().kill, 0
        for what, same in survive(make_assets(Path(temporary, "assets")), Path(temporary), number):
            good += same
            print(f"{what}: {'identical' if same else 'DIFFERENT'}", flush=True)
    print(f"{good} of {number} killed runs end in the very bits of a run left alone")
    sys.exit(good < number)
