"""Hugging Face's folders in and out, their arithmetic, tokenizers and chat templates, against transformers, peft and what
transformers made of the fixtures."""
import json
import pickle
import re
import shutil
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import SHARED, chat_rl, full_disk, refusal

import gpt

FIXTURES, TEMPLATES = SHARED / "fixtures" / "hf", SHARED / "fixtures" / "chat-templates"
NAMES = ["llama3", "qwen2", "qwen3"]
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="no ../shared/fixtures beside the project")
IDS = list(range(3, 200, 7))

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


def add_tokenizer(folder: Path, template: str | None = CHATML, **settings) -> Path:
    """Bytes and three special tokens: 259 ids."""
    folder.mkdir(exist_ok=True, parents=True)
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
    assert re.search(match, text := refusal(f, *args, **kwargs)), text


def reference(name: str) -> dict:
    return torch.load(FIXTURES / name / "reference.pt", weights_only=False)


def logits(model: Any, ids: list[int] = IDS) -> torch.Tensor:
    """transformers', of a model or a folder."""
    if isinstance(model, Path):
        model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def mine(model: gpt.GPT, ids: list[int] = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.float().unembed(model(torch.tensor([ids]), gpt.Cache())[0])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs[-len(ours):, :ours.size(1)], atol=atol, rtol=0)


# config.json

PUBLISHED = dict(model_type="llama", hidden_size=64, intermediate_size=176, num_attention_heads=4, num_hidden_layers=2,
                 vocab_size=100, max_position_embeddings=128)
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}


def config_of(**changes) -> gpt.Config:
    return gpt.huggingface_config(transformers.AutoConfig.for_model(**{**PUBLISHED, **changes}).to_dict(), 90)


def test_config_defaults():
    assert config_of() == gpt.Config(90, 100, 2, 4, 4, 64, 16, 176, 128)
    assert config_of(vocab_size=80).vocab_size == 80        # ids past the table's rows are never sampled
    qwen2 = config_of(model_type="qwen2", num_attention_heads=32)
    assert (qwen2.qkv_bias, qwen2.n_kv_head, qwen2.head_dim) == (True, 32, 2)
    assert config_of(model_type="qwen2", num_key_value_heads=None).n_kv_head == 4
    qwen3 = config_of(model_type="qwen3", num_key_value_heads=2)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.n_kv_head, qwen3.head_dim) == (False, "before", 2, 128)
    harmless = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": True,
                "sliding_window": 4096, "layer_types": ["full_attention"] * 2, "quantization_config": None,
                "rope_scaling": None, "head_dim": None, "max_window_layers": 28, "pretraining_tp": 1}
    assert config_of(**harmless) == config_of()
    config = config_of(rope_theta=500000, rope_scaling=SCALING)
    assert (config.rope_base, config.rope_scaling) == (5e5, (8.0, 1.0, 4.0, 64))
    assert config_of(rope_theta=5e5, rope_scaling=SCALING, original_max_position_embeddings=99) == config
    old = {("type" if key == "rope_type" else key): value for key, value in SCALING.items()}
    assert config_of(rope_theta=5e5, rope_scaling=old) == config
    assert config_of(rope_parameters={**SCALING, "rope_theta": 5e5}) == config
    plain = config_of(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "factor": 8.0})
    assert (plain.rope_base, plain.rope_scaling) == (1e6, ())


@pytest.mark.parametrize("changes, match", [
    ({"model_type": "mistral"}, "model_type is 'mistral'"), ({"model_type": None}, "model type `None`"),
    ({"model_type": "nanochat"}, "model_type is 'nanochat'.*nanochat's as model_<N>.pt"), ({"model_type": ["llama"]}, "cannot be loaded"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"attention_bias": True}, "attention_bias is True"), ({"mlp_bias": True}, "mlp_bias is True"), ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "layer_types is .*sliding"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"), ({"hidden_size": "64"}, "cannot be loaded"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"), ({"num_hidden_layers": 1}, "Unexpected key.*model.layers.1."),
    ({"num_key_value_heads": 3}, "size mismatch"), ({"vocab_size": 280}, r"size mismatch for .*weight.*\[272, 48\]"),
])
def test_configs_that_are_refused(changes, match, folder):
    set_config(folder, **changes)
    refused(match, gpt.load_checkpoint, folder)


def set_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Weights and arithmetic


@needs_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_fixtures(name):
    """Logits, logprobs, greedy completions, tokens and chats are transformers'."""
    expected = reference(name)
    model, tokenizer = gpt.load_checkpoint(FIXTURES / name)
    for ids, rows, logprobs in zip(expected["full"], expected["logits"], expected["logp"], strict=True):
        assert_close(mine(model, ids)[-len(rows):], rows)
        if model.config.vocab_size == model.config.vocab_rows:  # else transformers gives padding some of it
            ours = mine(model, ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(ours, logprobs, atol=1e-4, rtol=0)
    for ids, greedy in zip(expected["prompts"], expected["greedy"], strict=True):
        if max(greedy) < model.config.vocab_size:
            assert mine(model, ids + greedy)[len(ids) - 1:-1].argmax(-1).tolist() == greedy
    assert list(tokenizer.stops) == expected["eos_ids"] and tokenizer.call_end == -1
    assert [tokenizer.encode(text) for text in expected["texts"]] == expected["texts_ids"]
    assert [tokenizer.decode(ids) for ids in expected["greedy"]] == expected["greedy_text"]
    for chat in expected["chats"]:
        tokenizer.variables = chat["kwargs"]
        assert tokenizer.render_text(chat["messages"]) == chat["text"]
        assert tokenizer.render(chat["messages"]) == chat["ids"]
    for chat in expected["chat_errors"]:
        tokenizer.variables = chat["kwargs"]
        refused("chat template fails", tokenizer.render_text, chat["messages"])


SIZES = {
    "wide heads": {"head_dim": 40, "num_attention_heads": 2, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "fewer rows than ids": {"vocab_size": 257},
    "another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_logits_of_random_models(kind, size, tmp_path):
    changes = dict(SIZES[size])
    if kind != "qwen3" and "head_dim" in changes:
        changes["hidden_size"] = 80                         # qwen2 has no head_dim of its own
    model = tiny(kind, **changes)
    model.save_pretrained(add_tokenizer(tmp_path))
    loaded, _ = gpt.load_checkpoint(tmp_path)
    assert loaded.config.vocab_size == min(259, model.config.vocab_size)    # what is past either is never sampled
    assert_close(mine(loaded), logits(model))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_folder_is_the_model(kind, dtype, tmp_path):
    """In either layout the same tensors in their types; saved they are transformers' model, with nothing of the source."""
    model = deepcopy(tiny(kind)).to(dtype)
    model.save_pretrained(add_tokenizer(tmp_path / "one"))
    model.save_pretrained(add_tokenizer(tmp_path / "many"), max_shard_size="30KB")
    loaded, tokenizer = gpt.load_checkpoint(tmp_path / "one")
    many, _ = gpt.load_checkpoint(tmp_path / "many")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.suffix != ".safetensors"}
    state = {key: x.clone().float() for key, x in loaded.state_dict().items()}
    assert all(torch.equal(x, many.state_dict()[key]) and x.dtype == dtype for key, x in loaded.state_dict().items())
    shutil.rmtree(tmp_path / "one")
    gpt.save_checkpoint(tmp_path / "run", 5, loaded, state, tokenizer)
    saved = tmp_path / "run" / "000005"
    assert {path.name: path.read_bytes() for path in saved.iterdir() if path.suffix != ".safetensors"} == kept
    tensors, expected = load_file(saved / "model.safetensors"), dict(model.named_parameters())
    assert tensors.keys() == expected.keys()                # which name a tied tensor once
    assert all(x.dtype == dtype and torch.equal(x, expected[name]) for name, x in tensors.items())
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(saved)
    assert all(theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text) for text in TEXTS)
    assert theirs.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=False) == tokenizer.render(CHATS[0])


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_go_out_merged_and_alone(kind, tmp_path):
    """The merged model loads in transformers, and peft puts the adapter on the model that it began with: equal logits."""
    import peft

    model = tiny(kind)
    model.save_pretrained(add_tokenizer(tmp_path / "base"))
    adapted, tokenizer = gpt.load_checkpoint(tmp_path / "base", lora_rank=4)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        name for name in adapted.state_dict() if "lora_" in name}
    assert_close(mine(adapted), logits(model))
    torch.manual_seed(1)
    state = {key: torch.randn_like(x) * 0.02 if "lora_b" in key else x for key, x in adapted.state_dict().items()}
    gpt.save_checkpoint(tmp_path, 3, adapted, state, tokenizer, "some/base")
    adapted.load_state_dict(state)
    settings = json.loads((tmp_path / "000003" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/base" and len(settings["target_modules"]) == 7
    assert (logits(tmp_path / "000003") - logits(model)).abs().max() > 0.1
    assert_close(mine(adapted), logits(tmp_path / "000003"))
    assert_close(mine(adapted), logits(peft.PeftModel.from_pretrained(model, tmp_path / "000003" / "adapter")))
    assert "lora_" not in "".join(load_file(tmp_path / "000003" / "model.safetensors"))
    assert_close(mine(gpt.load_checkpoint(tmp_path)[0]), logits(tmp_path / "000003"))


def test_adapters_name_the_step_that_they_adapt(folder, tmp_path):
    """Of a run's folder, which as a whole is no model for peft."""
    model, tokenizer = gpt.load_checkpoint(folder)
    gpt.save_checkpoint(tmp_path / "run", 7, model, model.state_dict(), tokenizer)
    _, state = chat_rl.find_run([f"--model-tag={tmp_path / 'run'}", "--lora-rank=2"], tmp_path)
    assert state["source"] == str(tmp_path / "run" / "000007")
    adapted, _ = gpt.load_checkpoint(folder, lora_rank=2)
    learner = gpt.Learner(adapted, gpt.Ranks(torch.device("cpu")), torch.float32, chat_rl.Flags())
    run = SimpleNamespace(out=tmp_path / "out", step=1, tokenizer=tokenizer, flags=chat_rl.Flags(), wandb_id="", source="the base")
    chat_rl.save(run, learner)
    about = json.loads((run.out / "000001" / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "the base"
    elsewhere = folder.rename(tmp_path / "starter")         # where no starter is to be made
    assert chat_rl.find_run([f"--model-tag={elsewhere}"], tmp_path)[1]["source"] == str(elsewhere)
    assert not list(elsewhere.glob("model_*"))


def test_a_step_is_saved_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """What another save left of itself is no checkpoint and does not stay; a step may be saved again."""
    model, tokenizer = gpt.load_checkpoint(folder)
    (tmp_path / "run" / "000002.part").mkdir(parents=True)
    (tmp_path / "run" / "000002.part" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    assert gpt.checkpoint_steps(tmp_path / "run") == []
    gpt.save_checkpoint(tmp_path / "run", 1, model, model.state_dict(), tokenizer)
    for _ in range(2):
        gpt.save_checkpoint(tmp_path / "run", 2, model, model.state_dict(), tokenizer)
    with pytest.raises(KeyError), monkeypatch.context() as patch:
        patch.setattr(gpt.huggingface_hub, "save_torch_state_dict", lambda *_: {}["what fails when half of it is there"])
        gpt.save_checkpoint(tmp_path / "run", 3, model, model.state_dict(), tokenizer)
    assert gpt.checkpoint_steps(tmp_path / "run") == [1, 2]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["000001", "000002"]
    assert gpt.find_checkpoint(tmp_path / "run", None).name == "000002"
    assert gpt.find_checkpoint(tmp_path / "run", 1).name == "000001"


def test_a_full_disk_is_an_oserror(folder, tmp_path):
    """Also where torch and safetensors have errors of their own; what was there stays, and nothing of the new."""
    model, tokenizer = gpt.load_checkpoint(folder)
    state, place = model.state_dict(), tmp_path / "run"
    gpt.save_checkpoint(place, 1, model, state, tokenizer)
    gpt.write_file(place / "x", lambda file: torch.save(state, file))
    with full_disk(60_000):
        with pytest.raises(OSError, match="File too large"):
            gpt.save_checkpoint(place, 2, model, state, tokenizer)
        with pytest.raises(OSError, match="File too large"):
            gpt.write_file(place / "x", lambda file: torch.save(state, file))
    assert sorted(path.name for path in place.iterdir()) == ["000001", "x"]
    assert gpt.load_checkpoint(place) and gpt.read_state(place / "x")


def test_a_single_file_wins(folder):
    tensors = {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}
    save_file({**tensors, "model.norm.weight": torch.full((48,), 3.0)}, folder / "model.safetensors")
    assert (gpt.load_checkpoint(folder)[0].last_norm.weight == 3).all()
    refused("no model of step 7 in .* without --model-step", gpt.load_checkpoint, folder, 7)


def shard(folder: Path, name: str = "model.norm.weight") -> Path:
    """The file that holds a tensor."""
    return next(path for path in sorted(folder.glob("model-*.safetensors")) if name in load_file(path))


def edit(folder: Path, **tensors) -> None:
    """Adds tensors, or replaces them, beside the last norm."""
    path = shard(folder)
    save_file({**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}, path)


def test_old_folders_with_frequencies_load(folder):
    """Llama folders of 2023 hold each layer's rotary frequencies, which follow from the config."""
    expected = logits(folder)
    edit(folder, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})
    assert_close(mine(gpt.load_checkpoint(folder)[0]), expected)


def test_tied_and_untied_heads(tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(add_tokenizer(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    embedding, expected = tensors["model.embed_tokens.weight"], logits(tmp_path)
    alone = {name: x for name, x in tensors.items() if x is not embedding}  # as safetensors' save_model has it
    save_file({**alone, "lm_head.weight": embedding}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_close(mine(gpt.load_checkpoint(tmp_path)[0]), expected)
    for change in (0, 1e-3):
        save_file({**tensors, "lm_head.weight": embedding + change}, tmp_path / "model.safetensors")
        if change:
            refused("lm_head.weight is not model.embed_tokens.weight", gpt.load_checkpoint, tmp_path)
        else:
            assert "lm_head.weight" not in gpt.load_checkpoint(tmp_path)[0].state_dict()


def drop(folder: Path, name: str) -> None:
    path = shard(folder)
    save_file({key: x for key, x in load_file(path).items() if key != name}, path)


def only_an_adapter(folder: Path) -> None:                  # with config.json and tokenizer beside it, as of axolotl
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


INDEX = "model.safetensors.index.json"
BAD = {
    "missing shard": (lambda f: shard(f).unlink(), "model-0000.-of-.*cannot be read"),
    "short shard": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-100]), "model-0000.-of-.*cannot be read"),
    "pickle": (lambda f: shard(f).write_bytes(pickle.dumps({"x": 1})), "model-0000.-of-.*cannot be read"),
    "index": (lambda f: (f / INDEX).write_text('{"weight_map": {"x": "model-9.safetensors"}}'), "model-9.safetensors cannot be read"),
    "no index": (lambda f: (f / INDEX).unlink(), "No such file.*index.json"),
    "tensor missing": (lambda f: drop(f, "model.norm.weight"), r'Missing key\(s\) in state_dict: "last_norm.weight"'),
    "tensor left over": (lambda f: edit(f, extra=torch.zeros(2)), "'extra'"),
    "shape": (lambda f: edit(f, model__norm__weight=torch.zeros(47)), r"size mismatch for last_norm.weight"),
    "config": (lambda f: (f / "config.json").write_text("{"), "config|broken"),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json of .* is missing or broken"),
    "another tokenizer": (lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_text("YQ== 0\n")),
                          "tokenizer.json of .* is missing or broken"),
    "tokenizer config": (lambda f: (f / "tokenizer_config.json").write_text("[]]"), "or a file beside it"),
    "generation config": (lambda f: (f / "generation_config.json").write_text("{"), "or a file beside it"),
    "adapter": (only_an_adapter, "merged into its base"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_refused(what, folder):
    harm, match = BAD[what]
    harm(folder)
    refused(match, gpt.load_checkpoint, folder)


EVIL = "import pathlib\npathlib.Path({!r}).touch()\nfrom transformers import PreTrainedTokenizerFast as Evil\n"


def test_code_in_a_folder_does_not_run(folder, tmp_path):
    """Neither what config.json nor what tokenizer_config.json names as its classes."""
    (folder / "evil.py").write_text(EVIL.format(str(tmp_path / "touched")))
    classes = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoModelForCausalLM": "evil.Evil"}
    set_config(folder, auto_map=classes)
    add_tokenizer(folder, auto_map=classes, tokenizer_class="Evil")
    _, tokenizer = gpt.load_checkpoint(folder)
    set_config(folder, model_type="evil")
    refused("cannot be loaded .*custom code", gpt.load_checkpoint, folder)
    assert tokenizer.encode("a") and not (tmp_path / "touched").exists()
    exec((folder / "evil.py").read_text())                  # which would have shown it
    assert (tmp_path / "touched").exists()


# Tokenizers and chat templates

TEXTS = ["", " a  b 3 1234567", "é日本😀 e\u0301 \u200b\r\n\t", "<|im_end|>x<|endoftext|> <|im_start|>", "a" * 700, "\0\x7f"]
SYSTEM = [{"role": "system", "content": " You are careful.\n"}]
CHATS = [
    [{"role": "user", "content": " What is 2+2? <b>'\"&é日本😀 {{ x }} \n"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello. "},
     {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": " Four, </think> I think.\n"},
     {"role": "user", "content": "3+3?"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
]


def test_a_tokenizer_of_bytes(tmp_path):
    tokenizer = gpt.ChatTokenizer(add_tokenizer(tmp_path, model_max_length=4))
    assert tokenizer.vocab_size == 259 and tokenizer.stops == (256, 258) and tokenizer.call_end == -1
    ids = tokenizer.render([{"role": "user", "content": "é <|im_end|>?"}])
    assert ids[0] == 257 and ids.count(258) == 2            # as in transformers, a message can spell a special token
    assert tokenizer.decode(ids) == "<|im_start|>user\né <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode([300, *tokenizer.encode("a . b"), 259]) == "a . b"
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text) == tokenizer.encode_raw(text) == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.render(CHATS[0]) == tokenizer.render(CHATS[0]) and again.stops == tokenizer.stops


def test_the_tokenizer_is_the_one_in_the_file(tmp_path):
    """Whatever class the folder names: transformers makes some anew out of vocabulary and merges, and other tokens with
    them than the model was trained on. Truncation, padding and a bos that the file asks for are not obeyed."""
    add_tokenizer(tmp_path, tokenizer_class="GPT2Tokenizer", add_bos_token=True, bos_token="<|im_start|>")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    before = [library.encode(text, add_special_tokens=False).ids for text in TEXTS]
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), library.pre_tokenizer])
    library.post_processor = tokenizers.processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = gpt.ChatTokenizer(tmp_path)
    assert [tokenizer.encode(text) for text in TEXTS] == before
    assert "Digits" in tokenizer.chat.backend_tokenizer.to_str()


END, ADDED = "<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False, "__type": "AddedToken"}


@pytest.mark.parametrize("generation, config, eos, stops", [
    ({"eos_token_id": [3, 5]}, {"eos_token_id": 7}, END, (3, 5, 258)), ({"eos_token_id": 3}, {"eos_token_id": [7]}, None, (3, 258)),
    ({"eos_token_id": 0}, {"eos_token_id": [7]}, None, (0, 258)), ({}, {"eos_token_id": [7, 2]}, END, (2, 7, 258)),
    (None, {"eos_token_id": 7}, END, (7, 258)), (None, {}, END, (256, 258)), (None, {}, ADDED, (256, 258)),
    (None, {"eos_token_id": None}, None, (258,))])
def test_stops(tmp_path, generation, config, eos, stops):
    """generation_config.json's, else config.json's, else the tokenizer's, and what the template writes after a turn."""
    add_tokenizer(tmp_path, eos_token=eos)
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert gpt.ChatTokenizer(tmp_path).stops == stops


@pytest.mark.parametrize("before, after, stops", [
    ("", "<|im_end|>", (256, 258)), ("", " <|im_end|>", (256, 258)), ("", "\n", (256,)), ("", "", (256,)),
    ("", "</s>", (256,)), ("<|im_end|>", "", (256,))])
def test_the_end_of_a_turn_is_a_stop_only_if_it_is_a_token(tmp_path, before, after, stops):
    template = "{% for m in messages %}" + before + "<|im_start|>{{ m.content }}" + after + "{% endfor %}"
    assert gpt.ChatTokenizer(add_tokenizer(tmp_path, template)).stops == stops


def test_where_the_template_comes_from(tmp_path):
    """What is saved has the template that was trained with, here and in transformers."""
    lists = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for i, (own, beside, flag, text) in enumerate(((None, None, "f", "f"), ("o", None, None, "o"), (lists, None, None, "d"),
                                                   ("o", "b", None, "b"), ("o", "b", "f", "f"), (lists, None, "f", "f"))):
        tokenizer = gpt.ChatTokenizer(add_tokenizer(tmp_path / f"{i}", beside, chat_template=own), flag and {"chat_template": flag})
        assert tokenizer.render_text(CHATS[1]) == text
        copy = tmp_path / f"copy {i}"
        copy.mkdir()
        tokenizer.save(copy)
        assert gpt.ChatTokenizer(copy).render_text(CHATS[1]) == text
        assert transformers.AutoTokenizer.from_pretrained(copy).apply_chat_template(CHATS[1], tokenize=False) == text


def test_without_a_template_only_chats_are_refused(tmp_path):
    """Base models have none, and --raw-prompt needs none."""
    tokenizer = gpt.ChatTokenizer(add_tokenizer(tmp_path, None))
    assert tokenizer.stops == (256,) and tokenizer.encode_raw("a")
    refused("template.*not set.*--chat-template FILE", tokenizer.render, CHATS[0])


@pytest.mark.parametrize("template", [
    "{% for m in messages %}", "{{ messages[9].content.x }}", "{{ range(10000000) | list }}", "{{ ''.__class__.__mro__ }}",
    "{{ messages['append'](1) }}", "{% include '/etc/passwd' %}", "{{ raise_exception('no\nsystem') }}"])
def test_templates_that_are_refused(tmp_path, template):
    refused("the chat template fails .*--chat-template FILE", gpt.ChatTokenizer, add_tokenizer(tmp_path, template))


@needs_fixtures
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_published_templates_as_transformers_renders_them(path, tmp_path):
    """Through AutoTokenizer, with the variables that a run gives: the same text and the same ids."""
    add_tokenizer(tmp_path, path.read_text(), bos_token="<s>", eos_token="</s>", unk_token=None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for variables in ({}, {"enable_thinking": False}, {"date_string": "1 May 2024"}):
        tokenizer = gpt.ChatTokenizer(tmp_path, variables=variables)
        for chat in [before + chat for chat in CHATS for before in ([], SYSTEM)]:
            asked = chat[-1]["role"] == "user"
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=asked, **variables)
            assert tokenizer.render_text(chat) == text
            assert tokenizer.render(chat) == theirs.encode(text, add_special_tokens=False)
            if "llama3" in path.stem and "date_string" in variables:
                assert "Today Date: 1 May 2024" in text and datetime.now().strftime("%d %b %Y") not in text


# The cache of the hub


def test_a_model_from_a_filled_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "cache" / "models--Some--Model", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in folder.iterdir():                           # as the hub's client lays them out
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert gpt.find_folder("Some/Model") == snapshot and gpt.find_folder(str(folder)) == folder
    assert_close(mine(gpt.load_checkpoint(snapshot)[0]), logits(folder))
    refused("Some/Other is no file or folder.*hf auth login.*--model-tag", gpt.find_folder, "Some/Other")
    refused("a/b/c is no file or folder.*--model-tag", gpt.find_folder, "a/b/c")
    (snapshot / "config.json").resolve().unlink()
    refused("Some/Model .*cannot be had.*No such file.*config.json.*--model-tag", gpt.find_folder, "Some/Model")
