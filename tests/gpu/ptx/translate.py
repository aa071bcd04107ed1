"""PTX, as nvcc makes it of kernels.cu, to C that runs on a CPU: `check.py` compiles and runs it.

    python translate.py kernels.ptx kernels.c

Registers are words of 64 bits, a kernel is a function of one thread, and what it runs on is in
ptx.h. Knows what these kernels use, and ends with the name of whatever else it meets.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # of unsigned numbers
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
BITWISE = {"and": "&", "or": "|", "xor": "^"}
WIDE = {"u16": "uint32_t", "s16": "int32_t", "u32": "uint64_t", "s32": "int64_t"}


class UnknownError(Exception):
    """Something that no kernel has had so far."""


def c_type(kind: str) -> str:
    if kind in ("f32", "f64"):
        return "float" if kind == "f32" else "double"
    return f"{'int' if kind[0] == 's' else 'uint'}{kind[1:]}_t"


def unsigned(kind: str) -> str:
    return f"uint{kind[1:]}_t"


def bytes_of(kind: str) -> int:
    return int(kind[1:]) // 8


def name_of(operand: str) -> str:
    return operand.strip().lstrip("%")


def label(operand: str) -> str:
    return operand.strip().replace("$", "L_")


class Translation:
    """Of one file; `shared` are offsets of its variables in the memory of a block."""

    def __init__(self, source: str) -> None:
        self.source = re.sub(r"//.*", "", source)
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        for found in re.finditer(
            r"^\.shared \.align (\d+) \.(\w+) (\w+)(?:\[(\d+)\])?;", self.source, re.M
        ):
            align, size = int(found[1]), bytes_of(found[2]) * int(found[4] or 1)
            self.shared_bytes = -(-self.shared_bytes // align) * align
            self.shared[found[3]] = self.shared_bytes
            self.shared_bytes += size

    def run(self) -> str:
        kernels, lines = [], ['#include "ptx.h"', ""]
        pattern = r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{\n(.*?)\n\}\n"
        for found in re.finditer(pattern, self.source, re.S):
            name, parameter, body = found[1], re.search(r"(\w+)\[(\d+)\]", found[2]), found[4]
            assert parameter is not None
            self.parameter = parameter[1]
            lines += self.kernel(name, body)
            meets = str("bar.sync" in body).lower()
            kernels.append(f'    {{"{name}", run_{name}, {meets}, {parameter[2]}}},')
        lines += ["const ptx_kernel ptx_kernels[] = {", *kernels, "};"]
        lines += [f"const int ptx_count = {len(kernels)};"]
        lines += [f"const size_t ptx_shared_bytes = {self.shared_bytes};", ""]
        return "\n".join(lines)

    def kernel(self, name: str, body: str) -> list[str]:
        registers = [
            f"{found[1]}{k}"
            for found in re.finditer(r"\.reg \.\w+\s+%(\w+)<(\d+)>;", body)
            for k in range(int(found[2]))
        ]
        # What nvcc puts into braces: parts of a word, one of them for nobody, and cvt.
        body = re.sub(
            r"\{\s*\.reg \.b\d+ (%?\w+);\s*(mov\.b\d+[^;]*;)\s*\}",
            lambda found: re.sub(rf"{found[1]}\b", "_", found[2]),
            body,
        )
        body = re.sub(r"\.reg [^;]*;", "", body)
        body = re.sub(r"\{\s*(cvt[^;]*;)\s*\}", r"\1", body).replace("\t", " ")
        lines = [f"static void run_{name}(ptx_thread *t, const unsigned char *param)", "{"]
        lines += [f"  uint64_t {register} = 0;" for register in registers]
        for statement in re.split(r"(?<=[;:])", body):
            text = statement.strip().rstrip(";").strip()
            if text.endswith(":"):
                lines.append(f"{label(text[:-1])}:;")
            elif text:
                lines.append("  " + self.statement(text))
        return [*lines, "}", ""]

    def statement(self, text: str) -> str:
        guard = re.match(r"@(!?)%(p\d+)\s+(.*)", text, re.S)
        text = guard[3] if guard else text
        op, _, rest = text.partition(" ")
        code = self.instruction(op, operands(rest))
        return f"if ({guard[1]}{guard[2]}) {{ {code} }}" if guard else code

    # ---- operands --------------------------------------------------------------------------------

    def value(self, operand: str) -> str:
        operand = operand.strip()
        special = re.match(r"%(tid|ntid|ctaid|nctaid)\.([xyz])$", operand)
        if special:
            return f"t->{special[1]}[{'xyz'.index(special[2])}]"
        if operand.startswith("%"):
            return operand[1:]
        if re.match(r"0[fFdD][0-9A-Fa-f]+$", operand):
            return f"UINT64_C(0x{operand[2:]})"
        if re.match(r"-?\d+$|0x[0-9a-fA-F]+$", operand):
            return f"((uint64_t)({operand}LL))"
        if operand == self.parameter:
            return "((uint64_t)(uintptr_t)param)"
        if operand in self.shared:
            return f"UINT64_C({self.shared[operand]})"
        raise UnknownError(f"operand {operand}")

    def typed(self, kind: str, operand: str) -> str:
        value = self.value(operand)
        if kind in ("f32", "f64"):
            return f"ptx_{c_type(kind)}({value})"
        return f"(({c_type(kind)})({value}))"

    def made(self, kind: str, expression: str) -> str:
        """A register's word of a value of this kind."""
        if kind in ("f32", "f64"):
            return f"ptx_word_of_{c_type(kind)}({expression})"
        return f"(uint64_t)({unsigned(kind)})({expression})"

    def address(self, space: str, operand: str) -> str:
        found = re.match(r"\[(.+?)(?:\+(-?\d+))?\]$", operand.strip())
        assert found is not None, operand
        place = f"({self.value(found[1])} + {found[2] or 0})"
        return f"ptx_shared(t, {place})" if space == "shared" else place

    # ---- instructions ----------------------------------------------------------------------------

    def instruction(self, op: str, a: list[str]) -> str:
        parts = op.split(".")
        if op in ("ret", "bar.sync"):
            return "return;" if op == "ret" else "ptx_barrier(t);"
        if parts[0] in ("membar", "fence"):
            return ";"  # threads take turns, and see all that others wrote
        known: dict[str, Callable[[list[str], list[str]], str]] = {
            "ld": self.load, "st": self.store, "atom": self.atomic, "mov": self.move,
            "setp": self.compare, "selp": self.select, "cvt": self.convert, "not": self.negate,
            "neg": self.negate, "shl": self.shift, "shr": self.shift, "min": self.lesser,
            "max": self.lesser, "mad": self.multiply_add,
        }  # fmt: skip
        if parts[0] == "bra":
            return f"goto {label(a[0])};"
        if parts[0] == "cvta":
            return f"{name_of(a[0])} = {self.value(a[1])};"
        if parts[0] in BITWISE:
            return self.bitwise(parts, a)
        if parts[0] in ARITHMETIC:
            return self.arithmetic(parts, a)
        if parts[0] not in known:
            raise UnknownError(f"instruction {op}: {' '.join(a)}")
        return known[parts[0]](parts, a)

    def load(self, parts: list[str], a: list[str]) -> str:
        space, kind = parts[2 if parts[1] == "volatile" else 1], parts[-1]
        at, size, registers = self.address(space, a[1]), bytes_of(kind), names(a[0])
        lines = [f"ptx_vector({at}, {size * len(registers)});"] if len(registers) > 1 else []
        for k, register in enumerate(registers):
            lines.append(f"{register} = ptx_load({at} + {k * size}, {size});")
        return " ".join(lines)

    def store(self, parts: list[str], a: list[str]) -> str:
        space, kind = parts[2 if parts[1] == "volatile" else 1], parts[-1]
        values = [self.value(v) for v in a[1].strip("{} ").split(",")]
        at, size = self.address(space, a[0]), bytes_of(kind)
        lines = [f"ptx_vector({at}, {size * len(values)});"] if len(values) > 1 else []
        for k, value in enumerate(values):
            lines.append(f"ptx_store({at} + {k * size}, {size}, {value});")
        return " ".join(lines)

    def atomic(self, parts: list[str], a: list[str]) -> str:
        if parts[-2:] not in (["add", "u32"], ["inc", "u32"]):
            raise UnknownError("instruction " + ".".join(parts))
        to, at, by = name_of(a[0]), self.address(parts[1], a[1]), self.value(a[2])
        new = f"(uint32_t)({to} + {by})"
        if parts[-2] == "inc":
            new = f"({to} >= (uint32_t)({by}) ? 0 : {to} + 1)"
        return f"{to} = ptx_load({at}, 4); ptx_store({at}, 4, {new});"

    def move(self, parts: list[str], a: list[str]) -> str:
        kind = parts[-1]
        if a[0].startswith("{"):
            registers = names(a[0])
            width = int(kind[1:]) // len(registers)
            parted = [
                f"{r} = (uint{width}_t)(whole >> {k * width});"
                for k, r in enumerate(registers)
                if r != "_"
            ]
            return f"{{ uint64_t whole = {self.value(a[1])}; {' '.join(parted)} }}"
        if a[1].startswith("{"):
            values = [self.value(v) for v in a[1].strip("{} ").split(",")]
            width = int(kind[1:]) // len(values)
            halves = [f"(uint64_t)(uint{width}_t)({v})" for v in values]
            joined = " | ".join(f"{half} << {k * width}" for k, half in enumerate(halves))
            return f"{name_of(a[0])} = {joined};"
        if kind == "pred":
            return f"{name_of(a[0])} = {self.value(a[1])};"
        return f"{name_of(a[0])} = ({unsigned(kind)})({self.value(a[1])});"

    def compare(self, parts: list[str], a: list[str]) -> str:
        how, kind = parts[1], parts[-1]
        x, y = self.typed(kind, a[1]), self.typed(kind, a[2])
        ordered = f"({x} == {x} && {y} == {y})"
        if how in ("nan", "num"):
            test = ordered if how == "num" else f"!{ordered}"
        elif kind[0] == "f" and how.endswith("u"):  # true where one is NaN
            test = f"(!{ordered} || {x} {COMPARISONS[how[:-1]]} {y})"
        else:
            test = f"({ordered} && {x} {COMPARISONS[how]} {y})"
        return f"{name_of(a[0])} = {test};"

    def select(self, parts: list[str], a: list[str]) -> str:
        kind = unsigned(parts[-1])
        yes, no = (f"({kind})({self.value(operand)})" for operand in a[1:3])
        return f"{name_of(a[0])} = {self.value(a[3])} ? {yes} : {no};"

    def bitwise(self, parts: list[str], a: list[str]) -> str:
        result = f"({self.value(a[1])}) {BITWISE[parts[0]]} ({self.value(a[2])})"
        kind = "" if parts[-1] == "pred" else f"({unsigned(parts[-1])})"
        return f"{name_of(a[0])} = {kind}({result});"

    def negate(self, parts: list[str], a: list[str]) -> str:
        if parts[-1] == "pred":
            return f"{name_of(a[0])} = !({self.value(a[1])});"
        if parts[0] == "neg" and parts[-1][0] == "f":
            raise UnknownError("instruction " + ".".join(parts))
        sign = "~" if parts[0] == "not" else "-"
        return f"{name_of(a[0])} = ({unsigned(parts[-1])}){sign}({self.value(a[1])});"

    def shift(self, parts: list[str], a: list[str]) -> str:
        kind, sign = parts[-1], "<<" if parts[0] == "shl" else ">>"
        if kind[0] == "s":
            raise UnknownError("instruction " + ".".join(parts))
        by, value = f"(uint32_t)({self.value(a[2])})", f"({unsigned(kind)})({self.value(a[1])})"
        shifted = f"({unsigned(kind)})((uint64_t){value} {sign} {by})"
        return f"{name_of(a[0])} = {by} >= {kind[1:]} ? 0 : {shifted};"

    def lesser(self, parts: list[str], a: list[str]) -> str:
        kind = parts[-1]
        x, y = self.typed(kind, a[1]), self.typed(kind, a[2])
        sign = "<" if parts[0] == "min" else ">"
        return f"{name_of(a[0])} = {self.made(kind, f'({x} {sign} {y} ? {x} : {y})')};"

    def arithmetic(self, parts: list[str], a: list[str]) -> str:
        kind, sign = parts[-1], ARITHMETIC[parts[0]]
        if parts[1] == "wide":
            wide = WIDE[kind]
            x, y = (f"({wide}){self.typed(kind, operand)}" for operand in a[1:3])
            return f"{name_of(a[0])} = (uint64_t)({x} * {y});"
        if kind[0] == "f" and parts[1] != "rn":  # whatever is contracted has no rounding of its own
            raise UnknownError("instruction " + ".".join(parts))
        if parts[1] == "hi" or (parts[0] == "div" and kind[0] == "s"):
            raise UnknownError("instruction " + ".".join(parts))
        plain = kind if kind[0] == "f" else f"u{kind[1:]}"  # signed ones wrap around as well
        x, y = self.typed(plain, a[1]), self.typed(plain, a[2])
        return f"{name_of(a[0])} = {self.made(plain, f'{x} {sign} {y}')};"

    def multiply_add(self, parts: list[str], a: list[str]) -> str:
        if parts[1] != "lo" or parts[-1][0] == "f":
            raise UnknownError("instruction " + ".".join(parts))
        x, y, z = (self.value(operand) for operand in a[1:4])
        return f"{name_of(a[0])} = ({unsigned(parts[-1])})(({x}) * ({y}) + ({z}));"

    def convert(self, parts: list[str], a: list[str]) -> str:
        to, source = parts[-2], parts[-1]
        value, target = self.value(a[1]), name_of(a[0])
        halves = {
            "cvt.f32.f16": f"ptx_word_of_float(ptx_half((uint16_t)({value})))",
            "cvt.rn.f16.f32": f"ptx_word_of_half(ptx_float({value}))",
            "cvt.rn.bf16.f32": f"ptx_word_of_bfloat(ptx_float({value}))",
        }
        op = ".".join(parts)
        if op in halves:
            return f"{target} = {halves[op]};"
        if to[0] == "f" or source[0] == "f":
            exact = (to, source) == ("f64", "f32") or (to == "f64" and source in ("u32", "s32"))
            if not (exact or parts[1] == "rn") or "f" not in to or "16" in op:
                raise UnknownError(f"instruction {op}")
        return f"{target} = {self.made(to, f'({c_type(to)}){self.typed(source, a[1])}')};"


def names(operand: str) -> list[str]:
    return [name_of(register) for register in operand.strip("{} ").split(",")]


def operands(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


if __name__ == "__main__":
    made = Translation(Path(sys.argv[1]).read_text()).run()
    Path(sys.argv[2]).write_text(made)
