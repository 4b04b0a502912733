"""What a run goes on from: after signals, kills, full disks, damaged and hostile files, other flags. Real processes.

    CHAT_RL_SOAK=1 python -m pytest tests/test_resume.py -k soak        # the long one: 20 kills
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
from conftest import (SMALL, Touch, assert_readable, assert_same_run, cut_back, ended, gpt, last_step, main, metrics, out,
                      output, reach, run, started, wait_for, weights)

STEPS = 12
RUN = [*SMALL, f"--max-steps={STEPS}", "--eval-every=5", "--save-every=1"]

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
import os, sys, time
sys.path.insert(0, os.environ["ROOT"])
import chat_rl
exact, questions = chat_rl.GRADERS["exact"], chat_rl.questions_of_step
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
    return exact(reference, text)

chat_rl.questions_of_step = lambda run, step: now.append(step) or questions(run, step)
if kind == "hang in save":
    chat_rl.save = hang
else:
    chat_rl.GRADERS["exact"] = faulty
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
    model, tokenizer = gpt.load_checkpoint(base / "chatsft_checkpoints" / "adder")
    model.stored_types = {key: torch.bfloat16 for key in model.state_dict() if "wte" in key or "value_embeds" in key}
    gpt.save_checkpoint(base / "chatsft_checkpoints" / "half", 150, model, model.state_dict(), tokenizer)
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
    128 and the signal's number within 10 s, and save the last completed step."""
    flags, script = [*RUN, "--save-every=100", "--resume"], base / "trouble.py"
    script.write_text(TROUBLE)
    with started(base, *flags, script=script, KIND="long", STEPS="3") as process:
        wait_for(lambda: "hanging" in output(base), 120, "the rollout of step 3")
        process.send_signal(signal.SIGTERM)
        assert ended(process, base, 10) == 128 + signal.SIGTERM, output(base)
    assert gpt.checkpoint_steps(out(base)) == [3] and "interrupted after step 3" in output(base)
    assert_readable(base)
    with started(base, *flags, script=script, KIND="slow", STEPS="") as process:
        reach(process, base, 5)
        process.send_signal(signal.SIGINT)
        assert ended(process, base, 10) == 128 + signal.SIGINT, output(base)
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
    cut_back(finished, 11, "half")
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
    flags = [*RUN, "--max-steps=120", "--model-tag=adder"]
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    run(whole, *flags)
    kill_at_random(base, 20, flags, seed=1)
    assert_same_run(base, whole, step=120)


# ----------------------------------------------------------------------------------------------------------------------
# Disks and files


def test_full_disk(finished, wholes):
    """Wherever the disk is full (a limit on the size of files stands for it), there is one clear line and no half file;
    the run goes on from the last checkpoint once there is space."""
    cut_back(finished, 11)
    flags = [*RUN, "--resume"]
    results = several(finished, (flags, 400_000), (flags, 200))
    for wanted, (status, said) in zip((1, 2), results):
        assert status == wanted, said
        one_line(said, out(finished), "File too large")
    assert_readable(finished)
    assert not list(out(finished).glob("*.part"))
    assert "passing over" not in run(finished, *flags).stdout
    assert_same_run(finished, wholes)


def test_unwritable_folder(finished, tmp_path):
    """A folder that cannot be made is said in one line, with status 2."""
    file = tmp_path / "file"
    shutil.copytree(finished / "chatsft_checkpoints" / "adder", file / "chatsft_checkpoints" / "adder")
    (file / "chatrl_checkpoints").write_text("a file")
    for status, said in several(finished, *((flags, None, {"NANOCHAT_BASE_DIR": str(file)}) for flags in (RUN, [*RUN, "--resume"]))):
        assert status == 2 and one_line(said, file / "chatrl_checkpoints")


def test_flags_may_change(finished, capfd):
    """Flags that are not given are the run's; those that are win, and are said in a line; a rank of adapters is refused. More
    steps go on from the end, another step begins there, and what came after it is gone."""
    cut_back(finished, 11)
    plain = ["--model-tag=adder", "--resume"]
    assert main(finished, *plain, "--lora-rank=3") == 2 and "--lora-rank" in capfd.readouterr().err
    assert main(finished, *plain, "--matrix-lr=0.5", "--max-steps=14") == 0
    said = capfd.readouterr().out
    assert "going on with --max-steps 14, not 12; --matrix-lr 0.5, not 0.02" in said
    assert [line["step"] for line in metrics(finished) if "reward" in line] == list(range(14))
    assert gpt.checkpoint_steps(out(finished)) == list(range(1, 15))
    assert main(finished, f"--model-tag={out(finished)}", "--resume", "--model-step=13", "--max-steps=13") == 0
    assert "step 13/13" in capfd.readouterr().out and gpt.checkpoint_steps(out(finished))[-1] == 14
    assert main(finished, *plain, "--model-step=13", "--eval-every=100") == 0
    assert [line["step"] for line in metrics(finished)][-2:] == [13, 14]


def test_nothing_to_resume(base, capfd):
    """It is said, and the run begins."""
    assert main(base, *SMALL, "--resume", "--max-steps=1") == 0
    assert f"nothing to resume in {out(base)}: beginning anew" in capfd.readouterr().out and len(metrics(base)) == 3


def test_the_source_need_not_be_there(finished, wholes):
    """A run with all its weights goes on without the model that it began with, by its tag or by its own folder."""
    shutil.rmtree(finished / "chatsft_checkpoints")
    for tag, cut in ((out(finished), 11), (out(finished), 11)):
        cut_back(finished, cut)
        assert main(finished, f"--model-tag={tag}", "--resume") == 0
    assert_same_run(finished, wholes)


def test_two_runs_of_one_folder(base):
    """The second one is refused in a line that names the folder; the lock goes with its process."""
    script = base / "trouble.py"
    script.write_text(TROUBLE)
    with started(base, *RUN, script=script, KIND="long", STEPS="2") as process:
        wait_for(lambda: "hanging" in output(base), 120, "the rollout of step 2")
        said = run(base, *RUN, "--resume", status=2)
        one_line(said.stdout + said.stderr, out(base), "another run")
        process.kill()
    run(base, *RUN, "--resume", "--max-steps=3")
    assert [line["step"] for line in metrics(base) if "reward" in line] == [0, 1, 2]


def flip(path: Path, place: float = 0.5) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_damaged_states_are_passed_over(finished, wholes, capfd):
    """Each state damaged in each way: the run goes on from the last one that is whole, and names the rest; where none is, it
    stops, and moves nothing."""
    states = sorted(out(finished).glob("optim_*.pt"))
    assert [path.name for path in states] == ["optim_000011.pt", "optim_000012.pt"]
    whole = states[1].read_bytes()
    for damage in (shorten, empty, flip):
        states[1].write_bytes(whole)
        damage(states[1])
        assert main(finished, *RUN, "--resume", "--max-steps=11") == 0
        said = capfd.readouterr().out
        assert f"passing over {states[1]}" in said and "step 11/11" in said
    states[1].unlink()
    flip(states[0])
    before = {path.name: path.read_bytes() for path in out(finished).iterdir()}
    assert main(finished, *RUN, "--resume") == 2
    assert f"nothing in {out(finished)} can be read" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in out(finished).iterdir()} == before


def test_no_pickle_runs_code(finished, tmp_path, capfd):
    """A hostile pickle in any file that is read is refused or passed over by name."""
    bad = Touch(tmp_path / "touched")
    os.system(bad.__reduce__()[1][0])
    assert bad.path.exists()
    bad.path.unlink()
    sft = finished / "chatsft_checkpoints" / "adder"
    for path in (sft / "tokenizer.pkl", sft / "model_000150.pt", out(finished) / "optim_000012.pt"):
        whole = path.read_bytes()
        for content in ("pickle", "torch"):
            path.write_bytes(pickle.dumps(bad)) if content == "pickle" else torch.save({"lm_head.weight": bad}, path)
            status = main(finished, *RUN, *["--resume"] * ("optim" in path.name))
            said = capfd.readouterr()
            assert str(path) in said.out + said.err and status == (0 if "optim" in path.name else 2), (path, said)
            assert not bad.path.exists()
        path.write_bytes(whole)


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
    one_line(done.stderr, "not finite", "--resume")
    assert gpt.checkpoint_steps(out(base)) == [2, 4]
    first, last = weights(base, 2), weights(base, 4)
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert_readable(base)
