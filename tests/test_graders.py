"""Graders: what scores what, MATH-500 against itself, hostile text, and the process that compares expressions."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import chat_rl
from chat_rl import GRADERS, expression, last_answer, last_box, math_server, same_math, same_value
from conftest import ROOT, shared, wait_for

HANGS = r"9^{9^{9^9}}"              # expression() refuses it: same_value must be asked itself


def boxed(text: str) -> str:
    return rf"so it is $\boxed{{{text}}}$."


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in shared("data", name, "test.jsonl").read_text().splitlines()]


@pytest.fixture
def fresh(monkeypatch):
    """No server yet, no answers remembered, and servers that give up after a second of their CPU time."""
    short = chat_rl.SERVER.replace("ITIMER_PROF, 5)", "ITIMER_PROF, 1)")
    assert short != chat_rl.SERVER
    monkeypatch.setattr(chat_rl, "SERVER", short)

    def forget() -> None:
        if math_server.cache_info().currsize:
            math_server().kill()
            math_server().wait()
        math_server.cache_clear()
        same_value.cache_clear()
        same_math.timeouts = 0

    forget()
    yield
    forget()


# What scores what: (reference, what the model put in its box, score), by kind

BOXED = {
"tolerance": [
 (r"\frac{1}{2^{90}}", r"\frac{1}{2^{91}}", 0), ("0.0000003", "0.0000004", 0), (r"\frac{1}{3^{70}}", r"\frac{1}{3^{71}}", 0), ("10^{-20}", "10^{-21}", 0), (r"(\frac{1}{2^{90}}, 1)", r"(\frac{1}{2^{91}}, 1)", 0), ("0.00000012", "0.00000013", 0), (r"\frac{\pi}{10^{30}}", r"\frac{\pi}{10^{31}}", 0), (r"2^{200}", r"2^{200}+1", 0), (r"e^{-100}", r"e^{-101}", 0), (r"3\times10^{-9}", r"4\times10^{-9}", 0), (r"\frac{1}{20!}", r"\frac{1}{21!}", 0), ("0.0000003", r"3\times 10^{-7}", 1), (r"\frac{1}{2^{90}}", "2^{-90}", 1), (r"\frac13", "0.3333333333", 1), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2", 1),
 (r"\frac{1}{10^{8}}", "0.00000001", 1), ("0.5", r"\frac{1}{2}", 1), ("3.5", "3.50", 1), (r"\sqrt2\cdot10^{60}", r"\sqrt2\cdot10^{60}+1", 0), (r"\begin{pmatrix}10^{-20}\\1\end{pmatrix}", r"\begin{pmatrix}10^{-21}\\1\end{pmatrix}", 0), (r"\frac13", "0.333333", 1), (r"0.1", r"0.1000001", 1), (r"\begin{pmatrix}0.5\\1\end{pmatrix}", r"\begin{pmatrix}\frac12\\1\end{pmatrix}", 1), (r"10^{-20}", "0", 0), ("0", "10^{-20}", 0), ("0", "0.0000001", 0), (r"[0, 10^{-20}]", r"[0, 10^{-21}]", 0), (r"\{10^{-20}, 1\}", r"\{10^{-21}, 1\}", 0), ("x=10^{-20}", "x=10^{-21}", 0), (r"10^{-20}x", r"10^{-21}x", 0), (r"10^{-20}i", r"10^{-21}i", 0),
 ("10000000000", r"1.000000001\times10^{10}", 0), (r"\frac{10^{11}}{9}", r"1.11111111\times10^{10}", 0), (r"11,\!111,\!111,\!100", r"1.11111111\times10^{10}", 1), *((r"\begin{pmatrix}-2\\-14\\-7\end{pmatrix}", rf"{x}\begin{{pmatrix}}1\\1\\1\end{{pmatrix}}", 0) for x in ("x", r"\lambda", r"\pi", r"\frac{1}{\sqrt5}", "i", "e^2")), (r"\begin{pmatrix}\frac{1}{\sqrt5}\\0\end{pmatrix}", r"\frac{1}{\sqrt5}\begin{pmatrix}1\\0\end{pmatrix}", 1)],
"units": [
 (r"2 \text{ hours } 30 \text{ minutes}", r"2 \text{ hours } 45 \text{ minutes}", 0), (r"2 \text{ hours } 30 \text{ minutes}", "2", 0), ("2", r"2 \text{ hours } 30 \text{ minutes}", 0), (r"2 \text{ hours } 30 \text{ minutes}", r"2\text{ hours }30\text{ minutes}", 1), (r"\begin{cases} x & \text{if } x > 0 \\ 1 & \text{otherwise} \end{cases}", "x", 0), ("x", r"\begin{cases} x & \text{if } x > 0 \\ 1 & \text{otherwise} \end{cases}", 0),
 (r"\begin{cases} x & \text{if } x > 0 \\ 1 & \text{otherwise} \end{cases}", r"\begin{cases} x & \text{if } x > 0 \\ 2 & \text{otherwise} \end{cases}", 0), (r"\begin{cases} x & \text{if } x > 0 \\ 1 & \text{otherwise} \end{cases}", r"\begin{cases} x & \text{if } x < 0 \\ 1 & \text{otherwise} \end{cases}", 0), ("12", r"12\text{ cm}", 1), (r"12\text{ cm}", "12", 1), ("12", r"12\text{ cm}^2", 1), (r"12\text{ cm}^2", "12", 1), ("90", r"90^\circ", 1), (r"90^\circ", "90", 1), (r"90^{\circ}", "90", 1),
 (r"12\text{ cm}", r"12\text{ cm}^2", 0), (r"12\text{ cm}", r"12\text{ m}", 0), (r"5\text{ dollars}", r"5\text{ cents}", 0), (r"90^\circ", r"90\text{ cm}", 0), (r"12\text{ cm}", r"12\mathrm{~cm}", 1), (r"12\text{ cm}", r"12\,\mathrm{cm}", 1), (r"12\text{ cm}", "12 cm", 1), ("12", "12 cm", 1), (r"15\mbox{ cm}^2", r"15", 1), (r"15\mbox{ cm}^2", r"15\text{ cm}^{2}", 1),
 (r"90^\circ", r"90\text{ degrees}", 1), (r"x \text{ if } x > 0", "x", 0), (r"5 \text{ or } 6", "5", 0), ("5", r"5 \text{ or } 6", 0), (r"5 \text{ or } 6", "5, 6", 1), (r"5 \text{ and } 6", r"6 \text{ and } 5", 1), (r"\$5", "5", 1), ("5", r"\$5", 1), (r"\$5", r"5\text{ dollars}", 1), (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}", 1), (r"5.4 \text{ cents}", "5.4", 1), ("5", r"5\text{ million}", 0), (r"5\text{ million}", "5", 0), (r"3\text{ feet } 4\text{ inches}", r"3\text{ feet } 5\text{ inches}", 0), (r"3\text{ feet } 4\text{ inches}", "3", 0),
 ("60", r"60\text{ mph}", 1), ("60", r"60\text{ miles per hour}", 1), ("9.8", r"9.8\text{ m/s}^2", 1), ("9.8", r"9.8\,\frac{\text{m}}{\text{s}^2}", 1), (r"9.8\text{ m/s}", r"9.8\text{ m/s}^2", 0), (r"7\text{ remainder }3", "7", 0), (r"7\text{ remainder }3", r"7\text{ remainder }4", 0), (r"\text{at most } 5", r"\text{at least } 5", 0), ("10^3", r"10^3\text{ kg}", 1), (r"2\sqrt3\text{ cm}", r"2\sqrt{3}", 1),
 (r"10\%", "10", 1), (r"10\%", "0.1", 1), ("0.1", r"10\%", 1), (r"12.5\%", "12.5", 1), (r"12.5\%", "0.125", 1), (r"12.5\%", r"12.5\text{ percent}", 1), (r"10\%", r"10\text{ cm}", 0), (r"30^\circ\text{C}", r"30^\circ\text{F}", 0), (r"1\text{ out of } 6", "1", 0), ("5", r"5\text{ squared}", 0), (r"x\text{ cm}", "x", 1), (r"10\text{ AM}", r"10\text{ PM}", 0), (r"45^\circ", r"45'", 0), (r"3\text{ m}", r"3\text{ s}", 0), (r"3\text{ m}", "3", 1)],
"letters": [
 ("2t", "2", 0), ("2", "2t", 0), ("5h", "5m", 0), ("5m", "5", 0), ("5", "5m", 0), ("3s", "3", 0), ("7g", "7", 0), ("4d", "4", 0), ("4l", "4c", 0), ("2k", "2", 0), ("xy", "xyc", 0), (r"\frac{a}{b} h", r"\frac{a}{b}", 0), ("5t", "5t", 1), ("2t", "t+t", 1), ("2 t", "2", 0), ("2m", "2o", 0), ("5xy", "5", 0), ("5", "5xy", 0), ("5ab", "5", 0), ("x^2 h", "x^2", 0), ("(a+b)c", "a+b", 0), ("3by", "3", 0), ("2st", "2", 0), ("4th", "4h", 0)],
"words": [
 ("listen", "silent", 0), ("ABCD", "DCBA", 0), (r"\text{June 20}", "June 20", 1), ("June 20", r"\text{June 20}", 1), (r"\text{June 20}", r"\text{June 21}", 0), ("June 20", "20", 0), (r"\text{Evelyn}", "Evelyn", 1), (r"\text{Evelyn}", r"\mathrm{evelyn}", 1), (r"\textbf{Evelyn}", "Evelyn", 1), (r"\text{(B)}", "B", 1), ("B", r"\text{(B)}", 1), (r"\text{(B)}", r"\textbf{B}", 1), (r"\text{(B)}", "C", 0), ("xy", "yx", 1), ("pi", r"\pi", 1), (r"\pi", "pi", 1), ("2pi", r"2\pi", 1),
 ("ab", "ba", 1), (r"\text{no}", "on", 0), ("No solution", r"\text{no solution}", 1), ("even", r"\text{even}", 1), ("even", "odd", 0), (r"\text{east}", r"\text{seat}", 0), (r"\text{north}", r"\text{north}\text{ east}", 0), (r"\text{odd}", r"\text{odd} \quad \text{even}", 0), (r"\text{New York}", r"\text{New}\ \text{York}", 1), ("Tuesday", "Thursday", 0), ("Tom and Jerry", r"\text{Tom and Jerry}", 1), (r"\text{yes}", r"\text{Yes}", 1), ("ellipse", r"\text{ellipse}", 1), ("ellipse", r"\text{Ellipse}", 1), ("north", "thorn", 0), (r"\text{A}", "A", 1), ("16 June", "June 16", 0), (r"\text{New York}", r"\mathrm{New\ York}", 1),
 (r"\text{Monday}", r"\text{Monday}.", 1), (r"\angle ABC", r"\angle CAB", 0), ("EFG", "GFE", 0), ("2xyz", "2zyx", 1), ("abc+1", "1+bca", 1), (r"3\mathrm{i}", "3i", 1), (r"\mathrm{e}^2", "e^2", 1), (r"\sin x", "sin x", 1), ("cos(x)", r"\cos x", 1), (r"\text{Friday}", "5", 0), (r"\text{five}", "5", 0), (r"-\text{five}", r"\text{five}", 0), (r"\text{true}", r"\boldsymbol{\text{true}}", 1), (r"\text{Cat}", r"\text{Act}", 0), (r"\textit{listen}", r"\mathit{silent}", 0), (r"\mathbf{Yes}", r"\mbox{yes}", 1)],
"unicode": [
 (r"10-2\sqrt5", "10-2√5", 1), ("10-2√5", r"10-2\sqrt{5}", 1), ("-3", "−3", 1), ("−3", "-3", 1), (r"2\pi", "2π", 1), ("2π", r"2\pi", 1), ("35", "5×7", 1), ("90", "90°", 1), (r"90^\circ", "90°", 1), ("x^2", "x²", 1), ("x²+1", "x^2+1", 1), (r"\frac12", "½", 1), (r"2\frac12", "2½", 1), (r"x\le 3", "x≤3", 1), (r"(-\infty, 3)", "(−∞, 3)", 1), (r"[1,2]\cup[3,4]", "[1,2]∪[3,4]", 1), (r"6", "2·3", 1), (r"2", "6÷3", 1), (r"\sqrt{13}", "√13", 1), (r"\frac{\sqrt2}{2}", "√2/2", 1),
 ("12", "１２", 1), ("12", "12\u00a0", 1), ("1000", "1\u202f000", 1), ("x^2", "x2", 0), ("x²", "x2", 0), ("2", "√2", 0), ("-3", "–3", 1), ("x^{10}", "x¹⁰", 1), (r"a_1", "a₁", 1), (r"\sqrt{x+1}", "√(x+1)", 1), (r"\alpha+1", "α+1", 1), (r"\theta", "θ", 1), (r"2\pm\sqrt3", "2±√3", 1), (r"\sqrt[3]{2}", "∛2", 1), ("5", "5\u200b", 1), (r"x \in [1,2]", "x∈[1,2]", 1), (r"x\ge 3", "x≥3", 1), ("x≥3", "x>3", 0), (r"x^{-1}", "x⁻¹", 1), (r"3\frac14", "3¼", 1), (r"\pi r^2", "πr²", 1), ("2^{10}", "2¹⁰", 1)],
"relations": [
 ("5", "x=5", 1), ("x=5", "5", 1), ("24", r"4!=24", 1), ("24", r"6\cdot4=24", 1), ("12", "2x=12", 0), ("5", r"x/2=5", 0), ("5", "0=5", 0), ("5", "x+y=5", 0), ("x=5", "y=5", 0), ("x=5", "x=1=2=5", 0), ("y=2x+3", "y=3+2x=2x+3", 1), ("y=2x+3", "y=7=2x+3", 0), (r"\theta=5", r"\theta=4=5", 0), ("18", r"x = 3+15 = 18", 1), ("2x+1", "f(x)=2x+1", 1), ("y=2x+1", "2x+1", 1), ("18", r"\text{Area}=18", 1), ("18", "AB = 18", 1), ("x>3", r"x\ge 3", 0), ("x<3", "x<4", 0), ("x<3", "3>x", 1), (r"\pm 2", "2", 0), ("2", r"\pm2", 0), ("5", "5, 6", 0), ("x=1,x=2", "1,2", 1), ("1,2", "x=1 \\text{ or } x=2", 1), ("x^2=4", "x=2", 0),
 ("52_8", "52_9", 0), ("3:4", "3:5", 0), ("3:4", "4:3", 0), ("3:4", "3:4", 1), ("5", "5!", 0), ("5", "5 - x", 0), ("5", "5x", 0), ("34", "3,4", 0), ("1000", r"1\,000", 1), (r"20000\pi", r"20{,}000\pi", 1), (r"\frac{20000}{3}", r"\frac{20,000}{3}", 1), ("(1000,2000)", r"(1,\!000, 2,\!000)", 1), ("x=1000", "x=1,000", 1), ("0, 1", "x=1,000", 0), ("1100", r"\{1,100\}", 0), ("0.51", "0.5,100", 0), ("x^{2100}", r"x^2\,100", 0), (r"\sqrt{2100}", r"\sqrt2,100", 0), (r"\sqrt2, 100", r"100,\sqrt2", 1), (r"\sqrt2,100", r"100,\sqrt2", 1), ("(3,2.5)", r"(3,2\frac12)", 1), ("(3,1)", r"(3,2\frac12)", 0), ("-2.5", r"-2\frac12", 1), ("(1,100)", "(1100)", 0), ("1000", "1 000", 1), ("1,000", "1000", 1), ("1,2", "12", 0), ("18", "**18**", 1), ("18", r"\text{18}", 1),
 ("18", r"\textbf{18}", 1), ("18", "{18}", 1), ("18", "18.", 1), ("-5", "- 5", 1), ("460", "£460", 1), ("460", "€460", 1), (r"\$460", "£460", 0), ("5", "5 million", 0), ("7", "7 or 8", 0), ("8", "7 or 8", 0), ("78", "7 or 8", 0), ("7800", "7 or 800", 0), ("10:30", "10:45", 0),
 ("(15,-29)", "[15,-29]", 0), ("[15,-29]", "(15,-29)", 0), ("(1,-16,4)", "[1,-16,4]", 1), ("-2,1", "-2<x<1", 0), ("-2<x<1", "-2,1", 0), ("(-2,1)", "-2<x<1", 1), ("-2<x<1", "(-2,1)", 1), (r"\{1,2\}", "1<x<2", 0), (r"(1,2]", r"1<x\le2", 1), (r"1,2", r"1\le x\le2", 0), ("5", r"6\equiv5", 0), (r"x\equiv3\pmod7", r"x \equiv 3 \pmod{7}", 1), (r"(5,\infty)", r"(5,\infty]", 0), (r"(-\infty,5]", r"[-\infty,5]", 0), (r"(5,\infty)", "x>5", 1), (r"x<-2,x>3", r"x>3 \text{ or } x<-2", 1), ("36", r"US\$36", 1), (r"\$36", "US$36", 1), ("36", r"36\text{ US dollars}", 1), ("B", r"\text{Option B}", 1), (r"\text{(B)}", "Option B", 1), ("B", "Option C", 0), ("18", r"19 or \boxed{18}", 0), ("18", r"-\boxed{18}", 0), ("18", r"2\boxed{18}", 0), ("18", r"x\boxed{18}", 0), ("18", r"not \boxed{18}", 0), ("18", r"The answer is \boxed{18}", 1), ("18", r"\boxed{18}", 1), ("(15,-29)", "y=15, x=-29", 0), ("(15,-29)", r"y=-29\text{ and }x=15", 1), ("(15,-29)", "(y,x)=(15,-29)", 0), ("x=2,y=3", "x=3,y=2", 0), ("x=2,y=3", "y=3, x=2", 1), ("a=2,b=3", "b=3,a=2", 1), ("A=2,B=3", "A=3,B=2", 0), ("5", "a=5,b=5", 0), ("x=1,y=2,z=3", "x=3,y=2,z=1", 0), ("(1,2,3)", "x=1,y=2,z=3", 1), ("36", r"36\text{k}", 0), ("5", r"5\mathbf{j}", 0), ("5", r"5\text{ L}", 1), ("5", r"12 \mod 7", 0), ("(2,-2)", r"\pm2", 0), ("2,-2", r"\pm2", 1), (r"(1,\pm2)", r"(1,\pm2)", 1), (r"(-\infty,\infty)", r"\text{all real numbers}", 1), (r"f(x)=\frac12x", r"f(x)=\frac{x}{2}", 1), ("(x,y)=(0.5,3)", r"(x,y)=(\frac12,3)", 1), ("52_8", "(52)_8", 1)],
"exact": [
 (r"1-\frac{1}{2^{200}}", "1", 0), ("i^3", "i", 0), ("(1+i)^2", "2i", 1), (r"\frac1i", "-i", 1), (r"e^{i\pi}", "-1", 1), (r"-1+i\sqrt3", r"-1-i\sqrt3", 0), ("|x-3|", "3-x", 0), ("|x-3|", "|3-x|", 1), (r"\sin 2x", r"2\sin x\cos x", 1), (r"\infty", r"-\infty", 0),
 (r"6.02\times10^{23}", "6.03e23", 0), (r"6.02\times10^{23}", "602000000000000000000000", 1), ("1500", "1.5e3", 1), ("0.002", "2e-3", 1), (r"0.1\overline{6}", r"\frac16", 1), (r"0.\overline{36}", "0.36", 0), (r"\frac59", r"0.\bar{5}", 1), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\overrightarrow{AB}=\begin{pmatrix}1\\2\end{pmatrix}", 1), ("2 3/4", "2.75", 1), ("2 3/4", r"\frac64", 0), (r"\cos 60^\circ", "0.5", 1), (r"\cos 60^\circ", "60", 0), ("0.0", "0", 1),
 *((reference, said, score) for said, right, added in (("2(3)", "6", "5"), (r"3\binom{4}{2}", "18", "9"), (r"\binom{4}{1}\binom{5}{1}", "20", "9"), (r"\binom{4}{2}\frac12", "3", "6.5"), (r"(2(\frac12),1)", "(1,1)", "(2.5,1)")) for reference, score in ((right, 1), (added, 0))),
 ("A+1", "a+1", 0), ("A+1", "1+A", 1), (r"\frac{1}{a-b}", r"-\frac{1}{b-a}", 1), ("a+b", r"\frac{a^2-b^2}{a-b}", 1), (r"\frac{a}{a-b}", r"\frac{b}{a-b}", 0), (r"\frac{dy}{dx}", r"\frac{dx}{dy}", 0), ("5", "5_{-1}", 0)],
"order": [
 *((together, said, 0) for together, said in (("2100", "x=2, y=100"), ("2100", "2,x=100"), ("2100500", "x=2,y=100,z=500"), (r"(-\sqrt3,\sqrt3)", r"\pm\sqrt3"), ("(-2,2)", r"x=\pm2"))), ("2, 100", "x=2, x=100", 1), ("(2,100)", r"x=2, y=100", 1), ("2, 100", r"x = 2 \text{ or } x = 100", 1),
 ("1,2", "(2,1)", 0), (r"\{1,2\}", "(1,2)", 0), ("(1,2)", r"\{1,2\}", 0), (r"\{(1,2),(3,4)\}", "(3,4), (1,2)", 1), ("(x,y)=(1,2)", "(1,2)", 1), (r"(3,\frac{\pi}{2})", r"(r,\theta)=(3,\frac{\pi}{2})", 1), ("(1,2)", "(x,y)=(2,1)", 0), ("1:2:3", "1:3:2", 0), ("2:40", "1:20", 0), ("3:4", "6:8", 1), ("1/2/3", "1/3/2", 0), (r"10{:}30", "10:30", 1), ("(1;2)", "(1,2)", 1),
 ("x>3", r"(3,\infty)", 1), (r"(3,\infty)", r"x\ge3", 0), (r"\emptyset", r"\varnothing", 1), (r"\begin{pmatrix}2\\4\end{pmatrix}", r"2\begin{pmatrix}1\\2\end{pmatrix}", 1), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\left[\begin{array}{c}1\\[2pt]2\end{array}\right]", 1)],
"left out": [
 *((r"\frac{14}{3}", said, 0) for said in (r"\frac12\to\frac{14}{3}", r"x\mapsto\frac{14}{3}", r"x<1\lor x>\frac{14}{3}", r"\max\{\frac{14}{3},9\}", r"\frac{14}{3}\bmod 3", r"10\equiv\frac{14}{3}\pmod 7", r"2**\frac{14}{3}")), ("1, 2", r"\deg [1, 2] x", 0), ("12", r"12\text{ times}", 1), ("12", r"12\text{ times }2", 0),
 ("6", "1 2 3", 0), ("3", r"1 \quad 2", 0), (r"\log_2 3", r"\log_{2} 3", 1), (r"\sin^2 2x", r"1-\cos^2 2x", 1), ("0", "x=", 0), ("0", r"^\circ", 0), ("11", "11_2", 0), ("11_2", "11", 1), ("1.5", "<1.5", 0), (r"\frac32", r"\frac32\cup", 0), ("1.5", r"\frac32-", 0), ("-5", "-05", 1), ("18", r"18\ldots", 0), ("3.14", "3.14...", 0), (r"1,2,\ldots,9", r"1,2,\ldots,8", 0), ("f'(x)", "f(x)", 0), ("2k", "2k'", 0), ("C", "C'", 0), (r"\text{3 only}", "3", 0), ("5", r"5\text{ is wrong}", 0), ("no", "on", 0), ("IV", "VI", 0), ("6'2\"", "6'3\"", 0), ("x+1", r"\color{red}{x+1},", 1), ("18", r"\textcolor{red}{18};", 1), ("18", r"\bf 18", 1)],
"names and units": [
 ("30", r"m\angle ABC=30^\circ", 1), ("3", r"\lambda=3", 1), ("3", r"\lambda=4", 0), ("5", r"|AB|=5", 1), ("5", r"\log x=5", 0), ("5", r"\text{The answer is }\$5", 1), ("5", r"\text{The answer is not }5", 0), ("A is 5", "B is 5", 0), (r"\text{A is odd}", r"\text{B is odd}", 0), (r"\text{Mr. Lee}", "Mr Lee", 1),
 ("15", r"15\,\text{kg}\cdot\text{m}^2", 1), ("9.8", r"9.8\text{ m}\,\text{s}^{-2}", 1), (r"9.8\text{ m s}^{-2}", r"9.8\text{ m s}^{-1}", 0), (r"5\text{ cm}", r"5\text{ centimeters}", 1), (r"5\text{ m}", r"5\text{ miles}", 0), (r"2\text{ ft}^2", r"2\text{ square feet}", 1), (r"2\text{ ft}^2", r"2\text{ cubic feet}", 0), ("₹500", "500", 1)],
"forms": [  # where a pair is not symmetric both orders stand here
 *((r"\frac{-1\pm\sqrt5}{2}", answer, 1) for answer in (r"\frac{-1 \pm \sqrt{5}}{2}", r"\frac{-1+\sqrt5}{2},\frac{-1-\sqrt5}{2}", r"-\frac12\pm\frac{\sqrt5}{2}")), (r"1\pm\sqrt{19}", r"\frac{2\pm2\sqrt{19}}2", 1), (r"1\pm\sqrt{19}", r"\frac{2\pm2\sqrt{18}}2", 0), (r"\frac{-1\pm\sqrt5}{2}", r"\frac{-1+\sqrt5}{2}", 0),
 (r"\frac{\pi}{2}", r"\frac\pi2", 1), (r"(3,\frac{\pi}{2})", r"(3,\frac\pi{2})", 1), (r"\frac{x}{y}", r"\frac x y", 1), (r"\frac{x}{y}", r"\frac y x", 0), (r"\frac{x-1}{2}", r"f^{-1}(x)=\frac{x-1}{2}", 1), ("5", "f(-2)=5", 1), ("5", "f^{-1}(3)=5", 1), (r"90^\circ", r"90\degree", 1), (r"90^\circ", r"90^{\degree}", 1), (r"\frac12", r"\sin 30\degree", 1), ("5", "x^{-1}=5", 0), ("5", "f_1(x)=5", 1), (r"10\text{ pairs}", "10", 1), ("(6,31,-1)", r"\big(6,31,-1\big)", 1),
 *((reference, answer, 1) for reference, answer in [
  (r"\frac12", r"\dfrac{1}{2}"), (r"\frac12", "0.5"), ("0.5", r"\dfrac{1}{2}"), (r"\frac12", "1/2"), (r"\frac12", r"\tfrac 12"), (r"-\frac12", r"\frac{-1}{2}"), (r"1\frac12", "1.5"),
  ("(1, 2)", "(1,2)"), ("(1,2)", r"\left(1,2\right)"), ("1,2", "2,1"), ("1,2", r"\{1,2\}"), ("1,2", "1 and 2"), (r"\pm 2", "2,-2"), (r"90^\circ", r"90^{\circ}"), ("90", r"90\text{ degrees}"),
  ("x=5", "x = 5"), ("1,2", "x=1,x=2"), ("y=2x+1", "2x-y+1=0"), (r"\text{B}", "B"), ("B", r"\text{B}"), (r"\text{(B)}", r"\text{B}"), ("B", "b"), ("10", r"10\%"), (r"10\%", "10%"), (r"\$10", "10"),
  ("1000", "1,000"), ("1000", "1{,}000"), ("1000", r"1,\!000"), ("1000", "10^3"), ("104", "104."), ("25", "025"), ("025", "n = 25"), ("25", "25.0"), ("25", r"\text{25}"), ("25", r"\boxed{25}"), ("25", "$25$"), (r"5\text{ cm}", "5"),
  ("5", r"5\text{ cm}^2"), ("3x+2", "2+3x"), ("(x+1)^2", "x^2+2x+1"), (r"\sqrt{8}", r"2\sqrt2"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"), ("2^{2005}", r"2\cdot 2^{2004}"), ("252", r"\binom{10}{5}"), ("120", "5!"),
  ("2", "1+1"), (r"\pi", "3.14159265"), (r"x\in[1,2]", "[1,2]"), (r"1\le x\le 2", "[1,2]"), ("[1,2]", r"1\le x\le 2"), (r"(-\infty,3)", "x<3"), ("4210_{5}", "4210_5"), ("4210_5", "4210"), ("3+4i", "4i+3"),
  (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}")]),
 *((reference, answer, 0) for reference, answer in [
  ("5", "6"), ("5", "-5"), ("5", "5 or 6"), ("5", "five"), ("5", ""), ("25", "25.4"), (r"\frac13", "0.333"), (r"\pi", "3.14159"), ("(1,2)", "(2,1)"), ("[1,2)", "[1,2]"), ("[1,2]", "(1,2)"), ("x^2", "y^2"), ("B", "C"),
  (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), ("[1,2]", r"1\le x < 2"), (r"(-\infty,3)", r"x\le 3"), (r"(-\infty,3)", "x>3")])],
}
NUMBERS = {"right": ["18", r"\text{18}", r"\textbf{18}", r"18\text{ cm}^2", r"18\text{ cm}^{2}", "18 cm", "18 cm²", "£18", "€18", r"\$18", "$18$", "$18", "**18**", "+18", "x = 18", "x=18", r"\boxed{18}", "18.", "18.00", "18.0", "018",
  "18 apples", "18 dollars per day", r"18\text{ dollars}", r"18\%", "18%", "18°", r"18^\circ", r"18^{\circ}", "１８", "18\u00a0", "{18}", r"\mathrm{18}", r"\mathbf{18}", "18 m²", "18cm", r"\text{18 cm}", r"18\,\text{cm}", r"18\ \text{cm}", "18 km/h", r"18\text{ km/h}",
  r"$\boxed{18}$", "**18** dollars", r"\(18\)", "18 €", "18€", r"\$18.00", "y = 18", r"\text{Total} = 18", "18 square feet", r"\mathrm{18~cm}", "$18.", "USD 18", "18 USD", "*18*", r"\textbf{18}.", "AB = 18", r"\text{\$18}", "£18.00", "18 percent", "18 times", "18 more", "18 teenagers", "18 dollars for two weeks", "f(-2)=18",
  "(18)", "18,", r"\color{red}{18}", r"\lambda = 18", "Answer: 18", "The answer is $18.", "x = £18", r"18\,\text{kg}\cdot\text{m}^2", "₹18", "18¢", r"18\text{ m s}^{-1}", "US$18", "18 US dollars", "18 two-dollar bills", r"The answer is \boxed{18}", "18 months", "18 milliliters", "18 counties"],
"wrong": ["x^{-1}=18", "(12)=18", "18 tens", "18 below zero", "x=18, y=100", "18x", "18!", "18 - x", r"18\pi", "18 million", "1,8", "18 or 19", "18 or 7", "7 or 18", "18/4", "18.5", "-18", "", "eighteen", "x18", "18 + 2", "18^2", "18^{2}", "18 thousand", "18, 19", "1 8", "18:30", "18e3", "2x = 18", "18\\sqrt{2}", "18/1.5", "not 18",
  "18 \\times 2", "18×2", "18√2", "18π", "18²", "1.8.0", "18..5", "18 and 19", "18 to 20", "18-20", "18 hundred", "18 dozen", "18i", "18 x", "18xy", "18 y", "18 squared", "18 and a half", "18%x", "18 = x", r"\frac{18}{5}", "(18, 3)", "18 hours 30 minutes", r"18\text{ hours }30\text{ minutes}", "10100_2", "18_{9}", "18 billion", "18k", "180", "0.18", "18,0", "18½", "18 ½", "18 1/2", "18,00", "18\\cdot 2", ">18", "x > 18", "18n", "18 per 2 days", "x+18", "18+", "18*2", "18 times 2", "18 less than x", "18 choose 2",
  "18 factorial", "18 tenths", "18 nonillion", "18 lakh", "18 point three", "18 apples but not", "18...", r"18\ldots", "18 is wrong", "10 is 18", "it is not 18", "(18, 3)", "(18)^2", r"18\cdot\text{m}3", "18 five", "18 double", "18 twice", "18 dollars fifty cents", "18 feet six inches", "18 twenty", "18 sixteenths", "18 mil", "The answer is not: 18", r"\boxed{19} or \boxed{18}"],
}
THOUGHTS = [  # grader, reference, text, score
 ("number", "5", "<think>#### 5", 0), ("number", "5", "<think>\nso #### 5", 0), ("number", "5", "<think>#### 4</think>#### 5", 1), ("number", "5", "<think>#### 5</think>#### 4", 0),
 ("boxed-number", "5", r"<think>\boxed{5}", 0), ("boxed-number", "5", r"<think>\boxed{4}</think>\boxed{5}", 1), ("boxed-number", "5", r"<think>\boxed{5}</think>\boxed{4}", 0), ("boxed-math", "5", r"<think>\boxed{5}", 0), ("boxed-math", r"\frac12", r"<think>\boxed{\frac12}", 0),
 ("boxed-math", "5", r"<think>\boxed{4}</think>\boxed{5}", 1), ("boxed-math", "5", r"a</think><think>\boxed{5}", 0), ("boxed-math", "5", r"\boxed{5}<think>sure?", 1), ("boxed-math", "5", r"\boxed{4}<think>\boxed{5}", 0), ("tagged-number", "5", "<think><answer>5</answer>", 0), ("tagged-number", "5", "<think>the <answer> goes last</think><answer>5</answer>", 1),
 ("tagged-number", "5", "<think><answer>5</answer></think>", 0), ("tagged-number", "5", "<think>a</think><answer>5</answer>", 1), ("exact", "5", "<think>5", 0), ("exact", "5", "<think>a</think>5", 1), ("exact", "-5", "−5", 1), ("exact", "18", " 18", 0), ("exact", "18", "18.0", 0), ("exact", "18", "", 0), ("exact", "18", "１８", 1), ("boxed-number", "5", r"<think>\boxed{5}</think>The answer is 5.", 1),
]


@pytest.mark.parametrize("kind", BOXED)
def test_boxed_math(kind):
    grade, wrong = GRADERS["boxed-math"], []
    for reference, answer, score in BOXED[kind]:
        if grade(reference, boxed(answer)) != score or grade(rf"As $\boxed{{3}}$, \boxed{{{reference}}}", boxed("7") + boxed(answer)) != score:
            wrong.append((reference, answer))
    assert wrong == []


@pytest.mark.parametrize("name, form", [("number", "7\n#### {}"), ("boxed-number", r"so \boxed{{{}}}."), ("tagged-number", "<answer>{}</answer>")])
def test_numbers(name, form):
    for reference in ("18", "9 + 9 = <<9+9=18>>18\n#### 18", r"so $\boxed{\$18}$", "18.0"):
        for said, score in (("right", 1), ("wrong", 0)):
            assert [text for text in NUMBERS[said] if GRADERS[name](reference, form.format(text)) != score] == []


@pytest.mark.parametrize("name, reference, text, score", THOUGHTS)
def test_thoughts(name, reference, text, score):
    assert GRADERS[name](reference, text) == score


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
    same_math.timeouts = 0
    for row, after in zip(test, test[1:] + test[:1]):
        for reference in (row["answer"], row["solution"]):
            assert grade(reference, boxed(row["answer"])) == grade(reference, row["solution"]) == 1, row
        assert grade(row["answer"], boxed(after["answer"])) == (row["answer"] == after["answer"] or row["answer"] == "5" and after["answer"] == "x=5"), row
    assert same_math.timeouts == 0


def test_what_stands_in_a_box_or_an_answer():
    assert last_box(r"\boxed{\left\{ x \right.} \boxed{a \} b}") == r"a \} b"
    assert last_box(r"\boxed{\begin{pmatrix} 1 \\{2} \end{pmatrix}}") == r"\begin{pmatrix} 1 \\{2} \end{pmatrix}"
    assert last_box(r"\boxed{\frac{1}{2} + \boxed{3}}") == r"\frac{1}{2} + \boxed{3}"
    assert last_answer("<answer> a\nb </answer>") == " a\nb "


# Hostile text

PIECES = ["\\boxed{", "\\boxed", "{", "}", "\\", "\\\\", "\\{", "####", " ", "\n", "<think>", "</think>", "<answer>", "</answer>", "1",
          "5", ".", ",", "-", "$", "^", "!", "\\frac", "\\text{", "x", "=", "%", "(", ")", "|", "\u00b2", "\ud800", "\0", "\u0663"]
HOSTILE = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


@pytest.mark.parametrize("name", sorted(GRADERS))
@settings(max_examples=40, deadline=None)
@given(HOSTILE, HOSTILE)
def test_any_text_is_graded(name, reference, text):
    for right, said in ((reference, text), ("5", text), ("5", boxed(text)), ("5", f"<answer>{text}</answer>"), (reference, reference)):
        assert GRADERS[name](right, said) in (0.0, 1.0)
    if not GRADERS[name].reads(reference):
        assert GRADERS[name](reference, text) == 0


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.text("ab ", max_size=4), lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}")),
       st.text("ab \\$}", max_size=6), st.text("ab ", max_size=6))
def test_a_balanced_box_is_found(inside, before, after):
    assert last_box(rf"{before} \boxed{{{inside}}}{after}") == inside


@pytest.mark.parametrize("latex", [
    HANGS, "9^{9^9}", r"(9^9)^{9^{9}}", "2^{100000}", "((9^{99})^{99})^{99}", "99999!", "9!!!!", "((9!)!)!", r"\binom{99999}{50000}",
    r"\sum_{n=1}^{9} n", r"\prod_{k=1}^{n} k", r"\int_0^1 x dx", r"\lim_{x \to 0} x", "(x+y+z)^{100}", "(((((((1)))))))", "x" * 201,
    "|" * 6, r"\sin" * 5, "9^9^9^9" + "^9" * 9, "", "x^", "2^{2^{x}}", r"\exp(\exp(\exp(99)))", r"e^{\exp(99)}",
])
def test_what_is_refused(latex):
    assert expression(latex) is None
    assert not GRADERS["boxed-math"].reads(rf"\boxed{{{latex}}}") and GRADERS["boxed-math"]("5", boxed(latex)) == 0


@pytest.mark.parametrize("latex", [
    "864 \\mbox{ inches}^2", r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]", "x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + x^2 + x + 1",
    "2^{2005}", r"\left(\frac{2}{3}\right)^{10}", r"\frac{10!}{3!7!}", r"\binom{10}{5}", r"e^{\frac{\pi i}{3}}", r"|x-1|+|x+1|",
    r"\sin^2 x", r"1,\!000,\!000", r"(x-1)^2(x+2)^3", r"90^{\circ}", r"\sqrt{2+\sqrt{2+\sqrt{2}}}", "(-\\infty, 2) \\cup (3, \\infty)",
])
def test_what_is_not_refused(latex):
    assert expression(latex)


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
    text, asked = HOSTILE_10K[what], same_value.cache_info().misses
    for wrapped in (text, text * 10, boxed(text), f"<answer>{text}</answer>", f"#### {text}"):
        for name, grader in GRADERS.items():
            start = time.process_time()
            assert grader("5", wrapped) == 0 and grader(wrapped, "5") == 0
            assert time.process_time() - start < 10, name   # what is quadratic takes minutes
    assert same_value.cache_info().misses == asked


def test_small_hostile_expressions_are_quick():
    """What expression() lets pass and yet looks heavy is judged, by what it is and not by the clock."""
    same_math("1/2", "0.5")
    same_math.timeouts = 0
    for latex in ("(x+1)^{20}", "(x+y)^4(z+w)^5", "(9^{9999})^{20}", "(((((1)))))", "7" * 200, "1+" * 99 + "1", "(1+x)" * 40,
                  r"\sqrt{" + "7" * 190 + "}", r"\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11}", "999!/998!", r"\binom{999}{500}",
                  r"\frac{1}{1+\frac{1}{1+\frac{1}{1+x}}}", r"\frac{1}{0}", "1e9999999999", r"\sqrt[0.001]{9}", "=".join("x" * 50)):
        assert expression(latex) and not same_math(r"\frac{\sqrt{2}}{7}", latex), latex
    assert same_math.timeouts == 0


# The server


def test_a_hanging_expression_scores_nothing_is_counted_and_harms_no_other(fresh):
    assert same_math(r"\frac12", "0.5")
    first = math_server()
    assert not same_math("5", HANGS)
    assert same_math.timeouts == 1 and first.returncode == -signal.SIGPROF      # ended, and no zombie
    assert same_math(r"\frac13", r"\frac{2}{6}") and not same_math("5", "6+x")
    assert same_math.timeouts == 1 and math_server() is not first


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


GROUP = f"""
import os, signal, time
import chat_rl
from chat_rl import *
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
assert same_math("5", "10-5")
idle = math_server().pid
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    os.killpg(0, number)
    time.sleep(0.1)
assert same_math("5", "7-2") and math_server().pid == idle
chat_rl.SERVER = SERVER.replace("ITIMER_PROF, 5)", "ITIMER_PROF, 1)")
busy = math_server.__wrapped__()
print(json.dumps(["5", {HANGS!r}]), file=busy.stdin, flush=True)
print(idle, busy.pid, flush=True)
time.sleep(60)
"""


def test_signals_to_the_group_do_not_reach_the_server_and_it_ends_with_the_run():
    """An idle server ends at once; a busy one when its clock has run out, even if the run was killed."""
    run = subprocess.Popen([sys.executable, "-c", GROUP], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           start_new_session=True)
    idle, busy = map(int, run.stdout.readline().split())
    time.sleep(0.5)
    assert alive(idle) and alive(busy)
    run.kill()
    assert run.communicate()[1] == ""
    wait_for(lambda: not alive(idle), 5, "the idle server's end")
    wait_for(lambda: not alive(busy), 60, "the busy server's end")


def test_an_interrupted_grading_leaves_no_reply_for_another(fresh):
    assert same_math("5+x", "x+5")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        same_value("5", HANGS)
    signal.signal(signal.SIGALRM, before)
    assert same_math("5+z", "z+5") and not same_math("5+z", "z+6") and same_math.timeouts == 0


def test_without_math_verify_one_line_says_what_to_do(fresh, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no ANTLR')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(chat_rl.UserError, match=r"math-verify does not work \(.*no ANTLR.*\): pip install"):
        GRADERS["boxed-math"].reads("5")
