"""TinyCode: the embedded problem set, small Python programs with reasoning and tests, from which `tiny` learns.

A problem is a family (a template), an operation for each of its slots (`x > {k}`, `x * {k}`) and their constants.
Held-out problems are set apart by rule (`split_of`), never by luck:

    training(20_000, seed=0)    # rows in OpenCodeReasoning's columns
    benchmark()                 # 600 held-out problems in EvalPlus's format: 300 constants, 300 compositions

The text fixes the behaviour, empty and negative input included: `%` and `//` are Python's, a sum of nothing is 0.
`python -m treediff.data.tinycode` prints three problems.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
import re
import string
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from treediff.errors import UserError

Split = Literal["train", "constants", "composition"]
Constant = int | str | None

INPUTS = 27
"""Test inputs per problem, a third of them EvalPlus's base inputs."""
HALF = 300
"""Held-out problems of each kind in the benchmark."""


class Op(NamedTuple):
    """An operation on `{v}` with a constant `{k}`, in words and in code; `values` is empty if it has no constant."""

    words: str
    code: str
    values: tuple[Any, ...] = ()


_TO_20 = tuple(range(2, 21))  # not 0 and 1: they make `x * k`, `x % k` and sums blind to an operator's change
_FROM_3 = _TO_20[1:]  # `divisible by 2` would be the same code as `even`
_LETTERS = tuple(string.ascii_lowercase)

# The place of an operation in this table decides which pairs are held out (`_held_pair`): new ones go to the end.
OPS: dict[str, Op] = {
    # conditions
    "gt": Op("greater than {k}", "{v} > {k}", _TO_20),
    "ge": Op("at least {k}", "{v} >= {k}", _TO_20),
    "lt": Op("less than {k}", "{v} < {k}", _TO_20),
    "le": Op("at most {k}", "{v} <= {k}", _TO_20),
    "ne": Op("not {k}", "{v} != {k}", _TO_20),
    "div": Op("divisible by {k}", "{v} % {k} == 0", _FROM_3),
    "ndiv": Op("not divisible by {k}", "{v} % {k} != 0", _FROM_3),
    "even": Op("even", "{v} % 2 == 0"),
    "odd": Op("odd", "{v} % 2 == 1"),
    # maps
    "add": Op("{v} plus {k}", "{v} + {k}", _TO_20),
    "sub": Op("{v} minus {k}", "{v} - {k}", _TO_20),
    "mul": Op("{v} times {k}", "{v} * {k}", _TO_20),
    "over": Op("{v} floor-divided by {k}", "{v} // {k}", _TO_20[:9]),
    "square": Op("{v} squared", "{v} * {v}"),
    "neg": Op("minus {v}", "-{v}"),
    "mod": Op("{v} modulo {k}", "{v} % {k}", _TO_20),
    # one step of a loop
    "less": Op("subtract {k} from {v}", "{v} -= {k}", _TO_20),
    "cut": Op("floor-divide {v} by {k}", "{v} //= {k}", _TO_20[:9]),
    "more": Op("add {k} to {v}", "{v} += {k}", _TO_20),
    "scale": Op("multiply {v} by {k}", "{v} *= {k}", _TO_20[:9]),
    "under": Op("less than n", "{v} < n"),
    "upto": Op("at most n", "{v} <= n"),
    # parts and aggregates of nums
    "head": Op("the first {k} nums", "nums[:{k}]", _TO_20),
    "tail": Op("nums after the first {k}", "nums[{k}:]", _TO_20),
    "last": Op("the last {k} nums", "nums[-{k}:]", _TO_20),
    "cutoff": Op("nums before the last {k}", "nums[:-{k}]", _TO_20),
    "total": Op("the sum of nums", "sum(nums)"),
    "size": Op("the length of nums", "len(nums)"),
    "max": Op("the largest of nums and 0", "max([0] + nums)"),
    # characters and words
    "is": Op("'{k}'", '{v} == "{k}"', _LETTERS),
    "isnt": Op("not '{k}'", '{v} != "{k}"', _LETTERS),
    "vowel": Op("in 'aeiou'", '{v} in "aeiou"'),
    "digit": Op("a digit", "{v}.isdigit()"),
    "upper": Op("upper case", "{v}.isupper()"),
    "raise": Op("{v} in upper case", "{v}.upper()"),
    "join": Op("{v} plus '{k}'", '{v} + "{k}"', _LETTERS),
    "repeat": Op("{v} times {k}", "{v} * {k}", _TO_20[:9]),
    # a bare constant
    "const": Op("{k}", "{k}", _TO_20),
}
_PLACE = {name: i for i, name in enumerate(OPS)}

# What a slot may hold. `shift` leaves out `mod`, which changes nothing below its constant (`x % 9 if x < 5 else x`),
# and `plain` also `over`, under which all digits are alike.
_KINDS = """
cond: gt ge lt le ne div ndiv even odd | order: gt ge lt le | high: gt ge | low: lt le | parity: div ndiv even odd
digit: gt ge lt le ne even odd | char: is isnt vowel digit upper | charmap: raise join repeat | const: const
map: add sub mul over square neg mod | shift: add sub mul over square neg | plain: add sub mul square neg
agg: total size max | shrink: less cut | grow: more scale | limit: under upto | slice: head tail last cutoff
"""
KINDS = {kind: tuple(ops.split()) for kind, ops in re.findall(r"(\w+): ([\w ]+)", _KINDS)}

# A family is three lines: name, parameter kind and slots (`slot=kind`, with `:variable` if it is not x, and with
# `:low-high` for fewer constants); the text; the code, its lines parted by ` | `, indented by `>`.
# `{c}` is slot c in words and `{C}` in code.
_TABLE = """
keep nums c=cond
    Return all x in nums that are {c}.
    result = [] | for x in nums: | > if {C}: | >> result.append(x) | return result
drop nums c=cond
    Return nums without all x that are {c}.
    result = [] | for x in nums: | > if {C}: | >> continue | > result.append(x) | return result
map nums m=map
    Return {m} for all x in nums.
    return [{M} for x in nums]
keep_map nums c=cond m=map
    Return {m} for all x in nums that are {c}.
    result = [] | for x in nums: | > if {C}: | >> result.append({M}) | return result
choose nums c=cond m=shift
    For all x in nums return {m} if it is {c}, else x.
    result = [] | for x in nums: | > if {C}: | >> result.append({M}) | > else: | >> result.append(x) | return result
ternary nums c=cond m=map
    For all x in nums return {m} if it is {c}, else 0.
    return [{M} if {C} else 0 for x in nums]
sum nums c=cond
    Return the sum of all x in nums that are {c}.
    total = 0 | for x in nums: | > if {C}: | >> total += x | return total
sum_map nums c=cond m=map
    Return the sum of {m} for all x in nums that are {c}.
    total = 0 | for x in nums: | > if {C}: | >> total += {M} | return total
count nums c=cond
    Return how many x in nums are {c}.
    count = 0 | for x in nums: | > if {C}: | >> count += 1 | return count
either nums c=low:x:2-10 d=high:x:12-20
    Return how many x in nums are {c} or {d}.
    count = 0 | for x in nums: | > if {C} or {D}: | >> count += 1 | return count
between nums c=high:x:2-10 d=low:x:12-20
    Return all x in nums that are {c} and {d}.
    result = [] | for x in nums: | > if {C} and {D}: | >> result.append(x) | return result
any nums c=cond
    Return whether any x in nums is {c}.
    for x in nums: | > if {C}: | >> return True | return False
index nums c=cond
    Return the index of the first x in nums that is {c}, or -1.
    for i, x in enumerate(nums): | > if {C}: | >> return i | return -1
first nums c=cond k=const
    Return the first x in nums that is {c}, or {k}.
    for x in nums: | > if {C}: | >> return x | return {k}
last_map nums c=cond m=map
    Return {m} for the last x in nums that is {c}, or 0.
    result = 0 | for x in nums: | > if {C}: | >> result = {M} | return result
before nums c=cond m=map
    Return the sum of {m} for all x in nums before the first that is {c}.
    total = 0 | for x in nums: | > if {C}: | >> break | > total += {M} | return total
running nums c=cond m=map
    Return the total after each x in nums, adding {m} if x is {c}.
    total = 0 | result = [] | for x in nums: | > if {C}: | >> total += {M} | > result.append(total) | return result
slice nums s=slice m=map
    Return {m} for all x in {s}.
    return [{M} for x in {S}]
balance nums c=order d=parity
    For all x in nums add x if it is {c}, else subtract x if it is {d}; return the total.
    total = 0 | for x in nums: | > if {C}: | >> total += x | > elif {D}: | >> total -= x | return total
score nums c=order d=parity k=const
    For all x in nums add {k} if it is {c}, else 1 if it is {d}; return the total.
    total = 0 | for x in nums: | > if {C}: | >> total += {k} | > elif {D}: | >> total += 1 | return total
blend nums c=order d=parity m=shift
    For all x in nums add {m} if it is {c}, else x if it is {d}; return the total.
    total = 0 | for x in nums: | > if {C}: | >> total += {M} | > elif {D}: | >> total += x | return total
stop nums c=order d=parity k=const
    Return {k} once an x in nums is {c}, or x once it is {d}, else 0.
    for x in nums: | > if {C}: | >> return {k} | > elif {D}: | >> return x | return 0
largest nums c=parity k=const
    Return the largest of {k} and all x in nums that are {c}.
    best = {k} | for x in nums: | > if {C}: | >> best = max(best, x) | return best
places nums c=cond:i
    Return all x in nums whose index is {c}.
    result = [] | for i, x in enumerate(nums): | > if {C}: | >> result.append(x) | return result
clamp nums j=const:x:2-10 k=const:x:12-20
    Return all x in nums limited to {j} to {k}.
    return [max({j}, min(x, {k})) for x in nums]
agg nums a=agg c=order m=shift
    Let x be {a}; return {m} if x is {c}, else x.
    x = {A} | if {C}: | > return {M} | return x
lead_count nums c=cond:nums[i]
    Return how many nums at the start are {c}.
    i = 0 | while i < len(nums) and {C}: | > i += 1 | return i
trim nums c=cond:nums[-1]
    Return nums without those at the end that are {c}.
    while nums and {C}: | > nums = nums[:-1] | return nums
steps n c=high:n s=shrink:n
    While n is {c}, {s}; count steps.
    count = 0 | while {C}: | > {S} | > count += 1 | return count
trail n c=high:n s=shrink:n
    While n is {c}, list n and {s}; return the list.
    result = [] | while {C}: | > result.append(n) | > {S} | return result
pile n c=high:n m=map:n s=shrink:n
    While n is {c}, add {m} to the total and {s}; return the total.
    total = 0 | while {C}: | > total += {M} | > {S} | return total
climb n k=const l=limit g=grow
    Start x at {k}; while x is {l}, {g}; return x.
    x = {k} | while {L}: | > {G} | return x
halve n k=const c=parity:n j=const
    While n is greater than {k}, floor-divide n by 2 if it is {c}, else subtract {j}; count steps.
    count = 0 | while n > {k}: | > if {C}: | >> n //= 2 | > else: | >> n -= {j} | > count += 1 | return count
digit_sum digits c=digit:x:2-8 m=plain
    Return the sum of {m} for all digits x of n that are {c}.
    total = 0 | while n > 0: | > x = n % 10 | > if {C}: | >> total += {M} | > n //= 10 | return total
below n c=cond m=map
    Return the sum of {m} for all x in range(n) that are {c}.
    total = 0 | for x in range(n): | > if {C}: | >> total += {M} | return total
span n m=map k=const
    Return {m} for all x from {k} to n.
    return [{M} for x in range({k}, n + 1)]
branch n c=cond:n m=shift:n
    Return {m} if n is {c}, else n.
    if {C}: | > return {M} | else: | > return n
branch3 n c=order:n d=parity:n m=shift:n
    Return {m} if n is {c}, else 0 if n is {d}, else n.
    if {C}: | > return {M} | elif {D}: | > return 0 | else: | > return n
grade n c=high:n:12-20 d=high:n:2-10
    Return 'high' if n is {c}, else 'mid' if n is {d}, else 'low'.
    if {C}: | > return "high" | elif {D}: | > return "mid" | else: | > return "low"
label n c=order:n d=parity:n
    Return 'a' if n is {c}, else 'b' if n is {d}, else 'c'.
    if {C}: | > return "a" | elif {D}: | > return "b" | else: | > return "c"
char_count text c=char:c
    Return how many c in text are {c}.
    count = 0 | for c in text: | > if {C}: | >> count += 1 | return count
char_map text c=char:c m=charmap:c
    Join {m} for all c in text that are {c}.
    result = "" | for c in text: | > if {C}: | >> result += {M} | return result
words words c=digit:len(w) m=charmap:w
    Return {m} for all words w in text whose length is {c}.
    result = [] | for w in text.split(): | > if {C}: | >> result.append({M}) | return result
"""


class Slot(NamedTuple):
    """A place in a family's template: its letter, the operations it takes, their variable, their constants."""

    name: str
    kind: str
    var: str
    low: int
    high: int

    def values(self, op: str) -> tuple[Any, ...]:
        """The constants that `op` may have in this slot."""
        return tuple(v for v in OPS[op].values if isinstance(v, str) or self.low <= v <= self.high)


class Family(NamedTuple):
    """Problems of one shape: a text and a program with slots."""

    name: str
    takes: str
    """The kind of input: nums, n, digits (n that is not negative), text, words (text of words)."""
    slots: tuple[Slot, ...]
    text: str
    body: str

    @property
    def signature(self) -> str:
        """The head of the function, with its line's end."""
        return f"def solve({ {'digits': 'n', 'words': 'text'}.get(self.takes, self.takes) }):\n"


class Problem(NamedTuple):
    """One problem: its family, and for every slot an operation and its constant (None if it takes none)."""

    family: str
    ops: tuple[str, ...]
    constants: tuple[Constant, ...]

    @property
    def id(self) -> str:
        """Family, operations and constants: unique over all problems."""
        numbers = "-".join(str(k) for k in self.constants if k is not None)
        return f"{self.family}/{'-'.join(self.ops)}/{numbers}".rstrip("/")

    @property
    def prompt(self) -> str:
        """The function's head and docstring, in training and in the benchmark alike."""
        return f'{FAMILIES[self.family].signature}    """{self._fill("text")}"""\n'

    @property
    def reasoning(self) -> str:
        """The plan: each slot in words, as the text has it, and in code, as the program will."""
        filled = self._fill_slots()
        return "; ".join(f"{filled[s.name]} is {filled[s.name.upper()]}" for s in FAMILIES[self.family].slots)

    @property
    def body(self) -> str:
        """The function's indented lines."""
        return self._fill("body")

    @property
    def code(self) -> str:
        """The whole function, without its docstring."""
        return FAMILIES[self.family].signature + self.body.rstrip("\n")

    def _fill(self, part: str) -> str:
        text: str = getattr(FAMILIES[self.family], part)
        return text.format(**self._fill_slots())

    def _fill_slots(self) -> dict[str, str]:
        """Each slot in words, and in code under its upper-case letter."""
        family, fields = FAMILIES[self.family], {}
        for slot, name, k in zip(family.slots, self.ops, self.constants, strict=True):
            op = OPS[name]
            fields[slot.name] = op.words.format(v=slot.var, k=k)
            fields[slot.name.upper()] = op.code.format(v=slot.var, k=k)
        return fields


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a pattern that the whole text has."""
    if (found := re.fullmatch(pattern, text)) is None:
        raise ValueError(f"{text!r} is not of the form {pattern}")
    return found.groups()


def _read(table: str) -> dict[str, Family]:
    """The families of a table in the form that `_TABLE` explains."""
    families, rows = {}, table.strip().split("\n")
    for head, text, code in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        name, takes, *specs = head.split()
        slots = []
        for spec in specs:
            slot, kind, var, bounds = _groups(r"(\w)=(\w+)(?::([^:]+))?(?::(\d+-\d+))?", spec)
            slots.append(Slot(slot, kind, var or "x", *map(int, (bounds or "0-99").split("-"))))
        lines = [_groups(r"(>*) ?(.*)", line) for line in code.strip().split(" | ")]
        body = "".join(f"{'    ' * (len(depth) + 1)}{line}\n" for depth, line in lines)
        families[name] = Family(name, takes, tuple(slots), text.strip(), body)
    return families


FAMILIES = _read(_TABLE)


# --- the split: by rule -------------------------------------------------------------------------------------------
def split_of(problem: Problem) -> Split:
    """Where a problem belongs: `train`, or held out for its pair of operations, or for a constant."""
    family = FAMILIES[problem.family]
    if _held_pair(family, problem.ops):
        return "composition"
    held = _held_constants(problem.family, problem.ops)
    return "constants" if any(k in h for k, h in zip(problem.constants, held, strict=True)) else "train"


def _held_pair(family: Family, ops: Sequence[str]) -> bool:
    """Whether two of the operations are a held-out pair. The rule asks neither family nor order.

    It takes a seventh of a square of operations, so that every operation is still seen with most others.
    """
    places = [_PLACE[op] for op, slot in zip(ops, family.slots, strict=True) if slot.kind != "const"]
    return any((i + j) % 7 == 2 for i, j in itertools.combinations(places, 2))


@functools.cache
def _held_constants(name: str, ops: tuple[str, ...]) -> tuple[tuple[Any, ...], ...]:
    """For each slot the constants held out from this family with these operations, every eighth of all."""
    start = zlib.crc32(f"{name} {ops}".encode())
    return tuple(
        tuple(v for i, v in enumerate(slot.values(op)) if (i + start + 3 * s) % 8 == 0)
        for s, (slot, op) in enumerate(zip(FAMILIES[name].slots, ops, strict=True))
    )


class _Pool(NamedTuple):
    """Problems of a family with the same operations: the product of the constants in `axes`."""

    family: str
    ops: tuple[str, ...]
    axes: tuple[tuple[Constant, ...], ...]

    @property
    def size(self) -> int:
        return math.prod(map(len, self.axes))

    def problem(self, index: int) -> Problem:
        constants = []
        for axis in self.axes:
            index, i = divmod(index, len(axis))
            constants.append(axis[i])
        return Problem(self.family, self.ops, tuple(constants))


@functools.cache
def _pools(split: Split) -> dict[str, list[_Pool]]:
    """The pools of each family that has problems in `split`. Those of `constants` overlap if two slots have some."""
    pools: dict[str, list[_Pool]] = {}
    for family in FAMILIES.values():
        for ops in itertools.product(*(KINDS[slot.kind] for slot in family.slots)):
            whole = tuple(s.values(op) or (None,) for s, op in zip(family.slots, ops, strict=True))
            held = _held_constants(family.name, ops)
            if _held_pair(family, ops):
                found = [whole] if split == "composition" else []
            elif split == "train":
                found = [tuple(tuple(v for v in w if v not in h) for w, h in zip(whole, held, strict=True))]
            elif split == "constants":
                found = [(*whole[:i], h, *whole[i + 1 :]) for i, h in enumerate(held) if h]
            else:
                found = []
            pools.setdefault(family.name, []).extend(_Pool(family.name, ops, axes) for axes in found)
    return {name: found for name, found in pools.items() if found}


def count() -> dict[str, int]:
    """How many distinct training problems each family has."""
    return {name: sum(pool.size for pool in found) for name, found in _pools("train").items()}


# --- what the other stages call -----------------------------------------------------------------------------------
def stamp() -> str:
    """Changes with the source of the problem set."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def training(rows: int, seed: int) -> list[dict[str, str]]:
    """`rows` distinct training problems in OpenCodeReasoning's columns, in a seeded order.

    Families get equal shares as far as they reach, and so do the operations within a family: without this, `even`,
    which has no constant, would be drowned by the hundreds of variants of its neighbours.
    Raises UserError if there are not so many.
    """
    sizes, rng = list(count().values()), random.Random(f"tinycode training {seed}")
    if not 0 < rows <= sum(sizes):
        raise UserError(f"rows: TinyCode has 1 to {sum(sizes)} distinct training problems, not {rows}.")
    problems: list[Problem] = []
    for pools, quota in zip(_pools("train").values(), _share(rows, sizes, rng), strict=True):
        for pool, n in zip(pools, _share(quota, [p.size for p in pools], rng), strict=True):
            problems += [pool.problem(i) for i in rng.sample(range(pool.size), n)]
    rng.shuffle(problems)
    return [_row(p) for p in problems]


def benchmark(seed: int = 0) -> list[dict[str, Any]]:
    """600 held-out problems in EvalPlus's format, with `half` (constants, composition) and `family` beside it."""
    return [_task(task, p, half) for task, p, half in _held_out(seed)]


def reasonings(seed: int = 0) -> dict[str, str]:
    """The reasoning of each of the benchmark's problems, as a training row would have it."""
    return {task: problem.reasoning for task, problem, _ in _held_out(seed)}


def _held_out(seed: int) -> list[tuple[str, Problem, str]]:
    """The benchmark's problems with their names and halves."""
    rng = random.Random(f"tinycode benchmark {seed}")
    tasks: list[tuple[str, Problem, str]] = []
    for half in ("constants", "composition"):
        pools = _pools(half)
        chosen: dict[Any, None] = {}  # for its order
        while len(chosen) < HALF:
            for name in rng.sample(list(pools), len(pools)):
                pool = rng.choice(pools[name])
                chosen[pool.problem(rng.randrange(pool.size))] = None
        tasks += [(f"TinyCode/{len(tasks) + i}", p, half) for i, p in enumerate(list(chosen)[:HALF])]
    return tasks


def _share(total: int, sizes: Sequence[int], rng: random.Random) -> list[int]:
    """`total` dealt out as evenly as the sizes allow; what does not divide goes to a seeded choice."""
    given = [0] * len(sizes)
    while total:
        free = [i for i, size in enumerate(sizes) if given[i] < size]
        each = total // len(free)
        for i in free if each else rng.sample(free, total):
            more = min(each or 1, sizes[i] - given[i])
            given[i] += more
            total -= more
    return given


def _row(problem: Problem) -> dict[str, str]:
    code = problem.code
    output = f"<think>\n{problem.reasoning}\n</think>\n\n```python\n{code}\n```"
    return {"id": problem.id, "input": problem.prompt, "output": output, "solution": code}


def _task(task_id: str, problem: Problem, half: str) -> dict[str, Any]:
    inputs = _inputs(problem)
    return {
        "task_id": task_id,
        "prompt": problem.prompt,
        "entry_point": "solve",
        "canonical_solution": problem.body,
        "base_input": inputs[::3],
        "plus_input": [x for i, x in enumerate(inputs) if i % 3],
        "atol": 0,
        "contract": "",
        "test": "",
        "half": half,
        "family": problem.family,
    }


# --- test inputs: boundaries first --------------------------------------------------------------------------------
def _inputs(problem: Problem) -> list[list[Any]]:
    """The argument lists of a problem: half around its constants, half with diverse results.

    Random lists alone leave `any` true and `before` 0: so the second half takes turns among the results.
    """
    make = {"nums": _nums, "n": _n, "digits": _digits, "text": _text, "words": _words}
    rng = random.Random(f"tinycode inputs {problem.id}")
    values = make[FAMILIES[problem.family].takes]([k for k in problem.constants if k is not None], rng)
    distinct = list({repr(value): value for value in itertools.islice(values, 250)}.values())
    names: dict[str, Any] = {}
    exec(problem.code, names)
    by_result: dict[str, list[Any]] = {}
    for value in distinct[INPUTS // 2 :]:
        by_result.setdefault(repr(names["solve"](value)), []).append(value)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_result.values(), fillvalue=...))
    chosen = [*distinct[: INPUTS // 2], *(value for value in turns if value is not ...)]
    return [[value] for value in chosen[:INPUTS]]


def _nums(constants: list[Any], rng: random.Random) -> Iterator[list[int]]:
    """Lists: none, one at a time around each constant, as long as each constant, then a mixture."""
    near = [k + d for k in constants for d in (0, 1, -1)] or [1, 2, 3]
    pool = [0, 1, -1, 2, 3, *near, *(f * k + d for k in constants for f in (-1, 2, 3) for d in (0, 1, -1))]

    def some(length: int) -> list[int]:
        few = rng.choice([pool, pool + rng.sample(range(-30, 60), 12), rng.sample(pool, rng.randint(1, 3))])
        return rng.choices(few, k=length)

    yield []
    yield from ([v] for v in near[:9])
    yield from (some(k + d) for k in constants for d in (0, 1))
    while True:
        yield some(rng.choice([rng.randint(2, 9), rng.choice(near) + rng.randint(0, 2)]))


def _n(constants: list[Any], rng: random.Random) -> Iterator[int]:
    yield from (k + d for k in constants for d in (0, 1, -1))
    yield from (0, 1, -1)
    sums = [a + b for a, b in itertools.combinations(constants, 2)]
    products = [a * b for a, b in itertools.combinations(constants, 2)] + [2 * k for k in constants]
    near = [k + d for k in sums + products for d in (0, 1, -1)] + [-k for k in constants]
    while True:
        yield rng.choice([*near, rng.randint(-30, 30), rng.randint(20, 90), rng.randint(90, 400)])


def _digits(constants: list[Any], rng: random.Random) -> Iterator[int]:
    yield from range(10)
    while True:
        yield rng.choice([rng.randint(10, 99), rng.randint(100, 199), rng.randint(200, 99_999)])


def _text(constants: list[Any], rng: random.Random) -> Iterator[str]:
    alphabet = "aeioubyzAEZ 019-" + 3 * "".join(k for k in constants if isinstance(k, str))
    yield ""
    while True:
        yield "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 14)))


def _words(constants: list[Any], rng: random.Random) -> Iterator[str]:
    lengths = [1, 2, 3, 4, 5, *(k + d for k in constants if isinstance(k, int) for d in (0, 1, -1) if k + d)]
    yield from ("", "  ")
    while True:
        words = ("".join(rng.choice("abcxyzAZ09") for _ in range(rng.choice(lengths))) for _ in range(9))
        yield " ".join(itertools.islice(words, rng.randint(1, 6)))


if __name__ == "__main__":
    for row in training(3, seed=0):
        print(row["input"] + textwrap.indent(row["output"], "    "), end="\n\n")
