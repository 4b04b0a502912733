"""What the tests share: tiny real checkpoints, and real processes to run them in."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

if "CHAT_RL_GPU" not in os.environ:  # these tests are the CPU's; set it to run them with the machine's GPUs in sight
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)             # two that spin on tiny operations crawl where another process runs

import chat_rl  # noqa: E402
import gpt  # noqa: E402

# Flags that make a run on the `adder` checkpoint small, quick and not degenerate.
SMALL = ["--model-tag=adder", "--task=arithmetic", "--max-new-tokens=6", "--num-samples=8", "--examples-per-step=8",
         "--eval-examples=8", "--max-steps=3", "--init-lr-frac=0.02"]


SHAPE = {"sequence_len": 48, "vocab_size": 265, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}


def tiny_config(generation: str = "current") -> gpt.Config:
    """SHAPE with a window shorter than the test's sequences, where there are windows, and room for longer ones."""
    config = gpt.nanochat_config(generation, **SHAPE)
    return replace(config, windows=(16, 48, 48) if config.windows else (), max_positions=480)


def tiny_model(generation: str = "current", seed: int = 0) -> gpt.GPT:
    """A random model with every part in use: grouped heads, a short window, all scalars off zero."""
    model = gpt.GPT(tiny_config(generation)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name or p.ndim == 1 or "gate" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
            elif "lm_head" in name:
                p.normal_(std=0.1, generator=generator)
    return model


def chat(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def policy_of(model: gpt.GPT, temperature: float = 1.0, top_k: int = 50) -> gpt.Policy:
    return gpt.Policy(temperature, top_k, model.config.softcap)


def logits_of(model: gpt.GPT, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states (..., C) -> softcapped logits (..., V)."""
    return policy_of(model).scores(model.unembed(hidden))


def generate(model: gpt.GPT, tokenizer: gpt.Tokenizer, prompts: list[list[int]], num_samples: int, max_new_tokens: int,
             temperature: float = 1.0, top_k: int = 50, **more) -> list[list[gpt.Completion]]:
    """Samples with a sampler of its own."""
    policy = policy_of(model, temperature, top_k)
    return gpt.Sampler(model, tokenizer).generate(prompts, num_samples, max_new_tokens, policy, **more)


def sign(folder: Path, step: int, digests: bool = True) -> None:
    """Makes a meta file's digests those of the files that are there, or takes them away."""
    path = folder / f"meta_{step:06d}.json"
    meta = json.loads(path.read_text())
    for name in meta["sha256"]:
        file = gpt.find_tokenizer(folder) if name == "tokenizer.pkl" else folder / name
        meta["sha256"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digests:
        del meta["sha256"]
    path.write_text(json.dumps({**meta, "seal": gpt.seal(meta)}))


@pytest.fixture(scope="session")
def tokenizer() -> gpt.Tokenizer:
    return chat_rl.byte_tokenizer()


@pytest.fixture(scope="session")
def adder_base(tmp_path_factory) -> Path:
    """A base folder whose SFT checkpoint `adder` can add a little, so that groups have something to learn. Do not write
    into it: take `base`."""
    base, tokenizer, task = tmp_path_factory.mktemp("adder"), chat_rl.byte_tokenizer(), chat_rl.TASKS["arithmetic"]
    shape = dict(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    model = gpt.GPT(gpt.nanochat_config("current", **shape)).init_weights(seed=0)
    examples = chat_rl.load_examples(task, chat_rl.make_sums()["train"], "arithmetic")
    chat_rl.teach(model, tokenizer, examples, goal=0.2, size=64, optimizers=gpt.make_optimizers(model))
    gpt.save_checkpoint(base / "chatsft_checkpoints" / "adder", 150, model, tokenizer, {"model_config": shape})
    return base


@pytest.fixture
def base(adder_base, tmp_path) -> Path:
    """A base folder of the test's own, with the checkpoint `adder` in it."""
    return Path(shutil.copytree(adder_base, tmp_path / "base"))


def environment(base: Path, **more: str) -> dict:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def command(*flags: str, ranks: int = 0, script: Path = ROOT / "chat_rl.py") -> list[str]:
    """The command line of a run; under torchrun where ranks are given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *torchrun, str(script), *map(str, flags)]


def run(base: Path, *flags: str, ranks: int = 0, script: Path = ROOT / "chat_rl.py", status: int | None = 0,
        **more: str) -> subprocess.CompletedProcess:
    """Runs chat_rl.py to its end and checks the exit status (None: any)."""
    done = subprocess.run(command(*flags, ranks=ranks, script=script), env=environment(base, **more), cwd=base,
                          capture_output=True, text=True, timeout=300)
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done


def metrics(base: Path, tag: str = "adder") -> list[dict]:
    path = base / "chatrl_checkpoints" / tag / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(base: Path, step: int, tag: str = "adder") -> dict[str, torch.Tensor]:
    return torch.load(base / "chatrl_checkpoints" / tag / f"model_{step:06d}.pt", weights_only=True)
