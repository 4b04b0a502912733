"""What happens to long runs: signals, kills, full disks, damaged and hostile files, lost ranks. All of it to real processes.

    CHAT_RL_SOAK=1 python -m pytest tests/test_survival.py -k soak        # the long one: 20 kills
"""
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import ROOT, SMALL, chat_rl, environment, gpt, metrics, run, sign, weights
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

STEPS = 12
RUN = [*SMALL, f"--max-steps={STEPS}", "--eval-every=5", "--save-every=1", "--keep-last=20"]
TWO = ("--standalone", "--nproc-per-node=2")
FAST = dict(deadline=None, derandomize=True)

# Runs chat_rl several times in one process: argv[1] is a list of [file size limit or null, environment, flags].
SEVERAL = """
import json, os, resource, sys, traceback
sys.stderr = sys.stdout
sys.path.insert(0, os.environ["ROOT"])
import chat_rl
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit, environment, flags in json.loads(sys.argv[1]):
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or hard, hard))
    try:
        status = chat_rl.main(flags)
    except BaseException:
        status = traceback.format_exc()
    print("\\n===", json.dumps(status), flush=True)
"""

# chat_rl with a fault of the given KIND in the steps STEPS.
TROUBLE = """
import dataclasses, os, sys, time
sys.path.insert(0, os.environ["ROOT"])
import chat_rl
task, questions = chat_rl.TASKS["arithmetic"], chat_rl.questions_of_step
kind, steps, now = os.environ["KIND"], set(map(int, os.environ["STEPS"].split())), []

def hang(*args):
    print("hanging", flush=True)
    time.sleep(300)

def faulty(reference, text):
    if now and now[-1] in steps:
        return hang() if kind == "hang" else float(kind)
    return task.grader(reference, text)

faulty.reads = lambda reference: True
chat_rl.questions_of_step = lambda run, step: now.append(step) or questions(run, step)
if kind == "hang in save":
    chat_rl.save = hang
else:
    chat_rl.TASKS["arithmetic"] = dataclasses.replace(task, grader=faulty)
sys.exit(chat_rl.main(sys.argv[1:]))
"""


# ----------------------------------------------------------------------------------------------------------------------
# Processes, and what they leave


def wait_for(condition, seconds: float, what: str, pause: float = 0.005):
    """The first true value of condition(), asked again and again; fails after that many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(pause)
    return value


def family(base: Path) -> dict[int, dict]:
    """The live processes that were started with this base folder: their environments by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (folder / "environ").read_text(errors="replace").split("\0")
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:                     # it has ended, or is someone else's
            continue
        variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if alive and variables.get("NANOCHAT_BASE_DIR") == str(base):
            found[int(folder.name)] = variables
    return found


@contextmanager
def started(base: Path, *flags: str, torchrun: tuple = (), script: Path = ROOT / "chat_rl.py", **more: str):
    """A process of chat_rl.py; that of torchrun where it is given torchrun's options. In the end none of them is left."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    with open(base / "out.txt", "w") as out:
        process = subprocess.Popen([sys.executable, *launcher, str(script), *map(str, flags)], cwd=base, stdout=out,
                                   stderr=subprocess.STDOUT, env=environment(base, ROOT=str(ROOT), **more))
    try:
        yield process
    finally:
        for pid in [process.pid] * (process.poll() is None) + list(family(base)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait(10)


def output(base: Path) -> str:
    return (base / "out.txt").read_text()


def ended(process: subprocess.Popen, base: Path, seconds: float) -> int:
    """The exit status of a process that must end within so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it has not ended after {seconds} s:\n{output(base)}")


def finish(base: Path, *flags: str, **more) -> None:
    """Runs to the end."""
    with started(base, *flags, **more) as process:
        assert ended(process, base, 120) == 0, output(base)


def out(base: Path, tag: str = "adder") -> Path:
    return base / "chatrl_checkpoints" / tag


def last_step(base: Path, tag: str = "adder") -> int:
    """The last step that metrics.jsonl tells of, −1 where there is none; the file may be in the middle of a line."""
    path = out(base, tag) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if '"reward"' in line), default=-1)


def reach(process: subprocess.Popen, base: Path, step: int) -> None:
    """Waits until a step is done."""
    wait_for(lambda: last_step(base) >= step or process.poll() is not None, 120, f"step {step}")
    assert process.poll() is None, f"it ended before it could be stopped:\n{output(base)}"


def untimed(line: dict) -> dict:
    return {key: x for key, x in line.items() if key not in ("tokens_per_second", "rollout_seconds", "update_seconds")}


def assert_same_run(base: Path, whole: Path, tag: str = "adder", step: int = STEPS) -> None:
    """Bit for bit the same weights, and the same metrics apart from times."""
    mine, other = weights(base, step, tag), weights(whole, step, tag)
    assert mine.keys() == other.keys()
    for key, tensor in other.items():
        assert mine[key].dtype == tensor.dtype and torch.equal(mine[key], tensor), key
    assert [untimed(line) for line in metrics(base, tag)] == [untimed(line) for line in metrics(whole, tag)]


def cut_back(base: Path, step: int, tag: str = "adder") -> None:
    """Takes away the checkpoints after a step, as if the run had been killed before they were written."""
    for path in out(base, tag).glob("*_*.*"):
        if (found := re.fullmatch(r"(model|optim|meta)_(\d+)\.\w+", path.name)) and int(found[2]) > step:
            path.unlink()


def several(base: Path, *runs: tuple, script: str = SEVERAL) -> list[tuple[str, str]]:
    """Runs chat_rl several times in one process, each time with (flags, file size limit, environment): the exit status
    (a traceback where an exception came out) and the output of each."""
    runs = [[*part, *[None, {}][len(part) - 1:]] for part in runs]
    runs = [[limit, variables, [str(flag) for flag in flags]] for flags, limit, variables in runs]
    (base / "several.py").write_text(script)
    done = run(base, json.dumps(runs), script=base / "several.py", ROOT=str(ROOT))
    said, *parts = re.split(r"^=== (.*)\n", done.stdout, flags=re.MULTILINE)
    assert len(parts) == 2 * len(runs), done.stdout + done.stderr
    return [(json.loads(status), text) for status, text in zip(parts[0::2], [said, *parts[1::2]])]


@pytest.fixture(scope="module")
def wholes(adder_base, tmp_path_factory) -> Path:
    """A base folder with the uninterrupted runs, of `adder` and of `half`, whose tables are bfloat16 on disk."""
    base = Path(shutil.copytree(adder_base, tmp_path_factory.mktemp("whole") / "base"))
    model, tokenizer, meta = gpt.load_checkpoint(base / "chatsft_checkpoints" / "adder")
    model.stored_types = {key: torch.bfloat16 for key in model.state_dict() if "wte" in key or "value_embeds" in key}
    gpt.save_checkpoint(base / "chatsft_checkpoints" / "half", 150, model, tokenizer, {"model_config": meta["model_config"]})
    assert [status for status, _ in several(base, (RUN,), ([*RUN, "--model-tag=half"],))] == [0, 0]
    return base


@pytest.fixture(scope="module")
def pair(adder_base, tmp_path_factory) -> Path:
    """A base folder with the uninterrupted run on 2 ranks."""
    base = Path(shutil.copytree(adder_base, tmp_path_factory.mktemp("pair") / "base"))
    finish(base, *RUN, torchrun=TWO)
    return base


@pytest.fixture
def finished(wholes, tmp_path) -> Path:
    """A copy of the uninterrupted runs, to damage."""
    return Path(shutil.copytree(wholes, tmp_path / "finished"))


def assert_readable(base: Path, tag: str = "adder") -> None:
    """metrics.jsonl is JSON to its end, and curve.png a picture."""
    for line in (out(base, tag) / "metrics.jsonl").read_text().split("\n")[:-1]:
        json.loads(line, parse_constant=pytest.fail)
    for path in out(base, tag).glob("samples_*.jsonl"):
        assert [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert (out(base, tag) / "metrics.jsonl").read_text().endswith("\n")
    assert matplotlib.image.imread(out(base, tag) / "curve.png").std() > 0


def one_line(text: str, *parts: str) -> str:
    """What chat_rl says of an error: one line, with these parts, and no traceback."""
    lines = [line for line in text.splitlines() if line.startswith("chat_rl: ")]
    assert len(lines) == 1 and "Traceback" not in text and all(str(part) in lines[0] for part in parts), text
    return lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# Signals


def test_stopped_and_resumed_is_never_stopped(base, wholes):
    """SIGTERM in a rollout, SIGINT and SIGKILL anywhere: the end is that of an uninterrupted run. The first two exit with
    status 0 within 10 s, and save the last completed step."""
    flags, script = [*RUN, "--save-every=100", "--resume"], base / "trouble.py"
    script.write_text(TROUBLE)
    with started(base, *flags, script=script, KIND="hang", STEPS="3") as process:
        wait_for(lambda: "hanging" in output(base), 120, "the rollout of step 3")
        process.send_signal(signal.SIGTERM)
        assert ended(process, base, 10) == 0, output(base)
    assert gpt.checkpoint_steps(out(base)) == [3] and "stopped after step 3" in output(base)
    assert_readable(base)
    with started(base, *flags) as process:
        reach(process, base, 5)
        process.send_signal(signal.SIGINT)
        assert ended(process, base, 10) == 0, output(base)
    assert gpt.checkpoint_steps(out(base)) == [3, last_step(base) + 1]
    assert_readable(base)
    with started(base, *flags, "--save-every=2") as process:
        reach(process, base, 9)
        process.kill()
        assert ended(process, base, 10) == -signal.SIGKILL
    run(base, *flags)
    assert_same_run(base, wholes)
    assert_readable(base)


def test_second_signal_ends_at_once(base):
    """While the first one is still being obeyed, a second one a second later ends the process."""
    script = base / "trouble.py"
    script.write_text(TROUBLE)
    with started(base, *RUN, script=script, KIND="hang in save", STEPS="") as process:
        wait_for(lambda: "hanging" in output(base), 120, "a save")
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None, output(base)
        process.send_signal(signal.SIGTERM)
        assert ended(process, base, 5) == 128 + signal.SIGTERM


def test_float32_weights_of_bfloat16_tables_are_resumed(finished, wholes):
    """What is exported in bfloat16 goes on in float32."""
    cut_back(finished, 5, "half")
    run(finished, *RUN, "--model-tag=half", "--resume")
    assert_same_run(finished, wholes, "half")
    exported = [tensor.dtype for tensor in weights(finished, STEPS, "half").values()]
    assert exported.count(torch.bfloat16) == 2


def kill_at_random(base: Path, kills: int, flags: list[str], seed: int) -> None:
    """Kills a run that saves at every step so many times, every other time while a file is being written, and lets it end."""
    chance, hits = random.Random(seed), 0
    path = out(base) / "metrics.jsonl"
    for i in range(kills):
        before = path.stat().st_ino if path.exists() else None
        with started(base, *flags, "--resume") as process:
            wait_for(lambda: path.exists() and path.stat().st_ino != before or process.poll() is not None, 120, "its first step")
            time.sleep(chance.uniform(0, 0.2))
            if i % 2:
                name = chance.choice(["model", "optim"])
                wait_for(lambda: any(out(base).glob(f"{name}_*.part")) or process.poll() is not None, 60, "a save", pause=0)
            hits += process.poll() is None
            process.kill()
    assert hits >= kills - 1, output(base)
    run(base, *flags, "--resume")
    assert_readable(base)


def test_killed_at_random_moments(base, wholes):
    """Four kills, two of them in the middle of a save, change nothing."""
    kill_at_random(base, 4, RUN, seed=0)
    assert_same_run(base, wholes)
    assert not list(out(base).glob("*.part"))


@pytest.mark.skipif("CHAT_RL_SOAK" not in os.environ, reason="takes minutes: set CHAT_RL_SOAK=1")
def test_soak_of_random_kills(base, tmp_path):
    """Twenty kills, ten of them in the middle of a save, change nothing."""
    flags = [*RUN, "--max-steps=120", "--keep-last=2", "--model-tag=adder"]
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    run(whole, *flags)
    kill_at_random(base, 20, flags, seed=1)
    assert_same_run(base, whole, step=120)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks


def rank(base: Path, number: int) -> int:
    """The process id of a rank."""
    return next(pid for pid, variables in family(base).items() if variables.get("RANK") == str(number))


def test_ranks_stop_together(base, pair, tmp_path):
    """SIGTERM to torchrun, then to one rank alone, ends both ranks inside 30 s with the last completed step saved; with 2
    ranks the run goes on bit for bit. With 1 rank its change of the weights comes within 1% (measured: 0.06%) in norm, its
    metrics within 1e-4."""
    flags = [*RUN, "--save-every=100", "--resume"]
    with started(base, *flags, torchrun=TWO) as process:
        reach(process, base, 2)
        process.send_signal(signal.SIGTERM)
        ended(process, base, 30)                # torchrun's own status is that of a signal
        assert not family(base), "a rank is left"
    assert gpt.checkpoint_steps(out(base)) == [last_step(base) + 1], output(base)
    assert_readable(base)
    alone = Path(shutil.copytree(base, tmp_path / "alone"))
    with started(base, *flags, torchrun=TWO) as process:
        reach(process, base, 6)
        os.kill(rank(base, 1), signal.SIGTERM)
        assert ended(process, base, 30) == 0, output(base)
    assert gpt.checkpoint_steps(out(base))[1:] == [last_step(base) + 1], output(base)
    finish(base, *flags, torchrun=TWO)
    assert_same_run(base, pair)
    run(alone, *flags)
    start = torch.load(base / "chatsft_checkpoints" / "adder" / "model_000150.pt", weights_only=True)
    mine, other, start = (torch.cat([x.flatten() for x in state.values()]) for state in (weights(alone, STEPS), weights(pair, STEPS), start))
    assert (mine - other).norm() < 0.01 * (other - start).norm()
    for line, expected in zip(metrics(alone), metrics(pair), strict=True):
        assert untimed(line) == pytest.approx(untimed(expected), rel=1e-4, abs=1e-5)


def test_rank_that_dies_ends_the_run(base):
    """The other rank does not wait for it, and torchrun says which one it was."""
    with started(base, *RUN, torchrun=TWO) as process:
        reach(process, base, 2)
        os.kill(rank(base, 1), signal.SIGKILL)
        assert ended(process, base, 40) not in (0, None)
        assert not family(base), "a rank is left"
    assert "local_rank: 1" in output(base) and "Signal 9 (SIGKILL)" in output(base)


def test_torchrun_restarts_from_the_last_checkpoint(base, pair):
    """With --max-restarts and --resume a run that lost a rank recovers by itself, and ends as if nothing had been."""
    with started(base, *RUN, "--resume", torchrun=(*TWO, "--max-restarts=1")) as process:
        reach(process, base, 3)
        os.kill(rank(base, 1), signal.SIGKILL)
        assert ended(process, base, 90) == 0, output(base)
    assert_same_run(base, pair)


def test_two_machines(base, pair, tmp_path):
    """Two agents of one rank each are one agent of two. The second one's machine has no checkpoint, and gets none."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = (["--nnodes=2", "--nproc-per-node=1", f"--node-rank={i}", "--master-addr=127.0.0.1", f"--master-port={port}"] for i in (0, 1))
    with started(base, *RUN, torchrun=first) as one, started(empty, *RUN, torchrun=second) as two:
        assert ended(one, base, 120) == 0, output(base)
        assert ended(two, empty, 30) == 0, output(empty)
    assert_same_run(base, pair)
    assert os.listdir(empty) == ["out.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# Disks and files


def test_full_disk(finished, wholes):
    """Wherever the disk is full (a limit on the size of files stands for it), there is one clear line and no half file;
    the run goes on from the last checkpoint once there is space."""
    cut_back(finished, 6)
    flags = [*RUN, "--resume"]
    size = sum(len(line) + 1 for line in (out(finished) / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] < 6)
    results = several(finished, (flags, 400_000), (flags, 200), (flags, size + 100))
    for place, (status, said) in zip(("checkpoint", "start", "end of metrics.jsonl"), results):
        assert status == 1, (place, status)
        one_line(said, out(finished), "space")
    assert_readable(finished)
    assert not list(out(finished).glob("*.part"))
    assert "passing over" not in run(finished, *flags).stdout
    assert_same_run(finished, wholes)


def test_unwritable_folder_and_flags(finished, wholes, tmp_path):
    """What cannot be done is said in one line, with status 2: a folder that cannot be made, flags that a run did not have.
    Flags left out are the run's. --keep-last bounds optimizer states, not models."""
    file, fresh, plain = tmp_path / "file", tmp_path / "fresh", ["--model-tag=adder", "--resume"]
    for folder in (file, fresh):
        shutil.copytree(finished / "chatsft_checkpoints" / "adder", folder / "chatsft_checkpoints" / "adder")
    (file / "chatrl_checkpoints").write_text("a file")
    cut_back(finished, 6)
    shutil.copytree(out(finished), out(finished, "other"))
    shutil.copytree(finished / "chatsft_checkpoints" / "adder", finished / "chatsft_checkpoints" / "other")
    elsewhere = {"NANOCHAT_BASE_DIR": str(file)}, {"NANOCHAT_BASE_DIR": str(fresh)}
    at_file, at_file_too, seed, both, resumed, smaller, started_afresh = several(
        finished, (RUN, None, elsewhere[0]), ([*RUN, "--resume"], None, elsewhere[0]),
        ([*plain, "--seed=7"], None, {"NANOCHAT_BASE_DIR": str(finished)}), ([*plain, "--num-samples=4", "--max-steps=12", "--matrix-lr=0.5"],),
        ([*plain, "--keep-last=2"],), (["--model-tag=other", "--resume", "--rollout-batch-size=24", "--save-every=4"],),
        ([*RUN, "--resume"], None, elsewhere[1]))
    for status, said in (at_file, at_file_too):
        assert status == 2 and one_line(said, file / "chatrl_checkpoints")
    assert seed[0] == 2 and one_line(seed[1], "--seed 42, not 7")
    assert both[0] == 2 and "max-steps" not in one_line(both[1], "--num-samples 8, not 4", "--matrix-lr 0.02, not 0.5")
    assert resumed[0] == smaller[0] == started_afresh[0] == 0, (resumed, smaller, started_afresh)
    assert_same_run(finished, wholes)
    assert [path.name for path in sorted(out(finished).glob("optim_*"))] == ["optim_000011.pt", "optim_000012.pt"]
    assert gpt.checkpoint_steps(out(finished)) == list(range(1, STEPS + 1))
    assert gpt.checkpoint_steps(out(finished, "other")) == [1, 2, 3, 4, 5, 6, 8, 12]
    assert metrics(finished, "other")[-1]["greedy"] == metrics(wholes)[-1]["greedy"]
    assert_same_run(fresh, wholes)


def flip(path: Path, place: float = 0.5) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_damaged_files_are_passed_over(finished, wholes):
    """Each file of a checkpoint damaged in each way: the run goes on from the last one that is whole, and names the rest."""
    damages = [(name, damage) for name in ("model_{:06d}.pt", "optim_{:06d}.pt", "meta_{:06d}.json") for damage in (shorten, empty, flip)]
    paths = [out(finished) / name.format(step) for step, (name, _) in enumerate(damages, start=3)]
    for path, (_, damage) in zip(paths, damages):
        damage(path)
    (out(finished) / "meta_000012.json").unlink()
    said = run(finished, *RUN, "--resume").stdout
    lines = [line for line in said.splitlines() if line.startswith("passing over")]
    assert len(lines) == len(paths) and all(str(path) in line for path, line in zip(reversed(paths), lines)), said
    assert "step 2/12" in said and "step 1/12" not in said
    assert_same_run(finished, wholes)


def test_damaged_checkpoint_costs_no_other(finished):
    """A damaged checkpoint is not one of those that --keep-last keeps."""
    cut_back(finished, 10)
    for path in (path for step in (8, 9) for path in out(finished).glob(f"*_{step:06d}.*")):
        path.unlink()
    shorten(out(finished) / "optim_000010.pt")
    script = finished / "trouble.py"
    script.write_text(TROUBLE)
    flags = [*RUN, "--keep-last=1", "--save-every=100", "--resume"]
    with started(finished, *flags, script=script, KIND="hang", STEPS="8") as process:
        wait_for(lambda: "hanging" in output(finished), 120, "the rollout of step 8")
        process.send_signal(signal.SIGTERM)
        assert ended(process, finished, 10) == 0, output(finished)
    assert chat_rl.find_resumable(out(finished), None, None, torch.device("cpu"))[2]["step"] == 8


def test_no_bit_of_a_meta_goes_unnoticed(finished, capsys):
    """A meta file with a bit flipped, wherever, is passed over, unless it still says the same."""
    cut_back(finished, 1)
    path = out(finished) / "meta_000001.json"
    whole, bad = path.read_bytes(), []
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 3]) + whole[place + 1:])
        found = chat_rl.find_resumable(out(finished), None, None, torch.device("cpu"))
        if found and found[2] != json.loads(whole):
            bad.append(whole[place - 12:place + 12].decode())
    assert not bad, (len(bad), bad)


class Touch:
    """Makes a file when it is unpickled by a careless unpickler."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_pickle_runs_code(finished, wholes, tmp_path):
    """A hostile pickle in any file that is read is refused or passed over by name, though its digest be right."""
    bad, cases = Touch(tmp_path / "touched"), []
    os.system(bad.__reduce__()[1][0])
    assert bad.path.exists()
    bad.path.unlink()
    for i, name in enumerate(("chatsft_checkpoints/adder/tokenizer.pkl", "tokenizer/tokenizer.pkl", "chatsft_checkpoints/adder/model_000150.pt")):
        folder = tmp_path / f"base{i}"
        shutil.copytree(finished / "chatsft_checkpoints" / "adder", folder / "chatsft_checkpoints" / "adder")
        path = folder / name
        if path.parent.name == "tokenizer":
            (folder / "chatsft_checkpoints" / "adder" / "tokenizer.pkl").unlink()
            path.parent.mkdir()
        path.write_bytes(pickle.dumps(bad))
        if path.suffix == ".pt":
            torch.save({"lm_head.weight": bad}, path)
        sign(folder / "chatsft_checkpoints" / "adder", 150)
        cases.append((path, (RUN, None, {"NANOCHAT_BASE_DIR": str(folder)})))
    half, folder = out(finished, "half"), out(finished)
    (half / "tokenizer.pkl").write_bytes(pickle.dumps(bad))
    cut_back(finished, 9)
    cut_back(finished, 2, "half")
    for step in range(1, 3):
        sign(half, step)
    torch.save({"lm_head.weight": bad}, folder / "model_000009.pt")
    torch.save({"optimizers": bad, "masters": {}}, folder / "optim_000008.pt")
    (folder / "optim_000007.pt").write_bytes(pickle.dumps(bad))
    for step in (7, 8, 9):
        sign(folder, step)
    here = {"NANOCHAT_BASE_DIR": str(finished)}
    *sft, rl, tokens = several(finished, *(case for _, case in cases), ([*RUN, "--resume"], None, here),
                               ([*RUN, "--model-tag=half", "--resume"], None, here))
    assert not bad.path.exists()
    for (path, _), (status, said) in zip(cases, sft):
        assert status == 2, (path, status)
        one_line(said, path)
    assert rl[0] == 0, rl
    assert all(f"passing over step {step}: {folder / name}" in rl[1] for step, name in (
        (9, "model_000009.pt"), (8, "optim_000008.pt"), (7, "optim_000007.pt"))), rl[1]
    assert_same_run(finished, wholes)
    assert tokens[0] in (0, 2) and str(half / "tokenizer.pkl") in tokens[1], tokens


# ----------------------------------------------------------------------------------------------------------------------
# Numbers and texts


def test_steps_that_are_not_finite(base, tmp_path):
    """One is left out and said, and the run goes on; five in a row end it with status 1, and nothing more is saved."""
    script = base / "trouble.py"
    script.write_text(TROUBLE)
    said = run(base, *RUN, script=script, ROOT=str(ROOT), KIND="nan", STEPS="4 6").stdout
    assert [line.split()[1] for line in said.splitlines() if "not finite" in line] == ["4/12", "6/12"]
    for before, after, same in ((4, 5, True), (5, 6, False), (6, 7, True)):
        one, two = weights(base, before), weights(base, after)
        assert all(torch.equal(one[key], two[key]) for key in one) == same
    assert all(tensor.isfinite().all() for tensor in weights(base, STEPS).values())
    assert [line["grad_norm"] is None for line in metrics(base) if "grad_norm" in line] == [step in (4, 6) for step in range(STEPS)]
    assert_readable(base)
    done = run(base, *RUN, "--save-every=2", script=script, status=1, ROOT=str(ROOT), KIND="inf", STEPS="1 2 3 4 5 6 7")
    one_line(done.stdout + done.stderr, "not finite", "--resume")
    assert gpt.checkpoint_steps(out(base)) == [2, 4]
    first, last = weights(base, 2), weights(base, 4)
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert_readable(base)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where datasets keeps what it has read, for these tests alone."""
    import datasets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9) | st.just("#### 5"),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5)
rows = st.fixed_dictionaries({"question": st.text(max_size=9), "answer": st.text(max_size=9).map("#### 5".__add__)})
lines = st.one_of(rows.map(json.dumps), st.dictionaries(st.sampled_from(["question", "answer", "other"]), values).map(json.dumps),
                  values.map(json.dumps), st.text(max_size=20)).map(lambda text: text.encode(errors="surrogatepass"))
files = st.one_of(st.lists(rows.map(json.dumps).map(str.encode), min_size=1, max_size=4), st.lists(lines, max_size=4),
                  st.lists(st.binary(max_size=20), max_size=3)).map(b"\n".join)


@settings(**FAST, max_examples=15, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=files, test=files)
def test_any_jsonl_loads_or_is_refused(cache, tmp_path, train, test):
    """Random train and test files make a task, or an error of one line."""
    folder = tmp_path / str(time.monotonic_ns())
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(train)
    (folder / "test.jsonl").write_bytes(test)
    try:
        train, tests = chat_rl.load_task(chat_rl.Flags(task="gsm8k", data=str(folder)))
    except gpt.UserError as error:
        assert len(str(error).splitlines()) == 1 and str(folder) in str(error)
    else:
        assert all(isinstance(text, str) for example in train + tests[""] for text in (str(example), *example.references))
