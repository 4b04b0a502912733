"""A tiny Qwen 3 learns to add: taught by examples to solve half, saved in Hugging Face's format, and from that folder by
reinforcement learning, with all weights and with adapters of rank 8. Prints pass@1 before and after, and seconds.

    python tests/learn.py [folder]                          # the template is Qwen 3's own where ../shared has it
"""
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tokenizers  # noqa: E402
import torch  # noqa: E402

import chat_rl  # noqa: E402
import gpt  # noqa: E402

QWEN3 = ROOT.parent / "shared" / "fixtures" / "chat-templates" / "qwen3.jinja"
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384,
          "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 320,
          "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
          "torch_dtype": "float32"}
RATES = {"full": ["--matrix-lr=1e-3", "--embedding-lr=1e-3", "--unembedding-lr=1e-3"],
         "adapters": ["--lora-rank=8", "--matrix-lr=5e-3"]}
FLAGS = ["--task=arithmetic", "--examples-per-step=256", "--num-samples=8", "--max-new-tokens=8", "--rollout-batch-size=2048",
         "--device-batch-size=64", "--eval-examples=400", "--eval-samples=4", "--eval-every=1000", "--save-every=1000"]


def make_tokenizer() -> gpt.ChatTokenizer:
    """A token for each byte, the words of the questions, and Qwen's special ones."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(["user\nWhat is 1 + 1?\nassistant\n", "What is", "assistant", "user"] * 9, trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    settings = {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>"}
    return gpt.ChatTokenizer({"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": library.to_str().encode(),
                              "tokenizer_config.json": json.dumps(settings).encode(),
                              "chat_template.jinja": QWEN3.read_bytes() if QWEN3.exists() else CHATML.encode()})


def make_model(folder: Path, goal: float = 0.5, size: int = 128) -> int:
    """Teaches a model by examples and saves it. Returns the number of steps."""
    tokenizer = make_tokenizer()
    model = gpt.GPT(gpt.huggingface_config(CONFIG, tokenizer.vocab_size)).init_weights(seed=2)
    model.transformer.wte.weight.data *= 0.3                # no norm follows it here
    examples = chat_rl.load_examples(chat_rl.TASKS["arithmetic"], chat_rl.make_sums()["train"], "arithmetic")
    with mock.patch("gpt.make_optimizers", partial(gpt.make_optimizers, embedding_lr=0.03, unembedding_lr=0.02, matrix_lr=0.04)):
        steps = chat_rl.teach(model, tokenizer, examples, goal, size)
    gpt.save_checkpoint(folder, steps, model, tokenizer, {"model_config": CONFIG})
    return steps


def learn(base: Path, folder: Path, *flags: str) -> list[dict]:
    """Runs chat_rl.py on the folder: the lines of its log."""
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    assert chat_rl.main([f"--model-tag={folder}", *FLAGS, *flags]) == 0
    [path] = base.glob("chatrl_checkpoints/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(base: Path, num_steps: int = 25) -> None:
    torch.set_num_threads(1)
    begun = time.monotonic()
    steps = make_model(base / "tiny")
    print(f"{steps} steps of supervised learning: {time.monotonic() - begun:.0f} s", flush=True)
    for name, rates in RATES.items():
        begun = time.monotonic()
        lines = learn(base / name, base / "tiny" / f"{steps:06d}", f"--max-steps={num_steps}", *rates)
        tests = [line["pass@1"] for line in lines if "greedy" in line]
        print(f"{name}: pass@1 {tests[0]:.3f} → {tests[-1]:.3f} in {num_steps} steps, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
