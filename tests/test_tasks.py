"""Tasks: where questions come from, what is put around them, and what a run on them says, writes and refuses."""
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SHAPE, SHARED, SMALL, chat, main, metrics, tiny_model

import chat_rl
import gpt
from chat_rl import TASKS, Example, Flags, Group

BOX_NUMBER = r" Provide a numerical answer without units, written inside \boxed{}."
BOX_MATH = r" Write your answer in \boxed{} format."
SHOTS = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
GSM8K = [{"question": f"What is {i} plus 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in range(12)]
MATH = [{"problem": f"What is ${i}/7$?", "solution": rf"It is $\boxed{{\frac{{{i}}}{{7}}}}.$"} for i in range(1, 13)]
AIME = [{"problem": f"What is {i} + 20?", "answer": f"{i + 20:03}", "solution": "?"} for i in range(12)]
JSONL = [{"prompt": f"What is {i} times 3?", "answer": str(3 * i)} for i in range(12)]
ROWS = {"gsm8k": GSM8K, "gsm8k-boxed": GSM8K, "think": GSM8K, "math": MATH, "jsonl": JSONL}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def folder(path: Path, train: list[dict] = (), test: list[dict] = ()) -> Path:
    for name, rows in (("train", train), ("test", test)):
        if rows:
            write(path / f"{name}.jsonl", rows)
    return path


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def load(name: str, data: Path | str | None = None, **flags) -> tuple[list[Example], dict[str, list[Example]]]:
    return chat_rl.load_task(Flags(task=name, data=data and str(data), **flags))


def examples_of(rows: list[dict], name: str = "jsonl", **fields) -> list[Example]:
    return chat_rl.load_examples(replace(TASKS[name], **fields), rows, "here")


def asked(example: Example) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in example.prompt]


# ----------------------------------------------------------------------------------------------------------------------
# The rows of the table


@pytest.mark.parametrize("name, suffix", [
    ("gsm8k", ""), ("gsm8k-boxed", BOX_NUMBER), ("math", BOX_MATH), ("think", ""), ("jsonl", "")])
def test_each_task_asks_as_the_table_says(tmp_path, name, suffix):
    """Question, suffix (its braces as they are) and system text; the train split in its order, the test split whole."""
    rows, key = ROWS[name], {"math": "problem", "jsonl": "prompt"}.get(name, "question")
    train, tests = load(name, folder(tmp_path, rows[:9], rows[9:]))
    system = [("system", TASKS[name].system)] if name == "think" else []
    assert [asked(x) for x in train] == [[*system, ("user", row[key] + suffix)] for row in rows[:9]]
    assert [*tests] == [""] and sorted(map(str, tests[""])) == sorted(row[key] + suffix for row in rows[9:])
    answer = {"math": "solution"}.get(name, "answer")
    assert [x.references for x in train] == [[row[answer]] for row in rows[:9]]
    assert [x.index for x in train] == [*range(9)]


def test_the_system_text_of_think_says_what_is_scored():
    text = TASKS["think"].system
    assert all(word in text for word in ("<think>", "</think>", "<answer>", "</answer>", "Only", "scored"))


def test_arithmetic_is_made_here():
    train, tests = load("arithmetic")
    assert len(train) > 9000 and len(tests[""]) == 400
    assert all(sum(map(int, re.findall(r"\d+", str(x)))) == int(x.references[0]) for x in train)


@pytest.mark.parametrize("name, part, count", [
    ("gsm8k", "gsm8k", 1319), ("gsm8k-boxed", "gsm8k", 1319), ("think", "gsm8k", 1319), ("math", "math500", 500),
    ("aime", "aime24", 30)])
def test_the_real_data_load_from_local_folders(name, part, count, capsys):
    """Every row has a reference that the task's grader reads."""
    place = str(shared("data", part))
    _, tests = load(name, eval_data=place, max_steps=0)
    assert len(tests[""]) == count and capsys.readouterr().out == ""
    example = tests[""][0]
    marked = name in ("gsm8k", "math")              # what the solution ends with is what the task asks for
    assert example.task.grader(example.references[0], example.references[0]) == marked


def test_gsm8k_has_nanochats_test_order():
    """The test rows are those of Dataset.shuffle(seed=42)."""
    import datasets
    place = shared("data", "gsm8k")
    train, tests = load("gsm8k", place)
    order = datasets.load_dataset("json", data_files=str(place / "test.jsonl"), split="train").shuffle(seed=42)
    assert len(train) == 7473 and [str(x) for x in tests[""]] == list(order["question"])


def test_math_is_all_subjects_less_math_500(monkeypatch):
    """12,500 problems of seven subjects, train and test, without the 500 that are tested."""
    def fake(place: str, config: str | None = None) -> dict:
        if place == "HuggingFaceH4/MATH-500":
            return {"test": [{"problem": problem, "solution": "1"} for problem in ("algebra test 1", "geometry train 0")]}
        assert place == "EleutherAI/hendrycks_math"
        return {split: [{"problem": f"{config} {split} {i}", "solution": "3"} for i in range(3)]
                for split in ("train", "test")}

    monkeypatch.setattr(chat_rl, "load_records", fake)
    train, tests = load("math")
    problems = {str(x).removesuffix(BOX_MATH) for x in train}
    assert len(problems) == 40 and not problems & {"algebra test 1", "geometry train 0"} and len(tests[""]) == 2
    assert {problem.split()[0] for problem in problems} == {
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
        "precalculus"}


def test_aime_is_for_evaluation_only(monkeypatch):
    """It comes from the hub as a single split, and has no training questions."""
    monkeypatch.setattr(chat_rl, "load_records", lambda place, config=None: {"HuggingFaceH4/aime_2024": {"train": AIME}}[place])
    train, tests = load("aime", max_steps=0)
    assert train == [] and len(tests[""]) == 12
    with pytest.raises(gpt.UserError, match="train of aime without --data has no questions: pass --data"):
        load("aime")


# ----------------------------------------------------------------------------------------------------------------------
# What flags change, and what a row may hold


def test_flags_override_a_row(tmp_path):
    """Each flag that is named like a field; an empty one too."""
    place = folder(tmp_path / "data", [{"q": "Why {x}?", "a": 5, "question": "no", "answer": "no"}] * 3)
    shots = tmp_path / "shots.json"
    shots.write_text(json.dumps(SHOTS))
    train, tests = load("think", place, eval_data=str(place), prompt_key="q", answer_key="a", system="Be brief.",
                        suffix=r" \boxed{}", prefill="<think>\n", few_shot=str(shots), grader="exact")
    assert [asked(x) for x in train + tests[""]] == [[
        ("system", "Be brief."), ("user", "What is 1 + 1?"), ("assistant", "#### 2"), ("user", r"Why {x}? \boxed{}")]] * 6
    task = train[0].task
    assert (task.prefill, task.grader, train[0].references) == ("<think>\n", chat_rl.GRADERS["exact"], ["5"])
    train, _ = load("think", folder(tmp_path / "more", GSM8K, GSM8K), system="", suffix="!")
    assert asked(train[0]) == [("user", "What is 0 plus 2?!")]


def test_prefill_begins_the_reply(tokenizer):
    """Its tokens come after those that let the assistant speak; what it says is part of what is graded."""
    rows = [{"prompt": "1 + 1?", "answer": "2"}]
    plain, begun = (examples_of(rows, prefill=prefill)[0] for prefill in ("", r"It is \boxed{"))
    ids = chat_rl.prompt_of(plain, tokenizer)
    assert ids[-1] == tokenizer.assistant_start
    assert chat_rl.prompt_of(begun, tokenizer) == ids + tokenizer.encode(r"It is \boxed{")
    assert score(tokenizer, begun, "2}") == 1 and score(tokenizer, plain, "2}") == 0


ALONE = SimpleNamespace(ranks=gpt.Ranks("cpu"))


def score(tokenizer: gpt.Tokenizer, example: Example, text: str) -> float:
    """What the reply scores, by way of `grade`."""
    tokens = [*tokenizer.encode(text), tokenizer.stops[0]]
    completion = gpt.Completion(tokens, [True] * len(tokens), [0.0] * len(tokens))
    group = Group(example, chat_rl.prompt_of(example, tokenizer), [completion])
    chat_rl.grade(SimpleNamespace(tokenizer=tokenizer), ALONE, group)
    return group.scores[0]


@pytest.mark.parametrize("question, prefill", [
    ("A<think>\n", ""), ("A", "<think>\n"), ("A<think>\n", "So, "), ("A", "<think> So, ")])
def test_a_think_that_the_prompt_has_opened_counts(tokenizer, question, prefill):
    """An answer inside it is none, one after it is."""
    fields = dict(grader=chat_rl.GRADERS["tagged-number"], raw_prompt=True, prefill=prefill)
    example = examples_of([{"prompt": question, "answer": "5"}], **fields)[0]
    other = examples_of([{"prompt": "A", "answer": "5"}], **{**fields, "prefill": ""})[0]
    assert score(tokenizer, example, "<answer>5</answer>") == 0 and score(tokenizer, other, "<answer>5</answer>") == 1
    assert score(tokenizer, example, "five</think><answer>5</answer>") == 1
    assert score(tokenizer, example, "<answer>5</answer></think>") == 0


def test_messages_are_used_as_they_are():
    """Neither system text, nor suffix, nor examples; keys that templates do not know are left out."""
    messages = [{"role": "system", "content": "Be brief."}, *SHOTS, {"role": "user", "content": "2 + 2?", "name": None}]
    example, = examples_of([{"prompt": messages, "answer": 4}], system="no", suffix="no", few_shot=tuple(SHOTS))
    assert asked(example) == [(m["role"], m["content"]) for m in messages] and str(example) == "2 + 2?"
    assert all(set(message) == {"role", "content"} for message in example.prompt)


def test_there_is_one_system_text():
    """That of a few-shot file comes before the task's."""
    system, row = {"role": "system", "content": "Be brief."}, [{"prompt": "2 + 2?", "answer": 4}]
    own, = examples_of(row, system="Be long.", few_shot=(system, *SHOTS))
    other, = examples_of(row, system="Be long.", few_shot=tuple(SHOTS))
    assert own.prompt == [system, *SHOTS, *chat("2 + 2?")]
    assert other.prompt == [{**system, "content": "Be long."}, *SHOTS, *chat("2 + 2?")]


def test_a_raw_prompt_is_encoded_with_its_special_tokens(tokenizer, capsys):
    """No template around it; a warning where none of the model's special tokens is in the first one."""
    raw = "<|bos|><|user_start|>1 + 1?<|user_end|><|assistant_start|>"
    example, other = examples_of([{"prompt": raw, "answer": 2}, {"prompt": "<|User|>1 + 1?", "answer": 2}], raw_prompt=True)
    assert chat_rl.prompt_of(example, tokenizer) == tokenizer.render(chat("1 + 1?"))
    assert chat_rl.prompt_of(other, tokenizer) == tokenizer.encode("<|User|>1 + 1?")
    chat_rl.warn_of_markers([example, other], tokenizer)
    assert capsys.readouterr().out == ""
    chat_rl.warn_of_markers([other, example], tokenizer)
    said = capsys.readouterr().out
    assert re.fullmatch(r"warning: --raw-prompt, but none of the model's own markers is in .*<\|User\|>1 \+ 1\?\n", said)
    chat_rl.warn_of_markers(examples_of([{"prompt": "<|User|>1 + 1?", "answer": 2}]), tokenizer)
    assert capsys.readouterr().out == ""


def test_a_raw_prompt_on_hugging_face(capsys):

    place = shared("fixtures", "hf", "qwen3")
    tokenizer = gpt.ChatTokenizer({path.name: path.read_bytes() for path in place.iterdir() if path.name in gpt.FILES})
    raw = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    example, other = examples_of([{"prompt": raw, "answer": 2}, {"prompt": "<｜User｜>1 + 1?", "answer": 2}], raw_prompt=True)
    ids = chat_rl.prompt_of(example, tokenizer)
    assert ids == tokenizer.render(chat("1 + 1?")) and len(tokenizer.markers & set(ids)) == 2
    chat_rl.warn_of_markers([other], tokenizer)
    assert "none of the model's own markers" in capsys.readouterr().out


@pytest.mark.parametrize("value, right, wrong", [
    ("12", r"\boxed{12}", r"\boxed{13}"), (12, r"\boxed{12}", "12"), (2.5, r"\boxed{\frac{5}{2}}", r"\boxed{2}"),
    (0, r"\boxed{0}", r"\boxed{1}"), ([r"\boxed{7}", "8"], r"\boxed{8}", r"\boxed{78}"),
    ([r"\boxed{7}", "8"], r"\boxed{7}", r"\boxed{9}"), ([" ", "8"], r"\boxed{8}", r"\boxed{ }")])
def test_an_answer_is_a_text_a_number_or_several(tokenizer, value, right, wrong):
    example, = examples_of([{"prompt": "?", "answer": value}])
    assert (score(tokenizer, example, right), score(tokenizer, example, wrong)) == (1, 0)


def test_references_that_cannot_be_read_are_left_out(tmp_path, capsys):
    """Counted, the first one named by its place in the file; the others keep their random numbers."""
    rows = [{**row, "answer": "none"} if i in (2, 5) else row for i, row in enumerate(GSM8K)]
    train, _ = load("gsm8k-boxed", folder(tmp_path, rows, GSM8K))
    assert [x.index for x in train] == [i for i in range(12) if i not in (2, 5)]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("2 of 12 references in train of") and "row 2 of train" in said
    mixed = chat_rl.load_examples(TASKS["gsm8k-boxed"], [{"question": "?", "answer": ["none", "3"]}], "here")
    assert mixed[0].references == ["3"]


# ----------------------------------------------------------------------------------------------------------------------
# Test questions from elsewhere


def test_eval_data_of_one_place(tmp_path):
    """The run's keys; no test split of --data is asked for; a file, or a folder with a test split among others."""
    place, file = folder(tmp_path / "train", JSONL), write(tmp_path / "tests.jsonl", JSONL[:5])
    for other in (file, folder(tmp_path / "tests", JSONL[5:], JSONL[:5])):
        train, tests = load("jsonl", place, eval_data=str(other))
        assert len(train) == 12 and [*tests] == [""] and {str(x) for x in tests[""]} == {row["prompt"] for row in JSONL[:5]}


def test_eval_data_of_several_places(tmp_path):
    """A name that is a row of TASKS brings its own keys, prompt and grader; any other has the run's."""
    places = {"gsm8k": GSM8K, "math": MATH, "aime": AIME, "mine": JSONL}
    eval_data = ",".join(f"{name}={write(tmp_path / (name + '.jsonl'), rows)}" for name, rows in places.items())
    train, tests = load("jsonl", folder(tmp_path / "train", JSONL), eval_data=eval_data, suffix=" Go.", grader="number")
    assert [*tests] == [*places] and all(len(part) == 12 for part in tests.values())
    assert str(tests["mine"][0]) == "What is 0 times 3? Go." and tests["mine"][0].task is train[0].task
    assert str(tests["gsm8k"][0]) == "What is 0 plus 2?" and str(tests["math"][0]) == "What is $1/7$?" + BOX_MATH
    assert str(tests["aime"][0]) == "What is 0 + 20?" + BOX_MATH and tests["aime"][0].references == ["020"]
    assert {name: part[0].task.grader for name, part in tests.items()} == {
        **{name: TASKS[name].grader for name in ("gsm8k", "math", "aime")}, "mine": chat_rl.GRADERS["number"]}


def test_an_evaluation_needs_no_training_questions(tmp_path, monkeypatch):
    """With --max-steps 0 and --eval-data, --data is not even looked at."""
    file, load_records = str(write(tmp_path / "tests.jsonl", GSM8K)), chat_rl.load_records
    monkeypatch.setattr(chat_rl, "load_records", lambda place, *more: load_records(place, *more) if place == file else 1 / 0)
    for name in ("gsm8k", "math", "aime", "think", "jsonl"):
        train, tests = load(name, eval_data=f"gsm8k={file}", max_steps=0)
        assert train == [] and len(tests["gsm8k"]) == 12
    train, tests = load("jsonl", eval_data=file, max_steps=0, prompt_key="question")
    assert train == [] and len(tests[""]) == 12


def test_a_rank_without_questions_samples_nothing():
    """Whatever the bound on rows."""
    for size in (0, 7):
        run = SimpleNamespace(flags=Flags(rollout_batch_size=size))
        assert chat_rl.rollout(run, None, [], 4, gpt.Policy(), 1, "evaluation") == []


# ----------------------------------------------------------------------------------------------------------------------
# Runs

QUICK = ["--num-samples=2", "--examples-per-step=2", "--eval-samples=2", "--eval-examples=2", "--max-new-tokens=4",
         "--max-steps=2"]
MODELS = {"nanochat": ("fixtures", "nanochat", "gsm8k-d4"), "huggingface": ("fixtures", "hf", "qwen3")}


@pytest.mark.parametrize("kind", MODELS)
def test_every_task_runs_on_both_kinds_of_model(tmp_path, kind, capsys):
    """Two steps and an evaluation from local folders; with a Hugging Face model the default task is gsm8k-boxed, with
    nanochat's it is gsm8k."""
    source, out = shared(*MODELS[kind]), tmp_path / "base" / "chatrl_checkpoints"
    if kind == "nanochat":
        shutil.copytree(source, tmp_path / "base")
    tag = "d4" if kind == "nanochat" else "qwen3"
    model = [] if kind == "nanochat" else [f"--model-tag={source}"]
    for name, rows in {None: GSM8K, **ROWS, "arithmetic": [], "aime": AIME}.items():
        flags = [f"--data={folder(tmp_path / f'{name}', rows[:9], rows[9:])}"] if rows else []
        if name == "aime":
            flags = [f"--eval-data={write(tmp_path / 'aime.jsonl', AIME)}", "--max-steps=0"]
        if name:
            flags.append(f"--task={name}")
        assert main(tmp_path / "base", *QUICK, *model, *flags) == 0, capsys.readouterr().err
        if name == "aime":
            line, = metrics(tmp_path / "base", f"evaluations/{tag}")
            assert 0 <= line["pass@1"] <= line["pass@2"] <= 1
            continue
        lines = metrics(tmp_path / "base", tag)
        assert [("reward" in line, line["step"]) for line in lines] == [(False, 0), (True, 0), (True, 1), (False, 2)]
        assert all(line["grader_timeouts"] == 0 for line in lines)
        meta = json.loads((out / tag / "meta_000002.json").read_text())
        assert meta["flags"]["task"] == (name or {"nanochat": "gsm8k", "huggingface": "gsm8k-boxed"}[kind])


def test_several_evaluations_in_one_run(base, tmp_path, capsys):
    """Each has its own metrics, a line of the row that is printed, a line in the curve, and its rows in the samples; with
    --eval-examples 0 all questions are asked, but those that are too long, which are counted."""
    long = {"problem": "What is " + "1 + " * 50 + "1?", "answer": "51"}
    places = {"aime": [*AIME, long], "mine": [{"question": "What is 3 + 4?", "answer": "7"}] * 3}
    eval_data = ",".join(f"{name}={write(tmp_path / (name + '.jsonl'), rows)}" for name, rows in places.items())
    assert main(base, *SMALL, "--max-steps=1", f"--eval-data={eval_data}", "--eval-examples=0", "--eval-samples=2") == 0
    said = capsys.readouterr().out
    assert "1 of 13 aime questions are longer than 122 tokens and left out" in said
    assert re.search(r"step 0/1  aime/pass@1 .*  aime/greedy .*  mine/pass@1 .*  mine/greedy ", said)
    first, step, last = metrics(base)
    names = [f"{name}/{key}{error}" for name in places for key in ("pass@1", "pass@2", "greedy")
             for error in ("", "_error")]
    assert set(names) <= first.keys() == last.keys() and not {"pass@1", "greedy"} & first.keys()
    out = base / "chatrl_checkpoints" / "adder"
    rows = [json.loads(line) for line in (out / "samples_000000.jsonl").read_text().splitlines()]
    assert [row["data"] for row in rows] == ["aime"] * 12 + ["mine"] * 3
    flags = json.loads((out / "meta_000001.json").read_text())["flags"]
    assert flags["eval_data"] == eval_data and flags["eval_examples"] == 0


def test_the_curve_has_a_line_for_each_evaluation(pictures, monkeypatch, tmp_path):
    from matplotlib.figure import Figure
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.update({
        axes.get_title(): axes.get_legend_handles_labels()[1] for axes in figure.axes}))
    one = {f"pass@{k}{error}": 0.5 for k in range(1, 9) for error in ("", "_error")} | {"greedy": 0.5, "greedy_error": 0.1}
    several = {f"{name}/{key}": value for name in ("gsm8k", "math", "aime") for key, value in one.items()}
    title = "test questions solved (± standard error)"
    for tests, names in ((one, ["pass@1", "pass@2", "pass@4", "pass@8", "greedy"]),
                         (several, [f"{name}/{key}" for name in ("gsm8k", "math", "aime") for key in ("pass@1", "greedy")])):
        chat_rl.Log.plot(SimpleNamespace(lines=[{"step": 0, **tests}, {"step": 20, **tests}], out=tmp_path))
        assert drawn[title] == names


@pytest.mark.parametrize("lines", [[], [{"step": 0, "reward": 0.5, "entropy": None}]], ids=["nothing", "no evaluation"])
def test_the_curve_of_a_run_that_was_stopped_at_once(lines, tmp_path, pictures):
    """A picture is drawn of whatever there is."""
    chat_rl.Log.plot(SimpleNamespace(lines=lines, out=tmp_path))
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_digest_of_the_questions_counts_each_set():
    """Training questions are part of it whatever the test questions are called."""
    one, other = (examples_of([{"prompt": f"{i} + 1?", "answer": i + 1}]) for i in (1, 2))
    assert len({chat_rl.digest_of(one, {"train": other}), chat_rl.digest_of(other, {"train": other})}) == 2


def test_the_two_forms_of_jsonl(base, tmp_path, capsys):
    """Raw text with a list of solutions, and messages with a label, by the flags for them; the meta keeps these."""
    raw = [{"prompt": f"<|User|>\nWhat is {i} + 2? <|Assistant|><think>\n", "task": "math", "query_id": str(i),
            "solutions": [rf"\boxed{{{i + 2}}}"]} for i in range(12)]
    spoken = [{"prompt": chat(f"What is {i} + 2?"), "label": i + 2} for i in range(12)]
    forms = {"raw": (raw, ["--answer-key=solutions", "--raw-prompt"]),
             "spoken": (spoken, ["--answer-key=label", "--grader=exact"])}
    for name, (rows, flags) in forms.items():
        place = folder(tmp_path / name, rows, rows)
        assert main(base, *SMALL, "--task=jsonl", "--max-steps=2", f"--data={place}", *flags) == 0
        assert ("none of the model's own markers" in capsys.readouterr().out) == (name == "raw")
        lines = [line for line in metrics(base) if "reward" in line]
        assert len(lines) == 2 and (max(line["reward"] for line in lines) > 0) == (name == "spoken")
        meta = json.loads((base / "chatrl_checkpoints" / "adder" / "meta_000002.json").read_text())["flags"]
        assert (meta["task"], meta["raw_prompt"]) == ("jsonl", name == "raw") and meta["answer_key"] in flags[0]


# ----------------------------------------------------------------------------------------------------------------------
# What a run says


def test_a_right_and_a_wrong_completion_are_shown(tokenizer, tmp_path, capsys):
    """Of the hardest question that has both."""
    groups = []
    for i, scores in enumerate([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]]):
        example, = examples_of([{"prompt": f"question {i}", "answer": f"reference {i}"}], grader=chat_rl.GRADERS["exact"])
        texts = [f"{i} says {score}" for score in scores]
        completions = [gpt.Completion([*tokenizer.encode(text), tokenizer.stops[0]], [], []) for text in texts]
        groups.append(Group(example, [], completions, scores, scores))
    for part, lines in (({"": groups[:2], "more": groups[2:]}, ["question", "reference", "right", "wrong"]),
                        ({"": groups[1:2]}, ["question", "reference", "wrong"])):
        chat_rl.Log.write_samples(SimpleNamespace(out=tmp_path, wandb=None), 3, part, tokenizer)
        i, said = len(lines) - 2, dict(question="question {}", reference="reference {}", right="{} says 1", wrong="{} says 0")
        assert capsys.readouterr().out.split() == " ".join(f"{key} {said[key].format(i)}" for key in lines).split()


@pytest.mark.parametrize("right, words", [
    (False, ["--few-shot", "--num-samples", "easier task", "SFT"]), (True, ["harder task"])])
@pytest.mark.parametrize("every", [4, 9, 60])
def test_advice_after_ten_steps(right, words, every, capsys):
    """One line, once, whenever the evaluations come; nothing where one thing was otherwise."""
    value, lines, other = float(right), [], []
    for step in range(30):
        if step % every == 0:
            lines.append({"step": step, "aime/pass@1": value, "aime/pass@1_error": 0.0, "aime/greedy": value})
            other.append(lines[-1])
        lines.append({"step": step, "reward": 5 * value, "all_right": value, "all_wrong": 1 - value})
        other.append(lines[-1] if step != 3 else {"step": step, "reward": 0.5, "all_right": 0.0, "all_wrong": 0.0})
        chat_rl.advise(lines)
        said = capsys.readouterr().out
        assert said.count("\n") == (step == 9) and all(word in said for word in words) == (step == 9)
        chat_rl.advise(other)
        assert capsys.readouterr().out == ""


def test_advice_in_a_run(base, tokenizer, capsys):
    gpt.save_checkpoint(base / "chatsft_checkpoints" / "fool", 3, tiny_model(), tokenizer, {"model_config": SHAPE})
    flags = ["--model-tag=fool", "--max-steps=11", "--eval-every=3", "--num-samples=2", "--examples-per-step=2",
             "--eval-samples=1"]
    assert main(base, *SMALL, *flags) == 0
    assert capsys.readouterr().out.count("nothing was right so far") == 1


def test_tensorboard_has_the_same_metrics(base):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert main(base, *SMALL, "--max-steps=2", "--tensorboard") == 0
    events = EventAccumulator(str(base / "chatrl_checkpoints" / "adder" / "tensorboard"))
    events.Reload()
    lines = metrics(base)
    assert set(events.Tags()["scalars"]) == {key for line in lines for key in line}
    for key in events.Tags()["scalars"]:
        assert [(e.step, e.value) for e in events.Scalars(key)] == [
            (line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if key in line]


def test_without_tensorboard_a_line_asks_for_it(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    refused(base, capsys, [*SMALL, "--tensorboard"], "pip install tensorboard")


def test_timeouts_of_an_evaluation_are_its_own(base, monkeypatch):
    equal = chat_rl.GRADERS["exact"]

    def slow(reference: str, text: str) -> float:
        chat_rl.same_math.timeouts += 1
        return equal(reference, text)

    slow.reads = equal.reads
    monkeypatch.setitem(TASKS, "arithmetic", replace(TASKS["arithmetic"], grader=slow))
    assert main(base, *SMALL, "--max-steps=1", "--eval-samples=3") == 0
    assert [line["grader_timeouts"] for line in metrics(base)] == [8 * 4, 8 * 8, 8 * 4]


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def refused(base: Path, capsys, flags: list[str], *words: str) -> None:
    """One line, exit 2, and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    capsys.readouterr()
    assert main(base, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("chat_rl: ") and said.count("\n") == 1 and len(said) < 500, said
    assert all(word in said for word in words), said
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*")} == before


BAD_ROWS = {
    "no key": ({"text": "?", "answer": "1"}, "row 1 of train", "'prompt'", "it has answer, text", "--prompt-key"),
    "no answer": ({"prompt": "?", "label": "1"}, "row 1 of train", "'answer'", "prompt, label", "--answer-key"),
    "empty prompt": ({"prompt": "", "answer": "1"}, "row 1 of train", "'prompt'"),
    "empty answer": ({"prompt": "?", "answer": ""}, "row 1 of train", "'answer'"),
}
BAD_CHATS = {
    "the assistant's last": SHOTS,
    "no role": [{"role": "", "content": "?"}],
    "a second system": [{"role": "system", "content": "1"}, {"role": "system", "content": "2"}, *chat("?")],
    "unknown role": [{"role": "tool", "content": "?"}],
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused(base, tmp_path, capsys, name):
    row, *words = BAD_ROWS[name]
    place = folder(tmp_path / "data", [JSONL[0], row, JSONL[2]], JSONL)
    refused(base, capsys, [*SMALL, "--task=jsonl", f"--data={place}"], *words)


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_bad_list_of_messages_is_refused(base, tmp_path, capsys, name):
    rows = [{"prompt": messages, "answer": "1"} for messages in (chat("?"), BAD_CHATS[name])]
    place = folder(tmp_path / "data", rows, rows)
    refused(base, capsys, [*SMALL, "--task=jsonl", f"--data={place}"], "row 1 of train", "ends with the user's")


@pytest.mark.parametrize("content", [None, "", "[", "{}", "[]", '["a"]', '[{"role": "user", "content": "?"}]',
                                     '[{"role": "assistant"}]', '[{"role": "assistant", "content": 5}]', "\xff"])
def test_a_few_shot_file_that_is_none_is_refused(base, tmp_path, capsys, content):
    path = tmp_path / "shots.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    refused(base, capsys, [*SMALL, f"--few-shot={path}"], f"--few-shot {path}")


def test_other_bad_input_is_refused(base, tmp_path, capsys):
    good, tests = folder(tmp_path / "good", JSONL, JSONL), write(tmp_path / "tests.jsonl", JSONL)
    jsonl = [*SMALL, "--task=jsonl", f"--data={good}"]
    unread = folder(tmp_path / "unread", [{**row, "answer": "?" * 300} for row in JSONL], JSONL)
    only_train, only_test = folder(tmp_path / "only-train", JSONL), folder(tmp_path / "only-test", [], JSONL)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": \n')
    for flags, words in (
            (["--task=sums"], ["--task sums", *TASKS]),
            (["--grader=right"], ["--grader right", *chat_rl.GRADERS]),
            ([f"--data={unread}"], ["unread", "--grader"]),
            ([f"--data={tmp_path / 'nowhere'}"], ["nowhere", "--data"]),
            ([f"--data={broken}"], ["broken.jsonl"]),
            ([f"--data={only_test}"], ["train of ", "only-test has no questions", "--data"]),
            ([f"--data={only_train}"], ["test of ", "only-train has no questions", "--eval-data"]),
            (["--data="], ["train of jsonl without --data has no questions"]),
            (["--eval-data=nowhere.jsonl"], ["nowhere.jsonl"]),
            ([f"--eval-data={tests},{tests}"], ["--eval-data", "name=place"]),
            ([f"--eval-data=a={tests},a={tests}"], ["--eval-data", "name=place"]),
            ([f"--eval-data=a={tests},"], ["--eval-data", "name=place"]),
            (["--max-new-tokens=125"], ["too few", "--max-new-tokens"])):
        refused(base, capsys, [*jsonl, *flags], *words)


# ----------------------------------------------------------------------------------------------------------------------
# What examples before each question cost


def test_a_group_pays_for_its_examples_once(tokenizer):
    """The tokens that are computed for a question do not depend on the number of its samples, in rollout or update."""
    shots = tuple(SHOTS * 6)
    model = tiny_model()
    computed = []
    model.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    example, = examples_of([{"prompt": "What is 3 + 4?", "answer": "7"}], few_shot=shots)
    prompt, policy = chat_rl.prompt_of(example, tokenizer), gpt.Policy(1.0, 50, 15.0)
    assert len(prompt) > 150
    sampler = gpt.Sampler(model, tokenizer)
    sampler.model.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    for samples in (2, 16):
        computed.clear()
        completions, = sampler.generate([prompt], samples, 5, policy)
        assert computed[0] == len(prompt) and sum(computed[1:]) <= 4 * samples
        computed.clear()
        rewards = [float(i % 2) for i in range(samples)]
        group = Group(example, prompt, completions, rewards, rewards, chat_rl.advantages_of(rewards))
        chat_rl.backward(model, [group], policy, 4)
        assert computed[0] == len(prompt) and sum(computed[1:]) <= 4 * samples
