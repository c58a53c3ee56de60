"""Benchmarks: every figure is a ratio within one run, since absolute seconds belong to one machine.

    python extras/bench.py steps     # what a training step costs when only the top blocks are open

The model has the demo's shape (12 layers of 384, random weights), a batch 32 rows of random tokens. A round
runs every variant once, in turn, so that a slow spell of the machine falls on all; figures are medians.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent))
from adapters import add_task_adapters
from unfreeze import Unfreezer

ROWS, ROUNDS = 32, 15
OPEN_BLOCKS = (1, 2, 3, 6, 9, 12)  # from the top, as gradual unfreezing opens them


def steps() -> None:
    """Print the time of a training step (forward, backward, clip, AdamW) by the number of open blocks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=514, num_labels=35)).to(device).train()
    blocks = add_task_adapters(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.0)
    print(f"a step's time over standard's (12 open); 12 layers x 384, {ROWS} rows, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| tokens a row | " + " | ".join(f"{count} open" for count in OPEN_BLOCKS) + " | standard |")
    print("|---|" + "---|" * len(OPEN_BLOCKS) + "---|")
    for tokens in (16, 64, 128):
        batch = {"input_ids": torch.randint(5, 1000, (ROWS, tokens), device=device),
                 "attention_mask": torch.ones(ROWS, tokens, dtype=torch.long, device=device),
                 "labels": torch.randint(35, (ROWS,), device=device)}
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


if __name__ == "__main__":
    if sys.argv[1:] != ["steps"]:
        sys.exit(__doc__)
    steps()
