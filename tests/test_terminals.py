"""Runs without a terminal, in a session that closes, and on ranks that are slow: all of them in forks of one process."""
import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import SMALL, copies, free_port, gpt, metrics, out, run, weights

# Runs chat_rl.py as a program in a fork for each of argv[1], a list of [code to run before, flags], all at once. What fork
# i prints is in <i>.out and <i>.err; the exit statuses are in statuses.
FORKS = """
import json, os, runpy, signal, sys, threading, time
from pathlib import Path
script = os.environ["ROOT"] + "/chat_rl.py"
sys.path.insert(0, os.environ["ROOT"])
import torch, chat_rl
pids = []
for i, (code, flags) in enumerate(json.loads(sys.argv[1])):
    pids.append(os.fork())
    if not pids[-1]:
        signal.alarm(200)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{i}.{name}", os.O_CREAT | os.O_WRONLY), number)
        sys.argv = [script, *flags]
        exec(code)
        runpy.run_path(script, run_name="__main__")
        sys.exit(99)
statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
Path("statuses").write_text(json.dumps(statuses))
"""

# Sends SIGHUP after the first step.
HANG_UP = """
def hang_up(path):
    while not path.exists() or '"reward"' not in path.read_text():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGHUP)

path = Path(os.environ["NANOCHAT_BASE_DIR"], "chatrl_checkpoints", flags[-1].partition("=")[2], "metrics.jsonl")
signal.signal(signal.SIGHUP, signal.{})
threading.Thread(target=hang_up, args=(path,), daemon=True).start()
"""

# Rank 1 takes half a second longer to sample than rank 0, which takes longer than that to save.
RANK = """
os.environ.update(RANK="{rank}", LOCAL_RANK="{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT="{port}")
place = chat_rl.gpt
generate, save = place.generate, torch.save

def slow_generate(*args, **more):
    time.sleep(0.5 * {rank})
    return generate(*args, **more)

def slow_save(*args, **more):
    time.sleep(0.4)
    return save(*args, **more)

place.generate, torch.save = slow_generate, slow_save
"""

STDOUT = "sys.stdout = sys.__stdout__ = open(1, 'w', encoding='utf-8', closefd=False); "
NO_TERMINAL = {
    "ascii": STDOUT.replace("utf-8", "ascii"),
    "closed": "os.close(1); sys.stdout = sys.__stdout__ = None",
    "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); " + STDOUT,
    "pipe": "ends = os.pipe(); os.dup2(ends[1], 1); [os.close(end) for end in ends]; " + STDOUT}
SSH_STEPS, NOHUP_STEPS, RANKS_STEPS = 300, 6, 2


@pytest.fixture(scope="module")
def forked(adder_base, tmp_path_factory) -> tuple[Path, dict[str, tuple[int, str, str]]]:
    """A base folder, and the exit status, stdout and stderr of each run in it, by its name: its tag and, where there are
    ranks, the rank."""
    base = Path(shutil.copytree(adder_base, tmp_path_factory.mktemp("forked") / "base"))
    port = free_port()
    cases = {kind: (code, ["--max-steps=1"]) for kind, code in NO_TERMINAL.items()}
    cases["ssh"] = HANG_UP.format("SIG_DFL"), [f"--max-steps={SSH_STEPS}"]
    cases["nohup"] = HANG_UP.format("SIG_IGN"), [f"--max-steps={NOHUP_STEPS}"]
    for rank in range(2):
        cases[f"ranks{rank}"] = RANK.format(rank=rank, port=port), [f"--max-steps={RANKS_STEPS}", "--save-every=1"]
    tags = [name.strip("01") for name in cases]
    copies(base, *dict.fromkeys(tags))
    runs = [[code, [*SMALL, *flags, f"--model-tag={tag}"]] for tag, (code, flags) in zip(tags, cases.values())]
    (base / "forks.py").write_text(FORKS)
    run(base, json.dumps(runs), script=base / "forks.py")
    statuses = json.loads((base / "statuses").read_text())
    said = [[(base / f"{i}.{name}").read_text() for name in ("out", "err")] for i in range(len(runs))]
    return base, {name: (status, *texts) for name, status, texts in zip(cases, statuses, said)}


@pytest.mark.parametrize("kind", NO_TERMINAL)
def test_no_terminal(forked, kind):
    """A run ends and saves where stdout is ASCII, closed, a full disk or a pipe that nobody reads."""
    base, reports = forked
    status, text, error = reports[kind]
    assert status == 0 and "Traceback" not in error and "Exception ignored" not in error, error
    assert weights(base, 1, kind) and len(metrics(base, kind)) == 3
    assert kind != "ascii" or text.isascii() and "pass@1" in text and str(out(base, kind)) in text


def test_a_closed_session(forked):
    """SIGHUP ends a run as SIGTERM does, with its last step saved, unless it was ignored from the start, as under nohup."""
    base, reports = forked
    status, text, error = reports["ssh"]
    assert status == 128 + signal.SIGHUP and "Traceback" not in error and "--resume" in text, (status, text, error)
    done = [line["step"] for line in metrics(base, "ssh") if "reward" in line]
    assert gpt.checkpoint_steps(out(base, "ssh")) == [done[-1] + 1] and len(done) < SSH_STEPS
    assert reports["nohup"][0] == 0 and gpt.checkpoint_steps(out(base, "nohup")) == [NOHUP_STEPS]


def test_tokens_per_second_of_many_ranks(forked):
    """The tokens of all ranks are divided by the time of the slowest, also where rank 0 comes later, from a save."""
    base, reports = forked
    assert reports["ranks0"][0] == reports["ranks1"][0] == 0, reports
    lines = [line for line in metrics(base, "ranks") if "reward" in line]
    assert len(lines) == RANKS_STEPS
    for line in lines:
        assert line["tokens_per_second"] <= line["completion_length"] * 8 * 8 / 0.5 * 1.01, line
