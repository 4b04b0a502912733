"""Questions: where they come from, what is put around them, what is left out, and what is refused."""
import json
import pickle
import re
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from conftest import chat, refusal, shared

import chat_rl
from chat_rl import BOX_MATH, BOX_NUMBER, TASKS, Example, Flags

SYSTEM = {"role": "system", "content": "Be brief."}
SHOTS = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
GSM8K = [{"question": f"What is {i} plus 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in range(12)]
MATH = [{"problem": f"What is ${i}/7$?", "solution": rf"It is $\boxed{{\frac{{{i}}}{{7}}}}.$"} for i in range(1, 13)]
AIME = [{"problem": f"What is {i} + 20?", "answer": f"{i + 20:03}", "solution": "?"} for i in range(12)]
JSONL = [{"prompt": f"What is {i} times 3?", "answer": str(3 * i)} for i in range(12)]
ROWS = {"gsm8k": GSM8K, "gsm8k-boxed": GSM8K, "think": GSM8K, "math": MATH, "jsonl": JSONL}
ORDER = numpy.random.default_rng(42).permutation(12).tolist()


def write(path: Path, rows: list, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding)
    return path


def folder(path: Path, **splits: list) -> Path:
    for name, rows in splits.items():
        write(path / f"{name}.jsonl", rows)
    return path


@pytest.fixture
def load(tokenizer):
    """The training and test questions of a task."""
    def load(task: str, data: Path | str | None = None, limit: int = 10**6, **flags) -> tuple:
        given = {**TASKS[task], **flags, **({} if data is None else {"data": str(data)})}
        settings = Flags(task=task)
        vars(settings).update(given)        # a grader too that is no choice of --grader
        return chat_rl.load_task(settings, tokenizer, limit)
    return load


@pytest.fixture
def examples_of(load, tmp_path):
    """The questions of rows in a file, in their order."""
    def examples_of(rows: list, task: str = "jsonl", limit: int = 10**6, **flags) -> list[Example]:
        tests = load(task, eval_data=str(write(tmp_path / "rows.jsonl", rows)), limit=limit, max_steps=0, **flags)[1]
        return sorted(tests[""], key=lambda example: example.index)
    return examples_of


@pytest.mark.parametrize("name, suffix", [
    ("gsm8k", ""), ("gsm8k-boxed", BOX_NUMBER), ("math", BOX_MATH), ("think", ""), ("jsonl", "")])
def test_each_task_asks_as_the_table_says(load, tokenizer, tmp_path, name, suffix):
    rows, key = ROWS[name], {"math": "problem", "jsonl": "prompt"}.get(name, "question")
    train, tests = load(name, folder(tmp_path, train=rows[:9], test=rows[9:]))
    system = [{"role": "system", "content": TASKS[name]["system"]}] if name == "think" else []
    for examples, part in ((train, rows[:9]), (tests[""], rows[9:])):
        examples = sorted(examples, key=lambda example: example.index)
        assert [x.index for x in examples] == [*range(len(part))]
        assert [x.prompt for x in examples] == [tokenizer.render([*system, *chat(row[key] + suffix)]) for row in part]
        assert [x.references for x in examples] == [[row["solution" if name == "math" else "answer"]] for row in part]
        assert {(x.grader, x.opening) for x in examples} == {(TASKS[name]["grader"], "")}
    assert pickle.loads(pickle.dumps((train, tests))) == (train, tests)


def test_arithmetic_is_made_here(load):
    """No pair that is tested is trained on, in either order; the test asks both orders, as training does."""
    train, tests = load("arithmetic")
    pairs = [{frozenset(map(int, re.findall(r"\d+", x.question))) for x in part} for part in (train, tests[""])]
    assert len({x.question for x in train}) == len(train) > 9000 and len(tests[""]) == 400 and not pairs[0] & pairs[1]
    assert all(sum(map(int, re.findall(r"\d+", x.question))) == int(x.references[0]) for x in train + tests[""])
    assert 150 < sum(int.__gt__(*map(int, re.findall(r"\d+", x.question))) for x in tests[""]) < 250


@pytest.mark.parametrize("name, part, count", [
    ("gsm8k", "gsm8k", 1319), ("math", "math500", 500), ("aime", "aime24", 30)])
def test_all_of_the_real_data_load(load, name, part, count):
    assert len(load(name, eval_data=str(shared("data", part)), max_steps=0)[1][""]) == count


def test_gsm8k_has_nanochats_test_order(load):
    """That of Dataset.shuffle(seed=42)."""
    import datasets
    place = shared("data", "gsm8k", "test.jsonl")
    rows = datasets.load_dataset("json", data_files=str(place), split="train").shuffle(seed=42)
    _, tests = load("gsm8k", max_steps=0, eval_data=str(place))
    assert [x.question for x in tests[""]] == list(rows["question"])


# Files


def test_numbers_arrive_as_they_are_written(load, tmp_path):
    """Without exponents, and 18.0 as 18; beside each other in one column; in JSON lines as in a list, with a mark or
    without, in a file as in a folder."""
    written = {"0.00005": "0.00005", "1e16": "10000000000000000", "72": "72", "3.5": "3.5", "18.0": "18", "0": "0",
               "1234567890123456789012345": "1234567890123456789012345", "-2.50": "-2.50", '"2024-05-01"': "2024-05-01",
               "0.1234567890123456789": "0.1234567890123456789", '"18.0"': "18.0", "[7, 8.0]": ["7", "8"]}
    lines = [f'{{"prompt": "{i}", "answer": {text}}}' for i, text in enumerate(written)]
    (tmp_path / "lines.jsonl").write_text("\n\n".join(lines) + "\r\n")
    (tmp_path / "list.json").write_text(" [" + ",\n".join(lines) + "]", "utf-8-sig")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "test.jsonl").write_text("\n".join(lines), "utf-8-sig")
    for name in ("lines.jsonl", "list.json", "folder"):
        _, tests = load("jsonl", max_steps=0, eval_data=str(tmp_path / name), grader="exact")
        said = {int(x.question): x.references for x in tests[""]}
        assert [said[i] for i in range(12)] == [x if isinstance(x, list) else [x] for x in written.values()]


def test_parquet(load, tmp_path):
    rows = [{"prompt": chat(f"{i}?"), "answer": i / 2, "row": "a", "other": {"x": i}} for i in range(12)]
    for place in (tmp_path / "one.parquet", tmp_path / "data" / "train.parquet", tmp_path / "data" / "test.parquet"):
        place.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place)
    for name in ("one.parquet", "data"):
        train, tests = load("jsonl", tmp_path / name)
        assert len(train) == 12
        assert {x.question: x.references for x in tests[""]} == {f"{i}?": [f"{i / 2}".removesuffix(".0")] for i in range(12)}


def test_tests_are_shuffled_the_same_way_however_their_place_is_spelled(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(chat_rl.MADE, "made", lambda: {"test": JSONL})
    write(tmp_path / "tests.jsonl", JSONL), folder(tmp_path / "folder", train=GSM8K, test=JSONL)
    folder(tmp_path / "other", validation=JSONL)
    expected = [JSONL[i]["prompt"] for i in ORDER]
    for place in ("tests.jsonl", "folder", "other"):
        for prefix in (str(tmp_path), "~"):
            _, tests = load("jsonl", max_steps=0, eval_data=f"{prefix}/{place}")
            assert [x.question for x in tests[""]] == expected and [x.index for x in tests[""]] == ORDER
    assert [x.question for x in load("jsonl", "made", max_steps=0)[1][""]] == expected


@pytest.mark.parametrize("name, content, words", [
    ("rows.jsonl", b'{"prompt": "?", "answer": 1}\n\n{"prompt": "?", "answer": 2\n{"prompt": "?", "answer": 3}\n', ["line 3 ", "rows.jsonl"]),
    ("rows.jsonl", b'{"prompt": "?", "answer": 1}\n{"prompt": "\xff"}\n', ["rows.jsonl", "utf-8"]),
    ("rows.json", b'[{"prompt": "?",\n "answer": 1},\n {]', ["rows.json", "line 3"]),
    ("rows.jsonl", b'{"prompt": "?", "answer": 1}\n5\n', ["row 1 of", "rows.jsonl"]),
    ("rows.parquet", b"PAR1", ["cannot load", "rows.parquet", "--data"]),
    ("rows.jsonl", b"", ["0 of 0", "rows.jsonl", "--data"]),
], ids=["not closed", "not UTF-8", "a list", "no record", "Parquet", "empty"])
def test_a_broken_file_is_named(load, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    text = refusal(load, "jsonl", tmp_path / name)
    assert all(word in text for word in words), text


def test_a_place_that_is_not_there(load, tmp_path):
    """The library's own cause, and what to do; also where the hub is out of reach."""
    for place in ("openai/gsm8k:main", "openai/gsm8k::test", str(tmp_path / "none.jsonl")):
        text = refusal(load, "gsm8k", place)
        assert text.startswith(f"cannot load {place} (") and "--data" in text and "--eval-data" in text
    (tmp_path / "empty").mkdir()
    assert "cannot load" in refusal(load, "gsm8k", tmp_path / "empty")
    assert "--eval-data" in refusal(load, "aime", max_steps=0)
    assert "--data" in refusal(load, "aime") and "0 of 0 questions in train of" in refusal(load, "jsonl")


def test_a_configuration_and_a_split_of_the_hub(load, monkeypatch):
    """What the library is asked for."""
    import datasets
    table, calls = datasets.Dataset.from_list(GSM8K), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *place, split=None: calls.append((*place, split)) or
                        datasets.DatasetDict({key: table for key in split or ("train", "validation")}))
    for place in ("org/name", "org/name:main", "org/name::dev", "org/name:main:test"):
        train, tests = load("gsm8k", place, num_epochs=2)
        assert len(train) == 12 and [x.question for x in tests[""]] == [GSM8K[i]["question"] for i in ORDER]
    assert calls[::2] == calls[1::2] == [("org/name", None, None), ("org/name", "main", None),
                                         ("org/name", None, {"train": "dev"}), ("org/name", "main", {"train": "test"})]


# What is put around a question


@pytest.mark.parametrize("system, before", [("Be brief.", []), ("", [SYSTEM])])
def test_flags_override_a_row(load, tokenizer, tmp_path, system, before):
    """The system text may be a flag or the first of the few-shot messages."""
    rows = [{"q": "Why {x}?", "meta": {"a": {"b": 5}}, "question": "no", "answer": "no"}] * 3
    flags = dict(prompt_key="q", answer_key="meta.a.b", suffix=r" \boxed{}", prefill="So ", grader="number")
    shots, data = tmp_path / "shots.json", folder(tmp_path / "data", train=rows, test=rows)
    shots.write_text(json.dumps([*before, *SHOTS]))
    train, tests = load("think", data, few_shot=str(shots), system=system, **flags)
    prompt = tokenizer.render([SYSTEM, *SHOTS, *chat(r"Why {x}? \boxed{}")]) + tokenizer.encode("So ")
    assert [(x.prompt, x.references, x.grader) for x in train + tests[""]] == [(prompt, ["5"], "number")] * 6


def test_a_column_may_be_called_like_a_part(examples_of):
    row = {"prompt": "?", "a.b": "1", "a": {"b": "2", "c": "3"}}
    assert [examples_of([row], answer_key=key)[0].references for key in ("a.b", "a.c")] == [["1"], ["3"]]


def test_messages_are_used_as_they_are(examples_of, tokenizer, tmp_path, monkeypatch):
    """Neither system text, nor suffix, nor examples; keys that templates do not know are left out."""
    messages = [SYSTEM, *SHOTS, {**chat("2 + 2?")[0], "name": None}]
    shots = write(tmp_path / "shots.jsonl", SHOTS)
    seen, render = [], tokenizer.render
    monkeypatch.setattr(tokenizer, "render", lambda chat: seen.extend(chat) or render(chat))
    example, = examples_of([{"prompt": messages, "answer": 4}], system="no", suffix="no", few_shot=str(shots))
    assert example.prompt == tokenizer.render([SYSTEM, *SHOTS, *chat("2 + 2?")]) and example.question == "2 + 2?"
    assert {key for message in seen for key in message} == {"role", "content"}


def test_a_raw_prompt_is_encoded_with_its_special_tokens(examples_of, tokenizer):
    """No template around it, no system text, no suffix; messages are none."""
    raw = "<|bos|><|user_start|>1 + 1?<|user_end|><|assistant_start|>"
    example, other = examples_of([{"prompt": raw, "answer": 2}, {"prompt": "<|User|>", "answer": 2}], raw_prompt=True, system="a", suffix="b")
    assert example.prompt == tokenizer.render(chat("1 + 1?")) and other.prompt == tokenizer.encode("<|User|>")
    assert "row 0 of" in refusal(examples_of, [{"prompt": chat("?"), "answer": 2}], raw_prompt=True)


@pytest.mark.parametrize("question, prefill, opening", [
    ("A", "", ""), ("A<think>\n", "", "<think>"), ("A", "<think>\n", "<think>\n"), ("A<think>\n", "So, ", "<think>So, "),
    ("A<think></think>", "", ""), ("<think>A", "", "")])
def test_what_the_prompt_holds_of_the_reply(examples_of, tokenizer, monkeypatch, question, prefill, opening):
    """A grader that looks for marks sees it, and so does any function; one that compares all that was said does not."""
    flags = dict(prefill=prefill, raw_prompt=True)
    monkeypatch.setitem(chat_rl.GRADERS, "any", lambda reference, text: 1.0)
    for grader, shown in (("tagged-number", opening), ("any", opening), ("exact", "")):
        example, = examples_of([{"prompt": question, "answer": "5"}], grader=grader, **flags)
        assert (example.opening, example.prompt) == (shown, tokenizer.encode(question + prefill))


@pytest.mark.parametrize("content, words", [
    *((text.encode("latin-1"), ["few-shot"]) for text in (
        "{}", '["a"]', '[{"role": "user", "content": "?"}]', '[{"role": "assistant"}]', '[{"role": "assistant", "content": 5}]')),
    (b"[", ["shots.json"]), (b"\xff", ["shots.json"]), (None, ["shots.json"]),
    (json.dumps([SYSTEM, *SHOTS]).encode(), ["--system", "--few-shot", "system system user"])])
def test_a_few_shot_file_that_is_none_is_refused(load, tmp_path, content, words):
    """So is a second system text."""
    path = tmp_path / "shots.json"
    if content is not None:
        path.write_bytes(content)
    text = refusal(load, "think", folder(tmp_path / "data", train=GSM8K, test=GSM8K), few_shot=str(path))
    assert all(word in text for word in words) and "--few-shot" in text, text


# What is left out, and what is refused


def test_rows_without_an_answer_that_can_be_read_are_left_out(load, tmp_path, capfd):
    """Counted in a line; the others keep their numbers."""
    bad = {2: {"answer": "none"}, 3: {"answer": None}, 5: {"answer": ""}, 6: {"answer": [" ", None]}, 8: {"question": None}}
    rows = [{**row, **bad.get(i, {})} for i, row in enumerate(GSM8K)] + [{"question": "?"}, {"answer": "#### 1"}]
    train, tests = load("gsm8k", folder(tmp_path, train=rows, test=[{"question": "?", "answer": ["none", "#### 3"]}]))
    assert tests[""][0].references == ["#### 3"]
    assert sorted(x.index for x in train) == [i for i in range(12) if i not in bad]
    said = capfd.readouterr().out
    assert said.count("\n") == 1 and said.startswith("7 of 14 questions in train of") and "7 lack a question or an answer" in said
    assert load("gsm8k", tmp_path, grader="exact", eval_data=str(write(tmp_path / "blank.jsonl", [
        {"question": "?", "answer": [" ", "", "8"]}, {"question": "?", "answer": "\n"}, {"question": "?", "answer": float("nan")}])))[1][""][0].references == ["8"]


def test_what_is_too_long_is_left_out(examples_of, tokenizer, capfd):
    """The prefill counts."""
    rows = [{"prompt": "a" * n, "answer": "1"} for n in (5, 6, 7)]
    limit = len(tokenizer.render(chat("a" * 6))) + 3
    assert [x.index for x in examples_of(rows, limit=limit, prefill="abc")] == [0, 1]
    said = capfd.readouterr().out
    assert said.count("\n") == 1 and "2 of 3 questions" in said and f"1 are longer than the {limit} tokens" in said
    assert "3 are longer than the 5 tokens" in refusal(examples_of, rows, limit=5)


def test_where_no_row_has_an_answer_the_columns_are_named(examples_of):
    for flags in (dict(answer_key="label"), dict(prompt_key="text"), dict(grader="tagged-number")):
        text = refusal(examples_of, [{**row, "answer": "four"} for row in JSONL], **flags)
        assert all(word in text for word in ("0 of 12", "prompt, answer", "--prompt-key", "--answer-key", "--grader"))


@pytest.mark.parametrize("row, flag", [
    *(({"prompt": "?", "answer": answer}, "--answer-key") for answer in ({"a": 1}, True, ["1", ["2"]], ["1", False], {})),
    *(({"prompt": prompt, "answer": "1"}, "--prompt-key") for prompt in (
        SHOTS, [SYSTEM], [SYSTEM, SYSTEM, *chat("?")], [{"role": "", "content": "?"}], [{"role": "tool", "content": "?"}],
        [{"content": "?"}], [{"role": "user"}], [{"role": "user", "content": 5}], [{"role": "user", "content": None}], ["?"],
        {"role": "user"}, 5, True))])
def test_what_is_no_question_or_no_reference_is_refused_by_row(examples_of, row, flag):
    text = refusal(examples_of, [JSONL[0], row, JSONL[2]])
    assert all(word in text for word in ("row 1 of test of", "rows.jsonl", flag, "the user's last")), text


# Test questions from elsewhere


def test_eval_data_of_several_places(load, tokenizer, tmp_path):
    """A name that is another row of TASKS brings its own columns, prompt and grader; any other has the run's. None comes twice."""
    places = {"gsm8k": GSM8K, "math": MATH, "aime": AIME, "jsonl": JSONL}
    eval_data = ",".join(f"{name}={write(tmp_path / (name + '.jsonl'), rows)}" for name, rows in places.items())
    train, tests = load("jsonl", folder(tmp_path / "train", train=JSONL), eval_data=eval_data, suffix=" Go.", grader="number")
    assert {name: len(part) for name, part in tests.items()} == dict.fromkeys(places, 12)
    firsts = {name: min(part, key=lambda x: x.index) for name, part in tests.items()}
    asked = {"gsm8k": "What is 0 plus 2?", "math": "What is $1/7$?" + BOX_MATH, "aime": "What is 0 + 20?" + BOX_MATH,
             "jsonl": "What is 0 times 3? Go."}
    assert {name: x.prompt for name, x in firsts.items()} == {k: tokenizer.render(chat(text)) for k, text in asked.items()}
    assert {name: x.grader for name, x in firsts.items()} == {
        "gsm8k": "number", "math": "boxed-math", "aime": "boxed-math", "jsonl": "number"}
    assert firsts["aime"].references == ["020"] and "two of the name math" in refusal(load, "jsonl", tmp_path / "train", eval_data=eval_data + ",math=x")


def test_paths_with_commas_and_equals_signs(load, tmp_path):
    one, other = write(tmp_path / "a=1,b" / "x,y.jsonl", JSONL[:5]), write(tmp_path / "c,d" / "z=1.jsonl", JSONL[:4])
    plain = write(tmp_path / "plain.jsonl", JSONL[:3])
    for eval_data, counts in ((one, {"": 5}), (other, {"": 4}), (f"m={plain},n={plain}", {"m": 3, "n": 3}),
                              (f"m={tmp_path / 'a=1,b'},n={plain}", {"m": 5, "n": 3})):
        _, tests = load("jsonl", max_steps=0, eval_data=str(eval_data))
        assert {name: len(part) for name, part in tests.items()} == counts


def test_an_evaluation_needs_no_training_questions(load, tmp_path):
    """With --max-steps 0 and --eval-data, --data is not even looked at."""
    file = write(tmp_path / "tests.jsonl", GSM8K)
    for name in ("gsm8k", "math", "aime", "think", "jsonl"):
        train, tests = load(name, "nowhere", eval_data=f"gsm8k={file}", max_steps=0)
        assert train == [] and len(tests["gsm8k"]) == 12


def test_questions_in_both_are_counted(load, tmp_path, capfd):
    load("jsonl", folder(tmp_path, train=JSONL[:8], test=JSONL[6:]))
    said = capfd.readouterr().out
    assert said.count("\n") == 1 and said.startswith("2 test questions in") and "training questions too" in said
    load("jsonl", write(tmp_path / "one.jsonl", JSONL))         # a file is all there is
    assert capfd.readouterr().out.startswith("12 test questions in")
    load("gsm8k", one := write(tmp_path / "one.jsonl", GSM8K), eval_data=f"gsm8k-boxed={one}")  # whatever the suffix
    assert capfd.readouterr().out.startswith("12 test questions in")
    load("jsonl", folder(tmp_path / "other", train=JSONL[:6], test=JSONL[6:]))
    assert capfd.readouterr().out == ""
