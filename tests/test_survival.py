"""What happens to long runs: signals, kills, full disks, damaged and hostile files. All of it to real processes.

    CHAT_RL_SOAK=1 python -m pytest tests/test_survival.py -k soak        # the long one: 20 kills
"""
import json
import os
import pickle
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import (SMALL, Touch, assert_readable, assert_same_run, chat_rl, cut_back, ended, gpt, last_step, metrics, out,
                      output, reach, run, sign, started, wait_for, weights)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

STEPS = 12
RUN = [*SMALL, f"--max-steps={STEPS}", "--eval-every=5", "--save-every=1", "--keep-last=20"]
FAST = dict(deadline=None, derandomize=True)

# Runs chat_rl several times in one process: argv[1] is a list of [file size limit or null, environment, flags].
SEVERAL = """
import io, json, os, resource, sys, traceback
sys.path.insert(0, os.environ["ROOT"])
import chat_rl
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit, environment, flags in json.loads(sys.argv[1]):
    os.environ.update(environment)
    sys.stdout = sys.stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)   # no file: those are limited
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or hard, hard))
    try:
        status = chat_rl.main(flags)
    except BaseException:
        status = traceback.format_exc()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(sys.stdout.buffer.getvalue().decode() + "\\n===", json.dumps(status), file=sys.__stdout__, flush=True)
"""

# chat_rl with a fault of the given KIND in the steps STEPS; or one whose steps all take a fifth of a second longer.
TROUBLE = """
import dataclasses, os, sys, time
sys.path.insert(0, os.environ["ROOT"])
import chat_rl
task, questions = chat_rl.TASKS["arithmetic"], chat_rl.questions_of_step
kind, steps, now = os.environ["KIND"], set(map(int, os.environ["STEPS"].split())), []

def hang(*args, seconds=300):
    print("hanging", flush=True)
    time.sleep(seconds)
    return 0.0

def faulty(reference, text):
    if kind == "slow":
        time.sleep(0.2 / 64)
    elif now and now[-1] in steps:
        return hang(seconds=0.4) if kind == "long" else float(kind)
    return task.grader(reference, text)

faulty.reads = lambda reference: True
chat_rl.questions_of_step = lambda run, step: now.append(step) or questions(run, step)
if kind == "hang in save":
    chat_rl.save = hang
else:
    chat_rl.TASKS["arithmetic"] = dataclasses.replace(task, grader=faulty)
sys.exit(chat_rl.main(sys.argv[1:]))
"""


def several(base: Path, *runs: tuple, script: str = SEVERAL) -> list[tuple[str, str]]:
    """Runs chat_rl several times in one process, each time with (flags, file size limit, environment): the exit status
    (a traceback where an exception came out) and the output of each."""
    runs = [[*part, *[None, {}][len(part) - 1:]] for part in runs]
    runs = [[limit, variables, [str(flag) for flag in flags]] for flags, limit, variables in runs]
    (base / "several.py").write_text(script)
    done = run(base, json.dumps(runs), script=base / "several.py")
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


@pytest.fixture
def finished(wholes, tmp_path) -> Path:
    """A copy of the uninterrupted runs, to damage."""
    return Path(shutil.copytree(wholes, tmp_path / "finished"))


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
    with started(base, *flags, script=script, KIND="long", STEPS="3") as process:
        wait_for(lambda: "hanging" in output(base), 120, "the rollout of step 3")
        process.send_signal(signal.SIGTERM)
        assert ended(process, base, 10) == 0, output(base)
    assert gpt.checkpoint_steps(out(base)) == [3] and "stopped after step 3" in output(base)
    assert_readable(base)
    with started(base, *flags, script=script, KIND="slow", STEPS="") as process:
        reach(process, base, 5)
        process.send_signal(signal.SIGINT)
        assert ended(process, base, 10) == 0, output(base)
    assert gpt.checkpoint_steps(out(base)) == [3, last_step(base) + 1]
    assert_readable(base)
    with started(base, *flags, "--save-every=2", script=script, KIND="slow", STEPS="") as process:
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


def inode(path: Path) -> int | None:
    """Which file is there, if any: its folder may be moved away meanwhile."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def kill_at_random(base: Path, kills: int, flags: list[str], seed: int) -> None:
    """Kills a run that saves at every step so many times, every other time while a file is being written, and lets it end."""
    chance, hits = random.Random(seed), 0
    path, script = out(base) / "metrics.jsonl", base / "trouble.py"
    script.write_text(TROUBLE)
    for i in range(kills):
        before = inode(path)
        with started(base, *flags, "--resume", script=script, KIND="slow", STEPS="") as process:
            wait_for(lambda: inode(path) not in (None, before) or process.poll() is not None, 120, "its first step")
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
        one_line(said, out(finished), "File too large: mend that")
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
    with started(finished, *flags, script=script, KIND="long", STEPS="8") as process:
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


def test_steps_that_are_not_finite(base, pictures):
    """One is left out and said, and the run goes on; five in a row end it with status 1, and nothing more is saved."""
    script = base / "trouble.py"
    script.write_text(TROUBLE)
    flags = [*RUN, "--eval-every=100"]
    said = run(base, *flags, script=script, KIND="nan", STEPS="4 6").stdout
    assert [line.split()[1] for line in said.splitlines() if "not finite" in line] == ["4/12", "6/12"]
    for before, after, same in ((4, 5, True), (5, 6, False), (6, 7, True)):
        one, two = weights(base, before), weights(base, after)
        assert all(torch.equal(one[key], two[key]) for key in one) == same
    assert all(tensor.isfinite().all() for tensor in weights(base, STEPS).values())
    assert [line["grad_norm"] is None for line in metrics(base) if "grad_norm" in line] == [step in (4, 6) for step in range(STEPS)]
    assert_readable(base)
    done = run(base, *flags, "--save-every=2", script=script, status=1, KIND="inf", STEPS="1 2 3 4 5 6 7")
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
