"""What the tests share: tiny real checkpoints, and real processes to run them in."""
import atexit
import fcntl
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

if "CHAT_RL_GPU" not in os.environ:  # these tests are the CPU's; set it to run them with the machine's GPUs in sight
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"   # read when the hub's client is imported, by whichever test is first
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()                # likewise; nothing of the tests stays in the home folder
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], True)

import matplotlib.figure  # noqa: E402
import matplotlib.image  # noqa: E402
import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from fork import Fork  # noqa: E402

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
    config = gpt.nanochat_config(generation, **SHAPE, vocab_rows=320)
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


PROMPT_LENGTHS = 3, 70, 21          # about the windows of tiny_model, 16 and 48: within both, past both, between


def random_prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


def scripted_model(successors: dict[int, list[int]], default: int) -> gpt.GPT:
    """A GPT whose every token is followed by one of its successors, all as likely, or else by `default`."""
    shape = dict(sequence_len=320, vocab_size=265, n_layer=1, n_head=4, n_kv_head=4, n_embd=320)
    model = gpt.GPT(gpt.nanochat_config("classic", **shape, vocab_rows=320)).init_weights(0)  # c_proj is zero: embeddings pass straight through
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(320))
        model.lm_head.weight.fill_(-10.0)
        for token in range(265):
            model.lm_head.weight[successors.get(token, [default]), token] = 10.0
    return model


def shared(*parts: str) -> Path:
    """What lies beside the project; without it the test is skipped."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def chat(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def policy_of(model: gpt.GPT, temperature: float = 1.0, top_k: int = 50) -> gpt.Policy:
    return gpt.Policy(temperature, top_k, model.config.softcap)


def logits_of(model: gpt.GPT, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states (..., C) -> softcapped logits (..., V)."""
    return policy_of(model).scores(model.unembed(hidden))


def generate(model: gpt.GPT, tokenizer: gpt.Tokenizer, prompts: list[list[int]], num_samples: int, max_new_tokens: int,
             temperature: float = 1.0, top_k: int = 50, **more) -> list[list[gpt.Completion]]:
    policy = policy_of(model, temperature, top_k)
    more = {"seed": (0,), "streams": list(range(len(prompts)))} | more
    return gpt.generate(model, tokenizer, prompts, num_samples, max_new_tokens, policy, **more)


def completion(tokens: list, mask: list | None = None, logprobs: list | None = None, entropy: float = 0.0) -> gpt.Completion:
    n = len(tokens)
    mask, logprobs = [True] * n if mask is None else mask, [0.0] * n if logprobs is None else logprobs
    return gpt.Completion(numpy.array(tokens, int), numpy.array(mask, bool), numpy.array(logprobs, numpy.float32), entropy)


def example(index: int, prompt: list[int], grader: str = "exact", references: tuple = ("?",)) -> chat_rl.Example:
    return chat_rl.Example(index, f"question {index}", prompt, "", list(references), grader)


def group_of(example: chat_rl.Example, completions: list, advantages: list, rewards: list = ()) -> chat_rl.Group:
    """One to learn from, whatever was said."""
    return chat_rl.Group(example, completions, [], [], list(rewards), advantages, timeouts=0)


def cpu_learner(model: gpt.GPT, **rates: float) -> gpt.Learner:
    return gpt.Learner(deepcopy(model), gpt.Ranks(torch.device("cpu")), next(model.parameters()).dtype, chat_rl.Flags(**rates))


def state_of(learner: gpt.Learner, *names: str) -> list[torch.Tensor]:
    """A rank's parts of masters ("masters") and averages ("exp_avg", "exp_avg_sq")."""
    return [x for shard in learner.shards.values() for name, x in shard.state.items() if name in names and x is not None]


def weights_of(model: gpt.GPT) -> torch.Tensor:
    """All of them, one after another."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient_of(model: gpt.GPT) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of two vectors, relative to their length."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def on_ranks(size: int, work: Callable, *args: Any) -> None:
    """Does work(ranks, *args) on so many ranks, in forks of this process."""
    def rank(number: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(number), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        work(gpt.start_ranks("cpu"), *args)
        torch.distributed.destroy_process_group()

    port = free_port()
    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(number,)) for number in range(size)]
    for process in processes:
        process.start()
    assert [process.join(120) or process.exitcode for process in processes] == [0] * size


def refusal(call: Callable, *args: Any, **more: Any) -> str:
    """The one line that it is refused with."""
    with pytest.raises(gpt.UserError) as refused:
        call(*args, **more)
    text = str(refused.value)
    assert "\n" not in text and len(text) < 700, text
    return text


class Touch:
    """Makes a file when it is unpickled by a careless unpickler."""

    def __init__(self, path: Path, call: Callable = os.system):
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (f"touch {self.path}",) if self.call is os.system else (f"open({str(self.path)!r}, 'w')",)


@pytest.fixture(scope="session")
def tokenizer() -> gpt.Tokenizer:
    return chat_rl.byte_tokenizer()


PLOT, DRAW = chat_rl.Log.plot, matplotlib.figure.Figure.savefig


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Drawing curve.png takes longer than a short run: here it is left out, and in a fork it is laid out but not drawn,
    unless a test takes `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_rl.Log, "plot", lambda log: (log.out / "curve.png").write_bytes(b"a picture"))
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda self, file, **_: file.write(b"a picture"))
        yield


@pytest.fixture
def pictures(monkeypatch) -> None:
    """curve.png is drawn."""
    monkeypatch.setattr(chat_rl.Log, "plot", PLOT)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", DRAW)


@pytest.fixture(scope="session")
def adder_base(tmp_path_factory) -> Path:
    """A base folder whose SFT checkpoint `adder` can add a little, so that groups have something to learn, and whose tables
    are bfloat16: taught once, by the worker that comes first. Do not write into it: take `base`."""
    many = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp().parent / "adder" if many else tmp_path_factory.mktemp("adder")
    folder = base / "chatsft_checkpoints" / "adder"
    with open(base.with_name("adder.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            teach_adder(folder)
    return base


def teach_adder(folder: Path) -> None:
    tokenizer, flags = chat_rl.byte_tokenizer(), chat_rl.Flags(**chat_rl.TASKS["arithmetic"])
    shape = dict(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    model = gpt.GPT(gpt.nanochat_config("current", **shape, vocab_rows=320)).init_weights(seed=0)
    model.raw_config = shape
    learner, examples = cpu_learner(model), chat_rl.load_examples(flags, tokenizer, 128, "sums", "train")
    chat_rl.teach(learner, tokenizer, examples, goal=0.2)
    state = learner.model.state_dict()
    learner.model.stored_types = {key: torch.bfloat16 for key in state if "wte" in key or "value_embeds" in key}
    gpt.save_checkpoint(folder, 150, learner.model, state, tokenizer)


@pytest.fixture
def base(adder_base, tmp_path) -> Path:
    """A base folder of the test's own, with the checkpoint `adder` in it."""
    return Path(shutil.copytree(adder_base, tmp_path / "base"))


def environment(base: Path, **more: str) -> dict:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "ROOT": str(ROOT), **more}


def main(base: Path, *flags: str) -> int:
    """Runs chat_rl in this process; returns its exit status. Ctrl-C is heard, also where the tests run in the background, and
    the handlers of signals stay what they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        try:
            return chat_rl.main([str(flag) for flag in flags])
        except SystemExit as end:
            return end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def forks(base: Path, flags: tuple, ranks: int, script: Path, out: Path, error: Path, **more: str) -> Iterator[list[Fork]]:
    """A process for each rank, or one without any, that print to two files, or to one. In the end none of them is left. Only
    rank 0 has the base folder: the others are on another machine."""
    for path in (out, error):
        path.write_bytes(b"")
    places = [{}]
    if ranks:
        shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks),
                      LOCAL_WORLD_SIZE=str(ranks))
        places = [dict(shared, RANK=str(i), LOCAL_RANK=str(i), NANOCHAT_BASE_DIR=str(base / "elsewhere" if i else base))
                  for i in range(ranks)]
    draws = matplotlib.figure.Figure.savefig is DRAW
    processes = [Fork(script, [*map(str, flags)], base, environment(base, **place, **more), out, error, draws)
                 for place in places]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(base: Path, *flags: str, ranks: int = 0, script: Path = ROOT / "chat_rl.py", status: int | None = 0,
        **more: str) -> subprocess.CompletedProcess:
    """Runs chat_rl.py, or another script, to its end in a fork, or in one for each rank, and checks the exit status
    (None: any). That of ranks is the one furthest from 0, and what they print comes mixed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "error")]
        with forks(base, flags, ranks, script, *files, **more) as processes:
            statuses = [process.wait(300) for process in processes]
        texts = [file.read_text() for file in files]
    done = subprocess.CompletedProcess([str(script), *flags], max(statuses, key=abs), *texts)
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can be larger than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def edited(base: Path, code: str) -> Path:
    """A program that runs this code and then chat_rl."""
    script = base / "edited.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, os.environ["ROOT"])
import torch, chat_rl, gpt
{code}
status = chat_rl.main(sys.argv[1:])
if "RANK" in os.environ:
    os._exit(status)
sys.exit(status)
""")
    return script


def wait_for(condition: Callable, seconds: float, what: str, pause: float = 0.005) -> Any:
    """The first true value of condition(), asked again and again; fails after that many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(pause)
    return value


@contextmanager
def started(base: Path, *flags: str, script: Path = ROOT / "chat_rl.py", **more: str) -> Iterator[Fork]:
    """A process of chat_rl.py, which prints to out.txt. In the end it is not left."""
    with forks(base, flags, 0, script, base / "out.txt", base / "out.txt", **more) as processes:
        yield processes[0]


def output(base: Path) -> str:
    return (base / "out.txt").read_text()


def ended(process: Fork | subprocess.Popen, base: Path, seconds: float) -> int:
    """The exit status of a process that must end within so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it has not ended after {seconds} s:\n{output(base)}")


def out(base: Path, tag: str = "adder") -> Path:
    return base / "chatrl_checkpoints" / tag


def metrics(base: Path, tag: str = "adder") -> list[dict]:
    return [json.loads(line) for line in (out(base, tag) / "metrics.jsonl").read_text().splitlines()]


def last_step(base: Path) -> int:
    """The last step that metrics.jsonl tells of, −1 where there is none."""
    lines = metrics(base) if (out(base) / "metrics.jsonl").exists() else []
    return max((line["step"] for line in lines if "reward" in line), default=-1)


def reach(process: Fork | subprocess.Popen, base: Path, step: int) -> None:
    """Waits until a step is done."""
    wait_for(lambda: last_step(base) >= step or process.poll() is not None, 120, f"step {step}")
    assert process.poll() is None, f"it ended before it could be stopped:\n{output(base)}"


def weights(base: Path, step: int, tag: str = "adder") -> dict[str, torch.Tensor]:
    return torch.load(out(base, tag) / f"model_{step:06d}.pt", weights_only=True)


def samples(base: Path, step: int, tag: str = "adder", kind: str = "") -> list[dict]:
    return [json.loads(line) for line in (out(base, tag) / f"samples_{step:06d}{kind}.jsonl").read_text().splitlines()]


def untimed(line: dict) -> dict:
    """A line of metrics.jsonl without what depends on the clock."""
    return {key: x for key, x in line.items() if "second" not in key}


def assert_same_run(base: Path, whole: Path, step: int = 12) -> None:
    """Bit for bit the same weights, and the same metrics apart from times."""
    mine, other = weights(base, step), weights(whole, step)
    assert mine.keys() == other.keys()
    for key, tensor in other.items():
        assert mine[key].dtype == tensor.dtype and torch.equal(mine[key], tensor), key
    assert [untimed(line) for line in metrics(base)] == [untimed(line) for line in metrics(whole)]


def assert_readable(base: Path) -> None:
    """metrics.jsonl and samples are JSON to their end, and curve.png is a picture."""
    for path in (out(base) / "metrics.jsonl", *out(base).glob("samples_*.jsonl")):
        text = path.read_text()
        assert text.endswith("\n") and [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    picture = (out(base) / "curve.png").read_bytes()
    assert picture == b"a picture" or matplotlib.image.imread(io.BytesIO(picture)).std() > 0


def cut_back(base: Path, step: int) -> None:
    """Takes away the checkpoints after a step, as if the run had been killed before they were written."""
    for path in out(base).glob("*_*.*"):
        if (found := re.fullmatch(r"(model|optim|meta|samples)_(\d+)\.\w+", path.name)) and int(found[2]) > step:
            path.unlink()
