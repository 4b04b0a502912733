"""Hugging Face's models: files in and out, logits, the update and whole runs, against transformers, peft and the fixtures."""
import hashlib
import json
import os
import pickle
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import memory
import numpy
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import chat_template_utils

from conftest import ROOT, SHARED, main, run, untimed

import chat_rl
import gpt
from gpt import UserError

FIXTURES, TEMPLATES = SHARED / "fixtures" / "hf", SHARED / "fixtures" / "chat-templates"
NAMES = ["llama3", "qwen2", "qwen3"]
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="no ../shared/fixtures beside the project")

CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MODELS = {
    "llama": dict(rms_norm_eps=1e-5, rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    "qwen2": dict(num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True),
    "qwen3": dict(head_dim=24, tie_word_embeddings=True),
}


def tiny(kind: str = "llama", **changes) -> transformers.PreTrainedModel:
    """A random model of a family's, with every weight off its initial value."""
    sizes = dict(vocab_size=272, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **MODELS[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def add_tokenizer(folder: Path, template: str | None = CHATML, make: bool = False, **settings) -> Path:
    """Bytes and three special tokens: 259 ids."""
    folder.mkdir(exist_ok=not make, parents=make)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny Llama in two shards."""
    tiny().save_pretrained(tmp_path / "model", max_shard_size="150KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    return add_tokenizer(tmp_path / "model")


def refused(match: str, f, *args, **kwargs) -> None:
    with pytest.raises(UserError, match=match) as info:
        f(*args, **kwargs)
    assert "\n" not in str(info.value)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tokenizer_of(folder: Path, template: str | None = None) -> gpt.ChatTokenizer:
    files = {path.name: path.read_bytes() for path in (folder / name for name in gpt.FILES) if path.exists()}
    return gpt.ChatTokenizer(files if template is None else {**files, "chat_template.jinja": template.encode()})


def config_of(folder: Path) -> gpt.Config:
    return gpt.huggingface_config(json.loads((folder / "config.json").read_text()), 259)


def read_tensors(folder: Path) -> tuple[dict, dict]:
    """The weights under GPT's names, and the digests of their files."""
    digests = {}
    state = gpt.load_huggingface(folder, {"sha256": digests})[1]
    return state, {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}


def write(folder: Path, contents: dict) -> Path:
    for name, content in contents.items():
        gpt.write_file(folder / name, content)
    return folder


def reference(name: str) -> dict:
    return torch.load(FIXTURES / name / "reference.pt", weights_only=False)


def logits(folder_or_model, ids=tuple(range(3, 200, 7))) -> torch.Tensor:
    if isinstance(folder_or_model, Path):
        folder_or_model = transformers.AutoModelForCausalLM.from_pretrained(folder_or_model, dtype=torch.float32)
    with torch.no_grad():
        return folder_or_model(torch.tensor([ids])).logits[0]


# config.json

PUBLISHED = dict(model_type="llama", hidden_size=64, intermediate_size=176, num_attention_heads=4, num_hidden_layers=2,
                 vocab_size=100, max_position_embeddings=128)
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}


def test_config_defaults():
    assert gpt.huggingface_config(PUBLISHED, 90) == gpt.Config(90, 100, 2, 4, 4, 64, 16, 176, 128)
    qwen2 = gpt.huggingface_config({**PUBLISHED, "model_type": "qwen2", "num_attention_heads": 32}, 90)
    assert (qwen2.qkv_bias, qwen2.n_kv_head, qwen2.head_dim) == (True, 32, 2)
    assert gpt.huggingface_config({**PUBLISHED, "model_type": "qwen2", "num_key_value_heads": None}, 90).n_kv_head == 4
    qwen3 = gpt.huggingface_config({**PUBLISHED, "model_type": "qwen3", "num_key_value_heads": 2}, 90)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.n_kv_head, qwen3.head_dim) == (False, "before", 2, 128)
    harmless = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False,
                "sliding_window": 4096, "layer_types": ["full_attention"] * 2, "quantization_config": None,
                "rope_scaling": None, "head_dim": None, "max_window_layers": 28, "pretraining_tp": 1}
    assert gpt.huggingface_config({**PUBLISHED, **harmless}, 90) == gpt.huggingface_config(PUBLISHED, 90)


def test_both_spellings_of_rope():
    config = gpt.huggingface_config({**PUBLISHED, "rope_theta": 500000, "rope_scaling": SCALING}, 90)
    assert (config.rope_base, config.rope_scaling) == (5e5, (8.0, 1.0, 4.0, 64))
    old = {("type" if key == "rope_type" else key): value for key, value in SCALING.items()}
    assert gpt.huggingface_config({**PUBLISHED, "rope_theta": 5e5, "rope_scaling": old}, 90) == config
    assert gpt.huggingface_config({**PUBLISHED, "rope_parameters": {**SCALING, "rope_theta": 5e5}}, 90) == config
    plain = gpt.huggingface_config({**PUBLISHED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 90)
    assert (plain.rope_base, plain.rope_scaling) == (1e6, ())


@pytest.mark.parametrize("kind", MODELS)
def test_config_as_transformers_reads_it(kind, tmp_path):
    for changes in ({}, {"num_key_value_heads": 1}, {"hidden_size": 96}):
        theirs = tiny(kind, **changes).config
        theirs.save_pretrained(tmp_path)
        ours = config_of(tmp_path)
        assert (ours.n_kv_head, ours.norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
        assert (ours.tied, ours.rope_base) == (theirs.tie_word_embeddings, theirs.rope_parameters["rope_theta"])
        assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize("changes, match", [
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"model_type": None}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type is 'dynamic'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {**SCALING, "factor": "8"}}, "factor is '8'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
    ({"rope_theta": "1e4"}, "rope_theta"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"layer_types": 3}, "layer_types"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_attention_heads": 4.0}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4; .* num_key_value_heads, 3"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"intermediate_size": -1}, "intermediate_size"),
    ({"max_position_embeddings": [1]}, "max_position_embeddings"),
    ({"vocab_size": 89}, "vocab_size is 89; .* 90 ids"),
])
def test_configs_that_are_refused(changes, match):
    refused(match, gpt.huggingface_config, {**PUBLISHED, **changes}, 90)


@pytest.mark.parametrize("missing", ["model_type", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size",
                                     "num_hidden_layers", "max_position_embeddings"])
def test_config_without_a_field(missing):
    refused(f"{missing} is None", gpt.huggingface_config, {k: v for k, v in PUBLISHED.items() if k != missing}, 90)


def test_json_files():
    assert gpt.read_json({}, "config.json") == {}
    for text in ("{", "[1]", "3", "null", "\xff"):
        refused("config.json is no JSON object", gpt.read_json, {"config.json": text.encode("latin-1")}, "config.json")


# Weights

@pytest.mark.parametrize("kind", MODELS)
def test_tensors_of_either_layout(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    for name in ("one", "many"):
        add_tokenizer(tmp_path / name)
    state, digests = read_tensors(tmp_path / "one")
    shards, shard_digests = read_tensors(tmp_path / "many")
    assert list(digests) == ["model.safetensors"] and len(shard_digests) > 2
    names = gpt.huggingface_names(2)
    expected = dict(model.named_parameters())               # names a tied tensor once
    assert {names[key] for key in state} == set(expected) and state.keys() == shards.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, expected[names[key]]) and torch.equal(tensor, shards[key])


def test_digests_name_the_bytes(folder):
    state, digests = read_tensors(folder)
    assert digests == {path.name: digest(path) for path in folder.glob("*.safetensors")}
    before = {key: tensor.clone() for key, tensor in state.items()}
    for path in folder.glob("*.safetensors"):
        with open(path, "r+b") as file:                     # what was read stays as it was
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())


def test_a_single_file_wins(folder):
    state = read_tensors(folder)[0]
    names = gpt.huggingface_names(2)
    save_file({names[key]: tensor + 1 for key, tensor in state.items()}, folder / "model.safetensors")
    again, digests = read_tensors(folder)
    assert list(digests) == ["model.safetensors"] and torch.equal(again["norm.weight"], state["norm.weight"] + 1)


def test_old_folders_with_frequencies_load(folder):
    """Llama folders of 2023 hold each layer's rotary frequencies, which follow from the config."""
    expected = logits(folder)
    edit(shard(folder), **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})
    torch.testing.assert_close(logits(folder), expected)


def test_names_go_both_ways():
    names = gpt.huggingface_names(3)
    assert len(set(names.values())) == len(names)
    assert names["transformer.h.2.attn.c_proj.weight"] == "model.layers.2.self_attn.o_proj.weight"
    assert names["transformer.h.0.mlp.c_gate.weight"] == "model.layers.0.mlp.gate_proj.weight"


def shard(folder: Path, k: int = 1) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[k]


def edit(path: Path, **tensors) -> None:
    save_file({**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}, path)


def misdirect(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard(folder).name, "model-9.safetensors"))


@pytest.mark.parametrize("harm, match", [
    (lambda f: shard(f).unlink(), "model-00002.*cannot be read"),
    (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-100]), "model-00002.*cannot be read"),
    (lambda f: shard(f).write_bytes(b""), "model-00002.*cannot be read"),
    (misdirect, "model-9.safetensors cannot be read"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "no weights"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": '), "index.json is no JSON"),
    (lambda f: (f / "model.safetensors.index.json").unlink(), "no weights"),
])
def test_weights_that_are_refused(folder, harm, match):
    harm(folder)
    refused(match, read_tensors, folder)


def test_tensors_of_no_family_stay_and_hide_none(folder):
    """The model that is built of them refuses them; `norm.weight` is another's name here."""
    before = read_tensors(folder)[0]
    edit(shard(folder), norm__weight=torch.zeros(48), model__layers__2__mlp__up_proj__weight=torch.zeros(2))
    state = read_tensors(folder)[0]
    assert state.keys() - before.keys() == {"'norm.weight'", "'model.layers.2.mlp.up_proj.weight'"}
    assert torch.equal(state["norm.weight"], before["norm.weight"])


def test_tied_and_untied_heads(tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path / "model.safetensors", lm_head__weight=embedding.clone())
    assert "lm_head.weight" not in read_tensors(tmp_path)[0]
    edit(tmp_path / "model.safetensors", lm_head__weight=embedding + 1e-3)
    refused("lm_head.weight is not model.embed_tokens.weight", read_tensors, tmp_path)


# Tokenizer and template

def test_a_tokenizer_of_bytes(tmp_path):
    tokenizer = tokenizer_of(add_tokenizer(tmp_path))
    assert tokenizer.vocab_size == 259 and tokenizer.stops == (256, 258) and tokenizer.call_end == -1
    ids = tokenizer.render([{"role": "user", "content": "é <|im_end|>?"}])
    assert ids[0] == 257 and ids.count(258) == 2            # as in transformers, a message can spell a special token
    assert tokenizer.decode(ids) == "<|im_start|>user\né <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode([300, *tokenizer.encode("a"), 259]) == "a"


def test_truncation_in_the_file_is_not_obeyed(tmp_path):
    add_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer_of(tmp_path).encode("0123456789")) == 10


@pytest.mark.parametrize("generation, config, eos, stops", [
    ({"eos_token_id": [3, 5]}, {"eos_token_id": 7}, "<|endoftext|>", (3, 5, 258)),
    ({"eos_token_id": 3}, {"eos_token_id": [7]}, None, (3, 258)),
    ({}, {"eos_token_id": [7, 2]}, "<|endoftext|>", (2, 7, 258)),
    (None, {"eos_token_id": 7}, "<|endoftext|>", (7, 258)),
    (None, {}, "<|endoftext|>", (256, 258)),
    (None, {}, {"content": "<|endoftext|>", "lstrip": False}, (256, 258)),
    (None, {"eos_token_id": None}, None, (258,)),
])
def test_stops(tmp_path, generation, config, eos, stops):
    add_tokenizer(tmp_path, eos_token=eos)
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert tokenizer_of(tmp_path).stops == stops


@pytest.mark.parametrize("after, stops", [("<|im_end|>", (256, 258)), (" <|im_end|>", (256, 258)), ("\n", (256,)),
                                          ("", (256,)), ("</s>", (256,))])
def test_the_end_of_a_turn_is_a_stop_only_if_it_is_a_token(tmp_path, after, stops):
    template = "{% for m in messages %}<|im_start|>{{ m.content }}" + after + "{% endfor %}"
    assert tokenizer_of(add_tokenizer(tmp_path, template)).stops == stops
    add_tokenizer(tmp_path, "<|im_end|>{{ messages[0].content }}")
    assert tokenizer_of(tmp_path).stops == (256,)       # the template does not write what the assistant says


def test_where_the_template_comes_from(tmp_path):
    lists = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    chat = [{"role": "user", "content": ""}]
    for own, beside, flag, text in ((None, None, "f", "f"), ("o", None, None, "o"), (lists, None, None, "d"),
                                    ("o", "b", None, "b"), ("o", "b", "f", "f")):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        tokenizer = tokenizer_of(add_tokenizer(tmp_path, beside, chat_template=own), flag)
        assert tokenizer.render_text(chat) == text
        copy = write(tmp_path / "copy", tokenizer.files)    # what is saved has the template that was trained with
        assert tokenizer_of(copy).render_text(chat) == text
    for own in (None, "", lists[:1]):
        add_tokenizer(tmp_path, chat_template=own)
        (tmp_path / "chat_template.jinja").unlink()
        refused("no chat template.*--chat-template FILE", tokenizer_of, tmp_path)


@pytest.mark.parametrize("template, match", [
    ("{{ raise_exception('no\nsystem') }}", "stops at no system"),
    ("{% for m in messages %}", "template fails"),
    ("{{ messages[9].content.x }}", "template fails"),
    ("{{ messages[0]['content'] + 1 }}", "template fails"),
    ("{{ 1 // 0 }}", "division"),
    ("{{ range(10000000) | list }}", "template fails"),
    ("{{ ''.__class__ }}", "stops at __class__"),
    ("{{ ''.__class__.__mro__ }}", "stops at"),
    ("{{ messages['append'](1) }}", "stops at append"),
    ("{{ ''['__class__'] }}", "stops at"),
    ("{{ '' | attr('__class__') }}", "stops at"),
    ("{{ strftime_now.__self__ }}", "stops at"),
    ("{{ raise_exception.__globals__ }}", "stops at"),
    ("{{ '{0.__class__}'.format(1) }}", "stops at"),
    ("{% include '/etc/passwd' %}", "template fails"),
    ("{{ cycler.__init__.__globals__ }}", "stops at"),
    ("{{ self._TemplateReference__context }}", "stops at"),
    ("{{ [] | tojson(default=dict) }}", "template fails"),
])
def test_templates_that_are_refused(tmp_path, template, match):
    refused(match, tokenizer_of, add_tokenizer(tmp_path, template))


def test_broken_tokenizers_are_refused(tmp_path):
    refused("tokenizer.json is missing or broken", tokenizer_of, tmp_path)
    path = add_tokenizer(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text()[:-30])
    refused("tokenizer.json is missing or broken", tokenizer_of, tmp_path)
    (add_tokenizer(tmp_path) / "tokenizer_config.json").write_text("{")
    refused("tokenizer_config.json is no JSON", tokenizer_of, tmp_path)


SYSTEM = [{"role": "system", "content": " You are careful.\n"}]
CHATS = [
    [{"role": "user", "content": " What is 2+2? <b>'\"&é日本😀 {{ x }} \n"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello. "},
     {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": " Four, </think> I think.\n"},
     {"role": "user", "content": "3+3?"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 'é'", "parameters": {"a": [1, None]}}}]


class Today(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2025, 3, 9)


def check_as_transformers(tokenizer: gpt.ChatTokenizer, chat: list, **kwargs) -> None:
    rendered, _ = chat_template_utils.render_jinja_template(
        [chat], chat_template=tokenizer.template, add_generation_prompt=chat[-1]["role"] == "user",
        **tokenizer.special, **kwargs)
    tokenizer.variables = kwargs
    assert tokenizer.render_text(chat) == rendered[0]


@needs_fixtures
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_published_templates_as_transformers_renders_them(path, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None}
    tokenizer = tokenizer_of(add_tokenizer(tmp_path, path.read_text(), **specials))
    tokenizer.date = "2025-03-09"
    for chat in CHATS:
        for before in ([], SYSTEM):
            for kwargs in ({}, {"enable_thinking": False}, {"date_string": "1 May 2024"}, {"tools": TOOLS}):
                check_as_transformers(tokenizer, before + chat, **kwargs)
    tokenizer.variables = {}
    if path.stem == "llama32":
        assert "Today Date: 09 Mar 2025" in tokenizer.render_text(CHATS[0])


@pytest.mark.parametrize("template", [
    "{% generation %}a{{ messages[0].content }}\n {%- endgeneration -%} \n b{% for i in range(9) %}"
    "{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}\n",
    "  {% if true %}\n  x\n  {% endif %}\n{{ {'é': '<a>', 'b': [1, none]} | tojson }} {{ [1] | tojson(indent=2) }}",
    "{{ strftime_now('%Y-%m-%d %H:%M') }} {{ bos_token is defined }} {{ eos_token }} {{ unk_token is defined }}"
    "{{ tools is none }} {{ documents is none }} {{ x is defined }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
])
def test_what_templates_may_use_is_as_in_transformers(template, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    tokenizer = tokenizer_of(add_tokenizer(tmp_path, template, bos_token="<s>", unk_token=None, add_bos_token=True))
    tokenizer.date = "2025-03-09"
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    for chat in CHATS:
        check_as_transformers(tokenizer, chat)


def test_a_pickled_tokenizer_is_the_same(tmp_path):
    tokenizer = tokenizer_of(add_tokenizer(tmp_path, CHATML + "{{ strftime_now('%d %b %Y') }}"))
    tokenizer.date = "2024-02-29"
    ids = tokenizer.render(CHATS[0])
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.render(CHATS[0]) == ids and again.stops == tokenizer.stops and again.files == tokenizer.files
    assert again.decode(ids).endswith("29 Feb 2024")


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_fixture_tokenizers(name):
    expected, tokenizer = reference(name), tokenizer_of(FIXTURES / name)
    assert list(tokenizer.stops) == expected["eos_ids"]
    assert [tokenizer.encode(text) for text in expected["texts"]] == expected["texts_ids"]
    assert [tokenizer.decode(ids) for ids in expected["greedy"]] == expected["greedy_text"]
    for chat in expected["chats"]:
        tokenizer.variables = chat["kwargs"]
        assert tokenizer.render_text(chat["messages"]) == chat["text"]
        assert tokenizer.render(chat["messages"]) == chat["ids"]
    for chat in expected["chat_errors"]:
        tokenizer.variables = chat["kwargs"]
        refused("chat template fails", tokenizer.render_text, chat["messages"])


# The cache of the hub

def cached(cache: Path, folder: Path, name: str = "Some/Model") -> Path:
    """Lays a folder out in a cache, as the hub's client does."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        blob = repository / "blobs" / digest(path)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def test_a_model_from_a_filled_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = cached(tmp_path / "cache", folder)
    found = gpt.find_hub_folder("Some/Model")
    assert found == snapshot
    assert read_tensors(found)[1] == read_tensors(folder)[1]
    assert tokenizer_of(found).files == tokenizer_of(folder).files
    refused("Some/Other is no folder.*--model-tag", gpt.find_hub_folder, "Some/Other")
    refused("a/b/c is no folder.*--model-tag", gpt.find_hub_folder, "a/b/c")
    (snapshot / "config.json").resolve().unlink()
    refused("Some/Model .*cannot be had.*No such file.*config.json.*online.*--model-tag", gpt.find_hub_folder, "Some/Model")


# Saving

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_is_the_model(kind, dtype, tmp_path):
    model = tiny(kind)
    for p in model.parameters():                            # its RoPE stays unrounded
        p.data = p.data.to(dtype).float()
    deepcopy(model).to(dtype).save_pretrained(tmp_path / "from")
    add_tokenizer(tmp_path / "from")
    config, tokenizer = config_of(tmp_path / "from"), tokenizer_of(tmp_path / "from")
    state = read_tensors(tmp_path / "from")[0]
    shutil.rmtree(tmp_path / "from")                        # nothing is needed of it
    one = write(tmp_path / "one", {**tokenizer.files, **gpt.weight_files(state, config)})
    many = write(tmp_path / "many", {**tokenizer.files, **gpt.weight_files(state, config, limit=60000)})
    assert (one / "model.safetensors").exists() and not (many / "model.safetensors").exists()
    assert all(path.stat().st_size < 60000 + 4000 or len(load_file(path)) == 1 for path in many.glob("*.safetensors"))
    for folder in (one, many):
        again = read_tensors(folder)[0]
        assert again.keys() == state.keys()
        assert all(tensor.dtype == dtype and torch.equal(tensor, state[key]) for key, tensor in again.items())
        assert torch.equal(logits(folder), logits(model))
        assert tokenizer_of(folder).files == tokenizer.files
        assert transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            CHATS[0], add_generation_prompt=True, return_dict=False) == tokenizer.render(CHATS[0])


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_fixtures_go_in_and_out(name, tmp_path):
    source = FIXTURES / name
    tokenizer = tokenizer_of(source)
    config = gpt.load_huggingface(source, {"sha256": {}})[0]
    state = read_tensors(source)[0]
    out = write(tmp_path / "out", {**tokenizer.files, **gpt.weight_files(state, config)})
    for path in out.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (source / path.name).read_bytes()
    assert {path.name for path in source.iterdir()} - {path.name for path in out.iterdir()} == {"reference.pt"}
    expected = reference(name)
    for ids, rows in zip(expected["full"], expected["logits"]):
        torch.testing.assert_close(logits(out, ids)[-len(rows):], rows, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_peft_loads_an_adapter(kind, tmp_path):
    import peft

    model = tiny(kind)
    model.save_pretrained(tmp_path / "base")
    config = config_of(tmp_path / "base")
    names = {theirs: ours for ours, theirs in gpt.huggingface_names(config.n_layer).items()}
    rank, merged = 4, tiny(kind)
    adapted = gpt.empty_model(replace(config, lora_rank=rank), torch.float32)
    adapters = {}
    for name, weight in merged.named_parameters():
        if "_proj.weight" in name:
            a, b = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank) * 0.02
            adapters |= {names[name].replace("weight", "lora_a"): a, names[name].replace("weight", "lora_b"): b}
            weight.data += 32 / rank * b @ a
    adapted.load_state_dict(adapters, strict=False, assign=True)
    write(tmp_path, gpt.adapter_files(adapted, "some/base"))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert len(adapters) == 2 * 14
    assert (logits(adapted) - logits(tiny(kind))).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Logits

LOOSE = dict(atol=1e-4, rtol=0)


def unlimited(model: gpt.GPT) -> gpt.GPT:
    """The model with the ids past the tokenizer's, as transformers runs it."""
    model.config = replace(model.config, vocab_size=model.config.vocab_rows)
    return model


def cached_logits(model: gpt.GPT, ids: list[int]) -> torch.Tensor:
    """Those of all positions but the first few, in the three ways that the cache is used: a question and a whole completion
    that learns, and, in a cache with room for three rows of two questions, token by token."""
    cut = max(len(ids) // 2, 1)
    prefix = gpt.prefix_of(model, [ids[:cut], ids[:cut // 2 + 1]])
    whole = torch.cat([prefix.hidden[:1, None], model(torch.tensor([ids[cut:]]), gpt.Cache(prefix.rows(torch.tensor([0]))))], 1)[0]
    cache, steps = gpt.Cache(prefix, 3, len(ids)), [prefix.hidden[0]]
    for token in ids[cut:]:
        steps.append(model(torch.full((6, 1), token), cache)[1, 0])
    steps = torch.stack(steps)
    torch.testing.assert_close(model.unembed(steps), model.unembed(whole), **LOOSE)
    return model.unembed(whole)


def check_logits(model: gpt.GPT, ids: list[int], expected: torch.Tensor) -> None:
    """Against the last logits of these ids, plain and through the cache."""
    with torch.no_grad():
        plain = model.unembed(model(torch.tensor([ids]))[0])
        through = cached_logits(model, ids)
    torch.testing.assert_close(plain[-len(expected):], expected, **LOOSE)
    n = min(len(expected), len(through))
    torch.testing.assert_close(through[-n:], expected[-n:], **LOOSE)


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_fixture_logits(name):
    """Logits, logprobs and greedy completions are transformers'."""
    expected = reference(name)
    model, tokenizer, meta = gpt.load_checkpoint(FIXTURES / name)
    assert meta["sha256"]["model.safetensors"] == digest(FIXTURES / name / "model.safetensors")
    unlimited(model).requires_grad_(False)
    for ids, rows, logprobs in zip(expected["full"], expected["logits"], expected["logp"]):
        check_logits(model, ids, rows)
        mine = model.unembed(model(torch.tensor([ids]))[0, :-1]).log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        torch.testing.assert_close(mine[:, 0], logprobs, **LOOSE)
    tokenizer.stops = ()
    greedy = gpt.Sampler(model, tokenizer).generate(expected["prompts"], 2, 48, gpt.Policy(1.0, 1))
    for group, ids, text in zip(greedy, expected["greedy"], expected["greedy_text"], strict=True):
        for completion in group:
            assert completion.tokens == ids and tokenizer.decode(completion.tokens) == text


SIZES = {
    "as it is": {},
    "wide heads": {"head_dim": 40, "num_attention_heads": 2, "num_key_value_heads": 1},
    "narrow heads": {"head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 8},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_logits_of_random_models(kind, size, tmp_path):
    """A model of any shape, in one file or shards, in float32 or bfloat16 on disk, gives transformers' logits."""
    changes = dict(SIZES[size])
    if kind == "qwen2" and "head_dim" in changes:           # Qwen 2 has no such key
        changes["hidden_size"] = changes.pop("head_dim") * changes["num_attention_heads"]
    model = tiny(kind, **changes)
    ids = [5, 250, 17, 17, 99, 3, 255, 60, 61, 62, 0, 200] * 9                  # beyond the 64 that Llama's scaling speaks of
    for dtype in (torch.float32, torch.bfloat16):
        for p in model.parameters():
            p.data = p.data.to(dtype).float()
        place = add_tokenizer(tmp_path / str(dtype), make=True)
        deepcopy(model).to(dtype).save_pretrained(place, max_shard_size="150KB" if size == "as it is" else "5GB")
        mine = unlimited(gpt.load_checkpoint(place)[0])
        assert set(mine.stored_types.values()) == {dtype}
        assert all(p.dtype == torch.float32 for p in mine.parameters())
        assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in model.parameters())
        check_logits(mine, ids, logits(model, ids))


def test_other_float_types(tmp_path):
    """Float16, and a folder whose tensors have several types: each is saved in its own."""
    model, place = tiny("qwen3"), add_tokenizer(tmp_path / "model", make=True)
    model.half().save_pretrained(place)
    edit(place / "model.safetensors", model__norm__weight=torch.ones(48, dtype=torch.float64))
    mine, tokenizer, _ = gpt.load_checkpoint(place)
    assert mine.norm.weight.dtype == torch.float32
    gpt.save_checkpoint(tmp_path / "out", 1, mine, tokenizer, {"model_config": {"vocab_size": 1}})
    before, after = (load_file(path / "model.safetensors") for path in (place, tmp_path / "out" / "000001"))
    assert before.keys() == after.keys() and after["model.norm.weight"].dtype == torch.float64
    assert all(tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items())


# ----------------------------------------------------------------------------------------------------------------------
# The update

REWARDS = [[0.0, 1.0, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0], [0.25, 0.0, 0.0, 0.0]]


def loaded(kind: str, folder: Path, lora_rank: int = 0, dtype: torch.dtype = torch.float32, **changes) -> tuple:
    """A tiny model of that family's with its tokenizer; where it has adapters, they are off zero."""
    if not folder.exists():
        tiny(kind, **changes).save_pretrained(add_tokenizer(folder, make=True))
    model, tokenizer, _ = gpt.load_checkpoint(folder, dtype=dtype, lora_rank=lora_rank)
    if lora_rank:
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.data.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model, tokenizer


def some_groups(model: gpt.GPT, tokenizer: gpt.ChatTokenizer, policy: gpt.Policy, **more) -> list[chat_rl.Group]:
    prompts = [tokenizer.render([{"role": "user", "content": text}]) for text in ("?", "Twenty-one characters", "2 + 2")]
    groups = gpt.Sampler(model, tokenizer).generate(prompts, 4, 12, policy, **more)
    groups[0][1].tokens[3:], groups[0][1].mask[3:], groups[0][1].logprobs[3:] = [], [], []
    return [chat_rl.Group(None, prompt, group, rewards, rewards, chat_rl.advantages_of(rewards))
            for prompt, group, rewards in zip(prompts, groups, REWARDS)]


def gradient_of(model: gpt.GPT, groups: list[chat_rl.Group], policy: gpt.Policy, size: int) -> dict[str, torch.Tensor]:
    """The project's, by parameter."""
    model = deepcopy(model)
    gpt.flatten(model)
    gap = chat_rl.backward(model, groups, policy, size)
    assert gap.abs().max() < 1e-5                           # the policy that sampled is the one that learns
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_gradient(model: gpt.GPT, groups: list[chat_rl.Group], policy: gpt.Policy) -> dict[str, torch.Tensor]:
    """The same written out: every row run alone, whole, in float64, with no cache and nothing left out."""
    model, loss = deepcopy(model).double(), 0.0
    model.dtype = torch.float64
    table = (model.transformer.wte if model.config.tied else model.lm_head).weight
    for group in groups:
        for completion, reward in zip(group.completions, group.rewards):
            hidden = model(torch.tensor([group.prompt + completion.tokens]))[0, len(group.prompt) - 1:-1]
            scores = (hidden @ table.T)[:, :model.config.vocab_size] / policy.temperature
            for row, token in zip(scores, completion.tokens, strict=True):
                kept = row.argsort(descending=True)[:policy.top_k or None]
                loss -= (reward - sum(group.rewards) / len(group.rewards)) * (row[token] - row[kept].logsumexp(dim=-1))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_same_gradient(mine: dict, other: dict, tolerance: float) -> None:
    """Of each parameter, relative to its length; keys' biases have none but rounding, as a softmax does not see them."""
    assert mine.keys() == other.keys()
    whole = torch.cat([x.flatten() for x in other.values()]).norm()
    for name, x in other.items():
        assert (mine[name] - x).norm() < tolerance * (whole if name.endswith("c_k.bias") else x.norm()), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rank", [0, 3])
def test_gradient_is_the_plain_one(kind, rank, tmp_path):
    """In batches of 1, 3 and 100 rows the gradient of each parameter is that of every row run alone; with adapters they
    alone have one; the ids past the tokenizer's have none."""
    model, tokenizer = loaded(kind, tmp_path / "model", rank)
    policy = gpt.Policy(0.8, 0 if rank else 20)
    groups = some_groups(model, tokenizer, policy)
    plain = plain_gradient(model, groups, policy)
    assert all("lora_" in name for name in plain) if rank else len(plain) == len(list(model.parameters()))
    assert all(x.norm() > 0 for x in plain.values())
    for size in (1, 3, 100):
        check_same_gradient(gradient_of(model, groups, policy, size), plain, 3e-5)
    assert rank or not plain["transformer.wte.weight" if model.config.tied else "lm_head.weight"][259:].any()


@pytest.mark.parametrize("rank", [0, 3])
def test_what_saves_memory_changes_nothing(rank, tmp_path, monkeypatch):
    """With the blocks computed again, and with the unembedding in pieces of two rows, completions and gradient are the same."""
    model, tokenizer = loaded("qwen3", tmp_path / "model", rank)
    policy = gpt.Policy(1.0, 0)
    groups = some_groups(model, tokenizer, policy)
    before = gradient_of(model, groups, policy, 4)
    model.recompute = True
    check_same_gradient(gradient_of(model, groups, policy, 4), before, 1e-6)
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", 600)
    assert len(gpt.in_pieces(model, lambda logits, _: logits, torch.zeros(7, model.config.n_embd), torch.zeros(7))) == 4
    check_same_gradient(gradient_of(model, groups, policy, 4), before, 1e-5)
    again = some_groups(model, tokenizer, policy)
    assert [[c.tokens for c in group.completions] for group in again] == [[c.tokens for c in group.completions] for group in groups]
    for one, two in zip(again, groups):
        for c, d in zip(one.completions, two.completions):
            assert c.logprobs == pytest.approx(d.logprobs, abs=1e-5) and c.entropy == pytest.approx(d.entropy, abs=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_recomputing_runs_the_blocks_twice(rank, tmp_path):
    """Once in a sampler, and twice in an update."""
    model, tokenizer = loaded("llama", tmp_path / "model", rank)
    policy, runs = gpt.Policy(1.0, 0), []
    groups = some_groups(model, tokenizer, policy)
    model.transformer.h[0].register_forward_pre_hook(lambda *args: runs.append(1))
    for recompute in (False, True):
        model.recompute = recompute
        runs.clear()
        chat_rl.backward(model, groups, policy, 100)
        assert len(runs) == (4 if recompute else 2)         # the questions, and the completions


def test_tied_embeddings_are_one_parameter(tmp_path):
    """Counted, stepped and saved once, and moved by what both uses say."""
    model, tokenizer = loaded("qwen2", tmp_path / "model")
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names and "lm_head.weight" not in model.state_dict()
    weights, gradient = gpt.flatten(model)
    assert len(weights) == sum(p.numel() for p in tiny("qwen2").parameters()) == len(gradient)
    optimizers = gpt.make_optimizers(model, 1e-2, 1e-2, 1e-2, 0.0, "adamw")
    stepped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())
    policy, before = gpt.Policy(1.0, 0), model.transformer.wte.weight.clone()
    chat_rl.backward(model, some_groups(model, tokenizer, policy), policy, 8)
    gpt.step_optimizers(optimizers, 1.0)
    moved = (model.transformer.wte.weight - before).abs().amax(dim=1)
    assert (moved[:259] > 0).all() and not moved[259:].any()                    # read in 20 rows, written in all
    gpt.save_checkpoint(tmp_path / "out", 1, model, tokenizer, {"model_config": {"vocab_size": 1}})
    saved = load_file(tmp_path / "out" / "000001" / "model.safetensors")
    assert "lm_head.weight" not in saved and torch.equal(saved["model.embed_tokens.weight"], model.transformer.wte.weight)


@pytest.mark.parametrize("top_k", [0, 265])
def test_ids_past_the_tokenizer_are_never_sampled(top_k, tmp_path):
    """Not even where the model is sure of them."""
    model, tokenizer = loaded("llama", tmp_path / "model")
    hidden = torch.randn(500, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight[259:] = 50 * hidden.mean(0)
        model.lm_head.weight[:259] *= 1e-3
    tokens, logprobs, _ = gpt.Sampler(model, tokenizer).draw(hidden, torch.rand(500), gpt.Policy(1.0, top_k))
    assert tokens.max() == 258 and len(set(tokens.tolist())) > 150
    assert (logprobs > -8).all()                            # of about 1 in 259: nothing is left for the others


def test_sampler_runs_base_and_adapter_as_the_update_does(tmp_path):
    """In bfloat16 what is sampled is what learns, though an update of 1e-4 would mostly be rounded away if it were merged."""
    model, tokenizer = loaded("qwen3", tmp_path / "model", 4, torch.bfloat16)
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in base.values())
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * 2 and all(p.dtype == torch.float32 for p in adapters.values())
    for name, p in adapters.items():
        p.data.normal_(std=0.1 if name.endswith("a") else 1e-4)
    sampler, policy = gpt.Sampler(model, tokenizer), gpt.Policy(1.0, 0)
    held = dict(sampler.model.named_parameters())
    assert all(held[name].data_ptr() == p.data_ptr() for name, p in base.items())       # once in memory
    with torch.no_grad():
        for p in adapters.values():
            p.mul_(1.5)
    sampler.refresh()
    assert all(torch.equal(held[name], p.bfloat16()) for name, p in adapters.items())
    ids = torch.randint(0, 250, (4, 60))
    with torch.no_grad():
        assert torch.equal(sampler.model(ids), model(ids))
        lost = [(module.merged().bfloat16() == module.weight).float().mean().item()
                for module in model.modules() if isinstance(module, gpt.Linear) and module.lora_a is not None]
    assert min(lost) > 0.2                                  # what merging would not have changed at all


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

# chat_rl.py with a task that any model can be better or worse at: the completion has an even number of characters.
EVEN = """
import os, sys
sys.path.insert(0, os.environ["ROOT"])
import chat_rl

def parity(text):
    return str(len(text) % 2)

def zero(reference):
    return "0"

def questions():
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in (1, 20, 35) for b in range(5)]
    return {"train": rows[:12], "test": rows[12:]}

chat_rl.TASKS["even"] = chat_rl.Task(questions, chat_rl.Grader(zero, parity))
if __name__ == "__main__":
    status = chat_rl.main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
"""
RUN = ["--task=even", "--examples-per-step=4", "--num-samples=6", "--max-new-tokens=6", "--eval-examples=4", "--eval-samples=2",
       "--max-steps=1", "--embedding-lr=1e-2", "--unembedding-lr=1e-2", "--matrix-lr=1e-2", "--eval-every=100"]


@pytest.fixture(autouse=True)
def even(monkeypatch):
    monkeypatch.setenv("ROOT", str(ROOT))
    space = {"__name__": "even"}
    exec(EVEN, space)


def model_folder(place: Path, kind: str = "qwen3", dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    model = tiny(kind, **changes).to(dtype)
    model.save_pretrained(add_tokenizer(place, make=True))
    return place


def lines_of(base: Path, name: str) -> list[dict]:
    """What metrics.jsonl says, without what depends on the clock."""
    text = (base / "chatrl_checkpoints" / name / "metrics.jsonl").read_text()
    return [untimed(json.loads(line)) for line in text.splitlines()]


def check_saved(source: Path, out: Path, step: int = 1) -> None:
    """The folder of a step is complete, and loads here and in transformers as the same model: another one than the source's."""
    folder = out / f"{step:06d}"
    kept = {path.name for path in source.iterdir()} - {"reference.pt"}
    assert {path.name for path in folder.iterdir() if path.is_file()} == kept
    for name in kept - {"model.safetensors"}:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(after[name].dtype == before[name].dtype and after[name].shape == before[name].shape for name in before)
    assert {name for name in before if "_proj.weight" in name} <= changed
    ids = list(range(3, 200, 7))
    for mine in (gpt.load_checkpoint(out)[0], gpt.load_checkpoint(folder)[0]):
        check_logits(unlimited(mine), ids, logits(folder))
    assert (logits(folder) - logits(source)).abs().max() > 1e-2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(CHATS[2], add_generation_prompt=True, return_dict=False) == tokenizer_of(folder).render(CHATS[2])


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_goes_out_as_it_came_in(kind, tmp_path):
    """What a step on bfloat16 weights has saved is what transformers loads, and what the run evaluated, to rounding."""
    source = model_folder(tmp_path / "model", kind)
    assert main(tmp_path, *RUN, f"--model-tag={source}") == 0
    check_saved(source, tmp_path / "chatrl_checkpoints" / "model")
    step = next(line for line in lines_of(tmp_path, "model") if "reward" in line)
    assert 0 < step["reward"] < 1 and step["grad_norm"] > 0 and step["sampler_gap"] < 1e-5


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_fixtures_take_a_step(name, tmp_path):
    assert main(tmp_path, *RUN, f"--model-tag={FIXTURES / name}") == 0
    check_saved(FIXTURES / name, tmp_path / "chatrl_checkpoints" / name)


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_go_out_merged_and_alone(kind, tmp_path):
    """The merged model loads in transformers, and peft puts the adapter on the model that the run began with: equal logits,
    to the rounding of what is saved in bfloat16. Nothing but the adapters has learned."""
    import peft

    source = model_folder(tmp_path / "model", kind)
    assert main(tmp_path, *RUN, f"--model-tag={source}", "--lora-rank=4") == 0
    out = tmp_path / "chatrl_checkpoints" / "model"
    assert json.loads((out / "meta_000001.json").read_text())["flags"]["matrix_optimizer"] == "adamw"
    check_saved(source, out)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, out / "000001" / "adapter")
    adapters = torch.load(out / "optim_000001.pt", weights_only=True)["masters"]
    assert len(adapters) == 2 * 7 * 2 and all(x.dtype == torch.float32 and x.any() for x in adapters.values())
    model = gpt.load_checkpoint(source, lora_rank=4)[0]
    model.load_state_dict(adapters, strict=False)
    check_logits(unlimited(model), list(range(3, 200, 7)), logits(adapted))
    before, after = (load_file(path / "model.safetensors") for path in (source, out / "000001"))
    for name, tensor in before.items():
        assert "_proj.weight" in name or torch.equal(tensor, after[name])
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in after.items():
        torch.testing.assert_close(merged[name].bfloat16(), tensor, rtol=0.01, atol=1e-3)


def check_same(base: Path, name: str, other: Path, other_name: str, step: int) -> None:
    """Two runs have ended the same: weights, adapters and optimizer states bit for bit, and metrics."""
    one, two = base / "chatrl_checkpoints" / name, other / "chatrl_checkpoints" / other_name
    for path in sorted((two / f"{step:06d}").rglob("*")):
        assert path.is_dir() or path.read_bytes() == (one / path.relative_to(two)).read_bytes(), path
    mine, theirs = (torch.load(out / f"optim_{step:06d}.pt", weights_only=True) for out in (one, two))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert lines_of(base, name) == lines_of(other, other_name)


@pytest.mark.parametrize("rank", [0, 4])
def test_resumed_is_never_stopped(rank, tmp_path):
    """Bit for bit, though the folder has bfloat16 and the run float32."""
    source = model_folder(tmp_path / "model")
    flags = [*RUN, f"--model-tag={source}", f"--lora-rank={rank}", "--max-steps=3", "--save-every=1"]
    assert main(tmp_path / "whole", *flags) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    out = tmp_path / "cut" / "chatrl_checkpoints" / "model"
    shutil.rmtree(out / "000003")
    (out / "meta_000003.json").unlink()
    (out / "000002" / "model.safetensors.part").write_bytes(b"")                # left of a kill
    assert main(tmp_path / "cut", *flags, "--resume") == 0
    check_same(tmp_path / "cut", "model", tmp_path / "whole", "model", 3)


# Runs of a process, or of two ranks: argv[1] is a list of lists of flags.
SEVERAL = EVEN.split("if __name__")[0] + """
import json
leave, chat_rl.dist.destroy_process_group = chat_rl.dist.destroy_process_group, lambda *args: None
for flags in json.loads(sys.argv[1]):
    assert chat_rl.main(flags) == 0
    chat_rl.dist.init_process_group = lambda *args, **more: None                # that of the first stays for all
sys.stdout.flush()
os._exit(0)
"""


def test_two_ranks_are_one(tmp_path):
    """With all weights or adapters, in float32 or bfloat16: the gradient of two ranks is that of one, to rounding."""
    kinds = {"full": [], "lora": ["--lora-rank=4"], "half": ["--lora-rank=4", "--dtype=bfloat16"]}
    flags = {name: [*RUN, *more, f"--model-tag={model_folder(tmp_path / name)}"] for name, more in kinds.items()}
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    run(tmp_path, json.dumps(list(flags.values())), ranks=2, script=script)
    for name, rounding in zip(kinds, (1e-5, 1e-5, 0.02)):
        assert main(tmp_path / "one", *flags[name]) == 0
        two, one = (torch.load(base / "chatrl_checkpoints" / name / "optim_000001.pt", weights_only=True)
                    for base in (tmp_path, tmp_path / "one"))
        assert two["masters"].keys() == one["masters"].keys() and len(one["masters"]) == (24 if name == "full" else 28)
        assert all(x.dtype == torch.float32 for state in (one, two) for x in state["masters"].values())
        two, one = (torch.cat([state["exp_avg"].flatten() for state in x["optimizers"][0]["state"].values()]) for x in (two, one))
        assert (two - one).norm() < rounding * one.norm()
        lines, expected = lines_of(tmp_path, name), lines_of(tmp_path / "one", name)
        keys = ("reward", "completion_length", "entropy", "grad_norm", "advantage_tokens")
        for key in keys:
            assert lines[1][key] == pytest.approx(expected[1][key], rel=2 * rounding), key
        assert expected[1]["sampler_gap"] < 0.02 and name == "half" or expected[1]["sampler_gap"] < 1e-5


def killed(base: Path, file: str, step: int, *flags: str) -> None:
    """Runs chat_rl.py in a process that is killed when it has written half of a file of that step's save."""
    pid = os.fork()
    if not pid:
        def write_half(path: Path, content) -> str:
            if path.name == file and f"{step:06d}" in str(path.relative_to(base)):
                with open(path.with_name(path.name + ".part"), "wb") as half:
                    half.write(b"half")
                os.kill(os.getpid(), 9)
            return whole(path, content)

        whole, gpt.write_file = gpt.write_file, write_half
        try:
            main(base, *flags)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9


@pytest.mark.parametrize("rank", [0, 4])
def test_killed_while_it_saves(rank, tmp_path):
    """In the model of step 1, the optimizer state of step 2 and the meta file of step 3: nothing that is half written is
    taken for a checkpoint, and the end is that of an uninterrupted run."""
    source = model_folder(tmp_path / "model")
    flags = [*RUN, f"--model-tag={source}", f"--lora-rank={rank}", "--max-steps=3", "--save-every=1", "--resume"]
    assert main(tmp_path / "whole", *flags) == 0
    base, out = tmp_path / "cut", tmp_path / "cut" / "chatrl_checkpoints" / "model"
    for i, (file, steps) in enumerate((("model.safetensors", []), ("optim_000002.pt", [1, 2]), ("meta_000003.json", [1, 2])), 1):
        killed(base, file, i, *flags)
        assert gpt.checkpoint_steps(out) == steps
        for step in steps:
            gpt.load_checkpoint(out, step)
    assert main(base, *flags) == 0
    check_same(base, "model", tmp_path / "whole", "model", 3)
    assert not list(out.rglob("*.part"))


@pytest.mark.skipif("CHAT_RL_SOAK" not in os.environ, reason="takes minutes: set CHAT_RL_SOAK=1")
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("shape", ["float32", "bfloat16", "shards"])
def test_soak_of_kills(rank, shape, tmp_path, monkeypatch):
    """A kill in every file of a save in turn changes nothing."""
    source = model_folder(tmp_path / "model", dtype=torch.float32 if shape == "float32" else torch.bfloat16)
    if shape == "shards":
        monkeypatch.setattr(gpt.weight_files, "__defaults__", (60_000,))
    base, whole, name = tmp_path / "cut", tmp_path / "whole", Path("chatrl_checkpoints", "model")
    flags = [*RUN, f"--model-tag={source}", f"--lora-rank={rank}", "--save-every=1", "--keep-last=100", "--resume"]
    assert main(whole, *flags, "--max-steps=1") == 0
    files = sorted({path.name for path in (whole / name / "000001").rglob("*") if path.is_file()} | {"optim_{:06d}.pt", "meta_{:06d}.json"})
    assert any("-of-" in file for file in files) == (shape == "shards")
    flags.append(f"--max-steps={len(files) + 1}")
    shutil.rmtree(whole)
    assert main(whole, *flags) == 0
    for step, file in enumerate(files, 1):
        killed(base, file.format(step), step, *flags)
    assert main(base, *flags) == 0
    check_same(base, "model", whole, "model", len(files) + 1)


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The prompts that are sampled for, as text."""
    prompts, generate = [], gpt.Sampler.generate

    def note(sampler: gpt.Sampler, ids: list, *args, **more) -> list:
        prompts.extend(sampler.tokenizer.decode(prompt) for prompt in ids)
        return generate(sampler, ids, *args, **more)

    monkeypatch.setattr(gpt.Sampler, "generate", note)
    return prompts


def set_today(monkeypatch, day: str) -> None:
    monkeypatch.setattr(gpt, "date", type("Day", (), {"today": staticmethod(lambda: datetime.fromisoformat(day).date())}))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_has_one_day_and_one_template(rank, tmp_path, monkeypatch, seen):
    """Stopped before and resumed after midnight is the run that was never stopped, though its template writes the day; with a
    template and variables of the run's own."""
    source = model_folder(tmp_path / "model")
    template = tmp_path / "own.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} {{ tone }} {{ tone2 }}: " + CHATML)
    flags = [*RUN, f"--model-tag={source}", f"--lora-rank={rank}", "--max-steps=2", "--save-every=1",
             f"--chat-template={template}", '--chat-template-kwargs={"tone": "calm"}']
    set_today(monkeypatch, "2026-02-28")
    assert main(tmp_path / "whole", *flags) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    out = tmp_path / "cut" / "chatrl_checkpoints" / "model"
    (out / "meta_000002.json").unlink()
    set_today(monkeypatch, "2026-03-01")
    assert main(tmp_path / "cut", *flags, "--resume") == 0
    assert {text.partition("<|im_start|>")[0] for text in seen} == {"28 Feb 2026 calm : "}
    check_same(tmp_path / "cut", "model", tmp_path / "whole", "model", 2)
    assert (out / "000002" / "chat_template.jinja").read_text() == template.read_text()
    assert not (source / "chat_template.jinja").read_text() == template.read_text()
    assert json.loads((out / "meta_000002.json").read_text())["date"] == "2026-02-28"
    assert main(tmp_path / "new", *flags) == 0 and seen[-1].startswith("01 Mar 2026 calm")
    assert main(tmp_path / "cut", *flags, "--resume", '--chat-template-kwargs={"tone": "wild"}') == 2


def test_recompute_reaches_the_blocks(tmp_path, monkeypatch):
    source, seen = model_folder(tmp_path / "model"), []
    monkeypatch.setattr(gpt, "recomputed", lambda work, when: seen.append(when) or work)
    for flags in ([], ["--recompute"]):
        seen.clear()
        assert main(tmp_path, *RUN, f"--model-tag={source}", "--max-steps=1", *flags) == 0
        assert any(seen) == bool(flags)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_from_the_hub(rank, folder, tmp_path, monkeypatch, capsys):
    """Offline, from a cache laid out by hand; the run bears the model's name, and goes on by the same name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached(tmp_path / "cache", folder)
    flags = [*RUN, "--model-tag=Some/Model", f"--lora-rank={rank}", "--max-steps=2", "--save-every=1"]
    assert main(tmp_path / "whole", *flags) == 0
    check_logits(unlimited(gpt.load_checkpoint(tmp_path / "whole" / "chatrl_checkpoints" / "Model")[0]), [1, 2, 3, 4, 5, 6],
                 logits(tmp_path / "whole" / "chatrl_checkpoints" / "Model" / "000002", [1, 2, 3, 4, 5, 6]))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "chatrl_checkpoints" / "Model" / "meta_000002.json").unlink()
    capsys.readouterr()
    assert main(tmp_path / "cut", *flags, "--resume") == 0
    assert "passing over" not in capsys.readouterr().out
    check_same(tmp_path / "cut", "Model", tmp_path / "whole", "Model", 2)
    cached(tmp_path / "cache", model_folder(tmp_path / "other", "qwen2"), "Other/Model")
    assert main(tmp_path / "cut", *flags, "--resume", "--model-tag=Other/Model") == 2       # another one of that name
    assert "not the checkpoint that the run began with" in capsys.readouterr().err
    for path in (tmp_path / "cut" / "chatrl_checkpoints" / "Model").glob("optim_*.pt"):
        path.write_bytes(b"")
    assert main(tmp_path / "cut", *flags, "--resume") == 0                      # nothing to go on from: from the start
    check_same(tmp_path / "cut", "Model", tmp_path / "whole", "Model", 2)


@pytest.mark.parametrize("rank", [0, 4])
def test_runs_begin_where_others_ended(rank, tmp_path):
    """A run's folder and a step's folder in it are models to begin with, with the preset of Hugging Face's; and their runs
    are resumed."""
    source = model_folder(tmp_path / "model")
    flags = [*RUN, f"--lora-rank={rank}", "--max-steps=1"]
    assert main(tmp_path, *flags, f"--model-tag={source}") == 0
    first = tmp_path / "chatrl_checkpoints" / "model"
    for i, place in enumerate((first, first / "000001")):
        base = tmp_path / str(i)
        assert main(base, *flags, f"--model-tag={place}") == 0
        out = base / "chatrl_checkpoints" / "model"
        meta = json.loads((out / "meta_000001.json").read_text())
        assert (meta["flags"]["top_k"], meta["flags"]["lr_schedule"], meta["flags"]["matrix_optimizer"]) == (0, "constant", "adamw")
        assert (out / "000001" / "config.json").exists()
        assert main(base, *flags, f"--model-tag={place}", "--resume") == 0
    assert main(tmp_path, *flags, f"--model-tag={first}") == 0                  # never into the folder that it begins from
    assert (tmp_path / "chatrl_checkpoints" / "model-2" / "000001").exists() and gpt.checkpoint_steps(first) == [1]


def test_adapters_go_on_with_their_own_base_only(tmp_path, capsys):
    """A run with adapters takes the frozen weights from where it began: where they have changed or are gone it is not
    resumed, and nothing of it is lost."""
    source = model_folder(tmp_path / "model")
    flags = [*RUN, f"--model-tag={source}", "--lora-rank=4", "--max-steps=2", "--save-every=1", "--resume"]
    assert main(tmp_path, *flags, "--max-steps=1") == 0
    before = {path: digest(path) for path in (tmp_path / "chatrl_checkpoints").rglob("*") if path.is_file()}
    whole = (source / "model.safetensors").read_bytes()
    edit(source / "model.safetensors", model__norm__weight=torch.ones(48, dtype=torch.bfloat16))
    capsys.readouterr()
    for harm in (lambda: None, lambda: shutil.rmtree(source)):
        harm()
        assert main(tmp_path, *flags) == 2
        assert one_error(capsys)
        assert {path: digest(path) for path in before} == before


def one_error(capsys) -> str:
    """The one line that a run ends with."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chat_rl: ")]
    assert len(lines) == 1
    return lines[0]


# Bad input

def set_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_shard(folder: Path, change) -> None:
    """Changes the tensors of the shard that has the last norm."""
    path = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def set_template(folder: Path, text: str | bytes) -> None:
    (folder / "chat_template.jinja").write_bytes(text if isinstance(text, bytes) else text.encode())


BAD = {
    "family": (lambda f: set_config(f, model_type="mistral"), "model_type is 'mistral'"),
    "quantised": (lambda f: set_config(f, quantization_config={"bits": 4}), "quantization_config"),
    "biases": (lambda f: set_config(f, attention_bias=True), "attention_bias is True"),
    "config": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    "missing shard": (lambda f: shard(f).unlink(), "model-00002-of-.* cannot be read"),
    "short shard": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-100]), "model-00002-of-.* cannot be read"),
    "short header": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:30]), "model-00002-of-.* cannot be read"),
    "index": (misdirect, "model-9.safetensors cannot be read"),
    "index list": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["x"]}'), "index.json"),
    "index numbers": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": 3}}'), "3 cannot be read"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "has no weights"),
    "tensor missing": (lambda f: edit_shard(f, lambda t: t.pop("model.norm.weight")), r'Missing key\(s\) in state_dict: "norm.weight"'),
    "tensor left over": (lambda f: edit_shard(f, lambda t: t.update(extra=torch.zeros(2))), "unknown key 'extra'"),
    "shape": (lambda f: edit_shard(f, lambda t: t.update({"model.norm.weight": torch.zeros(47)})), r"size mismatch for norm.weight: .*\[47\]"),
    "integers": (lambda f: edit_shard(f, lambda t: t.update({"model.norm.weight": torch.zeros(48).int()})), "norm.weight is torch.int"),
    "vocabulary": (lambda f: set_config(f, vocab_size=258), "vocab_size is 258"),
    "rows": (lambda f: set_config(f, vocab_size=280), r"size mismatch for .*weight: .*\[272, 48\]"),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer config": (lambda f: (f / "tokenizer_config.json").write_text("[]]"), "tokenizer_config.json is no JSON"),
    "template": (lambda f: set_template(f, "{{ raise_exception('no') }}"), "chat template fails"),
    "template syntax": (lambda f: set_template(f, "{% if %}"), "chat template fails"),
    "sandbox": (lambda f: set_template(f, "{{ ''.__class__.__mro__ }}"), "chat template fails .*__class__"),
    "template bytes": (lambda f: set_template(f, b"\xff\xfe"), "chat_template.jinja"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template.*--chat-template FILE"),
    "too large": (lambda f: set_config(f, intermediate_size=2 ** 40), r"weights need [\d,]+ GB of memory"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_refused(what, folder, tmp_path, capsys):
    """One line, status 2, and nothing is written."""
    harm, match = BAD[what]
    harm(folder)
    (tmp_path / "base").mkdir()
    assert main(tmp_path / "base", *RUN, f"--model-tag={folder}") == 2
    assert re.search(match, one_error(capsys))
    assert not list((tmp_path / "base").iterdir())


@pytest.mark.parametrize("flags, match", [
    (["--model-tag=Some/Other"], "Some/Other is no folder.*--model-tag"),
    (["--chat-template=/nowhere/x.jinja"], "/nowhere/x.jinja"),
    (["--chat-template={}/broken"], "chat template"),
    (["--chat-template={}/binary"], "binary"),
    (["--chat-template-kwargs=[1, 2]"], "--chat-template-kwargs .* no JSON object"),
    (["--chat-template-kwargs={"], "--chat-template-kwargs .* no JSON object"),
    (["--max-new-tokens=500"], "--max-new-tokens"),
])
def test_bad_flags_are_refused(flags, match, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "broken").write_text("{% if")
    (tmp_path / "base").mkdir()
    flags = [flag.replace("{}", str(folder)) for flag in flags]
    assert main(tmp_path / "base", *RUN, f"--model-tag={folder}", *flags) == 2
    assert re.search(match, one_error(capsys))
    assert not list((tmp_path / "base").iterdir())


def test_templates_are_not_for_nanochat(tmp_path, capsys):
    shape = dict(sequence_len=64, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model, place = gpt.GPT(gpt.nanochat_config("current", **shape)).init_weights(0), tmp_path / "model"
    gpt.save_checkpoint(place, 1, model, chat_rl.byte_tokenizer(), {"model_config": shape})
    (tmp_path / "template").write_text(CHATML)
    for flag in ('--chat-template-kwargs={"a": 1}', f"--chat-template={tmp_path / 'template'}"):
        assert main(tmp_path, f"--model-tag={place}", "--task=even", flag) == 2
        assert "Hugging Face" in one_error(capsys) and not (tmp_path / "chatrl_checkpoints").exists()


def test_long_questions_are_measured_against_the_positions(tmp_path, capsys):
    """max_position_embeddings holds a question and its completion."""
    source = model_folder(tmp_path / "model", max_position_embeddings=60)
    length = len(tokenizer_of(source).render([{"role": "user", "content": "What is 35 + 4?"}])) - 1
    flags = [*RUN, f"--model-tag={source}", f"--max-new-tokens={60 - length}"]
    assert main(tmp_path, *flags) == 2
    assert "3 of 3 test questions are longer" in capsys.readouterr().out and not (tmp_path / "chatrl_checkpoints").exists()
    assert main(tmp_path, *flags, f"--max-new-tokens={59 - length}") == 0


# ----------------------------------------------------------------------------------------------------------------------
# Memory

WIDE = gpt.Config(512, 512, n_layer=5, n_head=4, n_kv_head=2, n_embd=128, head_dim=32, mlp_width=256, max_positions=512)
SHAPES = {"llama": WIDE, "qwen2": replace(WIDE, qkv_bias=True, n_kv_head=4, vocab_rows=2000, vocab_size=1900, tied=True),
          "qwen3": replace(WIDE, qk_norm="before", head_dim=64, n_kv_head=1, mlp_width=400), "lora": replace(WIDE, lora_rank=8)}


def peak_of(work) -> int:
    """The most bytes that tensors take while work() runs, besides those that were there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(numpy.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]))


def learner(config: gpt.Config, dtype: torch.dtype) -> gpt.GPT:
    model = gpt.GPT(config, dtype).init_weights(0)
    for name, p in model.named_parameters():
        if config.lora_rank and "lora_" not in name:
            p.requires_grad_(False).data = p.data.to(dtype)
    gpt.flatten(model)
    return model


def lessons(num_groups: int, prompt: int, new: int) -> list[chat_rl.Group]:
    ids = torch.randint(0, 500, (1000,)).tolist()
    completions = [gpt.Completion(ids[:new], [True] * new, [0.0] * new)] * 2
    return [chat_rl.Group(None, ids[:prompt], completions, advantages=[1.0, -1.0]) for _ in range(num_groups)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_of_the_update(shape, recompute, monkeypatch):
    """What README's formula says, within a quarter."""
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", 2 ** 16)
    for dtype, batch, prompt, new in ((torch.float32, 4, 20, 50), (torch.bfloat16, 2, 70, 30)):
        model = learner(SHAPES[shape], dtype)
        model.recompute = recompute
        measured = peak_of(lambda: chat_rl.backward(model, lessons(batch, prompt, new), gpt.Policy(1.0, 0), batch))
        parts = memory.memory(SHAPES[shape], dtype.itemsize, 8, 2, prompt, new, batch, recompute)
        assert measured == pytest.approx(parts["activations"] + parts["logits"], rel=0.25)


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_of_what_stays(shape):
    """Weights, the sampler's copy, gradient, optimizer and the cache's keys and values, as README's formula says."""
    for dtype, optimizer in ((torch.float32, "adamw"), (torch.bfloat16, "muon")):
        model = learner(SHAPES[shape], dtype)
        parts = memory.memory(SHAPES[shape], dtype.itemsize, 32, 4, 20, 200, 8, matrix_optimizer=optimizer)

        def size(*tensors: torch.Tensor) -> int:
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
            return sum(storages.values())

        weights, sampler = list(model.parameters()), gpt.Sampler(model, None)
        optimizers = gpt.make_optimizers(model, matrix_optimizer=optimizer)
        gpt.step_optimizers(optimizers, 0.0)
        states = [x for o in optimizers for state in o.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
        assert size(*weights) == parts["weights"]
        assert size(*[p.grad for p in weights if p.requires_grad]) == parts["gradient"] == parts["before"]
        assert size(*weights, *sampler.model.parameters()) - size(*weights) == pytest.approx(parts["sampler"], rel=0.02)
        assert size(*states) == pytest.approx(parts["optimizer"], rel=0.02)


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_memory_of_the_cache(shape):
    """Keys and values of 32 rows, four of which share a question, and little else."""
    config = SHAPES[shape]
    sampler = gpt.Sampler(learner(config, torch.float32), SimpleNamespace(stops=(), call_end=-1))
    parts = memory.memory(config, 4, 32, 4, 20, 60, 8)
    measured = peak_of(lambda: sampler.generate([[1] * 20] * 8, 4, 60, gpt.Policy(1.0, 50)))
    assert measured == pytest.approx(parts["keys and values"] + 4 * 4 * 32 * config.vocab_rows, rel=0.25)


def test_logits_are_never_there_as_a_whole(monkeypatch):
    """The peak of an update is a fraction of what it is with the unembedding in one piece, and does not grow with the
    completions' logits."""
    model, policy, peaks = learner(replace(WIDE, n_layer=1, vocab_size=8000, vocab_rows=8000), torch.float32), gpt.Policy(1.0, 0), []
    for limit, new in ((2 ** 62, 100), (2 ** 18, 100), (2 ** 18, 50)):
        monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", limit)
        peaks.append(peak_of(lambda: chat_rl.backward(model, lessons(4, 10, new), policy, 8)))
    assert peaks[0] > 4 * 8 * 100 * 8000 * 2.5 and peaks[1] < 0.25 * peaks[0]
    assert peaks[1] - peaks[2] < 4 * 8 * 50 * 8000 * 0.5
