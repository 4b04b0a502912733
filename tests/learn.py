"""Tiny models of Qwen 3's shape, taught by examples to solve half of a task and saved in Hugging Face's format, learn the rest
from that folder by reinforcement learning: additions, with all weights and with adapters of rank 8, and word problems
with the answer in a box, the task gsm8k-boxed on data made here. Prints pass@1 before and after, and seconds.

    python tests/learn.py [folder]                          # the template is Qwen 3's own where ../shared has it
"""
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

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
          "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 448,
          "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
          "torch_dtype": "float32"}
FULL = ["--matrix-lr=1e-3", "--embedding-lr=1e-3", "--unembedding-lr=1e-3"]
LORA = ["--lora-rank=8", "--matrix-lr=5e-3"]
FLAGS = ["--examples-per-step=256", "--num-samples=8", "--rollout-batch-size=2048", "--device-batch-size=64",
         "--eval-examples=400", "--eval-samples=4", "--save-every=1000"]
STORIES = [
    ("{who} has {a} {what} and buys {b} more. How many {what} does {who} have now?", "+"),
    ("{who} had {a} {what} and gave {b} of them away. How many {what} are left?", "-"),
    ("There are {b} {what} on the table, and {who} brings {a}. How many {what} are there?", "+"),
]


def make_words(count: int = 6000) -> list[dict]:
    """Word problems in GSM8K's columns, no two alike: sums and differences of two numbers, up to 99."""
    draw, rows = random.Random(0), {}
    while len(rows) < count:
        (story, sign), a = draw.choice(STORIES), draw.randint(2, 90)
        b = draw.randint(1, min(a - 1, 99 - a))
        value = a + b if sign == "+" else a - b
        question = story.format(who=draw.choice(["Ana", "Ben", "Chi", "Dan"]), what=draw.choice(["apples", "coins", "pens"]), a=a, b=b)
        rows[question] = f"{a} {sign} {b} = <<{a}{sign}{b}={value}>>{value}\n#### {value}"
    return [{"question": question, "answer": answer} for question, answer in rows.items()]


def boxed(example: chat_rl.Example) -> chat_rl.Example:
    """A question with the reply that supervised learning imitates for a reference."""
    working, _, value = example.references[0].partition("\n#### ")
    return chat_rl.replace(example, references=[working.partition("<<")[0] + rf"\boxed{{{value}}}"])


def make_tokenizer(texts: list[str]) -> gpt.ChatTokenizer:
    """A token for each byte, the words of the questions, and Qwen's special ones."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=440, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator([f"user\n{text}\nassistant\n" for text in texts], trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    settings = {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>"}
    return gpt.ChatTokenizer({"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": library.to_str().encode(),
                              "tokenizer_config.json": json.dumps(settings).encode(),
                              "chat_template.jinja": QWEN3.read_bytes() if QWEN3.exists() else CHATML.encode()})


def make_model(folder: Path, examples: list[chat_rl.Example], goal: float = 0.5, size: int = 128) -> int:
    """Teaches a model by examples and saves it. Returns the number of steps."""
    tokenizer = make_tokenizer([f"{example} {example.references[0]}" for example in examples[:2000]])
    model = gpt.GPT(gpt.huggingface_config(CONFIG, tokenizer.vocab_size)).init_weights(seed=2)
    model.transformer.wte.weight.data *= 0.3                # no norm follows it here
    optimizers = gpt.make_optimizers(model, embedding_lr=0.03, unembedding_lr=0.02, matrix_lr=0.04)
    steps = chat_rl.teach(model, tokenizer, examples, goal, size, optimizers)
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
    words = base / "words"
    words.mkdir(parents=True)
    rows = make_words()
    for name, part in (("train", rows[400:]), ("test", rows[:400])):
        (words / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    load = chat_rl.load_examples
    sums = load(chat_rl.TASKS["arithmetic"], chat_rl.make_sums()["train"], "arithmetic")
    stories = [boxed(example) for example in load(chat_rl.TASKS["gsm8k-boxed"], rows[400:], "words")]
    arithmetic, in_a_box = ["--task=arithmetic", "--max-new-tokens=8"], [f"--data={words}", "--max-new-tokens=24"]
    for name, examples, runs in (
            ("words", stories, {"words in a box, all weights": [*in_a_box, *FULL]}),
            ("sums", sums, {"sums, all weights": [*arithmetic, *FULL], "sums, adapters": [*arithmetic, *LORA]})):
        begun = time.monotonic()
        steps = make_model(base / name, examples)
        print(f"{name}: {steps} steps of supervised learning, {time.monotonic() - begun:.0f} s", flush=True)
        for title, flags in runs.items():
            begun = time.monotonic()
            lines = learn(base / title, base / name / f"{steps:06d}", f"--max-steps={num_steps}", *flags)
            tests = [line["pass@1"] for line in lines if "greedy" in line]
            print(f"{title}: pass@1 {tests[0]:.3f} → {tests[-1]:.3f} in {num_steps} steps, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
