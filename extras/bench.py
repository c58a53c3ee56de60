"""Benchmarks: every figure is a ratio within one run, since absolute seconds belong to one machine.

    python extras/bench.py steps     # what a training step costs when only the top blocks are open
    python extras/bench.py peer      # a forward pass with language and task adapter against AdapterHub's
                                     # library, in an environment that has adapters==1.3.0
    python extras/bench.py fisher    # tr(F) against a training pass, a loop over examples and torch.func
    python extras/bench.py order     # how many examples it takes to rank the blocks (after extras/demo.py)

The models have the demo's shape (12 layers of 384, random weights), a batch 32 rows of random tokens. A round
runs every variant once, so that a slow spell of the machine falls on all; figures are medians over rounds.
"""

import importlib.util
import json
import sys
import tempfile
import time
from functools import partial
from itertools import accumulate
from operator import truediv
from pathlib import Path
from statistics import mean, median

import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

ROOT = Path(__file__).parent.parent
ROWS, ROUNDS = 32, 15
EXAMPLES = 2048
OPEN_BLOCKS = (1, 2, 3, 6, 9, 12)  # from the top, as gradual unfreezing opens them


def new_model(num_labels: int = 35) -> XLMRobertaForSequenceClassification:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=514, num_labels=num_labels)).to(device)


def new_batch(model: torch.nn.Module, tokens: int) -> dict:
    return {"input_ids": torch.randint(5, 1000, (ROWS, tokens), device=model.device),
            "attention_mask": torch.ones(ROWS, tokens, dtype=torch.long, device=model.device),
            "labels": torch.randint(35, (ROWS,), device=model.device)}


def median_ratios(variants: dict, base: str, rounds: int = ROUNDS) -> tuple[dict[str, float], float]:
    """Each variant's time over that of `base` (median over rounds), and the time of `base` in ms."""
    seconds = {name: [] for name in variants}
    for round_ in range(rounds + 1):
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
    sys.path.insert(0, str(ROOT))
    from adapters import add_task_adapters
    from unfreeze import Unfreezer
    model = new_model().train()
    blocks = add_task_adapters(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.0)
    print(f"a step's time over standard's (12 open); 12 layers x 384, {ROWS} rows, {model.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| tokens a row | " + " | ".join(f"{count} open" for count in OPEN_BLOCKS) + " | standard |")
    print("|---|" + "---|" * len(OPEN_BLOCKS) + "---|")
    for tokens in (16, 64, 128):
        batch = new_batch(model, tokens)

        def step(count: int) -> None:
            unfreezer = Unfreezer(blocks, "gu", k=1)
            for i in range(count):
                unfreezer.step(i)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        ratios, standard = median_ratios({count: partial(step, count) for count in OPEN_BLOCKS}, base=12)
        print(f"| {tokens} | {' | '.join(f'{ratio:.2f}' for ratio in ratios.values())} | {standard:.0f} ms |",
              flush=True)


@torch.inference_mode()
def peer() -> None:
    """Print the time of a forward pass with language and task adapter over that of AdapterHub's library."""
    import adapters as library
    specification = importlib.util.spec_from_file_location("our_adapters", ROOT / "adapters.py")
    ours = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(ours)
    plain, our_model, their_model = (new_model().eval() for _ in range(3))
    ours.add_language_adapter(our_model, "en")
    ours.add_task_adapters(our_model)
    ours.set_language(our_model, "en")
    library.init(their_model)
    for name in ("en", "task"):
        with tempfile.TemporaryDirectory() as folder:
            ours.save_adapter(our_model, name, folder, with_head=False)
            their_model.load_adapter(folder)
    their_model.active_adapters = library.composition.Stack("en", "task")
    models = {"ours": our_model, "library": their_model, "no adapter": plain}
    print(f"a forward pass over the library's ({library.__version__}); 12 layers x 384, {ROWS} rows, "
          f"{plain.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| tokens a row | ours | no adapter | library | difference of logits |\n|---|---|---|---|---|")
    for tokens in (16, 64, 128):
        batch = new_batch(plain, tokens)
        difference = (our_model(**batch).logits - their_model(**batch).logits).abs().max().item()
        ratios, library_ms = median_ratios({name: partial(model, **batch) for name, model in models.items()},
                                           base="library", rounds=2 * ROUNDS)
        print(f"| {tokens} | {ratios['ours']:.3f} | {ratios['no adapter']:.3f} | {library_ms:.0f} ms | "
              f"{difference:.1e} |", flush=True)


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
    sys.path.insert(0, str(ROOT))
    from adapters import add_task_adapters
    from fisher import fisher_diagonal, fisher_trace
    model = new_model().eval()
    blocks = add_task_adapters(model)
    learned = [parameter for block in blocks for parameter in block.parameters()]
    print(f"sampled labels; 12 layers x 384, {ROWS} rows, {model.device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; times, and the trace's peak memory, over those of one forward and "
          "backward pass through the same blocks; largest relative difference from the loop\n"
          "| tokens a row | trace | diagonal | loop over examples | torch.func | pass | memory | error |\n"
          "|---|---|---|---|---|---|---|---|")
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
        variants = {"trace": traced, "diagonal": partial(fisher_diagonal, model, [batch], blocks),
                    "loop": loop, "torch.func": functional, "pass": one_pass}
        assert abs(functional().item() / traced().sum().item() - 1) < 1e-4
        ratios, pass_ms = median_ratios(variants, base="pass", rounds=7)
        memory = peak_memory(traced) / peak_memory(one_pass)
        print(f"| {tokens} | {ratios['trace']:.2f} | {ratios['diagonal']:.2f} | {ratios['loop']:.2f} | "
              f"{ratios['torch.func']:.2f} | {pass_ms:.0f} ms | {memory:.2f} | {error:.1e} |", flush=True)


def order() -> None:
    """Print how well tr(F) of n examples ranks the blocks: Kendall's tau with the exact order of 2,048."""
    sys.path.insert(0, str(ROOT))
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


def kendall_tau(one: torch.Tensor, two: torch.Tensor) -> float:
    signs = (one[:, None] - one).sign() * (two[:, None] - two).sign()
    return signs.sum().item() / (len(one) * (len(one) - 1))


if __name__ == "__main__":
    benchmarks = {"steps": steps, "peer": peer, "fisher": fisher, "order": order}
    if len(sys.argv) != 2 or sys.argv[1] not in benchmarks:
        sys.exit(__doc__)
    benchmarks[sys.argv[1]]()
