"""The host headers declare what CANN documents: api.csv against the headers, by the compiler and by their text.

A row of api.csv is one documented prototype, struct or enumeration. chips: where the documentation says that it is
supported; undocumented: where it compiles all the same, because CANN's own code for that chip uses it. types: template
arguments that the documentation lists, in the template's order, "@910b" or "@310b" where only one chip has them; what
CANN's own headers refuse is left out (Duplicate of bfloat16_t on 310B). page: the title of the page, of the newest
documentation or, for names that it has no longer, of CANN 9.0's.
"""

import csv
import functools
import importlib.util
import re
import subprocess
from collections import Counter, namedtuple
from pathlib import Path

import pytest

ROOT = Path(importlib.util.find_spec("ascend_kernels").submodule_search_locations[0])
INCLUDE = ROOT / "host/include"
CHIPS = {"910b": 2201, "310b": 3002}
DEVICE_HEADERS = ("kernel_operator.h", "lib/matmul_intf.h", "kernel_tiling/kernel_tiling.h")
HOST_HEADERS = ("register/op_def_registry.h", "register/tilingdata_base.h", "tiling/tiling_api.h",
                "tiling/platform/platform_ascendc.h")
HOST_OPTIONS = ("-std=c++11",)
DTYPES = ("int8_t", "uint8_t", "int16_t", "uint16_t", "half", "bfloat16_t", "int32_t", "uint32_t", "float", "int64_t",
          "uint64_t", "double")
# Template arguments of the table that are longer than a word.
NAMED_TYPES = """namespace AscendC {
using GmHalf = MatmulType<TPosition::GM, CubeFormat::ND, half>;
using GmFloat = MatmulType<TPosition::GM, CubeFormat::ND, float>;
using Queue = TQue<TPosition::VECIN, 1>;
}"""

Row = namedtuple("Row", "name kind header chips undocumented types signature page")
# templates: lists of (kind, name, has a default), the class's first; owner: the class as it is written; suffix: const.
Prototype = namedtuple("Prototype", "templates returns owner name parameters suffix")
Parameter = namedtuple("Parameter", "type name array default")


@functools.cache
def table():
    with open(ROOT / "host/api.csv", encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        assert tuple(next(reader)) == Row._fields
        return tuple(Row(*fields) for fields in reader)


def is_device(row):
    return row.header in DEVICE_HEADERS


def has(row, chip):
    return chip is None or row.chips in ("both", chip) or row.undocumented == chip


def rows_of(chip):
    """Rows of the device side that a chip has; of the host side where chip is None."""
    return [row for row in table() if is_device(row) == (chip is not None) and has(row, chip)]


# ---- Signatures -----------------------------------------------------------------------------------------------------


def split(text):
    """The parts of a text between commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "<([{") - (letter in ">)]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def take_templates(text):
    """Lists of (kind, name, has a default), one for each leading "template <...>", and the rest of the text."""
    templates = []
    while text.startswith("template <"):
        depth, end = 1, len("template <")
        while depth:
            depth += {"<": 1, ">": -1}.get(text[end], 0)
            end += 1
        parameters = []
        for parameter in split(text[len("template <"):end - 1]):
            declared_as, _, default = parameter.partition("=")
            kind, _, name = declared_as.strip().rpartition(" ")
            parameters.append((kind, name, bool(default)))
        templates.append(parameters)
        text = text[end:].strip()
    return templates, text


def parse(row):
    """The Prototype of a row of kind function, member or constructor."""
    templates, text = take_templates(row.signature)
    found = re.search(r"(operator\W{1,2}|\w+)\(", text)
    head, owner, end = text[:found.start()], "", text.rindex(")")
    if head.endswith("::"):
        begin = head.rindex(row.name.split("::")[-2])
        head, owner = head[:begin], head[begin:-2]
    parameters = []
    for parameter in split(text[found.end():end]):
        declared_as, _, default = parameter.partition(" = ")
        type_, name, array = re.match(r"(.*?)(\w+)(\[\])?$", declared_as).groups()
        parameters.append(Parameter(type_.strip(), name, array or "", default))
    return Prototype(templates, head.strip(), owner, found[1], parameters, text[end + 1:].strip())


def declaration(row):
    """A function's or class's declaration as it stands in the header: inside its class, so without the class's name."""
    if row.kind == "class":
        return row.signature
    prototype, text = parse(row), row.signature
    if prototype.owner.endswith(">"):
        text = text[text.index("> ") + 2:]
    return text.replace(f"{prototype.owner}::{prototype.name}", prototype.name) if prototype.owner else text


TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\w+|::|->|&&|[^\s\w]')


def tokens(text):
    """The text without what does not matter: spaces, words like inline, const of what is passed by value, and R, the
    header's type of a repeat that is uint8_t in CANN."""
    text = re.sub(r"__attribute__\s*\(\(.*?\)\)", " ", text)
    text = re.sub(r"\b(inline|constexpr|static|explicit|virtual|override)\b", " ", text)
    text = f" {' '.join(TOKEN.findall(text))} "
    for ours, documented in ((" AscendC :: ", " "), (" , typename R = uint8_t", ""),
                             (" R repeatTime ", " uint8_t repeatTime "), (" GM_ADDR ", " uint8_t * ")):
        text = text.replace(ours, documented)
    text = re.sub(r" class (?=\w+ [,>=])", " typename ", text)
    return re.sub(r" const ((?:\w+ :: )*\w+) (\w+)(?= [,)=])", r" \1 \2", text)


# ---- Headers --------------------------------------------------------------------------------------------------------


@functools.cache
def header(names, *options):
    """(tokens of our headers after the preprocessor, {macro: its parameters or None}) of including some of them."""
    source = "".join(f'#include "{name}"\n' for name in names)
    done = subprocess.run(["g++", "-x", "c++", "-E", "-dD", *options, f"-I{INCLUDE}", "-"], input=source, text=True,
                          capture_output=True, check=True)
    text, macros, is_ours = [], {}, False
    for line in done.stdout.splitlines():
        place = re.match(r'# \d+ "([^"]*)"', line)
        if place:
            path = Path(place[1])
            is_ours = INCLUDE in path.parents and path.name not in ("machine.h", "numbers.h")
        elif is_ours:
            macro = re.match(r"#define (\w+)(\([^)]*\))?", line)
            if macro:
                macros[macro[1]] = macro[2]
            elif not line.startswith("#"):
                text.append(line)
    return tokens("\n".join(text)), macros


def options_of(chip):
    return ("-std=c++17", "-DPANGU_KERNEL_BUILD", f"-D__NPU_ARCH__={CHIPS[chip]}") if chip else HOST_OPTIONS


def is_declared(row, chip):
    """Whether the row's header has the declaration word for word; True for the kinds that only the compiler checks."""
    if row.kind not in ("function", "member", "class"):
        return True
    return tokens(declaration(row)) in header((row.header,), *options_of(chip))[0]


def declared(text):
    """Of a text in tokens: {function: number of overloads}, and the other names that it declares."""
    functions = Counter(re.findall(r"(?<!return )(?<!else )(?<!case )[\w>&*] (?!Pangu)([A-Z]\w*) \(", text))
    others = set(re.findall(r" (?:class|struct|using|typename) (?!namespace )(\w+) [^,>]", text))
    for body in re.findall(r" enum (?:class )?\w+ (?:: \w+ )?\{ (.*?) \}", text):
        others |= set(re.findall(r"(\w+)(?: = \w+)?(?= ,|$)", body))
    return functions, others | set(re.findall(r" ([A-Z]\w+) = [\w ]+[,;]", text))


# ---- Checks by the compiler -----------------------------------------------------------------------------------------


def type_tuples(row, chip):
    """The template arguments of the table: [(arguments, whether this chip has them)]."""
    found = [text.partition("@") for text in row.types.split()]
    return [(tuple(text.split("/")), only in ("", chip)) for text, _, only in found] or [((), True)]


def undocumented_tuples(row, chip):
    """Element types that the documentation does not list at all."""
    listed = [arguments for arguments, _ in type_tuples(row, chip)]
    if row.kind != "function" or not listed[0] or any(argument not in DTYPES for each in listed for argument in each):
        return []
    every = [(first,) for first in DTYPES]
    if len(listed[0]) == 2:
        every = [(first, second) for first in DTYPES for second in DTYPES]
    return [arguments for arguments in every if arguments not in listed]


def bindings(lists, arguments):
    """C++ that gives the template parameters their arguments; isSetMask, the one without any, is true."""
    parameters = [parameter for parameters in lists for parameter in parameters]
    arguments = [*arguments, *["true"] * (len(parameters) - len(arguments))]
    text = ""
    for (kind, name, _), argument in zip(parameters, arguments, strict=True):
        text += f"using {name}" if kind in ("typename", "class") else f"constexpr {kind} {name}"
        text += f" = {argument}; "
        if name == "BIAS_TYPE":
            text += "using SrcAT = A_TYPE::T; using SrcBT = B_TYPE::T; using DstT = C_TYPE::T; "
    return text


def prototype_check(row, arguments):
    """Pointers of the documented type to the function, with all template arguments and with those without a default."""
    prototype = parse(row)
    text = bindings(prototype.templates, arguments)
    values = [f"std::declval<{p.type}{'*' if p.array else ''}>()" for p in prototype.parameters]
    if row.kind == "constructor":
        return text + f"using made = decltype({prototype.owner}{{{', '.join(values)}}});"
    own = prototype.templates[prototype.owner.endswith(">"):]
    scope = f"{prototype.owner}::" if prototype.owner else ""
    types = ", ".join(f"{p.type} {p.name}{p.array}" for p in prototype.parameters)
    pointer = f"{prototype.returns} ({scope}*)({types}) {prototype.suffix}"
    for with_defaults in (True, False):
        names = [name for _, name, has_default in sum(own, []) if with_defaults or not has_default]
        explicit = f"<{', '.join(names)}>" if names else ""
        text += (f"constexpr auto pointer{int(with_defaults)} = static_cast<{pointer}>"
                 f"(&{scope}{prototype.name}{explicit}); ")
    target = f"std::declval<{prototype.owner}&>()." if prototype.owner else ""
    for count, parameter in enumerate(prototype.parameters):
        if parameter.default:
            text += f"using with{count} = decltype({target}{prototype.name}({', '.join(values[:count])})); "
    return text


def asserted(*conditions):
    return "".join(f'static_assert({condition}, ""); ' for condition in conditions)


def struct_check(row, arguments):
    """The documented struct itself, with every field at the same place and of the same type."""
    templates, text = take_templates(row.signature)
    body = text[text.index("{"):]
    ours = f"{row.name}<{', '.join(arguments)}>" if templates else row.name
    check = f"{bindings(templates, arguments)}struct Documented {body}; "
    check += asserted(f"sizeof(Documented) == sizeof({ours})")
    for kind, field in re.findall(r"([\w:]+) (\w+)(?: = [\w:]+)?;", body):
        theirs, mine = f"Documented::{field}", f"{ours}::{field}"
        if kind == "using" or re.search(rf"using {field} ", body):
            check += asserted(f"std::is_same<{theirs}, {mine}>::value")
            continue
        check += asserted(f"std::is_same<decltype({theirs}), decltype({mine})>::value",
                          f"{theirs} == {mine}" if "constexpr" in body
                          else f"offsetof(Documented, {field}) == offsetof({ours}, {field})")
    return check


def enum_check(row, _):
    """enum: values and width as documented; enumerators: the documentation gives names only."""
    head, body = row.signature.split("{")
    name = row.name.split("::")[-1]
    names = re.findall(r"(\w+)(?: = \w+)?(?=[, ])", body)
    if row.kind == "enumerators":
        return asserted(*(f"sizeof({name}::{enumerator}) > 0" for enumerator in names))
    check = f"{head.replace(name, 'Documented')}{{{body}; " + asserted(
        *(f"long(Documented::{enumerator}) == long({name}::{enumerator})" for enumerator in names))
    if ":" in head:
        underlying = "std::underlying_type<{}>::type"
        check += asserted(f"std::is_same<{underlying.format(name)}, {underlying.format('Documented')}>::value")
    return check


def class_check(row, arguments):
    templates, text = take_templates(row.signature)
    name = text.split()[-1]
    required = [argument for argument, (_, _, has_default) in zip(arguments, sum(templates, []), strict=True)
                if not has_default]
    forms = {f"{name}<{', '.join(each)}>" if templates else name for each in (arguments, required)}
    return bindings(templates, arguments) + asserted(*(f"sizeof({form}) > 0" for form in sorted(forms)))


def other_check(row, _):
    if row.kind == "fields":
        return asserted(*(f"std::is_same<decltype({row.name}::{field}), {kind}>::value"
                          for kind, field in re.findall(r"(\w+) (\w+);", row.signature)))
    if row.kind == "alias":
        name, _, meaning = row.signature.removeprefix("using ").partition(" = ")
        return asserted(f"std::is_same<{name}, {meaning}>::value")
    type_, name, value = re.match(r"const (\w+) (\w+) = (\w+)$", row.signature).groups()
    return asserted(f"{name} == {value}", f"std::is_same<decltype({name}), const {type_}>::value")


CHECKS = {"function": prototype_check, "member": prototype_check, "constructor": prototype_check, "class": class_check,
          "struct": struct_check, "enum": enum_check, "enumerators": enum_check, "fields": other_check,
          "alias": other_check, "constant": other_check}


@functools.cache
def compiled(chip):
    """[(row, arguments, whether it should compile, whether it did)] of every row with each of its types, of every other
    type, and of every wrong row: each is one line of C++ in a namespace of its own, all in one call of g++."""
    rows = [row for row in table() if is_device(row) == (chip is not None) and row.kind != "macro"]
    checks = [(row, arguments, has(row, chip) and on_chip)
              for row in rows for arguments, on_chip in type_tuples(row, chip)]
    overloads = {overload_of(row) for row in rows}
    for row in rows:
        if has(row, chip):
            checks += [(row, arguments, False) for arguments in undocumented_tuples(row, chip)]
            checks += [(wrong, type_tuples(row, chip)[0][0], False)
                       for wrong in mutants(row) if overload_of(wrong) not in overloads]
    lines = [f"#include <{name}>" for name in ("cstddef", "type_traits", "utility")]
    lines += [f'#include "{name}"' for name in dict.fromkeys(row.header for row in rows)]
    lines += NAMED_TYPES.splitlines() if chip else []
    first = len(lines) + 1
    for number, (row, arguments, _) in enumerate(checks):
        space = "AscendC" if chip else row.name.split("::")[0]
        lines.append(f"namespace {space} {{ namespace check{number} {{ {CHECKS[row.kind](row, arguments)} }} }}")
    command = ["g++", "-x", "c++", "-fsyntax-only", "-w", "-fdiagnostics-plain-output", "-fmax-errors=0",
               *options_of(chip), f"-I{INCLUDE}", "-"]
    done = subprocess.run(command, input="\n".join(lines), text=True, capture_output=True)
    found = re.findall(r"^<stdin>:(\d+):\d+: (?:error|  required from here)", done.stderr, re.MULTILINE)
    failed = {int(number) for number in found}
    assert min(failed) >= first, done.stderr[:2000]
    return [(row, arguments, expected, first + number not in failed)
            for number, (row, arguments, expected) in enumerate(checks)]


# ---- Wrong rows -----------------------------------------------------------------------------------------------------


def overload_of(row):
    """Equal for rows that declare one function: its name and types."""
    if row.kind not in ("function", "member"):
        return row
    prototype = parse(row)
    types = [p.type if p.array or p.type[-1] in "&*" else p.type.removeprefix("const ") for p in prototype.parameters]
    return row.name, prototype.returns, *zip(types, (p.array for p in prototype.parameters), strict=True)


def wrong_parameters(row):
    """The signature with neighbouring parameters of different types swapped, with another type, with one fewer."""
    prototype = parse(row)
    begin, end = row.signature.index(f"{prototype.name}(") + len(prototype.name) + 1, row.signature.rindex(")")
    parameters = split(row.signature[begin:end])
    variants = [parameters[:-1] or ["int extra"]]
    for i, (first, second) in enumerate(zip(prototype.parameters, prototype.parameters[1:], strict=False)):
        if (first.type, first.array) != (second.type, second.array) and not second.default:
            variants.append([*parameters[:i], parameters[i + 1], parameters[i], *parameters[i + 2:]])
    for i, parameter in enumerate(parameters):
        other = re.sub(r"^(const )?(u?int\d+_t|int|bool|size_t)\b", r"\1double", parameter)
        variants.append([*parameters[:i], other, *parameters[i + 1:]])
    return [row.signature[:begin] + ", ".join(variant) + row.signature[end:] for variant in variants]


def mutants(row):
    """Copies of a row that are wrong in one place each."""
    text = row.signature
    changed = []
    if row.kind in ("function", "member"):
        changed = [*wrong_parameters(row), re.sub(r"(^|> )(void|u?int\d+_t|bool|size_t) ", r"\1char* ", text, count=1)]
    elif "constexpr" in text:
        changed = [text.replace("isTrans = ISTRANS", "isTrans = IBSHARE"), text.replace("T = TYPE", "T = int")]
    elif row.kind in ("struct", "fields"):
        changed = [re.sub(r"\b(u?int\d+_t|int|bool)( \w+(?: = \w+)?;)", r"double\2", text, count=1),
                   re.sub(r"(\w+)((?: = \w+)?;)", r"other\2", text, count=1)]
    elif row.kind in ("enum", "enumerators"):
        changed = [re.sub(r"\{ \w+", "{ OTHER", text)]
        if row.kind == "enum":
            changed += [re.sub(r"(\w+)( = \w+)?, (\w+)", r"\3\2, \1", text, count=1)]
    return [row._replace(signature=signature) for signature in changed if signature != text]


# ---- Tests ----------------------------------------------------------------------------------------------------------

SIDES = pytest.mark.parametrize("chip", ["910b", "310b", None], ids=["910b", "310b", "host side"])


@SIDES
def test_documented_signatures_compile_where_they_are_documented_and_nowhere_else(chip):
    assert not [(row.name, row.signature, arguments, "compiles" if compiles else "does not compile")
                for row, arguments, expected, compiles in compiled(chip) if row in table() and expected != compiles]


@SIDES
def test_declarations_are_the_documented_ones_word_for_word(chip):
    """What the compiler cannot see: names tell parameters of one type apart, and defaults have values."""
    assert not [(row.name, declaration(row)) for row in rows_of(chip) if not is_declared(row, chip)]


@SIDES
def test_wrong_rows_are_noticed(chip):
    wrong = [(row, compiles) for row, _, _, compiles in compiled(chip) if row not in table()]
    assert len(wrong) > (250 if chip is None else 850)
    assert sum(compiles for _, compiles in wrong) < 0.1 * len(wrong)  # a repeat's type, which the header leaves open
    assert not [(row.name, row.signature) for row, compiles in wrong if compiles and is_declared(row, chip)]


@pytest.mark.parametrize("right, wrong", [
    ("dstRepStride, int32_t srcBlkStride, ", "srcBlkStride, int32_t dstRepStride, "),
    ("src0, const LocalTensor<T>& src1", "src1, const LocalTensor<T>& src0"),
    ("bool calIndex = 0", "bool calIndex = 1"),
    ("bool isSetMask = true", "bool isSetMask = false"),
    ("bool enSequentialWrite = false, bool waitIterateAll", "bool waitIterateAll = false, bool enSequentialWrite"),
])
def test_swapped_parameters_of_one_type_and_other_defaults_are_noticed(right, wrong):
    rows = [row for row in rows_of("910b") if right in row.signature]
    assert rows
    for row in rows:
        assert not is_declared(row._replace(signature=row.signature.replace(right, wrong)), "910b"), row


@SIDES
def test_macros_take_the_documented_arguments(chip):
    for row in table():
        if row.kind == "macro" and is_device(row) == (chip is not None):
            macros = header((row.header,), *options_of(chip))[1]
            assert (row.name in macros) == has(row, chip), row
            shapes = [(text.count(","), "..." in text, bool(text))
                      for text in (row.signature.removeprefix(row.name), macros.get(row.name) or "")]
            assert shapes[0] == shapes[1] or not has(row, chip), row


@pytest.mark.parametrize("chip", CHIPS)
def test_every_function_of_the_device_headers_has_its_row(chip):
    functions, _ = declared(header(DEVICE_HEADERS, *options_of(chip))[0])
    assert functions == Counter(row.name.split("::")[-1] for row in rows_of(chip)
                                if row.kind in ("function", "member") and "operator" not in row.name)


def sources(folder):
    return [path for path in sorted(ROOT.glob(f"*/{folder}/*")) if path.suffix in (".h", ".cpp")]


def not_in_the_table(source, rows, headers, options):
    """What a source uses of what the headers declare, without its own names and those of the rows."""
    text, macros = header(headers, *options)
    functions, others = declared(text)
    source = tokens(re.sub(r'//.*|/\*.*?\*/|"[^"\n]*"', " ", source))
    own_functions, own = declared(source)
    used = set(re.findall(r"[A-Za-z_]\w*", source)) - set(own_functions) - own
    known = {name for row in rows for name in row.name.split("::")}
    for row in rows:
        if row.kind in ("struct", "fields", "enum", "enumerators"):
            known |= set(re.findall(r"\w+", row.signature))
    return used & (set(functions) | others | set(macros)) - known


@pytest.mark.parametrize("folder, headers, options", [("op_kernel", DEVICE_HEADERS, options_of("910b")),
                                                      ("op_host", HOST_HEADERS, HOST_OPTIONS)])
def test_what_the_operators_use_is_in_the_table(folder, headers, options):
    assert sources(folder)
    for path in sources(folder):
        assert not not_in_the_table(path.read_text(encoding="utf-8"), table(), headers, options), path


def test_a_use_without_a_row_is_noticed():
    source = "void Scale(AscendC::LocalTensor<float>& x) { Exp(x, x, 8); x.SetSize(DEFAULT_BLK_NUM); }  // Ln\n" \
             "constexpr auto kMode = RoundMode::CAST_ODD;"
    rows = [row for row in table() if row.name not in ("Exp", "RoundMode", "LocalTensor::SetSize")]
    assert not_in_the_table(source, rows, DEVICE_HEADERS, options_of("910b")) == {
        "Exp", "RoundMode", "CAST_ODD", "SetSize", "DEFAULT_BLK_NUM"}


def test_what_is_undocumented_for_a_chip_is_there_only_for_a_kernel_that_needs_it():
    used = " ".join(path.read_text(encoding="utf-8") for path in sources("op_kernel"))
    for row in table():
        assert row.chips in ("both", *CHIPS) and row.undocumented in ("", *({*CHIPS} - {row.chips})), row
        assert not row.undocumented or row.name.split("::")[-1] in used, row
