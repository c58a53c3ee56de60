"""Benchmarks: every figure is a ratio within one run, since absolute seconds belong to one machine.

    python extras/bench.py steps     # a training step by the number of open blocks, and where its time goes;
                                     # --data FOLDER adds epochs of xnli on it;
                                     # --size base: XLM-R base by batch and precision instead, for a GPU
    python extras/bench.py peer      # forward pass, training step and memory against AdapterHub's library,
                                     # in an environment that has adapters==1.3.0
    python extras/bench.py fisher    # tr(F) against a training pass, a loop over examples and torch.func
    python extras/bench.py order     # how many examples it takes to rank the blocks (after extras/demo.py)

The models have the demo's shape (12 layers of 384, random weights), a batch 32 rows of random tokens, but for
--size base and --data. A round runs every variant once, so that a slow spell of the machine falls on all;
figures are medians over rounds. --quick only shows that a benchmark runs: its figures mean nothing.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from operator import truediv
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (XLMRobertaConfig, XLMRobertaForSequenceClassification,
                          XLMRobertaForTokenClassification)

ROOT = Path(__file__).parent.parent
ROWS, ROUNDS, BATCHES, EXAMPLES, LAYERS = 32, 15, 64, 2048, 12  # BATCHES: of epoch; EXAMPLES: of order
STEPS = 1166  # two epochs of 18,652 pairs in batches of 32, in which 11 of 12 blocks are chosen by tr(F)
OPEN_BLOCKS = (1, 2, 3, 6, 9, 12)  # from the top, as gradual unfreezing opens them


def new_model(num_labels: int = 35, kind: type = XLMRobertaForSequenceClassification) -> torch.nn.Module:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return kind(XLMRobertaConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=514, num_labels=num_labels)).to(device)


def new_batch(model: torch.nn.Module, tokens: int) -> dict:
    return {"input_ids": torch.randint(5, 1000, (ROWS, tokens), device=model.device),
            "attention_mask": torch.ones(ROWS, tokens, dtype=torch.long, device=model.device),
            "labels": torch.randint(35, (ROWS,), device=model.device)}


def median_ratios(variants: dict, base: str, rounds: int | None = None) -> tuple[dict[str, float], float]:
    """Each variant's time over that of `base` (median over rounds), and the time of `base` in ms."""
    seconds = {name: [] for name in variants}
    for round_ in range((rounds or ROUNDS) + 1):
        for name, run in list(variants.items())[:: 1 if round_ % 2 else -1]:
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = {name: median(map(truediv, seconds[name], seconds[base])) for name in variants}
    return ratios, 1000 * median(seconds[base])


def steps() -> None:
    """Print the time of a training step (forward, backward, clip, AdamW) by the number of open blocks."""
    from adapters import add_task_adapters
    from unfreeze import keep_freed_memory
    keep_freed_memory()
    model = new_model()
    blocks = add_task_adapters(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: dict, count: int, training: bool) -> None:
        model.train(training)
        open_top(blocks, count)
        model(**batch).loss.backward()
        update(optimizer)

    print(f"a step's time over standard's (12 open), and in eval mode over the bound of its matrix products; "
          f"12 layers x 384, {ROWS} rows, {describe(model)}")
    print("| tokens a row | " + " | ".join(f"{count} open" for count in OPEN_BLOCKS) + " | standard | matrix "
          "products a second | peak memory, 1 open over 12 |")
    print("|---|" + "---|" * len(OPEN_BLOCKS) + "---|---|---|")
    for tokens in (16, 64, 128):
        batch, (multiply, flops) = new_batch(model, tokens), matrix_product(model, ROWS * tokens)
        run = {count: partial(step, batch, count, True) for count in OPEN_BLOCKS}
        still = {-count: partial(step, batch, count, False) for count in OPEN_BLOCKS}  # in eval mode
        memory = peak_memory(run[1]) / peak_memory(run[12])
        ratios, standard = median_ratios(run, base=12)
        over_product, product_ms = median_ratios(still | {0: multiply}, base=0)
        bounds = [over_product[-count] * flops / flops_of(still[-count]) for count in OPEN_BLOCKS]
        cells = (f"{ratios[count]:.2f}, {bound:.2f}" for count, bound in zip(OPEN_BLOCKS, bounds))
        print(f"| {tokens} | {' | '.join(cells)} | {standard:.0f} ms | {flops / product_ms / 1e6:.0f} GFLOP "
              f"| {memory:.2f} |", flush=True)
    where(partial(step, new_batch(model, 64)))


# Tokens of MNLI's training pairs in XLM-R's vocabulary, cut at 128: their 0th, 5th, … 100th percentile.
MNLI_TOKENS = (6, 17, 21, 24, 26, 29, 31, 34, 36, 39, 41, 44, 46, 49, 52, 56, 59, 64, 70, 80, 128)


def pairs_like_mnli(count: int) -> list[dict]:
    """Examples of random tokens, as long as MNLI's."""
    lengths = torch.tensor(MNLI_TOKENS).float().quantile(torch.rand(count)).long().tolist()
    return [{"input_ids": torch.randint(5, 1000, (length,)), "attention_mask": torch.ones(length).long(),
             "labels": length % 3} for length in lengths]


def base() -> None:
    """Print time and memory of a step of XLM-R base (random weights) by precision, open blocks and batch."""
    import unfreeze
    from adapters import add_task_adapters
    from fisher import fisher_trace
    from extras import graphs, packing
    from tasks import TASKS, pad, predict, tokens_of
    unfreeze.keep_freed_memory()
    device, task = unfreeze.device_of(unfreeze.parse(["xnli"])), TASKS["xnli"]
    torch.use_deterministic_algorithms(True)  # as a run
    torch.manual_seed(0)
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig(
        vocab_size=250_002, num_hidden_layers=LAYERS, max_position_embeddings=514, type_vocab_size=1,
        num_labels=3)).to(device)
    blocks = add_task_adapters(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, weight_decay=0.0, fused=True)
    packing.allow_packing(model)
    tokenizer = SimpleNamespace(pad_token_id=1, pad_token_type_id=0, padding_side="right")
    make = partial(pad, tokenizer=tokenizer)
    collate = partial(packing.batch_on, device, model, make)
    collate_wide = partial(packing.batch_on, device, model, partial(graphs.widened, make, tokenizer, 128),
                           multiple=graphs.TOKENS)
    batches = [sorted(pairs_like_mnli(4 * ROWS), key=tokens_of) for _ in range(8)]

    def run(batch: dict, precision: str) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = task.loss(model, batch)
        loss.backward()
        return loss.detach()

    def step(kind: str, count: int, precision: str) -> None:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        model.train()
        open_top(blocks, count)
        rows = batches[turn[kind] % len(batches)]  # all kinds the same
        turn[kind] += 1
        if kind == "packed, CUDA graph":
            graphed[precision, count](collate_wide(rows))
        else:
            batch = collate(rows, is_packed=kind == "packed")
            run(padded_to_128(batch) if kind == "padded to 128" else batch, precision)
        update(optimizer)

    kinds, turn = ["padded to 128", "padded to the longest", "packed"], defaultdict(int)
    if device.type == "cuda":
        kinds.append("packed, CUDA graph")
    real = mean(sum(map(tokens_of, batch)) for batch in batches)
    print("ms a step (over padding to 128), and GiB at the peak beyond the weights, by kind of batch; XLM-R "
          f"base, {4 * ROWS} pairs as long as MNLI's ({real:.0f} tokens a batch), {describe(model)}")
    print("| precision | open | " + " | ".join(kinds) + " | peak memory |")
    print("|---|---|---|" + "---|" * len(kinds))
    for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):
        for count in (LAYERS, 1):
            steps = {kind: partial(step, kind, count, precision) for kind in kinds}
            graphed = {(precision, count): graphs.Graphed(partial(run, precision=precision), learned)}
            ratios, ms = median_ratios(steps, kinds[0])
            memory = [peak_memory(steps[kind]) / 2**30 for kind in kinds[:3]]  # a graph's is held
            print(f"| {precision} | {count} | " + " | ".join(
                f"{ratios[kind] * ms:.1f} ({ratios[kind]:.2f})" for kind in kinds) + " | "
                + ", ".join(f"{gib:.2f}" for gib in memory) + " |", flush=True)
    precision = unfreeze.PRECISION[device.type]
    step("packed", LAYERS, precision)
    if device.type == "cuda":
        for count in (LAYERS, 1):
            with torch.profiler.profile() as profile:
                step("packed", count, precision)
                torch.cuda.synchronize()
            events = profile.key_averages()
            launches = sum(event.count for event in events if "LaunchKernel" in event.key)
            busy = sum(event.self_device_time_total for event in events) / 1000
            print(f"packed, {precision}, {count} open: {launches} launches, {busy:.1f} ms on the device")
    tests = [example for batch in batches for example in batch] * (5 if device.type == "cuda" else 1)
    one = collate(batches[0], is_packed=False)
    open_top(blocks, LAYERS)
    ratios, ms = median_ratios({
        "pass": lambda: torch.autograd.grad(model.eval()(**one).loss, learned),
        "trace": lambda: fisher_trace(model, 4 * [one], blocks),
        "packed": lambda: predict(task, model, tests, collate, nullcontext),
        "padded": lambda: predict(task, model, tests, partial(collate, is_packed=False), nullcontext)},
        base="pass", rounds=min(5, ROUNDS))
    print(f"{precision}: tr(F) of four batches over four padded passes {ratios['trace'] / 4:.2f}; testing "
          f"{len(tests)} pairs {ratios['packed'] * ms:.0f} ms, {ratios['packed'] / ratios['padded']:.2f} of "
          "the same padded")


def padded_to_128(batch: dict) -> dict:
    """[B, T] -> [B, 128]"""
    ids, add = batch["input_ids"], (0, 128 - batch["input_ids"].shape[1])
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return batch | {"input_ids": torch.nn.functional.pad(ids, add, value=1),
                    "attention_mask": torch.nn.functional.pad(mask, add)}


def update(optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def open_top(blocks: list, count: int) -> None:
    for index, block in enumerate(blocks):
        block.requires_grad_(index >= len(blocks) - count)


def describe(model: torch.nn.Module) -> str:
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else model.device
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def matrix_product(model: torch.nn.Module, rows: int) -> tuple:
    """What the bound is taken from: the two products of a layer's feed-forward part, and their FLOPs."""
    inputs = torch.randn(rows, 384, device=model.device), torch.randn(rows, 1536, device=model.device)
    weights = torch.randn(1536, 384, device=model.device), torch.randn(384, 1536, device=model.device)

    def multiply() -> None:
        for _ in range(4):
            for x, weight in zip(inputs, weights):
                torch.nn.functional.linear(x, weight)

    return multiply, flops_of(multiply)


def flops_of(run) -> int:
    """FLOPs of all matrix products that `run` computes, attention's included."""
    aten = torch.ops.aten
    attention = {  # not counted by PyTorch on the CPU
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda gradient, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(gradient, q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops()


KINDS = {  # by a part of an operation's name, the first that fits
    "matrix products": ("mm", "linear"), "attention": ("scaled_dot_product", "softmax"),
    "dropout": ("dropout", "bernoulli"), "LayerNorm": ("layer_norm",), "GELU": ("gelu",)}


def where(step) -> None:
    """Print which kinds of operations a step's time goes to."""
    columns = {"1 open, eval": (1, False), "12 open, eval": (12, False),
               "1 open": (1, True), "12 open": (12, True)}
    shares = {}
    for name, (count, training) in columns.items():
        step(count, training)
        with torch.profiler.profile() as profile:
            step(count, training)
        shares[name] = dict.fromkeys([*KINDS, "all else"], 0.0)
        events = profile.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        for event in events:
            kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)),
                        "all else")
            shares[name][kind] += event.self_cpu_time_total / total
    print(f"\n| where a step of {ROWS} x 64 tokens spends its time | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for kind in [*KINDS, "all else"]:
        print(f"| {kind} | " + " | ".join(f"{100 * share[kind]:.0f} %" for share in shares.values()) + " |")


def epoch(data: str, folder: str) -> None:
    """Print the time of an epoch of xnli by padding and method, and of testing all languages, on a CPU."""
    import unfreeze
    from fisher import fisher_trace
    from extras import packing
    from tasks import TASKS, load_data, predict, sampled, tokens_of
    unfreeze.keep_freed_memory()
    task = TASKS["xnli"]
    settings = unfreeze.parse(["xnli", "--data", data, "--model", folder, "--test-examples", str(2 * BATCHES),
                               "--train-examples", str(BATCHES * ROWS), "--batch-size", str(ROWS),
                               "--fisher-batches", "4", "--max-length", "128"])
    rows, labels = load_data(settings)
    splits = sampled(rows, settings)
    tokenizer, config = unfreeze.load_tokenizer(settings)
    model, blocks = unfreeze.build_model(settings, config, labels)
    packing.allow_packing(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, weight_decay=0.0, fused=True)
    examples = task.encode(splits["train"], tokenizer, 128, labels)
    batches = [sorted((examples[i] for i in chosen), key=tokens_of) for chosen in torch.randperm(
        len(examples), generator=torch.Generator().manual_seed(0)).split(ROWS)]
    collate = partial(packing.batch_on, torch.device("cpu"), model, partial(task.batch, tokenizer=tokenizer))
    padded = partial(collate, is_packed=False)

    def fixed(rows: list[dict]) -> dict:
        return padded_to_128(padded(rows))

    def step(rows: list[dict], batch_of, count: int) -> float:
        started = time.perf_counter()
        model.train()
        open_top(blocks, count)
        task.loss(model, batch_of(rows)).backward()
        update(optimizer)
        return time.perf_counter() - started

    def measure() -> float:
        started, generator = time.perf_counter(), torch.Generator().manual_seed(0)
        fisher_trace(model, unfreeze.fisher_batches(settings, examples, generator, padded), blocks)
        return time.perf_counter() - started

    seconds, computed, traces = defaultdict(float), defaultdict(int), []
    for i, batch in enumerate(batches):
        variants = {"padded to 128": (fixed, 12), "padded to the longest": (padded, 12),
                    "packed": (collate, 12), "packed, gu": (collate, min(12, 1 + i)),
                    "one block open, padded to 128": (fixed, 1), "one block open, packed": (collate, 1)}
        for name, (batch_of, count) in list(variants.items())[:: -1 if i % 2 else 1]:
            seconds[name] += step(batch, batch_of, count)
            width = {fixed: 128, padded: tokens_of(batch[-1])}.get(batch_of)
            computed[name] += len(batch) * width if width else sum(map(tokens_of, batch))
        if i % 8 == 0:
            traces.append(measure())
    fisher_seconds = 11 * median(traces) * len(batches) / STEPS  # of this many steps' share
    seconds["packed, fun at most"] = seconds["packed"] + fisher_seconds
    real = sum(map(tokens_of, examples))
    print(f"an epoch of {len(examples)} pairs of MNLI in batches of {ROWS}, {describe(model)}")
    print("| batches | time over padding to 128 | real tokens |\n|---|---|---|")
    for name in seconds:
        share = f"{100 * real / computed[name]:.0f} %" if name in computed else ""
        print(f"| {name} | {seconds[name] / seconds['padded to 128']:.2f} | {share} |")
    one_open = seconds["one block open, packed"] / seconds["one block open, padded to 128"]
    at_most = seconds["packed, fun at most"]
    print(f"\none block open, packed over padded to 128: {one_open:.2f}\nfun over gu at most "
          f"{at_most / seconds['packed, gu']:.2f}: every step as long as standard's, and 11 measurements of "
          f"tr(F) in {STEPS} steps, {100 * fisher_seconds / at_most:.1f} % of its time")
    many = examples[:128]
    _, ms = median_ratios({"collation": lambda: collate(sorted(many, key=tokens_of))}, base="collation")
    print(f"making a batch of {len(many)} pairs: {ms:.2f} ms")

    @torch.inference_mode()
    def in_file_order(rows: list[dict], batch_of) -> None:
        model.eval()
        for start in range(0, len(rows), 64):
            model(**batch_of(rows[start : start + 64]))

    tests = [task.encode(splits[language], tokenizer, 128, labels) for language in list(splits)[2:]]
    ratios, _ = median_ratios({
        "ours": lambda: [predict(task, model, rows, collate, nullcontext) for rows in tests],
        "longest": lambda: [in_file_order(rows, padded) for rows in tests],
        "128": lambda: [in_file_order(rows, fixed) for rows in tests]}, base="longest", rounds=1)
    print(f"\ntesting {len(tests)} languages, over batches of 64 in file order: {ratios['ours']:.2f} if "
          f"padded to the longest, {ratios['ours'] / ratios['128']:.2f} if padded to 128")


def peer() -> None:
    """Print time and memory over those of AdapterHub's library: a forward pass with language and task
    adapter, and a training step of standard."""
    try:
        import adapters as library
    except ImportError:
        sys.exit("error: peer needs AdapterHub's library, in an environment of its own (see STUDY.md)")
    specification = importlib.util.spec_from_file_location("our_adapters", ROOT / "adapters.py")
    ours = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(ours)
    plain, our_model, their_model = (new_model() for _ in range(3))
    ours.add_language_adapter(our_model, "en")
    ours.add_task_adapters(our_model)
    ours.set_language(our_model, "en")
    library.init(their_model)
    for name in ("en", "task"):
        with tempfile.TemporaryDirectory() as folder:
            ours.save_adapter(our_model, name, folder, with_head=False)
            their_model.load_adapter(folder)
    their_model.train_adapter(library.composition.Stack("en", "task"))
    models = {"ours": our_model, "library": their_model, "no adapter": plain}
    print(f"over the library's ({library.__version__}); 12 layers x 384, {ROWS} rows, {describe(plain)}")
    print("| tokens a row | forward | no adapter | library | training step | library | its peak memory | "
          "difference of logits |\n|---|---|---|---|---|---|---|---|")

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> None:
        model(**batch).loss.backward()
        update(optimizer)

    for tokens in (16, 64, 128):
        batch = new_batch(plain, tokens)
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            difference = (our_model(**batch).logits - their_model(**batch).logits).abs().max().item()
            forward, forward_ms = median_ratios(
                {name: partial(model, **batch) for name, model in models.items()}, "library", 2 * ROUNDS)
        steps = {}
        for name in ("ours", "library"):
            learned = [parameter for parameter in models[name].parameters() if parameter.requires_grad]
            steps[name] = partial(step, models[name].train(), torch.optim.AdamW(learned, lr=0.0), batch)
        training, training_ms = median_ratios(steps, base="library")
        memory = peak_memory(steps["ours"]) / peak_memory(steps["library"])
        print(f"| {tokens} | {forward['ours']:.3f} | {forward['no adapter']:.3f} | {forward_ms:.0f} ms | "
              f"{training['ours']:.3f} | {training_ms:.0f} ms | {memory:.3f} | {difference:.1e} |",
              flush=True)


def peak_memory(run) -> int:
    """The largest number of bytes held at a time by what `run` allocates."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - held
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def fisher() -> None:
    """Print what tr(F) costs, against what it needs at least, and against the other ways to it."""
    from adapters import add_task_adapters
    from fisher import fisher_diagonal, fisher_trace
    model = new_model().eval()
    blocks = add_task_adapters(model)
    learned = [parameter for block in blocks for parameter in block.parameters()]
    print(f"sampled labels; 12 layers x 384, {ROWS} rows, {describe(model)}; times, and the trace's peak "
          "memory, over those of one forward and backward pass through the same blocks; largest relative "
          "difference from the loop; the trace is of FUN's 4 batches, the first of which is checked for "
          "layers that do not see examples apart\n"
          "| tokens a row | trace | one batch | diagonal | loop over examples | torch.func | pass | memory | "
          "error |\n|---|---|---|---|---|---|---|---|---|")
    for tokens in (16, 64, 128):
        batch = new_batch(model, tokens)
        with torch.no_grad():
            p = model(**batch).logits.softmax(-1).cpu()
        y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0))[:, 0].to(model.device)

        def one_pass() -> None:
            torch.autograd.grad(model(**batch | {"labels": y}).loss, learned)

        def loop() -> torch.Tensor:
            total = torch.zeros(len(blocks), dtype=torch.float64)
            for i, label in enumerate(y):
                single = {key: value[i : i + 1] for key, value in batch.items() if key != "labels"}
                log_p = model(**single).logits.log_softmax(-1)[0, label]
                squares = [gradient.square().sum() for gradient in torch.autograd.grad(log_p, learned)]
                total += torch.stack(squares).view(len(blocks), -1).sum(1).double().cpu() / ROWS
            return total

        def functional() -> torch.Tensor:
            def log_p(parameters: dict, row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
                logits = torch.func.functional_call(model, parameters, (), {"input_ids": row[None]}).logits
                return logits.log_softmax(-1)[0].gather(0, label[None])[0]

            named = {name: parameter for name, parameter in model.named_parameters() if ".adapters." in name}
            gradients = torch.func.vmap(torch.func.grad(log_p), (None, 0, 0), randomness="same")(
                named, batch["input_ids"], y)
            return sum(gradient.square().sum() for gradient in gradients.values()) / ROWS

        traced = partial(fisher_trace, model, [batch], blocks)
        error = ((traced().cpu() - loop()) / loop()).abs().max().item()
        variants = {"trace": partial(fisher_trace, model, 4 * [batch], blocks), "one": traced,
                    "diagonal": partial(fisher_diagonal, model, [batch], blocks), "loop": loop,
                    "torch.func": functional, "pass": one_pass}
        assert abs(functional().item() / traced().sum().item() - 1) < 1e-4
        ratios, pass_ms = median_ratios(variants, base="pass", rounds=min(7, ROUNDS))
        memory = peak_memory(traced) / peak_memory(one_pass)
        print(f"| {tokens} | {ratios['trace'] / 4:.2f} | {ratios['one']:.2f} | {ratios['diagonal']:.2f} | "
              f"{ratios['loop']:.2f} | {ratios['torch.func']:.2f} | {pass_ms:.0f} ms | {memory:.2f} | "
              f"{error:.1e} |", flush=True)
    fisher_of_tags()


def fisher_of_tags(tokens: int = 64, classes: int = 17) -> None:
    """Print what tr(F) costs if every token has a label."""
    from adapters import add_task_adapters
    from fisher import fisher_trace
    model = new_model(classes, XLMRobertaForTokenClassification).eval()
    blocks = add_task_adapters(model)
    learned = [parameter for block in blocks for parameter in block.parameters()]
    batch = new_batch(model, tokens) | {"labels": torch.randint(classes, (ROWS, tokens), device=model.device)}
    variants = {"trace": partial(fisher_trace, model, 4 * [batch], blocks),
                "one": partial(fisher_trace, model, [batch], blocks),
                "pass": lambda: torch.autograd.grad(model(**batch).loss, learned)}
    ratios, pass_ms = median_ratios(variants, base="pass", rounds=min(7, ROUNDS))
    memory = peak_memory(variants["one"]) / peak_memory(variants["pass"])
    print(f"\na label of {classes} for each of {tokens} tokens: trace {ratios['trace'] / 4:.2f}, one batch "
          f"{ratios['one']:.2f}, pass {pass_ms:.0f} ms, memory {memory:.2f}", flush=True)


def order() -> None:
    """Print how well tr(F) of n examples ranks the blocks: Kendall's tau with the exact order of 2,048."""
    from transformers import AutoTokenizer
    from adapters import add_task_adapters
    print("mean Kendall tau with the order by the exact trace of 2,048 examples, over 50 draws of n examples")
    model = new_model(num_labels=3)
    ids = torch.randint(5, 1000, (EXAMPLES, 16), device=model.device)
    rank("random weights, random tokens, 3 classes", model, add_task_adapters(model),
         lambda chosen: {"input_ids": ids[chosen]})

    data = [json.loads(line) for line in (ROOT / "demo/data/train.en.jsonl").open(encoding="utf-8")]
    names = sorted({row["label"] for row in data})
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    torch.manual_seed(0)
    model = XLMRobertaForSequenceClassification.from_pretrained(ROOT / "demo/model", num_labels=len(names))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    blocks = add_task_adapters(model)
    rows = [data[i] for i in torch.randperm(len(data))]

    def utterances(chosen: torch.Tensor) -> dict:
        texts = [rows[i]["text"] for i in chosen]
        inputs = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        labels = torch.tensor([names.index(rows[i]["label"]) for i in chosen], device=model.device)
        return dict(inputs, labels=labels)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-4)
    for chosen in torch.arange(40 * ROWS).split(ROWS):
        model.train()(**utterances(chosen)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rank("the demo's model and data, 35 classes, after 40 steps of standard", model, blocks, utterances)


def rank(title: str, model: torch.nn.Module, blocks: list, examples) -> None:
    """The two curves for one model; `examples` gives the batch of some indices below 2,048."""
    from fisher import fisher_trace
    generator = torch.Generator().manual_seed(0)

    def traces(labels: str, size: int, epochs: int = 1) -> torch.Tensor:
        chosen = torch.cat([torch.randperm(EXAMPLES, generator=generator) for _ in range(epochs)])
        return torch.stack([fisher_trace(model, [examples(part)], blocks, labels, generator)
                            for part in chosen.split(size)])  # [epochs * 2048 / size, blocks]

    exact = traces("exact", ROWS).mean(0)
    curves = {"sampled": (traces("sampled", 1), 1), "official": (traces("official", ROWS, epochs=8), ROWS)}
    print(f"\n{title}\n\n| n | sampled | official, batches of {ROWS} |\n|---|---|---|")
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        cells = []
        for values, size in curves.values():
            draws = [values[torch.randperm(len(values), generator=generator)[: n // size]].sum(0)
                     for _ in range(50)] if size <= n <= size * len(values) // 2 else []
            cells.append(f"{mean(kendall_tau(draw, exact) for draw in draws):.3f}" if draws else "")
        print(f"| {n} | {' | '.join(cells)} |", flush=True)
    single, _ = curves["sampled"]  # [2048, blocks]
    shares = single.sort(0, descending=True).values.cumsum(0) / single.sum(0)
    print(f"\nthe largest of {EXAMPLES} examples, and the ten largest, are of a block's tr(F), bottom to "
          "top: " + ", ".join(f"{one:.1%} {ten:.1%}" for one, ten in zip(shares[0], shares[9])))


def kendall_tau(one: torch.Tensor, two: torch.Tensor) -> float:
    signs = (one[:, None] - one).sign() * (two[:, None] - two).sign()
    return signs.sum().item() / (len(one) * (len(one) - 1))


if __name__ == "__main__":
    benchmarks = {"steps": steps, "peer": peer, "fisher": fisher, "order": order}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=benchmarks)
    parser.add_argument("--data", help="for steps: a folder as unfreeze.py xnli takes it")
    parser.add_argument("--model", default=str(ROOT / "demo/model"), help="for steps with --data")
    parser.add_argument("--size", choices=["small", "base"], default="small", help="for steps: of the model")
    parser.add_argument("--quick", action="store_true", help="one round of small batches")
    given = parser.parse_args()
    if given.name != "peer":  # where `adapters` is the library
        sys.path.insert(0, str(ROOT))
    if given.quick:
        ROWS, ROUNDS, BATCHES, EXAMPLES, LAYERS = 4, 1, 4, 32, 2
    (base if given.size == "base" else benchmarks[given.name])()
    if given.data:
        epoch(given.data, given.model)
