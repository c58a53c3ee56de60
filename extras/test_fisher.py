"""fisher.py on models of all sorts: each measures what a loop over single examples does, or is refused."""

import copy
import itertools
import shutil
import sys
import warnings
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils.prune import l1_unstructured

import fisher
from adapters import add_lora, add_task_adapters
from extras.bench import peak_memory
from extras.conftest import (ADAPTERHUB, HERE, batch, needs_adapterhub, randomise, run_alone, tiny_model)
from fisher import fisher_diagonal, fisher_trace


# ---- models of all sorts against a loop over examples ------------------------------------------------------


class Tangled(nn.Module):
    """Weights shared within and across kinds of layers, bare parameters, repeated calls, in-place changes."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 9, bias=False)
        self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.out.weight, self.two.weight = self.embedding.weight, self.one.weight
        self.scale = nn.Parameter(torch.randn(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, input_ids):
        h = self.norm(self.embedding(input_ids))  # [B, T, 4]
        h = self.act(self.one(input=h)) + self.two(h) + self.one(h.flip(1))
        h = h + self.norm(h)
        h *= 2
        return self.out(self.scale * h.mean(1))  # [B, 9], a plain tensor


@pytest.mark.filterwarnings("ignore:parameters in")
@pytest.mark.parametrize("frozen", [False, True])
def test_shared_weights_bare_parameters_repeated_calls_and_in_place_changes(frozen):
    torch.manual_seed(0)
    model, ids = Tangled(), torch.tensor([[1, 2, 2], [3, 1, 0], [5, 5, 5], [8, 0, 0]])
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in ids:
        log_p = model(row[None])[0].log_softmax(-1)
        for y in range(9):
            gradients = torch.autograd.grad(log_p[y], list(model.parameters()), retain_graph=True)
            for name, gradient in zip(expected, gradients):
                expected[name] += log_p[y].detach().exp() * gradient.square() / 4
    model.requires_grad_(not frozen)
    found = fisher_diagonal(model, [{"input_ids": ids}], [model], "exact")[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
    trace = fisher_trace(model, [{"input_ids": ids}], [model.one, model], "exact").float()
    sums = {name: value.sum() for name, value in expected.items()}
    expected = torch.stack([sums["one.weight"] + sums["one.bias"], sum(sums.values())])
    torch.testing.assert_close(trace, expected)
    with pytest.warns(UserWarning, match="parameters in Embedding, Linear, Tangled take a backward pass per"):
        fisher_trace(model, [{"input_ids": ids}], [model])


class Positions(nn.Module):
    """An embedding that is looked up once for the whole batch; `flipped`: what a layer sees is [T * B, H]."""

    def __init__(self, flipped: bool):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(60, 6), nn.Embedding(40, 6)
        self.mix, self.out, self.flipped = nn.Linear(6, 6), nn.Linear(6, 3), flipped

    def forward(self, input_ids):
        h = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))  # [B, T, 6]
        if self.flipped:
            h = h.transpose(0, 1).flatten(0, 1)  # [T * B, 6], tokens first
        h = torch.tanh(self.mix(h))
        if self.flipped:
            h = h.unflatten(0, input_ids.shape[::-1]).transpose(0, 1)
        return self.out(h.mean(1))


class Sidestepped(nn.Module):
    """A weight that is used by its layer, and once more without it."""

    def __init__(self):
        super().__init__()
        self.tokens, self.one, self.out = nn.Embedding(60, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids):
        h = self.tokens(input_ids).mean(1)
        return self.out(torch.tanh(self.one(h)) + linear(h, self.one.weight))


class GatedLoRA(nn.Module):
    """It has the names of a LoRA, and adds something else."""

    def __init__(self):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(6, 2))
        self.scaling = 1.0

    def forward(self, h):
        return h + torch.sigmoid(h) * (h @ self.lora_A.T @ self.lora_B.T)


class Experts(nn.Module):
    """Each token goes to the expert of its number; a gate is a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.gate = nn.Embedding(60, 6, max_norm=1.0), nn.Parameter(torch.tensor(0.7))
        self.experts, self.out = nn.ModuleList(nn.Linear(6, 6) for _ in range(9)), nn.Linear(6, 3)

    def forward(self, input_ids):
        h = self.tokens(input_ids)
        mixed = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):  # most get no token, which is a call with no rows
            mixed[input_ids % 9 == number] = expert(h[input_ids % 9 == number])
        with torch.no_grad():
            h = self.out(h)  # no gradient reaches the weights by this call
        return {"logits": self.out(torch.tanh(self.gate * mixed).mean(1)) + h.mean(1)}


class SortedByLength(nn.Module):
    """Runs the batch in another order, as code for padded sequences does."""

    def __init__(self):
        super().__init__()
        self.tokens, self.out = nn.Embedding(60, 6), nn.Linear(6, 3)

    def forward(self, input_ids):
        order = input_ids[:, 0].argsort(descending=True)
        return self.out(torch.tanh(self.tokens(input_ids[order])).mean(1))[order.argsort()]


def on_tokens(change) -> nn.Module:
    layer = change(nn.Linear(6, 6))
    return nn.Sequential(nn.Embedding(60, 6), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_pre_hook(lambda _, inputs: (3 * inputs[0],))
    layer.register_forward_hook(lambda _, inputs, output: output * inputs[0].sum(-1, keepdim=True))
    return layer


def patched(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: linear(x, layer.weight**2, layer.bias)
    return layer


def deberta(**settings) -> nn.Module:
    return tiny_model("DebertaV2", relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"],
                      norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
                      type_vocab_size=0, num_hidden_layers=2, **settings)


ODD_LAYERS = {
    "weight norm": lambda: on_tokens(nn.utils.weight_norm),
    "parametrised weight norm": lambda: on_tokens(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: on_tokens(nn.utils.spectral_norm),
    "parametrised spectral norm": lambda: on_tokens(nn.utils.parametrizations.spectral_norm),
    "pruning": lambda: on_tokens(lambda layer: l1_unstructured(layer, "weight", 0.5)),
    "hooks that change input and output": lambda: on_tokens(hooked),
    "a forward of its own": lambda: on_tokens(patched),
    "positions of the whole batch": lambda: Positions(flipped=False),
    "tokens first": lambda: Positions(flipped=True),
    "a weight beside its layer": Sidestepped,
    "names of a LoRA": lambda: on_tokens(lambda layer: GatedLoRA()),
    "relative positions of DeBERTa": deberta,
    "experts": Experts,
    "sorted": SortedByLength,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows, tokens", [(1, 4), (4, 4), (4, 7), (4, 8)])
@pytest.mark.parametrize("name", ODD_LAYERS)
def test_layers_of_other_kinds_measure_what_a_loop_over_examples_does(name, rows, tokens):
    torch.manual_seed(0)
    model, batches = ODD_LAYERS[name](), [torch.randint(5, 60, (rows, tokens)) for _ in range(2)]
    key = "input" if isinstance(model, nn.Sequential) else "input_ids"
    model(**{key: batches[0]})  # fills the lazy layer
    model.eval()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in torch.cat(batches):
        output = model(**{key: row[None]})
        log_p = (output if torch.is_tensor(output) else output["logits"])[0].log_softmax(-1)
        for value in log_p:
            gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True,
                                            allow_unused=True)
            for total, gradient in zip(expected.values(), gradients):
                total += 0 if gradient is None else value.detach().exp() * gradient.square() / (2 * rows)
    batches = [{key: ids} for ids in batches]
    found = fisher_diagonal(model, batches, [model], "exact")[0]
    scale = sum(value.sum() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().sum() <= 1e-5 * scale, name
    assert fisher_trace(model, batches, [model], "exact").item() == pytest.approx(scale.item(), rel=1e-4)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_a_sequential_model_autocast_checkpointing_chunks_and_meta(monkeypatch):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, expected = torch.randn(4, 6), 0
    for row in x:
        log_p = plain(row).log_softmax(-1)
        for y in range(3):
            gradient = torch.autograd.grad(log_p[y], plain[0].weight, retain_graph=True)[0]
            expected += log_p[y].detach().exp() * gradient.square() / 4
    found = fisher_diagonal(plain, [{"input": x}], [plain], "exact")[0]["0.weight"]
    torch.testing.assert_close(found, expected)

    model = tiny_model().eval()
    blocks, inputs = [*randomise(add_task_adapters(model, 4)), model.roberta.embeddings], batch(5, 30)
    trace = fisher_trace(model, [inputs], blocks, "exact")
    diagonal = fisher_diagonal(model, [inputs], blocks, "exact")
    monkeypatch.setattr(fisher, "CHUNK", 100)
    torch.testing.assert_close(fisher_trace(model, [inputs], blocks, "exact"), trace)
    for one, two in zip(fisher_diagonal(model, [inputs], blocks, "exact"), diagonal):
        assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-9) for name in two)
    with torch.autocast("cpu", torch.bfloat16):
        rough = fisher_trace(model, [inputs], blocks, "exact")
    torch.testing.assert_close(rough, trace, rtol=0.1, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name is not in transformers 4.57
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(fisher_trace(model.train(), [inputs], blocks, "exact"), trace)
    always = Checkpointed().requires_grad_(False)
    trace = fisher_trace(always, [{"x": x}], [always.inner[2]], "exact")
    torch.testing.assert_close(trace, fisher_trace(always.inner, [{"input": x}], [always.inner[2]], "exact"))
    model.to("meta")
    inputs = {"input_ids": inputs["input_ids"].to("meta")}
    for labels in ("sampled", "exact", "official"):
        assert fisher_trace(model, [inputs], blocks, labels).is_meta


class Merging(nn.Linear):
    """As some LoRAs: `eval()` adds a part to the weight, `train()` takes it away again."""

    merged = False

    def train(self, mode: bool = True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -1 if mode else 1
            self.merged = not mode
        return self


@pytest.mark.parametrize("training", [True, False])
def test_layers_that_merge_in_eval_mode_come_back_as_they_were(training):
    model = nn.Sequential(Merging(8, 4), nn.Tanh(), nn.Linear(4, 3)).train()
    model[0].train(training)
    before = model[0].merged, model[0].weight.detach().clone()
    fisher_trace(model, [{"input": torch.randn(4, 8)}], [model[2]])
    assert (model[0].merged, model.training, model[0].training) == (before[0], True, training)
    assert torch.equal(model[0].weight, before[1])
    table = nn.Embedding(9, 3, max_norm=0.1)  # forward shortens its rows
    before = table.weight.detach().clone()
    with pytest.warns(UserWarning, match="parameters in Embedding take a backward pass per example"):
        fisher_trace(table, [{"input": torch.arange(5)}], [table])
    assert torch.equal(table.weight, before)


def test_inference_mode_and_a_wrapped_model_measure_the_same():
    model = tiny_model()
    blocks = randomise(add_task_adapters(model))
    expected = fisher_trace(model, [batch()], blocks)
    with torch.inference_mode():
        inputs = {key: value.clone() for key, value in batch().items()}  # autograd may not save these
        assert torch.equal(fisher_trace(model, [inputs], blocks), expected)
        soft = nn.Sequential(nn.Linear(3, 3))
        with pytest.raises(ValueError, match="made inside torch.inference_mode"):
            fisher_trace(soft, [{"input": torch.randn(2, 3)}], [soft])
    wrapped = nn.DataParallel(model, device_ids=[])  # on the CPU, also where there is a CUDA device
    assert torch.equal(fisher_trace(wrapped, [batch()], blocks), expected)


# ---- heads: labels of positions, several labels, regression ------------------------------------------------


def language_model(name: str, **settings) -> nn.Module:
    torch.manual_seed(1)
    config = getattr(transformers, name.partition("For")[0].replace("LMHeadModel", "") + "Config")
    sizes = {"vocab_size": 24, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
             "initializer_range": 0.3}
    sizes |= {
        "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 12, "num_labels": 3} if "GPT2" in name else {
        "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "init_std": 0.3,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "max_position_embeddings": 12, "decoder_start_token_id": 2} if "Bart" in name else {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 12}
    return getattr(transformers, name)(config(**sizes | settings))


def tags(**more) -> dict:
    """Four rows of five tokens; the first is padded; some labels do not count, and none of the last row's."""
    torch.manual_seed(2)
    inputs = {"input_ids": torch.randint(5, 24, (4, 5)), "attention_mask": torch.ones(4, 5, dtype=torch.long),
              "labels": torch.randint(3, (4, 5))}
    inputs["attention_mask"][0, 3:] = 0
    inputs["labels"][0, 3:] = inputs["labels"][1, ::2] = inputs["labels"][3] = -100
    return inputs | more


def without(inputs: dict, *keys) -> dict:
    return {key: value for key, value in inputs.items() if key not in keys}


def tagger(add=lambda model: add_task_adapters(model, 4)) -> tuple:
    model = tiny_model(head="TokenClassification", num_hidden_layers=2)
    return model, randomise(add(model))


def with_parts(model: nn.Module, *names: str) -> tuple:
    return model, [model.get_submodule(name) for name in names]


def bert_decoder() -> tuple:
    model = language_model("BertLMHeadModel", is_decoder=True, tie_word_embeddings=False)
    return model, [*randomise(add_task_adapters(model, 4)), model.cls]


TAGS, PLAIN = tags(), without(tags(), "labels")
TOKENS = {  # model and blocks, a batch, how far labels are shifted, warned of
    "tags": (tagger, TAGS, 0),
    "tags, only masked": (tagger, PLAIN, 0),
    "tags, nothing masked": (tagger, {"input_ids": TAGS["input_ids"]}, 0),
    "tags, LoRA": (lambda: tagger(lambda model: add_lora(model, r=3, alpha=2)), TAGS, 0),
    "masked language model, tied": (lambda: with_parts(
        tiny_model(head="MaskedLM", num_hidden_layers=1, vocab_size=24), "roberta.embeddings", "lm_head"),
        TAGS, 0),
    "GPT-2, tied": (lambda: with_parts(
        language_model("GPT2LMHeadModel"), "transformer.wte", "transformer.h.0", "transformer.ln_f"),
        TAGS, 1),
    "GPT-2, only masked": (lambda: with_parts(
        language_model("GPT2LMHeadModel"), "transformer.h.1.ln_1"), PLAIN, 1),
    "GPT-2, tags": (lambda: with_parts(
        language_model("GPT2ForTokenClassification"), "transformer.h.0", "classifier"), TAGS, 0),
    "Llama": (lambda: with_parts(
        language_model("LlamaForCausalLM"), "model.layers.0", "model.norm", "lm_head"), TAGS, 1),
    "BERT as decoder": (bert_decoder, TAGS, 1),
    "Bart": (lambda: with_parts(
        language_model("BartForConditionalGeneration"), "model.decoder.layers.0",
        "model.encoder.layers.0"), tags(
            decoder_input_ids=torch.randint(5, 24, (4, 3)), labels=torch.tensor([[4, 1, -100]] * 4)), 0),
    "Bart, masked": (lambda: with_parts(
        language_model("BartForConditionalGeneration"), "model.decoder.layers.0"), PLAIN | {
            "decoder_input_ids": torch.randint(5, 24, (4, 3)),
            "decoder_attention_mask": torch.tensor([[1, 1, 0]] * 4)}, 0),
}


def tokens_of(model: nn.Module, inputs: dict, shift: int) -> tuple[torch.Tensor, list, list]:
    """log p [B, T, C]; by example the positions that count, and with them the labels they have."""
    log_p = model(**without(inputs, "labels")).logits.log_softmax(-1)
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask", torch.ones(log_p.shape[:2])))
    told = inputs.get("labels", torch.where(mask == 0, -100, 0)).tolist()
    places = [[t for t in range(log_p.shape[1] - shift) if row[t + shift] != -100] for row in told]
    return log_p, places, [[row[t + shift] for t in of] for row, of in zip(told, places)]


def by_position(draw, rows: torch.Tensor) -> torch.Tensor:
    """draw([T B, C]) for all rows of [B, T, C], a position after the other: [B, T]."""
    return draw(rows.transpose(0, 1).flatten(0, 1)).view(rows.shape[1::-1]).T


def squares_of(log_ps: list, weights: list, blocks: list[nn.Module]) -> list[dict]:
    """Per block and parameter, the sum of the weighted squares of the gradients of each log p."""
    total = [{name: torch.zeros_like(value) for name, value in block.named_parameters()} for block in blocks]
    for log_p, weight in zip(log_ps, weights):
        for block, sums in zip(blocks, total):
            gradients = torch.autograd.grad(log_p, list(block.parameters()), retain_graph=True,
                                            allow_unused=True)
            for name, gradient in zip(sums, gradients):
                sums[name] += 0 if gradient is None else weight * gradient.square()
    return total


@pytest.mark.filterwarnings("ignore:parameters in")
@pytest.mark.parametrize("labels", ["sampled", "exact", "argmax", "gold", "official"])
@pytest.mark.parametrize("name", TOKENS)
def test_labels_of_positions_measure_what_a_loop_over_single_examples_does(name, labels):
    make, inputs, shift = TOKENS[name]
    model, blocks = make()
    model.double().eval().requires_grad_(True)
    if labels == "gold" and "labels" not in inputs:
        with pytest.raises(ValueError, match="labels='gold' needs 'labels' in every batch"):
            fisher_trace(model, [inputs], blocks, labels)
        return
    batched, *_ = tokens_of(model, inputs, shift)
    generator = torch.Generator().manual_seed(5)
    drawn = by_position(lambda p: torch.multinomial(p, 1, generator=generator), batched.detach().exp())
    log_ps, weights = [], []
    for i in range(4 if labels != "official" else 0):
        single = {key: value[i : i + 1] for key, value in inputs.items()}
        (log_p,), (places,), (gold,) = tokens_of(model, single, shift)
        if labels == "exact":
            log_ps += [log_p[t, y] for t in places for y in range(log_p.shape[1])]
            weights += [log_p[t, y].exp().item() / 4 for t in places for y in range(log_p.shape[1])]
        elif places:
            of = {"sampled": drawn[i, places], "argmax": log_p[places].argmax(1), "gold": gold}[labels]
            log_ps.append(log_p[places, of].sum())
            weights.append(1 / 4)
    if labels == "official":  # every row of logits, and its likeliest class
        log_ps, weights = [batched.max(-1).values.mean()], [1 / 4]
    expected = squares_of(log_ps, weights, blocks)
    found = fisher_diagonal(model, [inputs], blocks, labels, torch.Generator().manual_seed(5))
    for ours, theirs in zip(found, expected):
        for key, value in theirs.items():  # Llama's norms compute in float32
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-9)
    trace = fisher_trace(model, [inputs], blocks, labels, torch.Generator().manual_seed(5))
    sums = torch.stack([sum(value.sum() for value in block.values()) for block in expected])
    assert (sums > 0).all()
    torch.testing.assert_close(trace, sums, rtol=1e-5, atol=0)


def joint(log_p: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """log p of whole examples: of log p [T, C] and every way to label it [N, T], sums [N]."""
    return log_p[torch.arange(len(log_p)), ys].sum(1)


def independent(kind: str, columns: int = 3) -> tuple:
    """A model of this kind of head, and its adapters."""
    problem = {"bernoulli": "multi_label_classification", "gaussian": "regression"}.get(kind)
    head = "SequenceClassification" if problem else "TokenClassification"
    model = tiny_model(head=head, num_hidden_layers=2, problem_type=problem if columns > 1 else None,
                       num_labels=columns).double().eval()
    return model, randomise(add_task_adapters(model, 4))


@pytest.mark.parametrize("kind", ["tokens", "bernoulli"])
def test_exact_is_the_expectation_over_all_joint_labels_and_draws_come_near_it(kind):
    model, blocks = independent(kind)
    model.double().requires_grad_(True)
    inputs = {"input_ids": torch.tensor([[5, 7, 9], [8, 6, 11]])}
    log_ps = []
    for row in inputs["input_ids"]:
        z = model(row[None]).logits[0]
        log_p = z.log_softmax(1) if kind == "tokens" else torch.stack([(-z).sigmoid(), z.sigmoid()], 1).log()
        log_ps += joint(log_p, torch.cartesian_prod(*[torch.arange(log_p.shape[1])] * 3))  # 27 or 8
    squares = squares_of(log_ps, [log_p.exp().item() / 2 for log_p in log_ps], blocks)
    expected = torch.stack([sum(value.sum() for value in block.values()) for block in squares])
    torch.testing.assert_close(fisher_trace(model, [inputs], blocks, "exact"), expected)
    for ours, theirs in zip(fisher_diagonal(model, [inputs], blocks, "exact"), squares):
        torch.testing.assert_close(ours, theirs)
    drawn = fisher_trace(model, [inputs], blocks, draws=1000)
    torch.testing.assert_close(drawn, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("kind, labels", [
    *itertools.product(["gaussian"], ["sampled", "exact", "gold"]),
    *itertools.product(["bernoulli"], ["sampled", "argmax", "gold", "official"])])
def test_several_labels_and_regression_measure_what_a_loop_over_single_examples_does(kind, labels, columns):
    model, blocks = independent(kind, columns)
    model.requires_grad_(True)
    inputs = batch(4)
    gold = torch.randn(4, columns)
    inputs["labels"] = gold if kind == "gaussian" else (gold > 0).float()
    family = None if columns > 1 or kind == "gaussian" else kind  # one output is a regression's
    z = model(**without(inputs, "labels")).logits
    generator, p = torch.Generator().manual_seed(5), z.detach().sigmoid()
    if kind == "gaussian":
        noise = by_position(lambda rows: torch.randn(rows.shape, generator=generator).double(), z.detach())
        y = {"sampled": z.detach() + noise, "exact": None, "gold": inputs["labels"]}[labels]
    else:
        both = torch.stack([1 - p, p], 2)
        drawn = by_position(lambda rows: torch.multinomial(rows, 1, generator=generator), both).double()
        y = {"sampled": drawn, "gold": inputs["labels"].double()}.get(labels, (p > 0.5).double())
    log_ps, loss = [], nn.functional.binary_cross_entropy_with_logits
    for i, row in enumerate(inputs["input_ids"]):
        (z,) = model(row[None], inputs["attention_mask"][i : i + 1]).logits
        if labels == "exact":  # E (y - z)^2 is 1, of each output
            log_ps += [*z]
        else:
            squares = (y[i] - z).square().sum() / 2
            log_ps.append(-squares if kind == "gaussian" else -loss(z, y[i], reduction="sum"))
    weights = [1 / 4] * len(log_ps)
    if labels == "official":
        log_ps, weights = [torch.stack(log_ps).mean()], [1 / 4]
    expected = squares_of(log_ps, weights, blocks)
    for ours, theirs in zip(fisher_diagonal(model, [inputs], blocks, labels, torch.Generator().manual_seed(5),
                                            family=family), expected):
        torch.testing.assert_close(ours, theirs)
    if columns == 1 and labels != "exact":
        flat = inputs | {"labels": inputs["labels"][:, 0]}  # as regressions have them
        trace = fisher_trace(model, [flat], blocks, labels, torch.Generator().manual_seed(5), family=family)
        total = sum(value.sum().item() for of in expected for value in of.values())
        assert trace.sum().item() == pytest.approx(total)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_draws_are_the_mean_of_as_many_measurements(head):
    model = tiny_model(head=head).double().eval()
    blocks, inputs = randomise(add_task_adapters(model, 4)), without(batch(), "labels")
    one_by_one = torch.Generator().manual_seed(7)
    traces = torch.stack([fisher_trace(model, [inputs], blocks, generator=one_by_one) for _ in range(5)])
    assert (traces.std(0) > 0).all()
    found = fisher_trace(model, [inputs], blocks, generator=torch.Generator().manual_seed(7), draws=5)
    torch.testing.assert_close(found, traces.mean(0))
    diagonal = fisher_diagonal(model, [inputs], blocks, generator=torch.Generator().manual_seed(7), draws=5)
    torch.testing.assert_close(torch.stack([sum(v.sum() for v in of.values()) for of in diagonal]), found)


def test_labels_choose_positions_and_do_not_reach_the_model():
    model, blocks = tagger()
    model.double().eval()
    trace = partial(fisher_trace, model, blocks=blocks, labels="exact")
    some = TAGS | {"labels": torch.where(TAGS["labels"] == -100, -100, (TAGS["labels"] + 1) % 3)}
    assert torch.equal(trace([TAGS]), trace([some]))  # which labels they are is all one
    assert not torch.equal(trace([TAGS]), trace([PLAIN]))
    none = TAGS | {"labels": torch.full((4, 5), -100)}
    assert torch.equal(trace([none]), torch.zeros(2).double())
    torch.testing.assert_close(trace([none, TAGS]), trace([TAGS]) / 2)  # no label: a gradient of zero
    shorter = {key: value[:1, :3] for key, value in PLAIN.items()}
    torch.testing.assert_close(trace([shorter]), trace([{key: value[:1] for key, value in PLAIN.items()}]))


class Vocabulary(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.body = nn.Linear(8, 8, dtype=dtype)
        self.head = nn.Linear(8, 30_000, bias=False, dtype=dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels, draws", [("sampled", 3), ("argmax", 1), ("gold", 1)])
def test_beside_the_logits_of_a_large_vocabulary_only_their_gradient_is_of_their_size(
        dtype, labels, draws, monkeypatch):
    monkeypatch.setattr(fisher, "CHUNK", 2**18)
    model = Vocabulary(dtype)
    inputs = {"x": torch.randn(1, 60, 8, dtype=dtype), "labels": torch.randint(30_000, (1, 60))}

    def plain() -> None:  # the logits and one gradient of their size, and what PyTorch's own products take
        logits = model(inputs["x"])
        torch.autograd.grad(logits, [*model.body.parameters()], torch.ones_like(logits))

    least, piece = peak_memory(plain), 2**18  # CHUNK / 4 elements in float32, in bytes
    peak = peak_memory(lambda: fisher_trace(model, [inputs], [model.body], labels, draws=draws))
    assert 2 * 60 * 30_000 * dtype.itemsize <= least < peak + piece and peak < least + 9 * piece


@pytest.mark.parametrize("adapted", ["TOKEN_CLS", "CAUSAL_LM", None])
def test_lora_of_peft_measures_what_a_loop_does(adapted):
    peft = pytest.importorskip("peft")
    name = "GPT2LMHeadModel" if adapted != "TOKEN_CLS" else "GPT2ForTokenClassification"
    config = peft.LoraConfig(task_type=adapted, r=2, target_modules=["c_attn"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(language_model(name), config).double().eval()
    layers = [module for module in model.modules() if type(module).__name__ == "GPT2Block"]
    learned = [nn.ParameterList(value for name, value in layer.named_parameters() if "lora" in name)
               for layer in layers]
    blocks = [nn.ModuleList(m for m in layer.modules() if type(m) is nn.Linear) for layer in layers]
    shift, log_ps = int(name == "GPT2LMHeadModel"), []
    for i in range(4):
        (log_p,), (places,), (gold,) = tokens_of(
            model, {key: value[i : i + 1] for key, value in TAGS.items()}, shift)
        log_ps += [log_p[places, gold].sum()] if places else []
    expected = squares_of(log_ps, [1 / 4] * 4, learned)
    found = fisher_trace(model, [TAGS], blocks, "gold")
    torch.testing.assert_close(found, torch.stack([sum(v.sum() for v in of.values()) for of in expected]))


# ---- refusals ----------------------------------------------------------------------------------------------


def test_impossible_measurements_are_refused():
    model = tiny_model()
    blocks = add_task_adapters(model)
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.classifier.out_proj.bias, float("nan"))
    unlabelled = {"input_ids": batch()["input_ids"]}
    unused, tagger = tiny_model(), tiny_model(head="TokenClassification")
    unused.spare = nn.Linear(2, 2)
    for call, message in [(lambda: fisher_trace(model, [], blocks), "no batches"),
                          (lambda: fisher_trace(model, [batch()], [nn.ReLU()]), "block 0 has no parameters"),
                          (lambda: fisher_trace(model, [batch()], [nn.Linear(2, 2)]), "no block is part of"),
                          (lambda: fisher_trace(unused, [batch()], [unused.spare]), "no block took part"),
                          (lambda: fisher_trace(model, [unlabelled], blocks, "gold"), "'gold' needs 'lab"),
                          (lambda: fisher_trace(tagger, [batch()], [tagger.classifier]),
                           r"'labels' must be whole .* of shape \[5, 7\], not int64 of \[5, 1\]"),
                          (lambda: fisher_trace(model, [batch()], blocks, "golden"), "labels must be one of"),
                          (lambda: fisher_trace(broken, [batch()], [broken.classifier.dense]), "not finite"),
                          (lambda: fisher_trace(model.roberta, [batch()], blocks), "no `logits`")]:
        with pytest.raises(ValueError, match=message):
            call()


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.filterwarnings("ignore:parameters in")
def test_what_does_not_fit_a_head_is_refused():
    plain, tokens = nn.Linear(4, 3), tags()
    rows = {"input": torch.randn(4, 4)}
    (tagging, _), causal = tagger(), language_model("GPT2LMHeadModel")
    bart = language_model("BartForConditionalGeneration")
    several = tiny_model(problem_type="multi_label_classification")
    one = tiny_model(num_labels=1)
    spans = tiny_model(head="QuestionAnswering")
    for model, inputs, options, message in [
            (plain, rows, {"family": "normal"}, "family must be None or one of classes, bernoulli, gaussian"),
            *((plain, rows, {"draws": draws}, "draws must be a whole number from 1")
              for draws in (0, 2.0, True)),
            *((plain, rows, {"draws": 2, "labels": labels}, "and 1 unless labels='sampled'")
              for labels in ("exact", "gold", "argmax", "official")),
            (nn.Linear(4, 1), rows, {}, "family='bernoulli' or 'gaussian', not \\[4, 1\\] with 'classes'"),
            (plain, {"input": torch.randn(2, 2, 2, 4)}, {}, r"must be \[B, C\] or \[B, T, C\]"),
            (tagging, tokens, {"family": "bernoulli"}, "not .4, 5, 3. with 'bernoulli'"),
            (spans, without(tokens, "labels"), {"family": "gaussian"}, "not .4, 2, 5. with 'gaussian'"),
            (tagging, tags(labels=torch.full((4, 5), 3)), {}, "whole numbers below 3, or -100"),
            (tagging, tags(labels=torch.rand(4, 5)), {}, "'labels' must be whole numbers"),
            (tagging, tags(labels=torch.tensor(1)), {}, "not int64 of .1, 1."),
            (plain, rows | {"labels": torch.tensor([0, 1, 2, -1])}, {"labels": "gold"}, "whole numbers"),
            (several, tags(labels=torch.full((4, 3), 2.0)), {"labels": "gold"}, "whole numbers below 2"),
            (several, tags(labels=torch.zeros(4)), {"labels": "gold"}, r"not float32 of \[4, 1\]"),
            (one, tags(labels=torch.full((4,), torch.nan)), {"labels": "gold"}, "'labels' must be finite"),
            *((one, tokens, {"labels": labels}, "where a Gaussian is likeliest")
              for labels in ("argmax", "official")),
            (causal, tokens, {"labels": "exact"}, "take 5 x 24 backward passes, over 100: choose 'sampled'"),
            (bart, tokens, {}, "an encoder-decoder needs 'decoder_input_ids'"),
            (Wrapper(causal), tokens, {}, "Wrapper holds a GPT2LMHeadModel: whether its logits")]:
        with pytest.raises(ValueError, match=message), pytest.MonkeyPatch.context() as patch:
            patch.setattr(fisher, "PASSES", 100)
            fisher_trace(model, [inputs], [model], **options)


class Mixing(nn.Module):
    """No example has an output of its own."""

    def __init__(self, mix):
        super().__init__()
        self.out, self.mix = nn.Linear(4, 3), mix

    def forward(self, x):
        return self.out(self.mix(x))


def test_what_has_no_fisher_information_of_single_examples_is_refused():
    torch.manual_seed(0)
    centred, summed = Mixing(lambda x: x - x.mean(0)), Mixing(lambda x: x.cumsum(0))  # the first row stays
    detached = Mixing(lambda x: x)
    detached.register_forward_hook(lambda _, inputs, output: output.detach())
    counted, single = nn.Embedding(9, 3, scale_grad_by_freq=True), Mixing(lambda x: torch.eye(5) @ x)
    regression, x = nn.Linear(4, 1), torch.randn(5, 4)
    tuples = tiny_model()
    tuples.config.return_dict = False
    half_used = nn.Sequential(nn.Linear(4, 3))
    half_used.spare = nn.Linear(2, 2)
    half_used.forward = lambda input: half_used[0](input)
    for model, inputs, blocks, message in [
            (centred, {"x": x}, [centred.out], "another output alone than in a batch"),
            (summed, {"x": x}, [summed.out], "another output alone than in a batch"),
            (detached, {"x": x}, [detached.out], "no block took part"),
            (single, {"x": x}, [single.out], "does not run on one example alone"),
            (counted, {"input": torch.arange(5)}, [counted], "scale_grad_by_freq"),
            (regression, {"input": x}, [regression], "two classes or more"),
            (tuples, batch(), [tuples.classifier], "returned a tuple: set `model.config.return_dict = True`"),
            (half_used, {"input": x}, [half_used[0], half_used.spare], r"every block \(not 1\) took part")]:
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        with pytest.raises(ValueError, match=message):
            fisher_trace(model, [inputs], blocks)


@pytest.mark.parametrize("python", [sys.executable, pytest.param(ADAPTERHUB, marks=needs_adapterhub)])
def test_fisher_py_works_alone(python, tmp_path):
    shutil.copy(HERE / "fisher.py", tmp_path)
    run_alone("""
import torch, transformers
from fisher import fisher_diagonal, fisher_trace
plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
config = transformers.XLMRobertaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2,
                                       intermediate_size=32, num_attention_heads=2,
                                       max_position_embeddings=40)
encoder = transformers.XLMRobertaForSequenceClassification(config)
ids = torch.randint(5, 60, (3, 7))
for model, batch in ((plain, {"input": torch.randn(5, 3)}), (encoder, {"input_ids": ids})):
    diagonal, = fisher_diagonal(model, [batch], [model], labels="exact")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: value.shape for name, value in diagonal.items()} == shapes
    total = sum(value.double().sum() for value in diagonal.values())
    trace = fisher_trace(model, [batch], [model], labels="exact")
    torch.testing.assert_close(trace[0], total, rtol=1e-5, atol=0)
""", tmp_path, python)
