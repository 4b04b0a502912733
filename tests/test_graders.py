"""Graders: what scores what, MATH-500 and AIME against themselves, hostile text, and the process that compares expressions."""
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import chat_rl
from chat_rl import GRADERS, last_answer, last_box, math_server, same_math, small
from conftest import SHARED

HANGS = r"9^{9^{9^9}}"              # small() refuses it: same_math must be asked itself


def boxed(text: str) -> str:
    return rf"so it is $\boxed{{{text}}}$."


def rows(name: str) -> list[dict]:
    path = SHARED / "data" / name / "test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


def dismiss() -> None:
    """Ends the server, if there is one, and waits until it has."""
    if math_server.cache_info().currsize:
        with math_server() as server:
            server.kill()
    math_server.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def last_server_ends():
    yield
    dismiss()


@pytest.fixture
def fresh(monkeypatch):
    """No server yet, no answers remembered, and servers that give up after 2 seconds of their CPU time: several times
    what an honest line takes, the first one included."""
    short = chat_rl.SERVER.replace("ITIMER_PROF, 5)", "ITIMER_PROF, 2)")
    assert short != chat_rl.SERVER
    dismiss()
    monkeypatch.setattr(chat_rl, "SERVER", short)
    same_math.cache_clear()
    same_math.timeouts = 0
    yield
    dismiss()
    same_math.cache_clear()
    same_math.timeouts = 0


# ----------------------------------------------------------------------------------------------------------------------
# What scores what


@pytest.mark.parametrize("reference, text, score", [
    ("18", "18", 1), ("18", " 18", 0), ("18", "18.0", 0), ("18", "", 0), ("a\nb", "a\nb", 1),
])
def test_exact(reference, text, score):
    assert GRADERS["exact"](reference, text) == score


@pytest.mark.parametrize("tail, score", [
    ("12", 1), (" 12.", 1), ("$12.00", 1), ("12abc", 1), ("12 apples, or 13", 1), ("1,2", 1), ("+12", 1), ("012", 1), ("12...", 1),
    ("12/4", 1), ("**12**", 0), ("12..5", 0), ("12.5", 0), ("1.2.3", 0), ("-12", 0), ("", 0), ("twelve", 0), ("x12", 0),
    ("\u0661\u0662", 0), (r"\boxed{12}", 0), ("#### 12", 1), ("12 ####", 0), ("12 #### 13", 0),
])
def test_number(tail, score):
    for reference in ("6 + 6 = <<6+6=12>>12\n#### 12", "12", " 12.0 ", r"so $\boxed{12}$"):
        assert GRADERS["number"](reference, f"We add 7.\n#### {tail}") == score
        assert GRADERS["number"](reference, f"We add 7: {tail.replace('#', '')}") == 0


def test_number_of_fractions():
    assert GRADERS["number"]("#### 3", "#### 3/4") == 1
    assert not GRADERS["number"].reads("#### 1..5") and GRADERS["number"]("#### 1..5", "#### 1..5") == 0


@pytest.mark.parametrize("text, score", [
    (r"\boxed{1000}", 1), (r"\boxed{ 1000 }", 1), (r"\boxed {1000}", 1), (r"\boxed{1,000}", 1), (r"\boxed{1{,}000}", 1),
    (r"\boxed{1,\!000}", 1), (r"\boxed{1\,000}", 1), (r"\boxed{\$1000}", 1), (r"\boxed{$1000$}", 1), (r"\boxed{1000.00}", 1),
    (r"\boxed{1000.}", 1), (r"\boxed{1000\text{ m}}", 1), (r"\boxed{1000 dollars}", 1), (r"\boxed{1000\%}", 1),
    (r"\boxed{{1000}}", 1), (r"\boxed{\boxed{1000}}", 1), (r"\boxed{1000^\circ}", 1), ("\\boxed{\n1000\n}", 1),
    (r"\boxed{7} no, \boxed{1000}", 1), (r"\boxed{1000} or \boxed{7", 1), (r"\boxed{1000} } {", 1), (r"{ \boxed{1000}", 1),
    (r"\boxed{1000} no, \boxed{7}", 0), (r"\boxed{1000} no, \boxed{}", 0), (r"\boxed{1000", 0), (r"\boxed{1000\}", 0), ("1000", 0),
    (r"\boxed{1000} \boxed{\boxed 7}", 0), (r"\boxed{7 \\boxed{1000}}", 0),
    ("#### 1000", 0), (r"\boxed{1000/4}", 0), (r"\boxed{1000 or 7}", 0), (r"\boxed{1000 + 7}", 0), (r"\boxed{1000^{2}}", 0),
    (r"\boxed{-1000}", 0), (r"\boxed{x=1000}", 0), (r"\boxed{}", 0), ("boxed{1000}", 0), (r"\boxed{1 000}", 0), (r"\fbox{1000}", 0),
])
def test_boxed_number(text, score):
    for reference in ("500 + 500 = 1000\n#### 1,000", "1000", r"\boxed{1000}", r"so $\boxed{\$1{,}000}$ 7"):
        assert GRADERS["boxed-number"](reference, text) == score


@pytest.mark.parametrize("text, score", [
    ("<answer>5</answer>", 1),
    ("<think>4?</think><answer>5</answer>", 1),
    ("<think>4?</think>\n<answer>\n $5.00 </answer> done", 1),
    ("<answer>4</answer><answer>5</answer>", 1),
    ("<answer>5</answer><answer>4", 1),                             # not closed
    ("<answer>4<answer>5</answer>", 1),
    ("<answer>5</answer> 6 </answer>", 1),
    ("<think>a</think> b <think>c</think><answer>5</answer>", 1),
    ("<think> a <think> b </think><answer>5</answer>", 1),          # a think ends at the next </think>
    ("<answer>5</answer><think>was that right?", 1),
    ("thoughts</think><answer>5</answer>", 1),                      # the prompt has opened the think
    ("thoughts</think> b </think><answer>5</answer>", 1),
    ("<answer>5</answer></think>", 0),
    ("<answer>4</answer></think><answer>5</answer>", 0),
    ("<answer>4</think><answer>5</answer>", 0),
    ("a</think><think><answer>4</answer></think><answer>5</answer>", 0),
    ("<think><answer>5</answer></think>", 0),
    ("<think>the <answer> goes last</think><answer>5</answer>", 0),
    ("<think><answer>5</answer>", 0),                               # not closed
    ("<answer>5</answer><think><answer>5</answer>", 0),
    ("<answer>5</answer><answer>4</answer>", 0),
    ("<answer>5", 0), ("5</answer>", 0), ("</answer>5<answer>", 0), ("5", 0), ("", 0), ("<ANSWER>5</ANSWER>", 0),
    ("<answer></answer>", 0), ("<answer>5/4</answer>", 0), ("<answer>x=5</answer>", 0), ("<answer>5 or 6</answer>", 0),
    ("<answer>5 apples</answer>", 1),
])
def test_tagged_number(text, score):
    for reference in ("2 + 3 = 5\n#### 5", "5", r"\boxed{5}"):
        assert GRADERS["tagged-number"](reference, text) == score


def test_what_the_prompt_has_opened_is_part_of_the_text():
    """A think that the prompt has opened and the completion never closes cannot be seen in the completion alone."""
    assert GRADERS["tagged-number"]("5", "<think>\n" + "<answer>5</answer>") == 0
    assert GRADERS["tagged-number"]("5", "<think>\n" + "thoughts</think><answer>5</answer>") == 1


@pytest.mark.parametrize("name, said", [
    ("number", "#### 5"), ("boxed-number", boxed("5")), ("boxed-math", boxed("5")), ("tagged-number", "<answer>5</answer>"),
])
def test_a_thought_that_never_ends_holds_no_answer(name, said):
    grade = GRADERS[name]
    assert grade("5", f"<think>{said}") == grade("5", f"<think>a</think> b <think>{said}") == 0
    assert grade("5", f"<think>a</think>{said}") == grade("5", f"{said} <think>was that right?") == 1


# What scores what by math-verify 0.9; where a pair is not symmetric both orders stand here.
EQUAL = [
    (r"\frac12", r"\dfrac{1}{2}"), (r"\frac12", "0.5"), ("0.5", r"\dfrac{1}{2}"), (r"\frac12", "1/2"), (r"\frac12", r"\tfrac 12"),
    (r"-\frac12", r"\frac{-1}{2}"), (r"1\frac12", "1.5"), (r"\frac13", "0.333333"),
    ("(1, 2)", "(1,2)"), ("(1,2)", r"\left(1,2\right)"), ("1,2", "2,1"), ("1,2", r"\{1,2\}"), ("1,2", "1 and 2"), (r"\pm 2", "2,-2"),
    ("90", r"90^\circ"), (r"90^\circ", "90"), (r"90^\circ", r"90^{\circ}"), ("90", r"90\text{ degrees}"),
    ("x=5", "5"), ("5", "x=5"), ("x=5", "x = 5"), ("1,2", "x=1,x=2"), ("y=2x+1", "2x+1"), ("y=2x+1", "2x-y+1=0"),
    (r"\text{B}", "B"), ("B", r"\text{B}"), (r"\text{(B)}", "B"), (r"\text{(B)}", r"\text{B}"), ("B", "b"), (r"\text{Evelyn}", "Evelyn"),
    (r"10\%", "0.1"), ("0.1", r"10\%"), (r"10\%", "10"), ("10", r"10\%"), (r"10\%", "10%"),
    (r"\$10", "10"), ("1000", "1,000"), ("1000", "1{,}000"), ("1000", r"1,\!000"), ("1000", "10^3"), ("104", "104."), ("25", "025"),
    ("25", "25.0"), ("25", r"\text{25}"), ("25", r"\boxed{25}"), ("25", "$25$"), (r"5\text{ cm}", "5"), ("5", r"5\text{ cm}^2"),
    ("3x+2", "2+3x"), ("(x+1)^2", "x^2+2x+1"), (r"\sqrt{8}", r"2\sqrt2"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
    ("2^{2005}", r"2\cdot 2^{2004}"), ("252", r"\binom{10}{5}"), ("120", "5!"), ("2", "1+1"), (r"\pi", "3.14159265"),
    (r"x\in[1,2]", "[1,2]"), (r"1\le x\le 2", "[1,2]"), ("4210_{5}", "4210_5"), ("4210_5", "4210"), ("3+4i", "4i+3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
]
UNEQUAL = [
    ("5", "6"), ("5", "-5"), ("5", "5, 6"), ("5", "5 or 6"), ("5", "five"), ("5", ""), ("25", "25.4"), (r"\frac13", "0.333"),
    (r"\pi", "3.14159"), ("(1,2)", "(2,1)"), ("[1,2)", "[1,2]"), ("[1,2]", "(1,2)"), ("x=5", "y=5"), ("x^2", "y^2"), ("B", "C"),
    (r"\text{east}", r"\text{seat}"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), ("1000", r"1\,000"), ("25", r"\textbf{(025)}"),
    ("[1,2]", r"1\le x\le 2"), (r"(-\infty,3)", "x<3"),
]


@pytest.mark.parametrize("pairs, score", [(EQUAL, 1), (UNEQUAL, 0)])
def test_forms(pairs, score):
    grade = GRADERS["boxed-math"]
    assert [(r, a) for r, a in pairs if grade(r, boxed(a)) != score] == []
    assert [(r, a) for r, a in pairs if grade(rf"Since $\boxed{{3}}$, it is \boxed{{{r}}}", boxed("7") + boxed(a)) != score] == []


@pytest.mark.parametrize("name", sorted(GRADERS))
def test_references_that_cannot_be_read(name):
    grader = GRADERS[name]
    for reference in ("18", "#### 18", r"\boxed{18}"):
        assert grader.reads(reference)
    for reference in ("", r"\boxed{}", "{" * 300, "####", r"\boxed{18"):
        assert grader.reads(reference) == (name == "exact")
        if not grader.reads(reference):
            assert grader(reference, reference) == grader(reference, boxed(reference)) == 0


def test_every_answer_of_gsm8k_can_be_read_and_is_right():
    for row in rows("gsm8k"):
        answer = row["answer"].rpartition("####")[2].strip()
        assert GRADERS["number"](row["answer"], row["answer"]) == 1
        assert GRADERS["boxed-number"](row["answer"], boxed(answer)) == 1
        assert GRADERS["tagged-number"](row["answer"], f"<think>{row['answer']}</think><answer>{answer}</answer>") == 1


def test_math500_against_itself():
    test, grade = rows("math500"), GRADERS["boxed-math"]
    same_math("1/2", "0.5")                                         # the server starts
    same_math.timeouts, begun = 0, time.monotonic()
    for row in test:
        for reference in (row["answer"], row["solution"]):
            assert grade(reference, boxed(row["answer"])) == grade(reference, row["solution"]) == 1, row
    equal = [(row["answer"], after["answer"]) for row, after in zip(test, test[1:] + test[:1])
             if grade(row["answer"], boxed(after["answer"])) or grade(row["solution"], boxed(after["answer"]))]
    assert equal == [("5", "x=5"), ("7", "7"), ("3", "3")]
    assert time.monotonic() - begun < 10 * max(1, os.getloadavg()[0]) and same_math.timeouts == 0


def test_aime_against_itself():
    test, grade = rows("aime24"), GRADERS["boxed-math"]
    for row, after in zip(test, test[1:] + test[:1]):
        for form in ("{}", "{}.", "n = {}", "{}.0"):
            assert grade(row["answer"], boxed(form.format(row["answer"]))) == 1
        assert grade(row["answer"], boxed(str(int(row["answer"])))) == 1
        assert grade(row["answer"], boxed(after["answer"])) == (row["answer"] == after["answer"])


def test_what_stands_in_a_box_or_an_answer():
    assert last_box(r"\boxed{\left\{ x \right.} \boxed{a \} b}") == r"a \} b"
    assert last_box(r"\boxed{\begin{pmatrix} 1 \\{2} \end{pmatrix}}") == r"\begin{pmatrix} 1 \\{2} \end{pmatrix}"
    assert last_box(r"\boxed{\frac{1}{2} + \boxed{3}}") == "3"
    assert last_answer("<answer> a\nb </answer>") == " a\nb "


# ----------------------------------------------------------------------------------------------------------------------
# Hostile text

PIECES = ["\\boxed{", "\\boxed", "{", "}", "\\", "\\\\", "\\{", "####", " ", "\n", "<think>", "</think>", "<answer>", "</answer>", "1",
          "5", ".", ",", "-", "$", "^", "!", "\\frac", "\\text{", "x", "=", "%", "(", ")", "|", "\u00b2", "\ud800", "\0", "\u0663"]
HOSTILE = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


@pytest.mark.parametrize("name", sorted(GRADERS))
@settings(max_examples=60, deadline=None)
@given(HOSTILE, HOSTILE)
def test_any_text_is_graded(name, reference, text):
    for right, said in ((reference, text), ("5", text), ("5", boxed(text)), ("5", f"<answer>{text}</answer>"), (reference, reference)):
        assert GRADERS[name](right, said) in (0.0, 1.0)
    if not GRADERS[name].reads(reference):
        assert GRADERS[name](reference, text) == 0


def todays_number(text: str) -> Decimal | None:
    """The rule of GSM8K before there were other graders."""
    _, mark, tail = text.rpartition("####")
    found = re.match(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?!\.?\d)", tail.replace(",", "").replace("$", ""), re.ASCII)
    return Decimal(found[1]) if mark and found else None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"0123.,-+$ /a*", "####", "\n"]), max_size=12).map("".join))
def test_number_is_what_it_was_but_for_two_points(text):
    if ".." not in text.replace(",", "").replace("$", ""):
        number = todays_number(text)
        assert GRADERS["number"](f"#### {number}", text) == (number is not None)
        if number is not None:
            assert GRADERS["number"](f"#### {number + 1}", text) == 0


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.text("ab ", max_size=4), lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}")),
       st.text("ab \\$}", max_size=6), st.text("ab ", max_size=6))
def test_a_balanced_box_is_found(inside, before, after):
    assert last_box(rf"{before} \boxed{{{inside}}}{after}") == " ".join(inside.split())


@settings(max_examples=300, deadline=None)
@given(HOSTILE)
def test_small_is_small(latex):
    assert small(latex) in (None, latex) and (small(latex) is None or 0 < len(latex) <= 200)
    assert small(latex + "9" * 201) is None and small(f"{latex} 9^{{9^9}}") is None


@pytest.mark.parametrize("latex", [
    HANGS, "9^{9^9}", r"(9^9)^{9^{9}}", "2^{100000}", "((9^{99})^{99})^{99}", "99999!", "9!!!!", "((9!)!)!", r"\binom{99999}{50000}",
    r"\sum_{n=1}^{9} n", r"\prod_{k=1}^{n} k", r"\int_0^1 x dx", r"\lim_{x \to 0} x", "(x+y+z)^{100}", "(((((((1)))))))", "x" * 201,
    "|" * 6, r"\sin" * 5, "9^9^9^9" + "^9" * 9, "", "x^", "2^{2^{x}}", r"\exp(\exp(\exp(99)))", r"e^{\exp(99)}",
])
def test_what_is_refused(latex):
    assert small(latex) is None
    assert not GRADERS["boxed-math"].reads(rf"\boxed{{{latex}}}") and GRADERS["boxed-math"]("5", boxed(latex)) == 0


@pytest.mark.parametrize("latex", [
    "864 \\mbox{ inches}^2", r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]", "x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + x^2 + x + 1",
    "2^{2005}", r"\left(\frac{2}{3}\right)^{10}", r"\frac{10!}{3!7!}", r"\binom{10}{5}", r"e^{\frac{\pi i}{3}}", r"|x-1|+|x+1|",
    r"\sin^2 x", r"1,\!000,\!000", r"(x-1)^2(x+2)^3", r"90^{\circ}", r"\sqrt{2+\sqrt{2+\sqrt{2}}}", "(-\\infty, 2) \\cup (3, \\infty)",
])
def test_what_is_not_refused(latex):
    assert small(latex) == latex


HOSTILE_10K = {
    "braces": "{" * 10_000, "nested": "{" * 5_000 + "}" * 5_000, "boxes": r"\boxed{" * 1_400, "nested boxes": r"\boxed{" * 1_200 + "}" * 1_200,
    "digits": "7" * 10_000, "points": "1" + "." * 10_000 + "1", "decimals": "1.1" * 3_000, "commas": "1," * 5_000, "spaces": " " * 10_000,
    "commands": r"\frac\sqrt\sin" * 700, "fractions": r"\frac{1}{" * 1_000 + "2" + "}" * 1_000, "slashes": "\\" * 10_000,
    "towers": "9^" * 5_000 + "9", "braced towers": "9^{" * 2_500 + "9" + "}" * 2_500, "factorials": "9" + "!" * 10_000, "bars": "|" * 10_000,
    "parentheses": "(" * 5_000 + "1" + ")" * 5_000, "answers": "<answer>" * 1_250, "closed": "</answer>" * 1_100,
    "thinks": "<think>" * 1_400, "pairs": "<think></think>" * 660, "marks": "#" * 10_000, "surrogates": "\ud800" * 10_000,
}


@pytest.mark.parametrize("what", HOSTILE_10K)
def test_ten_thousand_hostile_characters(what):
    """No grader takes long, much memory, or asks the server, for any of them, bare or wrapped, nor for ten times as many."""
    text, asked = HOSTILE_10K[what], same_math.cache_info().misses
    for wrapped in (text, text * 10, boxed(text), f"<answer>{text}</answer>", f"#### {text}"):
        for name, grader in GRADERS.items():
            start = time.process_time()
            assert grader("5", wrapped) == 0 and grader(wrapped, "5") == 0
            assert time.process_time() - start < 1, name
    assert same_math.cache_info().misses == asked
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 ** 21         # kB: 2 GB, torch included


def test_small_hostile_expressions_are_quick():
    """What small() lets pass and yet looks heavy is judged, by what it is and not by the clock."""
    same_math("1/2", "0.5")
    same_math.timeouts = 0
    for latex in ("(x+1)^{20}", "(x+y)^4(z+w)^5", "(9^{9999})^{20}", "(((((1)))))", "7" * 200, "1+" * 99 + "1", "(1+x)" * 40,
                  r"\sqrt{" + "7" * 190 + "}", r"\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11}", "999!/998!", r"\binom{999}{500}",
                  r"\frac{1}{1+\frac{1}{1+\frac{1}{1+x}}}", r"\frac{1}{0}", "1e9999999999", r"\sqrt[0.001]{9}", "=".join("x" * 50)):
        assert small(latex) and not same_math(r"\frac{\sqrt{2}}{7}", latex), latex
    assert same_math.timeouts == 0


# ----------------------------------------------------------------------------------------------------------------------
# The server


def test_a_hanging_expression_scores_nothing_is_counted_and_harms_no_other(fresh):
    assert same_math(r"\frac12", "0.5")
    first = math_server()
    assert not same_math("5", HANGS)
    assert same_math.timeouts == 1 and first.returncode == -signal.SIGPROF      # ended, and no zombie
    assert same_math(r"\frac13", r"\frac{2}{6}") and not same_math("5", "6+x")
    assert same_math.timeouts == 1 and math_server() is not first


ECHO = """import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    time.sleep(0.005)
    print(int("same" in json.loads(line)), flush=True)
"""


def test_a_server_that_was_killed_is_replaced(fresh, monkeypatch):
    monkeypatch.setattr(chat_rl, "SERVER", ECHO)
    assert same_math("a", "same")
    math_server().kill()
    time.sleep(0.1)
    assert same_math("b", "same") and not same_math("a", "b") and same_math.timeouts == 0


def run_script(body: str, **kwargs) -> subprocess.Popen:
    paths = {str(Path(chat_rl.__file__).parent), str(Path(sys.modules["gpt"].__file__).parent)}
    head = f"import sys; sys.path[:0] = {sorted(paths)}\nfrom {Path(chat_rl.__file__).stem} import *\nimport os, signal, time\n"
    return subprocess.Popen([sys.executable, "-c", head + inspect.cleandoc(body)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True, **kwargs)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_signals_to_the_group_do_not_reach_the_server_and_it_ends_with_the_run(fresh):
    """An idle server ends at once; a busy one when its clock has run out, even if the run was killed."""
    script = run_script(f"""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        assert same_math("5", "10-5")
        idle = math_server().pid
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(0, number)
            time.sleep(0.1)
        assert same_math("5", "7-2") and math_server().pid == idle
        module = sys.modules[math_server.__module__]
        module.SERVER = SERVER.replace("ITIMER_PROF, 5)", "ITIMER_PROF, 1)")
        busy = math_server.__wrapped__()
        busy.stdin.write(json.dumps(["5", {HANGS!r}]) + chr(10))
        busy.stdin.flush()
        print(idle, busy.pid, flush=True)
        time.sleep(60)
    """)
    idle, busy = map(int, script.stdout.readline().split())
    time.sleep(0.5)
    assert alive(idle) and alive(busy)
    script.kill()
    assert script.communicate()[1] == ""
    for pid, seconds in ((idle, 5), (busy, 60)):
        deadline = time.monotonic() + seconds
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(pid)


def test_without_math_verify_one_line_says_what_to_do(fresh, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(chat_rl.UserError, match=r"pip install math-verify"):
        same_math("5", "10-5")
    assert GRADERS["boxed-math"]("5", boxed("5")) == 1 and GRADERS["boxed-math"]("5", boxed("6")) == 0     # nothing to ask
