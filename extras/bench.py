"""Benchmarks: every figure is a ratio within one run, since absolute seconds belong to one machine.

    python extras/bench.py steps     # what a training step costs when only the top blocks are open
    python extras/bench.py peer      # a forward pass with language and task adapter against AdapterHub's
                                     # library, in an environment that has adapters==1.3.0

The models have the demo's shape (12 layers of 384, random weights), a batch 32 rows of random tokens. A round
runs every variant once, so that a slow spell of the machine falls on all; figures are medians over rounds.
"""

import importlib.util
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path
from statistics import median

import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

ROOT = Path(__file__).parent.parent
ROWS, ROUNDS = 32, 15
OPEN_BLOCKS = (1, 2, 3, 6, 9, 12)  # from the top, as gradual unfreezing opens them


def new_model() -> XLMRobertaForSequenceClassification:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=514, num_labels=35)).to(device)


def new_batch(model: torch.nn.Module, tokens: int) -> dict:
    return {"input_ids": torch.randint(5, 1000, (ROWS, tokens), device=model.device),
            "attention_mask": torch.ones(ROWS, tokens, dtype=torch.long, device=model.device),
            "labels": torch.randint(35, (ROWS,), device=model.device)}


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
        seconds = {count: [] for count in OPEN_BLOCKS}
        for round_ in range(ROUNDS + 1):
            for count in OPEN_BLOCKS:
                unfreezer = Unfreezer(blocks, "gu", k=1)
                for step in range(count):
                    unfreezer.step(step)
                elapsed = timed_step(model, batch, learned, optimizer)
                if round_:  # the first round warms up
                    seconds[count].append(elapsed)
        standard = median(seconds[12])
        ratios = " | ".join(f"{median(seconds[count]) / standard:.2f}" for count in OPEN_BLOCKS)
        print(f"| {tokens} | {ratios} | {1000 * standard:.0f} ms |", flush=True)


def timed_step(model, batch: dict, learned: list, optimizer: torch.optim.Optimizer) -> float:
    started = time.perf_counter()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(learned, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
        batch, seconds = new_batch(plain, tokens), {name: [] for name in models}
        difference = (our_model(**batch).logits - their_model(**batch).logits).abs().max().item()
        for round_ in range(2 * ROUNDS + 1):
            for name, model in list(models.items())[:: 1 if round_ % 2 else -1]:
                started = time.perf_counter()
                model(**batch).logits.sum().item()  # reads the result back, so that a GPU has finished
                if round_:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
        ratio = {name: median(map(truediv, seconds[name], seconds["library"])) for name in models}
        print(f"| {tokens} | {ratio['ours']:.3f} | {ratio['no adapter']:.3f} | "
              f"{1000 * median(seconds['library']):.0f} ms | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    benchmarks = {"steps": steps, "peer": peer}
    if len(sys.argv) != 2 or sys.argv[1] not in benchmarks:
        sys.exit(__doc__)
    benchmarks[sys.argv[1]]()
