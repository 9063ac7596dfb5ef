r"""Answers that try to be right for many references at once, and references of all shapes to try them on.

`CONSTANTS` are answers as they stand; a reader would call each of them right for the references that `RIGHT` names, and
for nothing else. `HEDGES` are built around the reference, in place of `TRUTH`; a reader would call none of them right.
"""

from __future__ import annotations

import re


def _family(name: str, answers: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, answer.strip()) for answer in answers.split("¦"))


REFERENCES: tuple[str, ...] = tuple(
    answer
    for _, answer in _family(
        "",
        r"""
        0 ¦ 1 ¦ -1 ¦ 2 ¦ 5 ¦ 6 ¦ 7 ¦ 12 ¦ 204 ¦ 1024 ¦ -984 ¦ 3400 ¦ 1,234 ¦ 10000000 ¦ 1000000007 ¦ 4.5e33 ¦
        6.02e23 ¦ 1e-15 ¦ \frac{1}{2} ¦ \frac{1}{3} ¦ -\frac{7}{12} ¦ \dfrac{13}{32} ¦ 3/8 ¦ \frac{1}{576} ¦
        0.006 ¦ 41.8 ¦ 20.39 ¦ 1.6 ¦ -2.75 ¦ .35 ¦ 0.333 ¦ 3.14 ¦ \sqrt{2} ¦ 2\sqrt{3} ¦ \frac{\sqrt{13}}{2} ¦
        1+\sqrt{5} ¦ \sqrt[3]{2} ¦ \frac{1+\sqrt{5}}{2} ¦ \pi ¦ 2\pi ¦ \frac{\pi}{2} ¦ e^{2} ¦ e ¦ \log 2 ¦
        \sin 10^\circ ¦ -\ln 2 ¦ \infty ¦ x ¦ 2x ¦ x+1 ¦ 2n-2 ¦ x^2+x ¦ \frac{1}{2n+2} ¦ p - q ¦ k! ¦ 2^{99} ¦
        2^{n+1}-1 ¦ \binom{9}{3} ¦ (1,2) ¦ (2,1) ¦ \left( 3, \frac{\pi}{2} \right) ¦ (-1, 0.5, 3) ¦
        (1,8,19), (2,7,13) ¦ 1,2 ¦ 2, 3 ¦ [0,1) ¦ (-\infty, 2] ¦ (0,9) \cup (9,36) ¦ \{1,2,3\} ¦ \{5\} ¦
        1 \pm \sqrt{2} ¦ x=5 ¦ y = 2x+3 ¦ x \le 3 ¦ 0 < x < 1 ¦ f(x)=x^2 ¦ \text{Evelyn} ¦ \text{(B)} ¦ C ¦
        \text{Yes} ¦ no ¦ \text{even} ¦ 1 \frac{3}{4} ¦ 5 \text{ cm} ¦ 90^\circ ¦ 25\% ¦ \$32,348 ¦
        12 \text{ hours} ¦ 137 \frac{1}{2} ¦ 2516_8 ¦ 0.\overline{3} ¦ 3+4i ¦ -2i ¦
        \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix} ¦ np.arcsin(10/13)
        """,
    )
)

CONSTANTS: tuple[tuple[str, str], ...] = (
    *_family(
        "nothing",
        r"""
        $ ¦ $$ ¦ % ¦ \% ¦ {} ¦ \text{} ¦ \text{ cm} ¦ cm ¦ degrees ¦ nan ¦ NaN ¦ ~ ¦ \, ¦ \; ¦ \! ¦ \quad ¦
        \phantom{5} ¦ \phantom{} ¦ \hspace{1cm} ¦ \\ ¦ . ¦ , ¦ () ¦ (,) ¦ [] ¦ \{\} ¦ \emptyset ¦ - ¦ + ¦ = ¦ x= ¦
        ! ¦ ? ¦ ... ¦ \ldots ¦ None ¦ null ¦ [INVALID] ¦ undefined
        """,
    ),
    *_family(
        "huge and tiny floats",
        r"""
        1e400 ¦ -1e400 ¦ 1e-400 ¦ 1e308 ¦ 1.e308 ¦ 1e308*10 ¦ 1e-308 ¦ 5e-324 ¦ 1.e30 ¦ 1e30 ¦ 1.e30-1.e30 ¦
        1e300*1e-300+1e16-1e16 ¦ 1.e30+1.e30 ¦ 10.**30 ¦ 10.0**300 ¦ (1.e30) ¦ 1.e30*x ¦ 0*1.e300 ¦
        1.e-300*1.e-300 ¦ 1.e30/1.e30 ¦ 1e16+0.5 ¦ 3e-13+x ¦ 1.e30+x-1.e30 ¦ -1.e30 ¦ 10**30 ¦ 10**300 ¦ 9.9**99 ¦
        1.e200*1.e200 ¦ 1.e15 ¦ 1.e14 ¦ 1.e13 ¦ 1.e12 ¦ 1.e11
        """,
    ),
    *_family(
        "a bracket closed and opened",
        r"""
        1.e30)+(1.e30 ¦ 1.e30)+(-1.e30 ¦ 1.e300)*(1 ¦ 1)+(1 ¦ 0)*(0 ¦ x)*0+(0 ¦ 1.e30)-(1.e30 ¦ 0)**(0 ¦
        1.e30)*(1.e30 ¦ 1)*0*(1 ¦ 5)*(0 ¦ 1.e30)+(1.e30)+(1.e30 ¦ 1.e22)+(1.e22 ¦ x)-(x ¦ 1.e15)+(1.e15 ¦
        1.e400)+(1.e400 ¦ 10.**30)+(10.**30 ¦ 2.5)+0*(1 ¦ 9.**99)+(9.**99 ¦ 0.5)/1.e30+(0.5 ¦ )*0*( ¦ )*(0 ¦
        0)*( ¦ (0 ¦ 0) ¦ )( ¦ ))(( ¦ )*0+(0 ¦ 1/1.e30)*(1.e-30 ¦ .5)+1.e30-(1.e30 ¦ 1.e30\right)+\left(1.e30 ¦
        1.e30]+[1.e30 ¦ 1.e30}+{1.e30 ¦ 1.e30\}+\{1.e30 ¦ 1.e30⟩+⟨1.e30 ¦ (1.e30)+(1.e30 ¦ (0.5,1.e30)+(1.e30) ¦
        (1.e30)+(1.e30,1.e30)+(1.e30) ¦ 1.e30,1.e30 ¦ 0.5)+(0.5
        """,
    ),
    *_family(
        "factorials and powers",
        r"""
        170! ¦ 171! ¦ 100! ¦ (-1)! ¦ (-0.5)! ¦ 5!! ¦ 0.5! ¦ 9**9**9 ¦ 9^9^9 ¦ 2**1023 ¦ 2**-1074 ¦ 99999! ¦
        300!! ¦ (10**8)! ¦ 0**0 ¦ 0^0 ¦ 0**-1 ¦ x**0 ¦ x!/x! ¦ (x-x)! ¦ 99!/98!
        """,
    ),
    *_family(
        "infinities and no numbers",
        r"""
        inf ¦ -inf ¦ Infinity ¦ oo ¦ -oo ¦ zoo ¦ NAN ¦ nan+1 ¦ inf-inf ¦ \infty-\infty ¦ oo-oo ¦ 1/0 ¦ 0/0 ¦
        nan*0 ¦ x/0 ¦ \frac{1}{0} ¦ \frac{0}{0} ¦ \pm\infty ¦ 1/(x-x) ¦ 0*oo ¦ 1.5/0 ¦ inf*0.5 ¦ nan+0.5 ¦
        float('nan') ¦ float('inf') ¦ 1e999-1e999 ¦ ln(0) ¦ \text{nan} ¦ ∞-∞ ¦ log(0)
        """,
    ),
    *_family(
        "free names",
        r"""
        a ¦ t ¦ truth ¦ given ¦ ans ¦ answer ¦ _ ¦ f ¦ n ¦ z ¦ y ¦ q ¦ gt ¦ self ¦ expected ¦ ground_truth ¦
        Symbol('x') ¦ S(1) ¦ S ¦ N ¦ Q ¦ E ¦ I ¦ O ¦ beta ¦ Dummy() ¦ Wild('x') ¦ pi ¦ PI ¦ Pi ¦ \mathrm{x} ¦
        E**x ¦ I*I ¦ e**x ¦ i ¦ j ¦ x' ¦ x_1 ¦ C_1 ¦ Id ¦ EulerGamma ¦ GoldenRatio ¦ true ¦ True ¦ False ¦ 1==1 ¦
        S.Half ¦ Integer(1) ¦ Float('1e400') ¦ zeta(2)
        """,
    ),
    *_family(
        "lists and hedges",
        r"""
        5 or 6 ¦ 5 and 6 ¦ 5, 6 ¦ 5,6,7 ¦ 1,2,3,4,5,6,7,8,9 ¦ (0,1,2,3,4,5,6,7) ¦ \{0,1,2,5,6,7\} ¦
        \{1,2,\ldots\} ¦ 1,2,\ldots,1000 ¦ 5|6 ¦ 5/6/7 ¦ 5;6 ¦ 5 6 ¦ 5\ 6 ¦ 5\text{ or }6 ¦ 5~6 ¦ 5~7 ¦
        5\text{ and }6 ¦ 5\\6 ¦ 5&6 ¦ 5 vs 6 ¦ either 5 or 6 ¦ not 5 ¦ \neg 5 ¦ \neq 5 ¦ -5 or 5 ¦ \pm 5 ¦ \pm 1 ¦
        5 \pm 1 ¦ \approx 5 ¦ ~5 ¦ 5-ish ¦ 5? ¦ >=0 ¦ x\ge 0 ¦ x \in \mathbb{R} ¦ \mathbb{R} ¦ \mathbb{Z} ¦
        (-\infty,\infty) ¦ [0,1000] ¦ [0,1] ¦ (-inf,inf) ¦ any ¦ all ¦ all of them ¦ \text{Yes or no} ¦ yes,no ¦
        yes/no ¦ (A)(B)(C)(D) ¦ ABCD ¦ A,B,C,D ¦ A or B or C ¦ \text{(B) or (C)} ¦ 1 \lor 2 ¦
        \begin{cases}5\\6\end{cases} ¦ [5,6] ¦ (5)(6) ¦ 5(6) ¦ (5 or 6) ¦ 1 or 2 ¦ 1 and 2
        """,
    ),
    *_family(
        "equations and relations",
        r"""
        x=5=6 ¦ x=5=7 ¦ x=5, x=6 ¦ 5=6 ¦ 6=5 ¦ 1=2 ¦ 5=5=5 ¦ x=x ¦ 0=0 ¦ x==x ¦ a<b ¦ 0<x ¦ x<oo ¦ x!=x ¦ x:=5 ¦
        x=6=5 ¦ x=1.e30 ¦ x=y ¦ abc=5 ¦ x>0 ¦ x \neq 3 ¦ 0 < 1 < 2 ¦ x=5 or x=6 ¦ =>5
        """,
    ),
    *_family(
        "units, percent, money",
        r"""
        cm^2 ¦ meter ¦ 5%6 ¦ 5%%6 ¦ %5%6 ¦ $5$6 ¦ \$5\$6 ¦ 5 cm 6 ¦ 5 cm 6 cm ¦ 5 million 6 ¦ million ¦ $million ¦
        day ¦ second ¦ hours ¦ degreees ¦ mcmeterm ¦ 0 million ¦ inch ¦ ^\circ ¦ \circ ¦ ^{\circ}
        """,
    ),
    *_family(
        "digits of other scripts",
        r"""
        ٠٫٥ ¦ ० ¦ ² ¦ ½ ¦ Ⅴ ¦ 𝟙𝟚 ¦ ⑤ ¦ 五 ¦ ٣٤ ¦ 𝟎.𝟑 ¦ １．５ ¦ ¼ ¦ ৫৬
        """,
    ),
    *_family(
        "bases and underscores",
        r"""
        0x5f ¦ 0b11 ¦ 0o77 ¦ 1_0_0 ¦ 1__0 ¦ _1 ¦ 1_ ¦ 0_5.5 ¦ 0x_5 ¦ 1e1_0 ¦ 11_2 ¦ 5_{6} ¦ 1_5
        """,
    ),
    *_family(
        "expressions that cancel",
        r"""
        x-x+9 ¦ 0*x+9 ¦ 0*(x+1) ¦ x/x ¦ x/x*9 ¦ (x-x)*1.e300 ¦ x*0. ¦ 0*y+0.123 ¦ x**0*9 ¦ -(-9) ¦ sqrt(x**2)-x ¦
        0.[0] ¦ 0.[9] ¦ 0.[3]*0 ¦ 0*1.e308*x ¦ sqrt(0*x) ¦ ln(x/x) ¦ 3/7*0+9.25 ¦ 0!*9
        """,
    ),
    *_family(
        "Python",
        r"""
        # ¦ 5#6 ¦ # 1 ¦ lambda: 1 ¦ lambda x: x ¦ ().__class__ ¦ x.is_zero ¦ x.__class__ ¦ [1] ¦ []*9 ¦ (1).real ¦
        1 if 1 else 2 ¦ print(1) ¦ exec('1') ¦ __import__('os') ¦ x;y ¦ x:y ¦ 1;1 ¦ '1' ¦ "1" ¦ b'1' ¦ f'{1}' ¦
        *x ¦ **x ¦ not x ¦ 1 and 2 ¦ x or y ¦ x is x ¦ x in x ¦ (yield) ¦ await x ¦ ~1 ¦ 1<<9 ¦ 9@9 ¦ 9//2 ¦ 9%2 ¦
        1j ¦ 1+1j ¦ ... ¦ (x:=1) ¦ {1:2} ¦ [i for i in [1]] ¦ 0 if x else 0 ¦ x, ¦ 5, ¦ (5,) ¦ ''' ¦ 0)# ¦ 0*(# ¦
        x))# ¦ )# ¦ 0) # ¦ 1.5)*0 # ¦ 0)**1# ¦ x)*0# ¦ 0*1)-(0#
        """,
    ),
    *_family(
        "sympy",
        r"""
        Piecewise((1,True)) ¦ Sum(1,(x,1,oo)) ¦ Integral(x) ¦ Limit(x,x,0) ¦ Eq(1,1) ¦ Ne(1,2) ¦ O(1) ¦
        Rational(1,0) ¦ Symbol('t') ¦ Function('f')(x) ¦ Max(1,2) ¦ Min() ¦ Add() ¦ Mul() ¦ Order(x) ¦ sign(x) ¦
        AccumBounds(-1,1) ¦ Interval(0,1) ¦ FiniteSet(5,6) ¦ S.Reals ¦ DiracDelta(x) ¦ Heaviside(x) ¦
        KroneckerDelta ¦ Derivative(1,x) ¦ simplify(0) ¦ Abs(x) ¦ re(x) ¦ zoo*0 ¦ ComplexInfinity ¦ UniversalSet ¦
        EmptySet ¦ Not(1) ¦ RootOf(x,0) ¦ nan*x ¦ true ¦ bool(1) ¦ factorial(5.5) ¦ Integer() ¦ Float(1.e400) ¦
        Number('1.5') ¦ Float('nan') ¦ Float('inf') ¦ Integer(0)*Float('inf') ¦ Rational(1.5,0.) ¦ Symbol('') ¦
        sqrt() ¦ ln()
        """,
    ),
    *_family(
        "text tricks",
        r"""
        \text{5}\text{6} ¦ \text{5}6 ¦ 5\text{6} ¦ \text{ } ¦ \text{5 or 6} ¦ \text{ 5}\text{ 6} ¦ \mbox{6}5 ¦
        \text{a}\text{b} ¦ \text{}5 6 ¦ \textbf{x=} ¦ \overline{5}6 ¦ \underline{5}\overline{6} ¦ \rlap{5}6 ¦
        \not5 ¦ \cancel{5}6 ¦ \sout{5}6 ¦ \color{white}5 6 ¦ \phantom{5}6 5 ¦ 5\phantom{}6 ¦ 5\def\x{6} ¦ 5%\n6 ¦
        \newcommand{\a}{5}\a ¦ \input{5} ¦ \verb|5|6 ¦ \boxed{5}6 ¦ \boxed{5}\boxed{6} ¦ \tag{5}6 ¦ \sqrt ¦
        \frac ¦ \frac{1} ¦ \frac{}{} ¦ \sqrt{} ¦ \frac{x}{} ¦ \left ¦ \right ¦ \left(\right) ¦ \begin{x} ¦
        \end{x} ¦ \\\\ ¦ \textcolor{red}{5}6 ¦ \underset{5}{6} ¦ \overset{5}{6} ¦ \stackrel{5}{6} ¦ 5^{6} ¦
        5_{7} ¦ {5}_6 ¦ 5^6
        """,
    ),
    *_family(
        "nine decimals near nothing",
        r"""
        0.123456789 ¦ 1e-7 ¦ 1e-8+0 ¦ -1e-8 ¦ 0.0000000001 ¦ 0.00000001 ¦ 1e-10+x-x ¦ 0.99999999*1 ¦ 1e-9+1e-9*x
        """,
    ),
    *(
        ("nothing", a)
        for a in (
            "",
            " ",
            "\\ ",
            "\u200b",
            "\u200b\u200d\ufeff",
            "\xa0",
            "\u2003",
        )
    ),
    *(("lists and hedges", a) for a in ("5\n6",)),
    *(
        ("Python", a)
        for a in (
            "\\\n",
            "5\\\n6",
            '"""',
        )
    ),
    *(("text tricks", a) for a in ("5%\n6",)),
    *(
        ("very long", a)
        for a in ("9" * 999, "5" * 5000, "1+" * 300 + "1", "(" * 300, "x" * 900, "5 or " * 100 + "6")
    ),
)

HEDGES: tuple[tuple[str, str], ...] = (
    *_family(
        "one of several",
        r"""
        TRUTH or 77 ¦ 77 or TRUTH ¦ TRUTH and 77 ¦ TRUTH, 77 ¦ 77, TRUTH ¦ \{TRUTH, 77\} ¦ (TRUTH, 77) ¦
        TRUTH,77,78,79 ¦ TRUTH;77 ¦ TRUTH|77 ¦ TRUTH\\77 ¦ TRUTH\text{ or }77 ¦ 77\text{ or }TRUTH ¦
        TRUTH \lor 77 ¦ TRUTH\text{ cm}\text{ or }77 ¦ \text{77 or TRUTH} ¦ \boxed{77} TRUTH ¦ TRUTH?77 ¦
        TRUTH \neq 77 ¦ TRUTH or TRUTH+1
        """,
    ),
    *_family(
        "several sides",
        r"""
        x=TRUTH=77 ¦ 77=TRUTH=78 ¦ x=TRUTH, x=77 ¦ x=77, x=TRUTH ¦ TRUTH=77 ¦ TRUTH=x=77 ¦ abc77=TRUTH ¦
        TRUTH<77 ¦ 77<TRUTH ¦ TRUTH\le 777777777777 ¦ x<TRUTH<77777777777 ¦ \neq TRUTH ¦ \neg TRUTH ¦ not TRUTH ¦
        \approx TRUTH+1
        """,
    ),
    *_family(
        "something added",
        r"""
        TRUTH+0.001 ¦ TRUTH+1.e-3 ¦ TRUTH+0.000001 ¦ (TRUTH)*1.000001 ¦ TRUTH+77 ¦ 77TRUTH ¦ (TRUTH)+(77) ¦
        TRUTH+x*77 ¦ (TRUTH)-(0.25) ¦ TRUTH)+(77 ¦ TRUTH)*77+(0 ¦ 0.5)+(TRUTH ¦ (TRUTH)*1.e30 ¦ TRUTH+1.e30 ¦
        TRUTH*(x+1)/7 ¦ (TRUTH)**3+0.125
        """,
    ),
)

# What no verifier may pay for, not even the same text.
NOTHING: tuple[str, ...] = (
    "",
    " ",
    "$",
    "$$",
    "%",
    r"\%",
    "{}",
    r"\text{}",
    r"\text{ cm}",
    "cm",
    "degrees",
    "nan",
    "NaN",
)

# What a reader would pay: the constant, and in the spelling of `plain`, the only references it is right for.
RIGHT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pi", "PI", "Pi"), ("pi", "3.14")),
    **dict.fromkeys(("inf", "Infinity", "oo"), ("infty",)),
    "1.e11": ("1e11",),
    "E": ("e", "(E)"),
    "n": ("n",),
    "z": ("z",),
    "f": ("f",),
    r"\mathrm{x}": ("x",),
    "1.e30+x-1.e30": ("x",),
    "x=x": ("x",),
    **dict.fromkeys(("0=0", "०", "0 million"), ("0",)),
    "𝟙𝟚": ("12",),
    "٣٤": ("34",),
    "৫৬": ("56",),
    "0x5f": ("95",),
    "1_0_0": ("100",),
    "1_5": ("15",),
    "１．５": ("1.5", "frac32"),
    "5!!": ("15", "15mboxcm^2"),
    **dict.fromkeys(("(5)(6)", "5(6)"), ("30", "30^circ")),
    **dict.fromkeys(("5^6", "5^{6}"), ("15625",)),
    **dict.fromkeys(("1e-8+0", "0.00000001"), ("1e-8",)),
    **dict.fromkeys(("1.e30-1.e30", "0*1.e300", "1e999-1e999"), ("0",)),
    **dict.fromkeys(("1.e30/1.e30", "1e300*1e-300+1e16-1e16", "~1", "(x:=1)"), ("1",)),
    **dict.fromkeys(("-(-9)", "0!*9"), ("9",)),
    "{1:2}": ("0.5", "frac12"),
    "x,": ("x",),
    **dict.fromkeys(("x:=5", "x==5", "5,", "5=5=5", "abc=5", "~5"), ("5",)),
    **dict.fromkeys(("[1]", "'1'", '"1"', "1==1"), ("1",)),
    **dict.fromkeys(("1 or 2", "1 and 2"), ("1,2",)),
    "0_5.5": ("frac112",),
    r"\boxed{5}\boxed{6}": ("6",),
}


def plain(reference: str) -> str:
    """The reference without its left side, units, dollars, backslashes, braces and spaces."""
    right = re.sub(r"\\text\{ .*?\}|\\text|[\\${}\s]", "", reference.rpartition("=")[2])
    return right.removesuffix(".0")
