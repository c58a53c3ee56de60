"""A run's folder: one process at a time, continued where it was stopped, written whole or not at all.

    run = Run(run_folder(settings), identity_of(asdict(settings), fingerprint(rows)))
    state = restore_state(run, learned, optimizer, unfreezer) or run.start_anew()
    run.log("open", step, blocks=[11]); save_state(run, learned, optimizer, unfreezer, state)
    run.finish(results)

The log, checkpoint and results of extras/MANUAL.md, and what a run prints of its settings and scores.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import textwrap
from pathlib import Path
from statistics import mean

import torch
import transformers
from torch import nn
from tqdm import tqdm

from adapters import load_tensors, save_tensors, write_atomically
from extras.rows import UserError
from tasks import TASKS


def run_folder(settings) -> Path:
    """Where the run goes: a new folder, or one that holds a run."""
    kind = "-lora" if settings.adapter == "lora" else ""
    kind += f"-{settings.train_examples}" if settings.train_examples else ""
    kind += f"-{settings.fisher_labels}" if settings.fisher_labels != "sampled" else ""
    kind += f"-{settings.first}" if settings.first else ""
    kind += "-average" * settings.average
    kind += "-no-language-adapters" * (settings.language_adapters == "none" and settings.method != "full")
    task = TASKS[settings.task]
    run = f"/{settings.language}" if task.trains_language else f"{kind}-{settings.method}-{settings.seed}"
    model, data = Path(settings.model), Path(settings.data or "")
    name = f"{settings.task}-{model.name}"
    if not task.trains_language and not task.hub:
        is_demo = model.parts[-2:] == ("demo", "model") and data.parts[-2:] == ("demo", "data")
        name = "demo" if is_demo else f"{name}-{data.resolve().name}"
    out = Path(settings.out or f"runs/{name}{run}")
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if found and not is_our_log(out / "log.jsonl"):
        raise UserError(f"{out} holds files that are not a run's: choose another --out")
    return out


def is_our_log(path: Path) -> bool:
    """Whether it begins, as far as it goes, with an event of a run."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'{"event": "'.startswith(file.read(11))


def fingerprint(rows: dict[str, list[dict]]) -> str:
    """Of all rows, before any sample is drawn, so that it is the same for every seed."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


DATA = "data of fingerprint"  # a key of the identity, as it reads in "a run with data of fingerprint 1a2b"


def identity_of(settings: dict, data: str | None) -> dict:
    """All that shaped a run, by the names that a user knows."""
    return {f"--{name.replace('_', '-')}": value for name, value in settings.items()} | {DATA: data}


def first_difference(then: dict, now: dict) -> str | None:
    """The first setting of two runs, data included, that lets their results differ, if there is one."""
    without_effect = ("--out", "--overwrite", "--save-every", "--device", "--data")
    for name, value in now.items():
        if name not in then:
            return f"no {name} (an earlier version's)"
        if then[name] != value and name not in without_effect:
            return f"{name} {then[name]}, not {value}"


class Run:
    """A run's folder, this process's alone until it ends, however it ends: log, checkpoint and results.

    identity: what the run is told by. Knows files and nothing of training. Raises UserError if another
    process is at work there."""

    def __init__(self, out: Path, identity: dict):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.identity = out, identity
        self.log_file = (out / "log.jsonl").open("ab", buffering=0)
        try:
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {out}: let it finish, or choose another --out")

    def is_finished(self) -> bool:
        """Whether the folder holds this very run, finished; another one is refused unless --overwrite."""
        path = self.out / "results.json"
        if self.identity["--overwrite"] or not path.is_file():
            return False
        try:
            results = json.loads(path.read_bytes())
            other = first_difference(identity_of(results["settings"], results.get("data")), self.identity)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: pass --overwrite to start anew") from None
        if other:
            raise UserError(f"{self.out} holds a finished run with {other}: choose another --out or pass "
                            "--overwrite")
        return True

    def log(self, event: str, step: int, **fields) -> None:
        line = (json.dumps({"event": event, "step": step} | fields) + "\n").encode()
        while line:  # unbuffered: a full disk may take a part of it
            line = line[self.log_file.write(line) :]

    def save(self, tensors: dict) -> None:
        """Write checkpoint.pt, which knows how long the log is."""
        os.fsync(self.log_file)
        save_tensors(self.out / "checkpoint.pt", tensors | {
            "identity": self.identity, "log_bytes": os.fstat(self.log_file.fileno()).st_size})

    def start_anew(self) -> dict:
        """Clear away what an earlier run left in its folder; returns the loop's state at the start."""
        for name in ("checkpoint.pt", "results.json"):
            (self.out / name).unlink(missing_ok=True)
        for name in ("adapter", "head", "model", "predictions"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        os.truncate(self.out / "log.jsonl", 0)
        # kept: the best weights or, with --average, their mean over `count` validations (None: those at the
        # start); beside these, from the first validation on: untrained and, but with --average, validation
        return {"step": 0, "losses": [], "averages": [], "seconds": 0, "kept": None, "kept_step": None,
                "count": 0}

    def finish(self, results: dict) -> None:
        """Write results.json, the last file of a run: it marks the run as finished."""
        text = json.dumps(results, indent=2, ensure_ascii=False)
        write_atomically(self.out / "results.json", text.encode() + b"\n")
        (self.out / "checkpoint.pt").unlink(missing_ok=True)
        conclude(self.out, results)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


def save_state(run: Run, learned: dict, optimizer, unfreezer, state: dict) -> None:
    """Write all that the rest of the run depends on, except the frozen base model."""
    rng = {"cpu": torch.get_rng_state()}
    if next(iter(learned.values())).is_cuda:
        rng["cuda"] = torch.cuda.get_rng_state()
    run.save({"learned": copied(learned), "optimizer": optimizer.state_dict(), "rng": rng,
              "unfreezer": unfreezer.state_dict(), "state": state})


def restore_state(run: Run, learned: dict, optimizer, unfreezer) -> dict | None:
    """Continue from checkpoint.pt if there is one; returns the loop's state, or None."""
    path, log, identity = run.out / "checkpoint.pt", run.out / "log.jsonl", run.identity
    if identity["--overwrite"] or not path.exists():
        return None
    device = next(iter(learned.values())).device
    size = sum(parameter.numel() * parameter.element_size() for parameter in learned.values())
    try:
        saved = load_tensors(path, 5 * size + 2**24, device)  # weights, kept weights, AdamW's two moments
        if other := first_difference(saved["identity"], identity):
            raise UserError(f"{path} is of a run with {other}: give the same options and data, or pass "
                            "--overwrite to start anew")
        state = saved["state"]
        assert 0 < state["step"] <= identity["--steps"] and log.stat().st_size >= saved["log_bytes"]
        assert not identity["--average"] or (state["count"] > 0) == (state["kept"] is not None)
        put(saved["learned"] if state["kept"] is None else state["kept"], learned)  # both must fit
        put(saved["learned"], learned)
        optimizer.load_state_dict(saved["optimizer"])
        assert all(value.shape in ((), parameter.shape) for parameter, moments in optimizer.state.items()
                   for value in moments.values())
        saved["unfreezer"]["generator"] = saved["unfreezer"]["generator"].cpu()
        unfreezer.load_state_dict(saved["unfreezer"])
        torch.set_rng_state(saved["rng"]["cpu"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng"]["cuda"].cpu())
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file provokes
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} ({type(error).__name__}) or log.jsonl is damaged: pass --overwrite to start "
                        "anew") from None
    os.truncate(log, saved["log_bytes"])  # what was logged after the checkpoint is done again
    print(f"continuing from step {state['step']}", flush=True)
    return state


def copied(learned: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learned.items()}


@torch.no_grad()
def put(values: dict[str, torch.Tensor], learned: dict[str, nn.Parameter]) -> None:
    for name, parameter in learned.items():
        assert values[name].shape == parameter.shape, name
        parameter.copy_(values[name])


def is_out_of_memory(error: Exception) -> bool:
    """Also in the words of PyTorch's allocator on a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


# ------------------------------------------------------------------------------------------------------------
# What a run says
# ------------------------------------------------------------------------------------------------------------


def introduce(settings, splits: dict, encoded: dict, blocks: int, stride: int, last_opening: int,
              languages: dict, sources: dict, device: torch.device) -> None:
    """Print the settings that a reader of the scores needs; results.json has all."""
    first = ", top block first" if settings.first else ""
    print(f"\n{settings.task}, {settings.method}{first}: {len(splits['train'])} training examples in "
          f"{len(encoded['train'])} sequences,")
    tell(f"{settings.steps} steps of {settings.batch_size}, lr {settings.lr:g} {settings.decay}, k "
         f"{settings.k}, {blocks} blocks, {settings.max_length} tokens, seed {settings.seed}, {device}, "
         f"{settings.precision},")
    tested = " (tested is the mean of their weights)" if settings.average else ""
    tell(f"{len(splits['validation'])} validation examples every {stride} steps{tested}; test languages "
         f"{' '.join(languages) or 'none'}")
    is_mixed = settings.language_adapters.startswith("auto,")
    own = [language + f" ({place})" * (is_mixed and not place.startswith("AdapterHub/"))
           for language, place in sources.items()]
    lacking = [language for language, stacked in languages.items() if language != stacked]
    if own:
        tell(f"language adapters: {' '.join(own)}" + (
             f"; none for {' '.join(lacking)}, tested with the English one" if lacking else ""))
    elif languages and settings.language_adapters != "none" and settings.method != "full":
        tell(f"no language adapters for {settings.model}; --language-adapters FOLDER adds them")
    if unreachable := TASKS[settings.task].unreachable:
        counts = {name: unreachable(rows, encoded[name]) for name, rows in splits.items()}
        tell("answers in no window + answers that begin or end inside a token, of all: " + ", ".join(
             f"{name} {lost} + {inexact} of {len(splits[name])}" for name, (lost, inexact) in counts.items()))
    if last_opening >= settings.steps > 0:
        tell(f"note: k {settings.k} would open the last block at step {last_opening} of {settings.steps}; "
             "lower --k")
    sys.stdout.flush()


def tell(text: str) -> None:
    print(textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False))


def mean_of_targets(scores: dict[str, dict]) -> dict:
    """By metric, over the languages other than English; empty if there are none."""
    targets = [score for language, score in scores.items() if language != "en"]
    return {name: mean(score[name] for score in targets) for name in targets[0]} if targets else {}


def describe(settings, scores: dict[str, dict]) -> dict:
    """The part of results.json that follows from settings and scores."""
    return {
        "task": settings.task, "method": settings.method,
        "adapter": "none" if settings.method == "full" else settings.adapter,
        "model": settings.model, "seed": settings.seed, "k": settings.k, "steps": settings.steps,
        "scores": scores,
        "average": mean_of_targets(scores),
        "settings": dataclasses.asdict(settings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__}}


def conclude(out: Path, results: dict) -> None:
    metric = next(iter(results["validation"]))
    line = f"validation {results['validation'][metric]:.1f} (untrained {results['untrained'][metric]:.1f})"
    if results["scores"]:
        line += f"; English {results['scores']['en'][metric]:.1f}"
    if results["average"]:
        line += f", mean of {len(results['scores']) - 1} target languages {results['average'][metric]:.1f}"
    tell(f"{out}: {metric}: {line}; {results['wall_seconds']:.0f} s")


def say(progress: tqdm, text: str, done: int) -> None:
    """Beside the bar; off a terminal, where there is none, in a line every hundred steps and at the end."""
    progress.set_postfix_str(text)
    if progress.disable and (done % 100 == 0 or done == progress.total):
        print(f"step {done} of {progress.total}: {text}", flush=True)


def report_trace(run: Run, step: int, trace: list[float], trainable: list[int], averages: list[float]):
    """Log and print tr(F): a number per block, bottom to top, and its mean over the open blocks, the paper's
    curve, which is appended to `averages`. The log has the moving average over ten measurements too."""
    average = mean(trace[block] for block in trainable) if trainable else None
    averages += [average] if trainable else []
    smooth = mean(averages[-10:]) if averages else None
    run.log("fisher", step, trace=trace, trainable=trainable, average=average, moving_average=smooth)
    if step == 0:
        names = "".join(f"{'b' + str(block):>4} " for block in range(len(trace)))
        tqdm.write("tr(F) of each block, b0 at the bottom, * open; average: of the open blocks")
        tqdm.write(f" step  average |{names}")
    row = "".join(f"{short(value):>4}" + " *"[block in trainable] for block, value in enumerate(trace))
    tqdm.write(f"{step:>5} {'-' if average is None else format(average, '.3g'):>8} |{row}")


def short(value: float) -> str:
    """Two digits in at most four characters, or one with an exponent."""
    text = f"{value:.2g}".removeprefix("0") or "0"
    return text if len(text) <= 4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
