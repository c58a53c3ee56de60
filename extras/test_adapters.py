"""adapters.py beyond its equations: copies and replicas, half precision, AdapterHub's files, good and bad,
the file alone in a folder, and what AdapterHub's library computes with what it saves.
"""

import copy
import json
import pickle
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import adapters
from adapters import (adapter_blocks, add_language_adapter, add_lora, add_task_adapters, load_adapter,
                      merge_lora, remove_adapters, save_adapter, set_language)
from extras.conftest import (ADAPTERHUB, HERE, LAYERS, Bomb, batch, contents, cut, flat, inflate,
                             madx_model, needs_adapterhub, randomise, rewrite, run_alone, through,
                             tiny_model, with_adapter)
from fisher import fisher_trace
from unfreeze import Unfreezer


def test_impossible_adapters_are_refused():
    model, gpt = tiny_model(), transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=1, n_embd=4, n_head=1, vocab_size=9))
    add_task_adapters(model)
    for call, message in [(lambda: add_task_adapters(model), "already has an adapter named 'task'"),
                          (lambda: add_lora(model), "already has an adapter named 'task'"),
                          (lambda: add_task_adapters(tiny_model(), 17), "reduction_factor must be in 1..16"),
                          (lambda: add_task_adapters(tiny_model(), 0), "reduction_factor must be in 1..16"),
                          (lambda: add_task_adapters(tiny_model(), leave_out=[-1]), "names layer -1"),
                          (lambda: add_task_adapters(tiny_model(), name="a.b"), "without a dot"),
                          (lambda: add_language_adapter(model, "to"), "'to' cannot name an adapter"),
                          (lambda: save_adapter(model, "other", "/nowhere"), "named 'other'; it has: task"),
                          (lambda: merge_lora(model), "'task' is no LoRA"),
                          (lambda: add_lora(model, targets=("out",)), "targets must be some of query, key"),
                          (lambda: add_lora(model, r=0), "r must be a whole number"),
                          (lambda: add_lora(tiny_model("DebertaV2")), "no LoRA for model type 'deberta-v2'"),
                          (lambda: add_lora(tiny_model("ModernBert")), "no LoRA for model type 'modernbert'"),
                          (lambda: add_task_adapters(gpt), "no adapters for model type 'gpt2'")]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind, add", [
    ("XLMRoberta", add_task_adapters), ("XLMRoberta", add_lora), ("ModernBert", add_task_adapters)])
def test_a_copy_computes_with_its_own_weights_and_its_own_language(kind, add, copied):
    model, inputs = tiny_model(kind).eval(), batch()
    for seed, name in enumerate(("en", "sw")):
        randomise(add_language_adapter(model, name), seed)
    randomise(add(model), 2)
    set_language(model, "en")
    before, twin = model(**inputs).logits, copied(model)
    assert torch.equal(twin(**inputs).logits, before)
    set_language(twin, "sw")
    swapped = twin(**inputs).logits
    assert not torch.equal(swapped, before) and torch.equal(model(**inputs).logits, before)
    randomise(adapter_blocks(twin, "task"), 5)
    assert not torch.equal(twin(**inputs).logits, swapped) and torch.equal(model(**inputs).logits, before)
    remove_adapters(twin)
    assert torch.equal(twin(**inputs).logits, tiny_model(kind).eval()(**inputs).logits)
    assert torch.equal(model(**inputs).logits, before)


def replica_of(model: nn.Module) -> nn.Module:
    """What nn.DataParallel makes for another device, with weights of its own: all of them halved."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = copies.get(child)
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter.detach() / 2)
        for name, value in module._buffers.items():
            copied._buffers[name] = value
    return copies[model]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM"])
@pytest.mark.parametrize("kind, add", [
    ("XLMRoberta", add_task_adapters), ("XLMRoberta", add_lora), ("ModernBert", add_task_adapters)])
def test_a_replica_computes_with_its_own_weights(kind, add, head, dtype):
    model = tiny_model(kind, head).to(dtype).eval()
    randomise(add_language_adapter(model, "sw"))
    randomise(add(model))
    set_language(model, "sw")
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter /= 2
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    before, expected = model(**inputs).logits, halved(**inputs).logits
    assert torch.equal(replica_of(model)(**inputs).logits, expected) and not torch.equal(before, expected)
    assert torch.equal(model(**inputs).logits, before)


def test_a_wrapped_model_is_refused_by_name(tmp_path):
    model = tiny_model()
    wrapped = nn.DataParallel(model)
    for call in (add_task_adapters, add_lora, lambda model: set_language(model, None),
                 lambda model: save_adapter(model, "task", tmp_path), remove_adapters):
        with pytest.raises(ValueError, match="DataParallel is no model of transformers: give .* `.module`"):
            call(wrapped)
    add_task_adapters(model)
    assert wrapped(**batch()).logits.shape == (5, 3)


def test_a_meta_model_runs_forward_and_backward_so_nothing_is_pinned_to_a_device():
    with torch.device("meta"):
        model = tiny_model()
    add_language_adapter(model, "en")
    blocks = add_task_adapters(model)
    set_language(model, "en")
    add_lora(model, name="lora")
    model.base_model.invertible_adapters.stack[:] = ["en", "task", "lora"]
    assert all(parameter.is_meta for parameter in model.parameters())
    inputs = {key: batch()[key].to("meta") for key in ("input_ids", "labels")}
    unfreezer = Unfreezer(blocks, "gu", k=1)
    for step in range(LAYERS):
        unfreezer.step(step)
        model(**inputs).loss.backward()
        assert [block.adapter_up.weight.grad is not None for block in blocks] == [
            index in unfreezer.trainable for index in range(LAYERS)]


def add_language(model: nn.Module) -> list[nn.Module]:
    modules = add_language_adapter(model, "xx")
    set_language(model, "xx")
    return [module.requires_grad_(True) for module in modules]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, head, add", [
    ("XLMRoberta", "SequenceClassification", add_task_adapters), ("Bert", "MultipleChoice", add_lora),
    ("Roberta", "QuestionAnswering", add_task_adapters), ("XLMRoberta", "MaskedLM", add_language),
    ("DebertaV2", "SequenceClassification", add_task_adapters), ("DebertaV2", "MaskedLM", add_language),
    ("ModernBert", "SequenceClassification", add_task_adapters), ("ModernBert", "MaskedLM", add_language)])
def test_on_a_half_precision_model_adapters_and_head_are_float32_and_learn(kind, head, add, dtype):
    whole = tiny_model(kind, head).to(dtype).float().eval()  # the same weights in both
    half = copy.deepcopy(whole).to(dtype)
    types = {name: parameter.dtype for name, parameter in half.named_parameters()}
    inputs = batch(choices=3) if head == "MultipleChoice" else batch()
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    answers = []
    for model in (whole, half):
        randomise(add(model))
        output = model(**inputs)
        answers.append(output.start_logits if head == "QuestionAnswering" else output.logits)
    size = answers[0].abs().max().item()
    torch.testing.assert_close(answers[1].float(), answers[0], rtol=0.05, atol=0.05 * size)
    of_base = set(half.base_model.parameters())
    decoder = {"cls.predictions.bias", "lm_head.bias", "decoder.bias"}  # beside the embeddings, which decode
    learned = {name: parameter for name, parameter in half.named_parameters()
               if "adapters." in name or "loras." in name or parameter not in of_base and name not in decoder}
    assert {parameter.dtype for parameter in learned.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in learned.items()}
    trained = [parameter for parameter in half.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
    answers[1].float().square().sum().backward()
    optimizer.step()  # a step that half precision would lose: 1e-6 of weights around 0.3
    for name, parameter in learned.items():
        assert ((parameter != before[name]) == (parameter.grad != 0)).float().mean() > 0.98, name
    remove_adapters(half)
    assert not any(hasattr(module, "link") for module in half.modules())
    assert {name: parameter.dtype for name, parameter in half.named_parameters()} == types
    half(**inputs)


# ---- files -------------------------------------------------------------------------------------------------


def saved(folder: Path, kind: str) -> nn.Module:
    """A model of which one adapter, "task" or "en", was saved."""
    if kind == "lora":
        model = tiny_model()
        randomise(add_lora(model, alpha=4, targets=("key", "value"), leave_out=(1,)))
    elif kind == "task":
        model = tiny_model()
        randomise(add_task_adapters(model, reduction_factor=4, leave_out=(LAYERS - 1,)))
    else:
        model = tiny_model(head=kind)
        randomise(add_language_adapter(model, "en", reduction_factor=4))
        set_language(model, "en")
    save_adapter(model, "en" if kind not in ("lora", "task") else "task", folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["task", "lora", "SequenceClassification", "MaskedLM"])
@pytest.mark.parametrize("safe", [False, True])
def test_a_saved_adapter_and_its_head_bring_back_the_logits(kind, safe, tmp_path):
    model, inputs = saved(tmp_path, kind), {"input_ids": batch()["input_ids"]}
    language = kind not in ("task", "lora")
    names = ["adapter_config.json", "pytorch_adapter.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        names if language else sorted([*names, "head_config.json", "pytorch_model_head.bin"]))
    for path in tmp_path.glob("*.bin") if safe else ():
        name = path.name.removeprefix("pytorch_").replace(".bin", ".safetensors")
        save_file(torch.load(path, weights_only=True), tmp_path / name)
        path.unlink()
    other = tiny_model(head="MaskedLM" if kind == "MaskedLM" else "SequenceClassification").eval()
    if not language:
        nn.init.normal_(other.classifier.out_proj.weight)  # the head beside the adapter makes up for it
    state = torch.get_rng_state()
    assert load_adapter(other, tmp_path, "mine") == "mine" and torch.equal(torch.get_rng_state(), state)
    if language:
        assert other.base_model.invertible_adapters.stack == []
        assert not any(parameter.requires_grad for parameter in other.base_model.parameters())
        set_language(other, "mine")
    else:
        assert all(p.requires_grad for block in adapter_blocks(other, "mine") for p in block.parameters())
    assert torch.equal(other(**inputs)[0], model(**inputs)[0])
    save_adapter(other, "mine", tmp_path / "again")
    third = tiny_model(head="MaskedLM" if kind == "MaskedLM" else "SequenceClassification").eval()
    assert load_adapter(third, tmp_path / "again") == "mine"
    set_language(third, "mine" if language else None)
    assert torch.equal(third(**inputs)[0], model(**inputs)[0])


def test_the_head_of_another_class_is_left_alone_and_a_base_model_needs_none(tmp_path):
    model = saved(tmp_path, "task")
    other = tiny_model(head="MultipleChoice")
    before = [parameter.clone() for parameter in other.classifier.parameters()]
    load_adapter(other, tmp_path)
    assert all(map(torch.equal, before, other.classifier.parameters()))
    bare = tiny_model().roberta.eval()
    load_adapter(bare, tmp_path)
    inputs = {"input_ids": batch()["input_ids"]}
    assert torch.equal(bare(**inputs)[0], model.roberta(**inputs)[0])
    save_adapter(bare, "task", tmp_path / "bare")
    assert len(list((tmp_path / "bare").iterdir())) == 2  # no head
    ours, theirs = (torch.load(path / "pytorch_adapter.bin", weights_only=True)
                    for path in (tmp_path, tmp_path / "bare"))
    assert ours.keys() == theirs.keys()


def test_a_heads_labels_come_with_it_and_another_order_is_refused(tmp_path):
    names = {0: "no", 1: "maybe", 2: "yes"}
    model = tiny_model(id2label=names, label2id={name: i for i, name in names.items()})
    randomise(add_task_adapters(model))
    save_adapter(model, "task", tmp_path / "adapter")
    save_adapter(model, "task", tmp_path / "run/adapter", with_head=False)
    adapters.save_head(model, tmp_path / "run/head")
    for folder in ("adapter", "run"):
        fresh = tiny_model()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_adapter(fresh, tmp_path / folder) == "task"
        assert fresh.config.id2label == names and fresh.config.label2id == model.config.label2id
        assert torch.equal(fresh.eval()(**batch()).logits, model.eval()(**batch()).logits)
        other = tiny_model(id2label={0: "yes", 1: "maybe", 2: "no"}, label2id={"yes": 0, "maybe": 1, "no": 2})
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="labels no, maybe, yes, the model has them in another order"):
            load_adapter(other, tmp_path / folder)
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.warns(UserWarning, match="keeps its own head, since there is none beside the adapter"):
        load_adapter(tiny_model(), tmp_path / "run/adapter")
    with pytest.warns(UserWarning, match="the one beside the adapter is of a XLMRoberta"):
        load_adapter(tiny_model(head="QuestionAnswering"), tmp_path / "run")


def test_files_in_half_precision_load_as_float32(tmp_path):
    model = tiny_model()
    randomise(add_task_adapters(model))
    save_adapter(model, "task", tmp_path)
    for name in ("pytorch_adapter.bin", "pytorch_model_head.bin"):
        weights = torch.load(tmp_path / name, weights_only=True)
        torch.save({key: value.bfloat16() for key, value in weights.items()}, tmp_path / name)
    other = tiny_model()
    load_adapter(other, tmp_path)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    torch.testing.assert_close(other(**batch()).logits, model(**batch()).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind, changed", [
    ("XLMRoberta", {}), ("XLMRoberta", {"ln_before": True}), ("ModernBert", {"ln_before": True})])
def test_save_pretrained_of_a_patched_model_loads_as_the_plain_one_and_takes_its_adapter(
        kind, changed, tmp_path):
    model = tiny_model(kind).eval()
    plain = model(**batch()).logits
    with_adapter(model, adapters.SEQ_BN | changed)
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path / "model")
    save_adapter(model, "task", tmp_path / "adapter")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again(**batch()).logits, plain)
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(**batch()).logits, expected)


def test_early_hub_files_load_by_their_names_of_then(tmp_path):
    model = saved(tmp_path, "SequenceClassification")
    nested = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 4}
    early = {"LN_after": False, "LN_before": False, "MH_Adapter": False, "Output_Adapter": True,
             "adapter_residual_before_ln": False, "attention_type": "sent-lvl-dynamic",
             "new_attention_norm": False, "non_linearity": "relu", "original_ln_after": True,
             "original_ln_before": True, "reduction_factor": 4, "residual_before_ln": True,
             "invertible_adapter": nested}
    rewrite(tmp_path, keys=lambda key: key.replace(".adapters.", ".layer_text_lang_adapters.").replace(
        "invertible_adapters", "invertible_lang_adapters"), version=None)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": early}))
    other = tiny_model().eval()
    assert load_adapter(other, tmp_path) == "en"
    set_language(other, "en")
    assert torch.equal(other(**batch()).logits, model(**batch()).logits)


def test_a_config_by_name_a_task_adapter_without_its_invertible_block_and_old_gelu(tmp_path):
    model = tiny_model().eval()
    randomise(add_task_adapters(model, 16))
    save_adapter(model, "task", tmp_path)
    expected = model(**batch()).logits
    for name, facts in (("pfeiffer", {}), ("seq_bn", {}), ("pfeiffer+inv", {"type": "text_task"})):
        rewrite(tmp_path, name, **facts)
        other = tiny_model().eval()
        load_adapter(other, tmp_path)
        assert torch.equal(other(**batch()).logits, expected), name
    for version, name in ((None, "gelu_new"), ("adapters.1.3.0", "gelu")):  # gelu meant gelu_new at first
        rewrite(tmp_path, adapters.SEQ_BN | {"non_linearity": "gelu"}, version=version)
        other = tiny_model()
        load_adapter(other, tmp_path)
        assert other.base_model.invertible_adapters.configs["task"]["non_linearity"] == name


def test_a_lora_of_the_versions_with_wrong_scaling_loads_as_it_was_trained(tmp_path):
    model = saved(tmp_path, "lora")
    rewrite(tmp_path, version="adapters.1.0.1")
    load_adapter(model, tmp_path, "old")
    assert adapter_blocks(model, "task")[0]["key"].scaling == 0.5
    assert adapter_blocks(model, "old")[0]["key"].scaling == 1


OWN_BLOCK = adapters.SEQ_BN | {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}


@pytest.mark.parametrize("head, language, is_language", [
    ("SequenceClassification", None, False), ("MaskedLM", None, True), (None, None, True),
    ("flexible", None, False), ("flexible masked_lm", None, True),
    ("SequenceClassification", True, True), ("MaskedLM", False, False), (None, False, False)])
def test_what_has_an_invertible_block_and_no_type_is_told_by_its_head_and_said(
        head, language, is_language, tmp_path):
    kind = "MaskedLM" if head == "MaskedLM" else "SequenceClassification"
    save_adapter(with_adapter(tiny_model(head=kind), OWN_BLOCK), "task", tmp_path, with_head=head is not None)
    rewrite(tmp_path, type=None)  # as the paper's code writes it
    if "flexible" in (head or ""):
        path, task = tmp_path / "head_config.json", head.partition(" ")[2] or "classification"
        path.write_text(json.dumps(json.loads(path.read_text()) | {
            "model_class": "XLMRobertaAdapterModel", "config": {"head_type": task}}))
    model = tiny_model(head=kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_adapter(model, tmp_path, language=language)
    said = [str(warning.message) for warning in caught if "taken for a" in str(warning.message)]
    assert len(said) == (language is None)
    assert all(f"taken for a {'language' if is_language else 'task'} adapter" in line for line in said)
    record = model.base_model.invertible_adapters
    assert record.stack == ([] if is_language else ["task"])
    assert record.languages == ({"task"} if is_language else set())
    own = [*adapter_blocks(model, "task"), record["task"]]
    assert {p.requires_grad for module in own for p in module.parameters()} == {not is_language}


def test_a_task_adapters_own_invertible_block_is_in_play_without_a_language_below_and_comes_back(tmp_path):
    model, inputs = with_adapter(tiny_model(), OWN_BLOCK).eval(), batch()
    randomise(add_language_adapter(model, "en"), 5)
    block = model.base_model.invertible_adapters["task"]
    plain = with_adapter(tiny_model(), adapters.SEQ_BN).eval()  # the same layers, as a comparison shows
    assert all(map(torch.equal, flat(adapter_blocks(plain, "task")), flat(adapter_blocks(model, "task"))))
    randomise(add_language_adapter(plain, "en"), 5)

    def couple(module, _, embedding):
        e1, e2 = embedding.chunk(2, dim=-1)
        y1 = e1 + through(block.F, e2)
        return torch.cat([y1, e2 + through(block.G, y1)], -1)

    alone = model(**inputs).logits
    assert (alone - plain(**inputs).logits).abs().max() > 1e-3
    handle = plain.base_model.embeddings.register_forward_hook(couple)
    torch.testing.assert_close(alone, plain(**inputs).logits)
    handle.remove()
    for either in (model, plain):
        set_language(either, "en")
    above = model(**inputs).logits
    assert torch.equal(above, plain(**inputs).logits)  # the first of a stack alone has its block in play
    above.sum().backward()
    assert all(parameter.grad is None for parameter in block.parameters())
    for number, source in enumerate((model, tiny_model().eval())):
        if number:
            load_adapter(source, tmp_path / "0")
            assert torch.equal(source(**inputs).logits, alone)
        save_adapter(source, "task", tmp_path / str(number))
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


# ---- bad files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, config, message", [
    *(("task", {key: value}, f"{key} {value!r} in its config is not supported") for key, value in {
        "mh_adapter": True, "output_adapter": False, "original_ln_after": False, "is_parallel": True,
        "use_gating": True, "cross_adapter": True, "dropout": 0.1, "phm_layer": True, "stochastic_depth": 0.1,
        "residual_before_ln": "post_add", "scaling": "learned", "non_linearity": "mish",
        "inv_adapter": "glow", "reduction_factor": {"default": 16}, "leave_out": "0", "a_new_idea": 3,
        "architecture": "prefix_tuning",
        "invertible_adapter": {"block_type": "nice", "non_linearity": "tanh"}}.items()),
    *(("lora", {key: value}, f"{key} {value!r} in its config is not supported") for key, value in {
        "selfattn_lora": False, "intermediate_lora": True, "output_lora": True, "dropout": 0.1,
        "use_dora": True, "composition_mode": "scale", "use_gating": True, "vera_d": 0.1,
        "attn_matrices": ["q", "o"], "r": 2.5, "dtype": "float16"}.items()),
    ("task", {"reduction_factor": ...}, "its config lacks reduction_factor"),
    ("task", "houlsby", "config 'houlsby' is none of seq_bn, pfeiffer"), ("task", [1], "is none of seq_bn"),
])
def test_a_config_that_is_not_computed_here_is_refused_by_name(kind, config, message, tmp_path):
    saved(tmp_path, kind)
    rewrite(tmp_path, config)
    model = tiny_model()
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter(model, tmp_path)
    assert not hasattr(model.base_model, "invertible_adapters")


def break_weights(change):
    def apply(folder: Path) -> None:
        weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        torch.save(change(weights), folder / "pytorch_adapter.bin")

    return apply


BAD_FILES = {
    "no folder": (shutil.rmtree, "no adapter folder"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "it has no adapter_config.json"),
    "no weights": (lambda folder: (folder / "pytorch_adapter.bin").unlink(), "neither adapter.safetensors"),
    "cut config": (cut("adapter_config.json"), "adapter_config.json is damaged"),
    "config a list": (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "is damaged"),
    "cut weights": (cut("pytorch_adapter.bin"), "pytorch_adapter.bin holds no readable weights"),
    "cut head": (cut("pytorch_model_head.bin"), "pytorch_model_head.bin holds no readable weights"),
    "cut safetensors": (lambda folder: (folder / "adapter.safetensors").write_bytes(b"\xff" * 99),
                        "adapter.safetensors holds no readable weights"),
    "code in a pickle": (lambda folder: torch.save(Bomb(), folder / "pytorch_adapter.bin"),
                         "(UnpicklingError)"),
    "a bomb": (lambda folder: inflate("pytorch_adapter.bin")(folder), "no readable weights (ValueError)"),
    "no tensors": (break_weights(lambda weights: dict.fromkeys(weights, 1)), "holds no readable weights"),
    "integers": (break_weights(lambda weights: {key: value.long() for key, value in weights.items()}),
                 "holds no readable weights"),
    "a missing layer": (break_weights(lambda weights: {key: value for key, value in weights.items()
                                                       if ".layer.2." not in key}),
                        "it lacks encoder.layer.2.output.adapters.task.adapter_down.0.bias (4 weights)"),
    "a layer too many": (break_weights(lambda weights: weights | {
        key.replace("layer.1", "layer.9"): value for key, value in weights.items()}), "also encoder.layer.9"),
    "wrong shapes": (break_weights(lambda weights: {key: value[:1] for key, value in weights.items()}),
                     "has the shape [1, 16], not [4, 16]"),
    "another hidden size": (lambda folder: rewrite(folder, hidden_size=768), "size 768, this one has 16"),
    "another model": (lambda folder: rewrite(folder, model_type="bert"), "'bert', this one has 'xlm-rob"),
    "a dotted name": (lambda folder: rewrite(folder, name="a.b"), "'a.b' cannot name an adapter"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("as_language", [False, True])
def test_bad_files_give_one_line_and_leave_the_model_as_it_was(name, as_language, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "files", "task")
    change, message = BAD_FILES[name]
    change(tmp_path / "files")
    if as_language and name in ("cut head", "a dotted name"):
        pytest.skip("a language adapter has no head and no name of the file's")
    for model in (tiny_model(), madx_model(num_labels=3)):
        before = [(key, value.clone()) for key, value in model.state_dict().items()]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as caught:
            if as_language:
                add_language_adapter(model, "th", tmp_path / "files")
            else:
                load_adapter(model, tmp_path / "files", None if name == "a dotted name" else "new")
        assert "\n" not in str(caught.value) and not Path("the_bomb_went_off").exists()
        assert [key for key, _ in before] == list(model.state_dict())
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before)
        assert flags == [parameter.requires_grad for parameter in model.parameters()]


# ---- alone, and against AdapterHub's library ---------------------------------------------------------------


def hub_cache(folder: Path, repository: str, files: Path) -> None:
    """The local cache of the hub's client, with one repository in it."""
    place = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(files, place / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("python", [sys.executable, pytest.param(ADAPTERHUB, marks=needs_adapterhub)])
def test_adapters_py_works_alone_and_from_the_hub(python, tmp_path):
    model = saved(tmp_path / "files", "SequenceClassification")
    model.save_pretrained(tmp_path / "unused")  # a patched model can be saved
    expected = model(**batch()).logits.detach()
    remove_adapters(model)
    model.save_pretrained(tmp_path / "base")
    hub_cache(tmp_path / "cache", "AdapterHub/xlm-roberta-base-sw-wiki_pfeiffer", tmp_path / "files")
    save_file({"ids": batch()["input_ids"], "mask": batch()["attention_mask"], "logits": expected},
              tmp_path / "expected.safetensors")
    (tmp_path / "empty").mkdir()
    shutil.copy(HERE / "adapters.py", tmp_path / "empty")
    print(run_alone("""
import torch, transformers
from safetensors.torch import load_file
from adapters import *
model = transformers.XLMRobertaForSequenceClassification.from_pretrained("../base")
add_language_adapter(model, "sw", "AdapterHub/xlm-roberta-base-sw-wiki_pfeiffer")
set_language(model, "sw")
stored = load_file("../expected.safetensors")
logits = model(input_ids=stored["ids"], attention_mask=stored["mask"]).logits
assert (logits - stored["logits"]).abs().max() < 1e-5
for add, name in ((add_task_adapters, "task"), (add_lora, "lora")):
    blocks = add(model, name=name)
    gradients = []
    for is_checkpointed in (False, True):  # in transformers 4, reentrant by default
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model.train()(input_ids=stored["ids"], labels=torch.zeros(5).long()).loss.backward()
        gradients.append([p.grad.clone() for block in blocks for p in block.parameters()])
    assert all(map(torch.allclose, *gradients)), "checkpointed layers have other gradients"
    model.gradient_checkpointing_disable()
for name in ("task", "lora"):
    save_adapter(model, name, name)
    assert load_adapter(model, name, name + "2") == name + "2"
try:
    add_language_adapter(model, "de", "AdapterHub/xlm-roberta-base-de-wiki_pfeiffer")
    raise SystemExit("an adapter out of nothing")
except ValueError as error:
    assert "is not in the local cache" in str(error), error
remove_adapters(model)
""", tmp_path / "empty", python, HF_HOME=str(tmp_path / "cache")))


# The library's set-up for LoRA gives ModernBERT's attention, which has none, biases, and random ones.
WITHOUT_RANDOM_BIASES = """
from adapters.wrappers.interfaces import CUSTOM_INTERFACES
CUSTOM_INTERFACES["modernbert"].adapter_methods = ["bottleneck", "invertible"]
"""


@needs_adapterhub
@pytest.mark.parametrize("kind", ["XLMRoberta", "Roberta", "Bert", "DebertaV2", "ModernBert"])
def test_adapterhubs_library_computes_the_same_with_what_we_save(kind, tmp_path):
    gelu = {"reduction_factor": 4, "non_linearity": "gelu", "scaling": 0.5, "ln_before": True,
            "ln_after": True, "leave_out": [1]}
    cases = {  # what we put into a model: the stack
        "masked LM": (lambda model: randomise(add_language_adapter(model, "en")), ["en"]),
        "task": (lambda model: randomise(add_task_adapters(model, 4)), ["task"]),
        "stack": (lambda model: randomise([*add_language_adapter(model, "en"), *add_task_adapters(model)]),
                  ["en", "task"]),
        "gelu and norms": (lambda model: with_adapter(model, adapters.SEQ_BN | gelu), ["task"]),
        "LoRA": (lambda model: randomise(add_lora(model, r=4, alpha=6)), ["task"]),
        "own block": (lambda model: with_adapter(model, OWN_BLOCK), ["task"]),
        "own block, idle": (lambda model: randomise(add_language_adapter(
            with_adapter(model, OWN_BLOCK), "en")), ["en", "task"]),
    }
    if kind in ("DebertaV2", "ModernBert"):
        del cases["LoRA"]
    for what, (add, stack) in cases.items():
        model = tiny_model(kind, "MaskedLM" if what == "masked LM" else "SequenceClassification").eval()
        model.save_pretrained(tmp_path / what / "base")
        add(model)
        if what == "task":
            randomise([model.classifier])
        set_language(model, "en" if "en" in stack else None)
        for name in stack:
            save_adapter(model, name, tmp_path / what / name)
        inputs = {key: value for key, value in batch().items() if key != "labels"}
        logits = model(**inputs).logits.detach()
        save_file(inputs | {"logits": logits}, tmp_path / what / "expected.safetensors")
    code = f"""
import adapters, json, transformers
from safetensors.torch import load_file
{WITHOUT_RANDOM_BIASES}
for what, stack in {[(what, stack) for what, (_, stack) in cases.items()]}:
    if what == "masked LM" and "{kind}" != "ModernBert":
        # only the library's own class has the inverse before the decoder
        model = adapters.{kind}AdapterModel.from_pretrained(what + "/base").eval()
    else:
        head = "MaskedLM" if what == "masked LM" else "SequenceClassification"
        model = getattr(transformers, "{kind}For" + head).from_pretrained(what + "/base").eval()
        adapters.init(model)
    for name in stack:
        model.load_adapter(what + "/" + name)
    model.active_adapters = adapters.composition.Stack(*stack)
    inputs = load_file(what + "/expected.safetensors")
    logits = inputs.pop("logits")
    assert (model(**inputs).logits - logits).abs().max() < 1e-5, what
    print("equal:", what)
"""
    assert run_alone(code, tmp_path, ADAPTERHUB).count("equal:") == len(cases)


# ---- ModernBERT, into which AdapterHub's library puts adapters by its plug-in interface --------------------

BRANCH = adapters.SEQ_BN | {"reduction_factor": 2}
MODERN_CASES = {  # by name, the model's head and, of each adapter of the stack, the config
    "stack": ("SequenceClassification", {"en": BRANCH | {
        "inv_adapter": "nice", "inv_adapter_reduction_factor": 2}, "task": BRANCH}),
    "masked LM": ("MaskedLM", {"en": BRANCH | {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}}),
    "after the sum": ("TokenClassification", {"task": BRANCH | {
        "residual_before_ln": False, "ln_before": True, "ln_after": True, "scaling": 0.5}}),
    "one layer": ("QuestionAnswering", {"task": BRANCH | {
        "original_ln_before": False, "non_linearity": "gelu", "leave_out": [1]}}),
}
MODERN = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 8, "pad_token_id": 1, "cls_token_id": 0, "bos_token_id": 0, "sep_token_id": 2,
          "eos_token_id": 2, "local_attention": 4, "global_attn_every_n_layers": 2, "num_labels": 2,
          "classifier_pooling": "mean"}
MAKE_MODERN = f"""
import adapters, torch, transformers
from safetensors.torch import save_file
{WITHOUT_RANDOM_BIASES}
stored = {{}}
for case, (head, stack) in {MODERN_CASES}.items():
    torch.manual_seed(0)
    model = getattr(transformers, "ModernBertFor" + head)(transformers.ModernBertConfig(**{MODERN})).eval()
    adapters.init(model)
    for name, config in stack.items():
        model.add_adapter(name, adapters.BnConfig(**config))
    model.active_adapters = adapters.composition.Stack(*stack)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.requires_grad_(), std=0.5)
    ids = torch.randint(3, 20, (3, 9))
    ids[0, 5:] = 1
    output = model(input_ids=ids, attention_mask=(ids != 1).long())
    logits = output.start_logits if head == "QuestionAnswering" else output.logits
    if logits.shape[:2] == ids.shape:
        logits = logits[ids != 1]  # at padding, versions of transformers differ
    logits.square().mean().backward()
    stored |= {{f"{{case}}/ids": ids, f"{{case}}/logits": logits.detach()}}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored[f"{{case}}/weight/{{name}}"] = parameter.detach().clone()
        if parameter.grad is not None:  # the part of spans' head that gives the ends has none
            stored[f"{{case}}/grad/{{name}}"] = parameter.grad.clone()
    for name in stack:
        model.save_adapter(f"{{case}} {{name}}", name)
save_file(stored, "modernbert.safetensors")
"""


def modern_case(case: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The case's model without weights of its own, and what extras/modernbert.safetensors has of the case."""
    head = MODERN_CASES[case][0]
    model = getattr(transformers, "ModernBertFor" + head)(transformers.ModernBertConfig(**MODERN)).eval()
    everything = load_file(HERE / "extras/modernbert.safetensors")
    return model, {key.removeprefix(case + "/"): value for key, value in everything.items()
                   if key.startswith(case + "/")}


def modern_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=ids, attention_mask=(ids != 1).long())
    logits = output.start_logits if hasattr(output, "start_logits") else output.logits
    return logits[ids != 1] if logits.shape[:2] == ids.shape else logits


@pytest.mark.parametrize("case", MODERN_CASES)
def test_modernbert_has_the_logits_gradients_and_names_of_adapterhubs_library(case):
    (model, stored), (_, stack) = modern_case(case), MODERN_CASES[case]
    for name, config in stack.items():
        adapters._install(model, name, config, adapters._build(model, config), language=False)
    weights = {key.removeprefix("weight/"): value for key, value in stored.items() if "weight/" in key[:7]}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == [] and all(".adapter_norm_before." in key for key in unexpected)
    model.base_model.invertible_adapters.stack[:] = list(stack)
    model.requires_grad_(True)
    logits = modern_logits(model, stored["ids"])
    torch.testing.assert_close(logits, stored["logits"], rtol=0, atol=1e-5)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, stored.get(f"grad/{name}"), rtol=0, atol=1e-5)


def test_modernberts_traces_are_those_of_a_loop_over_examples():
    model, stored = modern_case("stack")
    blocks = randomise(add_task_adapters(model, reduction_factor=2))
    randomise(add_language_adapter(model, "en"))
    set_language(model, "en")
    ids = stored["ids"]
    expected = torch.zeros(1 + len(blocks))
    model.requires_grad_(True)
    for row in ids:
        log_p = modern_logits(model, row[row != 1][None])[0].log_softmax(-1)
        for value in log_p:
            for i, block in enumerate([model.base_model, *blocks]):
                gradients = torch.autograd.grad(value, list(block.parameters()), retain_graph=True)
                expected[i] += value.exp().item() * sum(g.square().sum() for g in gradients) / len(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of parameters that are slow
        inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
        found = fisher_trace(model, [inputs], [model.base_model, *blocks], "exact")
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", MODERN_CASES)
def test_patching_modernbert_changes_no_bit_without_an_active_adapter_and_can_be_undone(case):
    model, stored = modern_case(case)
    before = copy.deepcopy(model.state_dict())
    plain, modules = modern_logits(model, stored["ids"]), [type(module) for module in model.modules()]
    blocks = randomise(add_task_adapters(model, reduction_factor=2, leave_out=(1,)))
    assert blocks == [model.base_model.layers[0].output_adapters.adapters["task"]]
    adapted = modern_logits(model, stored["ids"])
    randomise(add_language_adapter(model, "en"))
    assert torch.equal(modern_logits(model, stored["ids"]), adapted) and not torch.equal(adapted, plain)
    set_language(model, "en")
    assert not torch.equal(modern_logits(model, stored["ids"]), adapted)
    model.base_model.invertible_adapters.stack.clear()
    assert torch.equal(modern_logits(model, stored["ids"]), plain)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned == {name for name, _ in model.named_parameters()
                       if "adapters.task." in name or not name.startswith("model.")}
    remove_adapters(model)
    assert list(model.state_dict()) == list(before)
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(modern_logits(model, stored["ids"]), plain)


@needs_adapterhub
def test_modernbert_adapters_of_adapterhubs_library_load_here_and_ours_in_transformers_4(tmp_path):
    run_alone(MAKE_MODERN, tmp_path, ADAPTERHUB)
    frozen, fresh = (load_file(folder / "modernbert.safetensors") for folder in (HERE / "extras", tmp_path))
    torch.testing.assert_close(fresh, frozen, rtol=0, atol=1e-5)
    for case, (_, stack) in MODERN_CASES.items():
        model, stored = modern_case(case)
        weights = {key.removeprefix("weight/"): value for key, value in stored.items()}
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
        model.save_pretrained(tmp_path / case)
        for name in stack:
            assert load_adapter(model, tmp_path / f"{case} {name}", language=name == "en") == name
        set_language(model, "en" if "en" in stack else None)
        torch.testing.assert_close(modern_logits(model, stored["ids"]), stored["logits"], rtol=0, atol=1e-5)
        for name in stack:
            save_adapter(model, name, tmp_path / f"ours/{case} {name}")
    (tmp_path / "empty").mkdir()
    shutil.copy(HERE / "adapters.py", tmp_path / "empty")
    print(run_alone(f"""
import torch, transformers
from safetensors.torch import load_file
from adapters import *
everything = load_file("../modernbert.safetensors")
for case, (head, stack) in {MODERN_CASES}.items():
    model = getattr(transformers, "ModernBertFor" + head).from_pretrained("../" + case).eval()
    for name in stack:
        load_adapter(model, f"../ours/{{case}} {{name}}", language=name == "en")
    set_language(model, "en" if "en" in stack else None)
    ids = everything[case + "/ids"]
    output = model(input_ids=ids, attention_mask=(ids != 1).long())
    logits = output.start_logits if head == "QuestionAnswering" else output.logits
    logits = logits[ids != 1] if logits.shape[:2] == ids.shape else logits
    torch.testing.assert_close(logits, everything[case + "/logits"], rtol=0, atol=1e-5)
    remove_adapters(model)
""", tmp_path / "empty", ADAPTERHUB))
