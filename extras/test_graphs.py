"""Tests of extras/graphs.py: batches of few shapes change no gradient, and a CUDA graph no update."""

import math
from functools import partial

import pytest
import torch
import transformers

import tasks
import unfreeze
from adapters import add_task_adapters
from extras import packing
from extras.graphs import LENGTH, TOKENS, Graphed, widened
from test_core import assets, command, examples_of, randomise, tiny_model  # noqa: F401 (a fixture)


def collator(model, assets, device: str, multiple: int = TOKENS):
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "model")
    make = partial(widened, partial(tasks.pad, tokenizer=tokenizer), tokenizer, 64)
    return partial(packing.batch_on, torch.device(device), model, make, multiple=multiple)


@pytest.mark.parametrize("task, head", [("xnli", "SequenceClassification"), ("tag", "TokenClassification")])
@pytest.mark.parametrize("multiple", [1, 7, 64, TOKENS])  # of tokens: none, some or all of the padding stays
def test_padding_that_stays_in_a_packed_batch_changes_no_gradient(multiple, task, head, assets):  # noqa: F811
    model = tiny_model(head=head).double().eval()
    randomise(add_task_adapters(model))
    examples, learned = examples_of(task), [p for p in model.parameters() if p.requires_grad]
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "model")
    expected = torch.autograd.grad(model(**tasks.pad(examples, tokenizer)).loss, learned)
    packing.allow_packing(model)
    batch = collator(model, assets, "cpu", multiple)(examples)
    tokens, real = len(batch["packing"].index), sum(map(tasks.tokens_of, examples))
    assert batch["input_ids"].shape[1] == LENGTH
    assert tokens == min(batch["input_ids"].numel(), math.ceil(real / multiple) * multiple)
    for mine, theirs in zip(torch.autograd.grad(model(**batch).loss, learned), expected):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_makes_the_updates_of_its_passes_while_blocks_open(assets):  # noqa: F811
    def weights(is_graphed: bool) -> list[torch.Tensor]:
        model = tiny_model(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).cuda().train()
        blocks = add_task_adapters(model)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=0.01, fused=True)
        schedule = unfreeze.Unfreezer(blocks, "gu", k=3)
        packing.allow_packing(model)
        collate, examples = collator(model, assets, "cuda"), examples_of("xnli")

        def run(batch: dict) -> torch.Tensor:
            loss = model(**batch).loss
            loss.backward()
            return loss.detach()

        step = Graphed(run, learned) if is_graphed else run
        torch.manual_seed(5)
        for i in range(12):
            schedule.step(i)
            step(collate(examples[i % 3 :: 3]))
            optimizer.step()
            optimizer.zero_grad()
        return learned

    torch.use_deterministic_algorithms(True)
    assert all(map(torch.equal, weights(True), weights(False)))


def test_graphs_on_a_cpu_are_refused_in_one_line(assets, tmp_path, capsys):  # noqa: F811
    assert unfreeze.main(command(assets, tmp_path / "out", "--cuda-graphs", "--device", "cpu")) == 2
    assert capsys.readouterr().err == "error: --cuda-graphs is for tasks on a CUDA device: leave it out\n"
    assert not (tmp_path / "out").exists()
