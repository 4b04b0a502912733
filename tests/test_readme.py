"""README: its experiments are applied and run, its tables are held against the code."""
import ast
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, metrics, run

import chat_rl

FLAGS = [*SMALL, "--max-steps=2", "--matrix-lr=1"]
README = (ROOT / "README.md").read_text()
SECTION = README.partition("## Change it")[2].partition("\n## ")[0]
EXPERIMENTS = {title: re.findall(r"```diff\n(.*?)```", part, re.S)
               for title, part in zip(re.findall(r"^\*\*(.+?)\*\*", SECTION, re.M), re.split(r"^\*\*", SECTION, flags=re.M)[1:])}


def apply(diffs: list[str], text: str) -> str:
    """The text with each diff applied, at the one place that it fits."""
    for diff in diffs:
        lines = diff.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -") + "\n"
        new = "\n".join(line[1:] for line in lines if line[0] in " +") + "\n"
        assert text.count(old) == 1, f"fits {text.count(old)} places:\n{old}"
        text = text.replace(old, new)
    return text


def test_there_are_five_experiments():
    """README shows another reward, z-scored advantages, a length penalty, a new task and a KL penalty."""
    assert len(EXPERIMENTS) == 5 and all(EXPERIMENTS.values())


def norms(base: Path) -> list[float]:
    return [line["grad_norm"] for line in metrics(base) if "reward" in line]


@pytest.fixture(scope="module")
def plain_norms(adder_base, tmp_path_factory) -> list[float]:
    """Gradient norms of the file as it is."""
    base = shutil.copytree(adder_base, tmp_path_factory.mktemp("plain") / "base")
    run(base, *FLAGS)
    return norms(base)


@pytest.mark.parametrize("title", EXPERIMENTS)
def test_experiment_runs(title, base, tmp_path, plain_norms):
    """The edited file runs, and does something else than the file as it is."""
    script = tmp_path / "edited" / "chat_rl.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "gpt.py", script.parent)
    script.write_text(apply(EXPERIMENTS[title], (ROOT / "chat_rl.py").read_text()))
    if title == "A new task":
        data = tmp_path / "data"
        data.mkdir()
        for split in ("train", "test"):
            rows = [{"question": f"What is {i} + {i + 1}?", "answer": f"So\n{2 * i + 1}"} for i in range(10, 30)]
            (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        run(base, *FLAGS, "--task=match", f"--data={data}", script=script)
        assert len(norms(base)) == 2
    else:
        run(base, *FLAGS, script=script)
        assert len(norms(base)) == 2 and norms(base) != plain_norms


def test_new_task_is_short():
    """A task takes under 25 lines."""
    assert sum(line.startswith("+") for diff in EXPERIMENTS["A new task"] for line in diff.splitlines()) < 25


def test_every_flag_is_in_the_table():
    """The table of flags has each flag's name, default and help, as the code has them."""
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.*?) \| (.*?) \|$", README, re.M)
    assert rows == [(f.name.replace("_", "-"), "" if f.default in (None, "", False) else str(f.default), f.metadata["help"])
                    for f in fields(chat_rl.Flags)]


def test_files_that_readme_names_are_there():
    """Pictures and links into the repository lead somewhere."""
    for target in re.findall(r"\]\((?!http)(.+?)\)", README):
        assert (ROOT / target).exists(), target


def test_public_functions_have_docstrings():
    """Every public function and class of gpt.py that takes more than a line has a docstring."""
    for node in ast.parse((ROOT / "gpt.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.end_lineno - node.lineno > 6 and node.name not in (
                "Attention", "Block", "MLP"):
            assert ast.get_docstring(node), node.name
