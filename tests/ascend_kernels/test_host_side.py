"""The operators' host side without CANN: definitions are checked, host functions see what the caller gave, tiling data
has one layout on both sides, and a Matmul's tiling keeps the limits that CANN documents."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ascend_kernels.host import tiling
from ascend_kernels.host.tiling import PLATFORMS, TilingError, compile_op, snake_case

INCLUDE = Path(tiling.__file__).parent / "include"
SOCS = tuple(PLATFORMS)

X = 'Input("x").ParamType(REQUIRED).DataType({ge::DT_FLOAT, ge::DT_BF16}).Format({ge::FORMAT_ND, ge::FORMAT_ND});'
Y = X.replace('Input("x")', 'Output("y")')
CHIP = 'AICore().AddConfig("ascend910b");'


def compile_definition(folder, *statements, name="Sample", before="", after=""):
    """The Op whose definition has these statements."""
    source = folder / "sample.cpp"
    lines = ['#include "register/op_def_registry.h"', before, "namespace ops {", f"class {name} : public OpDef {{",
             " public:", f"  explicit {name}(const char* name) : OpDef(name) {{", *statements, "  }", "};",
             f"OP_ADD({name});", after, "}", ""]
    source.write_text("\n".join(lines), encoding="utf-8")
    return compile_op(source)


# ---- Names ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("op_type", "name"), [  # the examples in CANN's documentation
    ("AddCustom", "add_custom"), ("ReduceMaxCustom", "reduce_max_custom"), ("BatchNormCustom", "batch_norm_custom"),
    ("Conv2DCustom", "conv2_d_custom"), ("GatherV2Custom", "gather_v2_custom"), ("SplitVCustom", "split_v_custom"),
    ("TopKCustom", "top_k_custom"), ("AbcAAc", "abc_a_ac"), ("GRUCell", "gru_cell"), ("Add", "add"),
    ("HTTPServerCustom", "http_server_custom"), ("PanguTopkKl", "pangu_topk_kl"),
])
def test_a_kernel_is_named_by_the_rule_of_cann(op_type, name):
    assert snake_case(op_type) == name


# ---- Definitions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("statements", "message"), [
    ([X.replace(".ParamType(REQUIRED)", ""), Y, CHIP], "Sample: x has no ParamType"),
    ([X, Y.replace(".DataType({ge::DT_FLOAT, ge::DT_BF16})", ""), CHIP], "Sample: y has no DataType"),
    ([X, Y.replace("ge::DT_FLOAT, ", ""), CHIP], r"differ in length: \{'x': \(2, 2\), 'y': \(1, 2\)\}"),
    ([X, Y.replace("ge::DT_FLOAT, ", "").replace("ge::FORMAT_ND, ", ""), CHIP], r"'x': \(2, 2\), 'y': \(1, 1\)"),
    ([X.replace("Format", "UnknownShapeFormat").replace("ge::FORMAT_ND, ", ""), Y, CHIP],
     "x has 2 formats, and 1 for unknown shapes"),
    ([X, Y], "Sample: no chip: call AICore"),
    ([X, Y, 'AICore().AddConfig("ascend910");'], r"AddConfig\('ascend910'\): expected one of \['ascend910b', "),
    ([X, Y, CHIP, 'Attr("n");'], "attribute n has no type: call Int, Float"),
    ([X, Y, CHIP, 'Attr("n").AttrType(OPTIONAL).Int();'], "attribute n is optional and has no default"),
    ([X, Y, 'OpAICoreConfig own; own.Input("z").DataType({ge::DT_FLOAT}); AICore().AddConfig("ascend910b", own);'],
     r"ascend910b: inputs \['z'\] are not in the definition"),
    ([X, Y, 'OpAICoreConfig own; own.Output("y").DataType({ge::DT_FLOAT}); AICore().AddConfig("ascend310b", own);'],
     r"ascend310b: DataType and Format lists are combined by position and differ in length: .*'y': \(1, 2\)"),
    ([X, Y, 'OpAICoreConfig own; own.Input("x").ParamType(OPTIONAL); AICore().AddConfig("ascend310b", own);'],
     "ascend310b: x changes its ParamType"),
])
def test_a_definition_that_cann_would_refuse_is_refused(tmp_path, statements, message):
    with pytest.raises(ValueError, match=message):
        compile_definition(tmp_path, *statements)


@pytest.mark.parametrize("name", ["sample", "Sample_2"])
def test_a_name_that_cann_would_refuse_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"OpType '{name}': expected letters and digits, a capital first"):
        compile_definition(tmp_path, X, Y, CHIP, name=name)


def test_a_source_registers_one_operator(tmp_path):
    with pytest.raises(ValueError, match=r"2 operators are registered with OP_ADD, expected one"):
        compile_definition(tmp_path, X, Y, CHIP, after="using Twice = Sample; OP_ADD(Twice);")
    with pytest.raises(ValueError, match="redefinition of .*Sample"):
        compile_definition(tmp_path, X, Y, CHIP, after="OP_ADD(Sample);")
    (tmp_path / "none.cpp").write_text('#include "register/op_def_registry.h"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="0 operators"):
        compile_op(tmp_path / "none.cpp")


@pytest.mark.parametrize(("statement", "message"), [
    ('Input("x").DataTypes({ge::DT_FLOAT});', "no member named .DataTypes"),
    ('AICore().AddConfig("ascend910b").AddConfig("ascend310b");', "void"),  # it returns nothing in some versions
    ("const auto twice = [](auto value) { return 2 * value; };", r"only available with .-std=c\+\+14"),
])
def test_what_cann_would_not_compile_does_not_compile(tmp_path, statement, message):
    with pytest.raises(ValueError, match=message):
        compile_definition(tmp_path, statement)


def test_definition_says_all_that_the_source_says(tmp_path):
    op = compile_definition(
        tmp_path, X, X.replace('"x"', '"mask"').replace("REQUIRED", "OPTIONAL"),
        X.replace('"x"', '"rest"').replace("REQUIRED", "DYNAMIC"),
        'Input("sizes").ParamType(REQUIRED).DataType({ge::DT_INT64, ge::DT_INT64}).ValueDepend(OPTIONAL);',
        Y, 'Output("y").InitValue(0);',
        'Attr("flag").AttrType(OPTIONAL).Bool(true);', 'Attr("scale").AttrType(OPTIONAL).Float(0.1f);',
        'Attr("low").AttrType(OPTIONAL).Float(-std::numeric_limits<float>::infinity());',
        'Attr("count").AttrType(OPTIONAL).Int(1ll << 40);', r'Attr("text").AttrType(OPTIONAL).String("a \"b\" \\ c");',
        'Attr("sizes").AttrType(OPTIONAL).ListInt({3, -1});', 'Attr("none").AttrType(OPTIONAL).ListInt({});',
        'Attr("scales").AttrType(OPTIONAL).ListFloat({0.5f, 2});', 'Attr("needed").Int();', CHIP,
        "OpAICoreConfig own;", 'own.Input("x").DataType({ge::DT_FLOAT16, ge::DT_FLOAT16});',
        'own.DynamicRankSupportFlag(true).ExtendCfgInfo("opInterface.value", "other");',
        'AICore().AddConfig("ascend310b", own);', before="#include <limits>")
    definition = op.definition()
    both, halves, nd, whole = ["float32", "bfloat16"], ["float16"] * 2, ["ND", "ND"], ["int64"] * 2

    def param(name, kind, dtypes=both, value_depend=False, init_value=None):
        return {"name": name, "param_type": kind, "dtypes": dtypes, "formats": nd, "value_depend": value_depend,
                "init_value": init_value}

    assert definition["inputs"] == [param("x", "required"), param("mask", "optional"), param("rest", "dynamic"),
                                    param("sizes", "required", whole, value_depend=True)]
    assert definition["outputs"] == [param("y", "required", init_value=0)]
    assert [(attr["name"], attr["type"], attr["required"], attr["default"]) for attr in definition["attrs"]] == [
        ("flag", "bool", False, True), ("scale", "float", False, pytest.approx(0.1, rel=1e-7)),
        ("low", "float", False, -np.inf), ("count", "int", False, 1 << 40), ("text", "string", False, 'a "b" \\ c'),
        ("sizes", "list_int", False, [3, -1]), ("none", "list_int", False, []),
        ("scales", "list_float", False, [0.5, 2]), ("needed", "int", True, None)]
    inputs = {"x": both, "mask": both, "rest": both, "sizes": whole}
    assert definition["socs"] == {
        "ascend910b": {"inputs": inputs, "outputs": {"y": both}, "options": {}},
        "ascend310b": {"inputs": inputs | {"x": halves}, "outputs": {"y": both},
                       "options": {"dynamicRankSupport.flag": "true", "opInterface.value": "other"}}}
    assert (definition["type"], definition["kernel"], definition["aclnn"]) == ("Sample", "sample", "aclnnSample")
    assert not any(definition[name] for name in ("has_tiling", "has_infer_shape", "has_infer_dtype"))
    definition["inputs"].clear()
    assert op.definition()["inputs"], "definition() must be a copy"
    for function, call in (("Tiling", lambda: op.tiling("ascend910b", [], [Y_GIVEN])),
                           ("InferShape", lambda: op.infer_shape([])), ("InferDataType", lambda: op.infer_dtype([]))):
        with pytest.raises(ValueError, match=f"Sample has no function for this: call Set{function} in its definition"):
            call()


def test_a_source_is_compiled_again_when_its_header_changes(tmp_path):
    for number in (3, 4):
        (tmp_path / "own.h").write_text(f"constexpr int kDefault = {number};\n", encoding="utf-8")
        op = compile_definition(tmp_path, X, Y, CHIP, 'Attr("n").AttrType(OPTIONAL).Int(kDefault);',
                                before='#include "own.h"')
        assert op.definition()["attrs"][0]["default"] == number


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="install g"):
        compile_definition(tmp_path, X, Y, CHIP)


# ---- Tiling and infer functions -------------------------------------------------------------------------------------

# Its tiling data is a JSON text of what it saw. The attribute `deed` makes it misbehave.
SEEING = r"""
#include <cstring>
#include <sstream>

#include "register/op_def_registry.h"
#include "register/tilingdata_base.h"
#include "tiling/platform/platform_ascendc.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(Sizes)
TILING_DATA_FIELD_DEF(int32_t, count);
TILING_DATA_FIELD_DEF(int64_t, bytes);
END_TILING_DATA_DEF;
struct Large { char bytes[1 << 20]; };

std::string Text(const gert::Shape& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.GetDimNum(); i++) text << (i ? ", " : "") << shape.GetDim(i);
  text << "]";
  return text.str();
}

template <class T>
std::string Text(const T* values, size_t count) {
  std::ostringstream text;
  text.precision(9);
  text << "[";
  for (size_t i = 0; i < count; i++) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

std::string Input(const gert::StorageShape* shape, const gert::CompileTimeTensorDesc* desc,
                  const gert::Tensor* tensor) {
  if (shape == nullptr || desc == nullptr || tensor == nullptr) {
    return shape == nullptr && desc == nullptr && tensor == nullptr ? "null" : "\"some\"";
  }
  std::ostringstream text;
  text << "{\"shape\": " << Text(shape->GetStorageShape()) << ", \"dtype\": " << desc->GetDataType()
       << ", \"elements\": " << tensor->GetShapeSize() << ", \"values\": ";
  if (tensor->GetAddr() == nullptr) {
    text << "null}";
  } else {
    text << Text(tensor->GetData<int64_t>(), tensor->GetSize() / sizeof(int64_t)) << "}";
  }
  return text.str();
}

ge::graphStatus Tile(gert::TilingContext* context) {
  const gert::RuntimeAttrs* attrs = context->GetAttrs();
  Sizes sizes;
  char buffer[64];
  gert::Shape shape;
  switch (*attrs->GetInt(0)) {
    case 1:
      std::fprintf(stderr, "Seeing: x has 7 rows, expected 8\n");
      return ge::GRAPH_FAILED;
    case 2: return ge::GRAPH_FAILED;
    case 3: return ge::GRAPH_SUCCESS;
    case 4: context->GetWorkspaceSizes(2)[1] = 8; break;
    case 5: context->GetInputShape(2); break;
    case 6: attrs->GetFloat(0); break;
    case 7: attrs->GetInt(attrs->GetAttrNum()); break;
    case 8: context->GetInputShape(0)->GetStorageShape().GetDim(2); break;
    case 9:
      for (int i = 0; i < 26; i++) shape.AppendDim(1);
      break;
    case 10: sizes.SaveToBuffer(buffer, sizes.GetDataSize() - 1); break;
    case 11:
      if (context->GetTilingData<Large>() == nullptr) std::fprintf(stderr, "Seeing: no place for Large\n");
      return ge::GRAPH_FAILED;
    case 12: std::fprintf(stderr, "Seeing: a warning\n"); break;
    case 13:
      shape = {2, 3};
      shape.SetDim(2, 4);
      break;
    default: break;
  }
  std::ostringstream text;
  const auto optional = [context](size_t i) {
    return Input(context->GetOptionalInputShape(i), context->GetOptionalInputDesc(i),
                 context->GetOptionalInputTensor(i));
  };
  text << "{\"inputs\": [" << Input(context->GetRequiredInputShape(0), context->GetRequiredInputDesc(0),
                                    context->GetRequiredInputTensor(0));
  text << ", " << optional(1) << ", " << optional(2) << ", " << optional(3) << "], \"beyond\": " << optional(4);
  text << ", \"present\": " << context->GetComputeNodeInputNum() << ", \"output\": "
       << Text(context->GetOutputShape(0)->GetStorageShape()) << ", \"output_dtype\": "
       << context->GetOutputDesc(0)->GetDataType() << ", \"type\": \"" << context->GetNodeType() << "\"";
  text << ", \"attrs\": [" << *attrs->GetBool(1) << ", " << Text(attrs->GetFloat(2), 1) << ", \"" << attrs->GetStr(3)
       << "\", " << Text(attrs->GetListInt(4)->GetData(), attrs->GetListInt(4)->GetSize()) << ", "
       << Text(attrs->GetListFloat(5)->GetData(), attrs->GetListFloat(5)->GetSize()) << ", "
       << *attrs->GetAttrPointer<int64_t>(0) << "]";
  const platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  using platform_ascendc::CoreMemType;
  text << ", \"cores\": [" << platform.GetCoreNumAic() << ", " << platform.GetCoreNumAiv() << "], \"memories\": [";
  for (const CoreMemType type : {CoreMemType::UB, CoreMemType::L1, CoreMemType::L0_A, CoreMemType::L0_B,
                                 CoreMemType::L0_C, CoreMemType::L2}) {
    uint64_t bytes = 0;
    platform.GetCoreMemSize(type, bytes);
    text << bytes << ", ";
  }
  text << platform.GetLibApiWorkSpaceSize() << "], \"is_310b\": "
       << (platform.GetSocVersion() == platform_ascendc::SocVersion::ASCEND310B) << "}";
  std::memcpy(context->GetRawTilingData()->GetData(), text.str().data(), text.str().size());
  context->GetRawTilingData()->SetDataSize(text.str().size());
  context->SetTilingKey(1ull << 40 | 5);
  context->SetScheduleMode(1);
  context->SetNeedAtomic(true);
  if (*attrs->GetInt(0) == 0) context->GetWorkspaceSizes(1)[0] = 5ull << 32;
  return context->SetBlockDim(platform.GetCoreNumAiv());
}
}  // namespace optiling

namespace ge {
// y is x's transpose of as many columns as `sizes` is long, if there is one; float where `mask` is int32.
ge::graphStatus InferShape(gert::InferShapeContext* context) {
  const gert::Shape& x = *context->GetRequiredInputShape(0);
  if (x.GetDimNum() != 2) {
    std::fprintf(stderr, "Seeing: x has %zu dimensions, expected 2\n", x.GetDimNum());
    return GRAPH_FAILED;
  }
  const gert::Shape* sizes = context->GetOptionalInputShape(2);
  *context->GetOutputShape(0) = {x[1], sizes == nullptr ? x[0] : sizes->GetDim(0)};
  return GRAPH_SUCCESS;
}
ge::graphStatus InferDtype(gert::InferDataTypeContext* context) {
  const bool whole = context->GetOptionalInputDataType(1) == DT_INT32;
  return context->SetOutputDataType(0, whole ? DT_FLOAT : context->GetRequiredInputDataType(0));
}
}  // namespace ge

namespace ops {
class Seeing : public OpDef {
 public:
  explicit Seeing(const char* name) : OpDef(name) {
    Input("x").ParamType(REQUIRED).DataType({ge::DT_FLOAT16});
    Input("mask").ParamType(OPTIONAL).DataType({ge::DT_INT32});
    Input("sizes").ParamType(OPTIONAL).DataType({ge::DT_INT64}).ValueDepend(OPTIONAL);
    Input("bias").ParamType(OPTIONAL).DataType({ge::DT_FLOAT});
    Output("y").ParamType(REQUIRED).DataType({ge::DT_FLOAT16});
    Attr("deed").AttrType(REQUIRED).Int();
    Attr("flag").AttrType(OPTIONAL).Bool(true);
    Attr("scale").AttrType(OPTIONAL).Float(0.1f);
    Attr("text").AttrType(OPTIONAL).String("default");
    Attr("axes").AttrType(OPTIONAL).ListInt({-1, 1LL << 40});
    Attr("scales").AttrType(OPTIONAL).ListFloat({0.25f, 3});
    AICore().SetTiling(optiling::Tile);
    AICore().AddConfig("ascend910b");
    AICore().AddConfig("ascend310b");
    SetInferShape(ge::InferShape).SetInferDataType(ge::InferDtype);
  }
};
OP_ADD(Seeing);
}  // namespace ops
"""
X_GIVEN, Y_GIVEN, SIZES = ((7, 5), "float16"), ((5, 7), "float16"), ((3,), "int64", np.array([4, -1, 1 << 40]))
X_SEEN = {"shape": [7, 5], "dtype": 1, "elements": 35, "values": None}
SIZES_SEEN = {"shape": [3], "dtype": 9, "elements": 3, "values": [4, -1, 1 << 40]}
BIAS_SEEN = {"shape": [], "dtype": 0, "elements": 1, "values": None}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    source = tmp_path_factory.mktemp("seeing") / "seeing.cpp"
    source.write_text(SEEING, encoding="utf-8")
    return compile_op(source)


def see(seeing, inputs=(X_GIVEN, None, None, None), attrs=(0,), soc="ascend910b", **options):
    return json.loads(seeing.tiling(soc, inputs, [Y_GIVEN], attrs, **options).data)


@pytest.mark.parametrize(("inputs", "expected"), [
    ([X_GIVEN, None, None, None], [X_SEEN, None, None, None]),
    ([X_GIVEN, None, SIZES, ((), "float32")], [X_SEEN, None, SIZES_SEEN, BIAS_SEEN]),
    ([X_GIVEN, ((7,), "int32"), SIZES[:2], None],
     [X_SEEN, X_SEEN | {"shape": [7], "dtype": 3, "elements": 7}, SIZES_SEEN | {"values": None}, None]),
])
def test_a_tiling_function_sees_the_inputs_by_their_place_in_the_definition(seeing, inputs, expected):
    """Absent ones are null, and values are there for inputs with ValueDepend that the caller gave."""
    seen = see(seeing, inputs)
    assert seen["inputs"] == expected and seen["beyond"] is None
    assert seen["present"] == sum(value is not None for value in inputs)
    assert (seen["output"], seen["output_dtype"], seen["type"]) == ([5, 7], 1, "Seeing")


def test_a_tiling_function_sees_attributes_and_their_defaults(seeing):
    def seen(*attrs):
        return see(seeing, attrs=attrs)["attrs"]

    defaults = [1, [pytest.approx(0.1, rel=1e-7)], "default", [-1, 1 << 40], [0.25, 3], 0]
    assert seen(0) == defaults
    assert seen(-3, None, None, None, None, None) == [*defaults[:5], -3]
    assert seen(0, False, 2.5, "other", [], [1e30]) == [0, [2.5], "other", [], [pytest.approx(1e30)], 0]
    assert seen(0, None, None, "", [7]) == [1, defaults[1], "", [7], defaults[4], 0]


@pytest.mark.parametrize(("soc", "cores", "memories"), [
    ("ascend910b", [20, 40], [192 * 1024 - 256, 512 * 1024 - 256, 65536, 65536, 131072, 192 << 20, 16 << 20]),
    ("ascend310b", [1, 1], [248 * 1024, 1024 * 1024, 65536, 65536, 131072, 4 << 20, 2 << 20]),
])
def test_a_tiling_function_sees_the_chip(seeing, soc, cores, memories):
    seen = see(seeing, soc=soc)
    assert (seen["cores"], seen["memories"], seen["is_310b"]) == (cores, memories, soc == "ascend310b")
    seen = see(seeing, soc=soc, cores=6, ub_bytes=4096)
    assert seen["cores"] == [6 * cores[0] // cores[1], 6] and seen["memories"] == [4096, *memories[1:]]


def test_tiling_returns_what_the_function_set(seeing):
    result = seeing.tiling("ascend910b", [X_GIVEN, None, None, None], [Y_GIVEN], [0], cores=4)
    assert (result.num_blocks, result.key, result.workspace_bytes) == (4, 1 << 40 | 5, 5 << 32)
    assert result.need_atomic and result.schedule_mode == 1
    assert seeing.tiling("ascend910b", [X_GIVEN, None, None, None], [Y_GIVEN], [12]).workspace_bytes == 0


@pytest.mark.parametrize(("deed", "message"), [
    (1, "^Seeing: x has 7 rows, expected 8$"),
    (2, "^Seeing returned GRAPH_FAILED without a message$"),
    (3, "did not call SetBlockDim"),
    (4, "2 workspaces, expected one"),
    (5, r"Seeing broke a rule of CANN: input 2 is read with GetInput\*, and input 1 is absent"),
    (6, "attribute 0 is of type int, read as float"),
    (7, "attribute 6 of an operator with 6"),
    (8, "dimension 2 of a shape with 2: check GetDimNum first"),
    (9, r"SetDimNum\(26\): at most 25"),
    (10, "SaveToBuffer: the tiling data has 16 bytes, the buffer 15"),
    (11, "^Seeing: no place for Large$"),
    (13, "dimension 2 of a shape with 2: .*SetDimNum before SetDim"),
])
def test_a_failed_tiling_raises_what_the_function_said(seeing, capfd, deed, message):
    with pytest.raises(TilingError, match=message):
        see(seeing, attrs=(deed,))
    assert see(seeing)["type"] == "Seeing", "the next call starts anew"
    assert capfd.readouterr() == ("", ""), "what a function says is in the error, not on stderr"


def test_what_is_said_in_a_tiling_that_succeeds_is_no_error(seeing, capfd):
    assert see(seeing, attrs=(12,))["attrs"][-1] == 12
    assert capfd.readouterr().err == ""


def test_shapes_and_dtypes_are_inferred_by_place_too(seeing):
    assert seeing.infer_shape([(7, 5), None, None, None], [0]) == [(5, 7)]
    assert seeing.infer_shape([(7, -1), None, (3,), (1,)], [0]) == [(-1, 3)]
    with pytest.raises(TilingError, match="^Seeing: x has 3 dimensions, expected 2$"):
        seeing.infer_shape([(7, 5, 1), None, None, None], [0])
    assert seeing.infer_dtype(["bfloat16", None, "int64", None], [0]) == ["bfloat16"]
    assert seeing.infer_dtype(["bfloat16", "int32", None, None], [0]) == ["float32"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"inputs": [X_GIVEN]}, "Seeing: 1 inputs, expected 4; None is an absent one"),
    ({"inputs": [None] * 4}, "Seeing: x is required"),
    ({"outputs": []}, "Seeing: 0 outputs, expected 1"),
    ({"attrs": []}, "Seeing: attribute deed is required"),
    ({"attrs": [0] * 7}, "Seeing: 7 attributes, expected 6"),
    ({"soc": "ascend910"}, r"Seeing is defined for \['ascend910b', 'ascend310b'\], not for ascend910"),
    ({"cores": 5}, "cores=5: ascend910b has 2 vector cores per cube core"),
    ({"cores": 0}, "cores=0"),
])
def test_a_call_that_does_not_fit_the_definition_is_refused(seeing, arguments, message):
    call = {"soc": "ascend910b", "inputs": [X_GIVEN, None, None, None], "outputs": [Y_GIVEN], "attrs": [0]} | arguments
    with pytest.raises(ValueError, match=message):
        seeing.tiling(**call)


# ---- Tiling data ----------------------------------------------------------------------------------------------------

FORMATS = {"int8_t": "b", "uint8_t": "B", "int16_t": "h", "uint16_t": "H", "int32_t": "i", "uint32_t": "I",
           "int64_t": "q", "uint64_t": "Q", "float": "f"}


def random_structs(num_structs=8):
    """{name: [(type or earlier struct, elements or None for no array, field)]}."""
    random, structs = np.random.default_rng(3), {}
    for number in range(num_structs):
        types = [*FORMATS, *structs]
        structs[f"Data{number}"] = [
            (type_, None if type_ in structs or random.random() < 0.6 else int(random.integers(1, 6)), f"field{place}")
            for place, type_ in enumerate(random.choice(types, int(random.integers(1, 9))))]
    return structs


STRUCTS = random_structs()


def layout(name):
    """[(path, type, offset)] of the scalars and arrays' elements, and the size: offsets are multiples of what is there,
    those of structs and the size of 8."""
    leaves, end = [], 0
    for type_, elements, field in STRUCTS[name]:
        if type_ in STRUCTS:
            begin = -(-end // 8) * 8
            inner, size = layout(type_)
            leaves += [(f"{field}.{path}", leaf, begin + offset) for path, leaf, offset in inner]
            end = begin + size
        else:
            size = struct.calcsize(FORMATS[type_])
            begin = -(-end // size) * size
            paths = [field] if elements is None else [f"{field}[{i}]" for i in range(elements)]
            leaves += [(path, type_, begin + i * size) for i, path in enumerate(paths)]
            end = begin + len(paths) * size
    return leaves, -(-end // 8) * 8


def setters(name, prefix, values):
    """Statements that give the fields of a class the values, in order."""
    statements = []
    for type_, elements, field in STRUCTS[name]:
        if type_ in STRUCTS:
            statements += setters(type_, f"{prefix}{field}.", values)
        elif elements is None:
            statements.append(f"{prefix}set_{field}({next(values)});")
        else:
            given = ", ".join(str(next(values)) for _ in range(elements))
            statements.append(f"{{ const {type_} values[] = {{{given}}}; {prefix}set_{field}(values); }}")
    return statements


def struct_header():
    lines = ['#include "register/tilingdata_base.h"', "namespace optiling {"]
    for name, fields in STRUCTS.items():
        lines.append(f"BEGIN_TILING_DATA_DEF({name})")
        for type_, elements, field in fields:
            kind = "_STRUCT" if type_ in STRUCTS else "_ARR" if elements else ""
            lines.append(f"TILING_DATA_FIELD_DEF{kind}({', '.join(map(str, filter(None, (type_, elements, field))))});")
        lines += ["END_TILING_DATA_DEF;", f"REGISTER_TILING_DATA_CLASS({name}Op, {name})"]
    return "\n".join([*lines, "}", ""])


def test_tiling_data_has_the_same_bytes_on_the_host_and_in_kernels(tmp_path):
    """Random structs of all types with arrays and nested structs, against offsets by the documented rule."""
    assert any(type_ in STRUCTS for fields in STRUCTS.values() for type_, _, _ in fields)
    (tmp_path / "structs.h").write_text(struct_header(), encoding="utf-8")
    cases, expected = [], []
    for number, name in enumerate(STRUCTS):
        leaves, size = layout(name)
        values = [(7 * place + number) % 120 for place in range(len(leaves))]
        packed = bytearray(size)
        for (_, type_, offset), value in zip(leaves, values, strict=True):
            struct.pack_into(FORMATS[type_], packed, offset, value)
        expected.append(bytes(packed))
        # The copy has values of its own: the first object's are cleared before the copy is saved.
        cases += [f"case {number}: {{", f"{name} first;", *setters(name, "first.", iter(values)),
                  f"{name} copy = first;", f"first = {name}();", "return Save(context, copy);", "}"]
    before = "\n".join([
        '#include "structs.h"', "using namespace optiling;", "template <class T>",
        "ge::graphStatus Save(gert::TilingContext* context, const T& data) {",
        "  gert::TilingData* raw = context->GetRawTilingData();",
        "  data.SaveToBuffer(raw->GetData(), raw->GetCapacity());", "  raw->SetDataSize(data.GetDataSize());",
        "  return context->SetBlockDim(1);", "}", "ge::graphStatus Tile(gert::TilingContext* context) {",
        "  switch (*context->GetAttrs()->GetInt(0)) {", *cases, "default: return ge::GRAPH_FAILED;", "  }", "}"])
    op = compile_definition(tmp_path, X, Y, CHIP, 'Attr("which").Int();', "AICore().SetTiling(Tile);", before=before)
    for number, packed in enumerate(expected):
        assert op.tiling("ascend910b", [X_GIVEN], [Y_GIVEN], [number]).data == packed, STRUCTS[f"Data{number}"]

    checks = ['#include "structs.h"', "#include <type_traits>"]
    for name in STRUCTS:
        leaves, size = layout(name)
        checks.append(f"static_assert(sizeof({name}) == {size}, \"{name}\");")
        for path, type_, offset in leaves:
            same = f"std::is_same<decltype(({name}().{path})), {type_}&&>::value"
            checks.append(f"static_assert(offsetof({name}, {path}) == {offset} && {same}, \"{name} {path}\");")
    (tmp_path / "kernel.cpp").write_text("\n".join(checks), encoding="utf-8")
    done = subprocess.run([shutil.which("g++"), "-std=c++17", "-fsyntax-only", "-DPANGU_KERNEL_BUILD", f"-I{INCLUDE}",
                           tmp_path / "kernel.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("field", ["TILING_DATA_FIELD_DEF(bool, on)", "TILING_DATA_FIELD_DEF(double, scale)",
                                   "TILING_DATA_FIELD_DEF_ARR(char, 4, text)"])
def test_types_that_cann_does_not_document_for_fields_do_not_compile(tmp_path, field):
    with pytest.raises(ValueError, match="is no type of a field"):
        compile_definition(tmp_path, X, Y, CHIP, before='#include "register/tilingdata_base.h"\nBEGIN_TILING_DATA_DEF('
                                                        f"Wrong)\n{field};\nEND_TILING_DATA_DEF;")


# ---- The tiling of a Matmul -----------------------------------------------------------------------------------------

# A request is a list of numbers by name; the answer is CANN's struct and what the other getters say.
REQUEST = ("is_multi_core", "m", "n", "k", "type", "result_type", "transpose_a", "transpose_b", "bias", "cores",
           "base_m", "base_n", "base_k", "l1", "l0c", "bias_table", "position", "format", "single_m", "single_n",
           "single_k", "org_k", "first_n")
PRODUCT = r"""
#include "register/op_def_registry.h"
#include "tiling/tiling_api.h"

using namespace matmul_tiling;

enum Request { kNAMES };

// The sum of what the setters return is no less than 0 only where all took their arguments.
template <class Tiling>
int64_t Ask(Tiling& tiling, const int64_t* request, optiling::TCubeTiling& answer) {
  const auto type = static_cast<DataType>(request[kType]), result = static_cast<DataType>(request[kResultType]);
  const auto position = static_cast<TPosition>(request[kPosition]);
  const auto format = static_cast<CubeFormat>(request[kFormat]);
  int64_t sum = tiling.SetAType(position, format, type, request[kTransposeA] != 0);
  sum += tiling.SetBType(TPosition::GM, CubeFormat::ND, type, request[kTransposeB] != 0);
  sum += tiling.SetCType(TPosition::GM, CubeFormat::ND, result);
  if (request[kBias] == 1) sum += tiling.SetBiasType(TPosition::GM, CubeFormat::ND, DataType::DT_FLOAT);
  sum += tiling.EnableBias(request[kBias] != 0);
  sum += tiling.SetShape(request[kM], request[kN], request[kK]);
  if (request[kOrgK] > 0) sum += tiling.SetOrgShape(request[kM], request[kN], request[kOrgK]);
  sum += tiling.SetFixSplit(request[kBaseM], request[kBaseN], request[kBaseK]);
  sum += tiling.SetBufferSpace(request[kL1], request[kL0c], -1, request[kBiasTable]);
  sum += tiling.SetTraverse(request[kFirstN] != 0 ? MatrixTraverse::FIRSTN : MatrixTraverse::FIRSTM);
  return sum < 0 ? -2 : tiling.GetTiling(answer);
}

ge::graphStatus Tile(gert::TilingContext* context) {
  const int64_t* request = context->GetAttrs()->GetListInt(0)->GetData();
  const platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  optiling::TCubeTiling answer;
  int32_t more[9] = {};
  int64_t outcome;
  if (request[kIsMultiCore]) {
    MultiCoreMatmulTiling tiling(platform);
    outcome = tiling.SetDim(request[kCores]) | tiling.SetSingleShape(request[kSingleM], request[kSingleN],
                                                                     request[kSingleK]);
    outcome = outcome < 0 ? -2 : Ask(tiling, request, answer);
    tiling.GetSingleShape(more[3], more[4], more[5]);
    tiling.GetCoreNum(more[6], more[7], more[8]);
    more[0] = tiling.GetBaseM(), more[1] = tiling.GetBaseN(), more[2] = tiling.GetBaseK();
  } else {
    MatmulApiTiling tiling(platform);
    outcome = Ask(tiling, request, answer);
    more[0] = tiling.GetBaseM(), more[1] = tiling.GetBaseN(), more[2] = tiling.GetBaseK();
  }
  char* data = static_cast<char*>(context->GetRawTilingData()->GetData());
  answer.SaveToBuffer(data, answer.GetDataSize());
  std::memcpy(data + answer.GetDataSize(), more, sizeof(more));
  context->GetRawTilingData()->SetDataSize(answer.GetDataSize() + sizeof(more));
  context->SetTilingKey(-outcome);
  return context->SetBlockDim(1);
}
"""
FIELDS = ("usedCoreNum", "M", "N", "Ka", "Kb", "singleCoreM", "singleCoreN", "singleCoreK", "baseM", "baseN", "baseK",
          "depthA1", "depthB1", "stepM", "stepN", "isBias", "transLength", "iterateOrder", "shareMode", "shareL1Size",
          "shareL0CSize", "shareUbSize", "batchM", "batchN", "singleBatchM", "singleBatchN", "stepKa", "stepKb",
          "depthAL1CacheUB", "depthBL1CacheUB", "dbL0A", "dbL0B", "dbL0C")
GETTERS = ("BaseM", "BaseN", "BaseK", "SingleM", "SingleN", "SingleK", "dim", "mDim", "nDim")
GM, VECIN, ND, NZ, ZN = 0, 9, 0, 1, 2
FLOAT, HALF, INT8, INT32, BFLOAT = 0, 1, 2, 3, 27
BYTES = {FLOAT: 4, HALF: 2, INT8: 1, BFLOAT: 2}
FINE = {"m": 100, "n": 200, "k": 300, "type": HALF, "result_type": FLOAT, "cores": 4} | dict.fromkeys(
    ("base_m", "base_n", "base_k", "l1", "l0c", "bias_table", "single_m", "single_n", "single_k"), -1)
ANSWERED, NO_TILING, REFUSED = 0, 1, 2  # by GetTiling with 0 or -1, or by a setter


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(soc, **request): (outcome, fields of TCubeTiling and getters by name)."""
    names = ", ".join("k" + "".join(part.capitalize() for part in name.split("_")) for name in REQUEST)
    op = compile_definition(tmp_path_factory.mktemp("product"), X, Y, CHIP, 'AICore().AddConfig("ascend310b");',
                            'Attr("request").ListInt();', "AICore().SetTiling(Tile);",
                            before=PRODUCT.replace("kNAMES", names))

    def ask(soc, **request):
        assert set(request) <= set(REQUEST)
        request = FINE | request
        result = op.tiling(soc, [X_GIVEN], [Y_GIVEN], [[request.get(name, 0) for name in REQUEST]])
        numbers = np.frombuffer(result.data, np.int32).tolist()
        assert len(numbers) == 50 + len(GETTERS)
        return result.key, dict(zip(FIELDS, numbers, strict=False)) | dict(zip(GETTERS, numbers[50:], strict=True))

    return ask


def round_up(value, unit):
    return -(-value // unit) * unit


def check_limits(soc, request, tiling):
    """The constraints of CANN's page on TCubeTiling, and what the page says of the fields."""
    platform, size = PLATFORMS[soc], BYTES[request["type"]]
    fractal = 32 // size  # C0_size
    base_m, base_n, base_k = (tiling[name] for name in ("baseM", "baseN", "baseK"))
    assert base_m % 16 == 0 and base_n % 16 == 0 and min(base_m, base_n, base_k) > 0
    transposes = request["transpose_a"] or not request["transpose_b"]
    assert base_k % (max(16, fractal) if transposes else fractal) == 0
    assert base_m * base_k * size * tiling["dbL0A"] <= platform.l0a
    assert base_n * base_k * size * tiling["dbL0B"] <= platform.l0b
    assert base_m * base_n * 4 * tiling["dbL0C"] <= platform.l0c
    assert {tiling[name] for name in ("dbL0A", "dbL0B", "dbL0C")} <= {1, 2}
    bias_bytes = base_n * 4 if request["bias"] else 0
    assert bias_bytes <= 1024 and tiling["isBias"] == request["bias"]
    for depth, steps in ((tiling["depthA1"], tiling["stepM"] * tiling["stepKa"]),
                         (tiling["depthB1"], tiling["stepN"] * tiling["stepKb"])):
        assert depth in (steps, 2 * steps) and steps > 0
    rows_a = round_up(base_m, fractal) if request["transpose_a"] else base_m
    rows_b = base_n if request["transpose_b"] else round_up(base_n, fractal)
    in_l1 = (rows_a * tiling["depthA1"] + rows_b * tiling["depthB1"]) * base_k * size + bias_bytes
    assert in_l1 <= platform.l1
    # K is not all in L1: then M and N are taken step by step, and the loops over K divide each other.
    single_k = tiling["singleCoreK"]
    assert single_k <= base_k * tiling["stepKa"] or tiling["stepM"] == 1
    assert single_k <= base_k * tiling["stepKb"] or tiling["stepN"] == 1
    loops = sorted(-(-single_k // (base_k * tiling[step])) for step in ("stepKa", "stepKb"))
    assert loops[1] % loops[0] == 0
    assert (tiling["M"], tiling["N"], tiling["Ka"]) == (request["m"], request["n"], request["k"])
    assert tiling["Kb"] == single_k == request["k"]
    assert tiling["transLength"] == 0 and tiling["iterateOrder"] == request["first_n"]
    # What is not split is not made larger than the matrix in whole fractals.
    assert base_m <= round_up(tiling["singleCoreM"], 16) and base_n <= round_up(tiling["singleCoreN"], 16)


def random_requests(count, seed):
    random = np.random.default_rng(seed)
    for _ in range(count):
        m, n, k = (int(2 ** random.uniform(0, top)) for top in (14, 17, 14))
        type_ = int(random.choice([FLOAT, HALF, INT8, BFLOAT]))
        flags = {name: int(random.integers(2)) for name in ("transpose_a", "transpose_b", "bias", "first_n")}
        yield {"m": m, "n": n, "k": k, "type": type_, "result_type": INT32 if type_ == INT8 else FLOAT} | flags


@pytest.mark.parametrize("soc", SOCS)
def test_the_tiling_of_a_product_keeps_the_limits_of_the_chip(ask, soc):
    for request in random_requests(1500, seed=1):
        outcome, answer = ask(soc, **request)
        assert outcome == ANSWERED, request
        check_limits(soc, request, answer)
        assert answer["usedCoreNum"] == 1
        assert [answer[f"singleCore{side}"] for side in "MNK"] == [request[side] for side in "mnk"]
        assert [answer[f"Base{side}"] for side in "MNK"] == [answer[f"base{side}"] for side in "MNK"]


@pytest.mark.parametrize("soc", SOCS)
def test_the_tiling_of_a_product_on_several_cores_covers_it_evenly(ask, soc):
    random = np.random.default_rng(2)
    for request in random_requests(300, seed=3):
        cores = int(random.integers(1, 41))
        outcome, answer = ask(soc, is_multi_core=1, cores=cores, **request)
        assert outcome == ANSWERED, request
        check_limits(soc, request, answer)
        m, n, single_m, single_n = request["m"], request["n"], answer["singleCoreM"], answer["singleCoreN"]
        assert answer["usedCoreNum"] == answer["dim"] == answer["mDim"] * answer["nDim"] <= cores
        assert (answer["mDim"], answer["nDim"]) == (-(-m // single_m), -(-n // single_n))
        assert [answer[f"Single{side}"] for side in "MNK"] == [answer[f"singleCore{side}"] for side in "MNK"]
        # No other split into whole fractals leaves the busiest core less.
        least = min(round_up(-(-m // rows), 16) * round_up(-(-n // (cores // rows)), 16)
                    for rows in range(1, cores + 1))
        assert round_up(single_m, 16) * round_up(single_n, 16) == least


def test_fixed_sizes_and_smaller_buffers_are_taken_as_they_are(ask):
    for soc in SOCS:
        outcome, answer = ask(soc, base_m=32, base_n=48)
        assert outcome == ANSWERED and (answer["baseM"], answer["baseN"]) == (32, 48)
        outcome, answer = ask(soc, is_multi_core=1, cores=40, single_m=64, single_n=96)
        assert outcome == ANSWERED
        assert (answer["singleCoreM"], answer["singleCoreN"], answer["usedCoreNum"]) == (64, 96, 2 * 3)
        outcome, answer = ask(soc, m=5000, n=5000, k=5000, l1=65536, l0c=32768, bias=1, bias_table=128)
        assert outcome == ANSWERED and answer["baseM"] * answer["baseN"] * 4 * answer["dbL0C"] <= 32768
        assert answer["baseN"] * 4 <= 128
        rows = answer["baseM"] * answer["depthA1"] + answer["baseN"] * answer["depthB1"]
        assert rows * answer["baseK"] * 2 + answer["baseN"] * 4 <= 65536
        _, answer = ask(soc, org_k=512)
        assert (answer["Ka"], answer["Kb"], answer["singleCoreK"]) == (512, 512, 300)


@pytest.mark.parametrize(("outcome", "request_"), [
    (REFUSED, {"m": 0}), (REFUSED, {"n": -2}), (REFUSED, {"k": 0}),
    (REFUSED, {"base_m": 24}), (REFUSED, {"base_n": 0}),
    (REFUSED, {"base_k": 64}),  # "only -1" in the documentation
    (REFUSED, {"l1": 2 << 20}), (REFUSED, {"l0c": 131073}), (REFUSED, {"bias_table": 1025}), (REFUSED, {"format": ZN}),
    (REFUSED, {"is_multi_core": 1, "cores": 0}), (REFUSED, {"is_multi_core": 1, "single_m": 0}),
    (NO_TILING, {"type": INT8}), (NO_TILING, {"type": INT32, "result_type": INT32}),
    (NO_TILING, {"type": HALF, "result_type": INT32}),
    (NO_TILING, {"bias": 2}),  # a bias without a type
    (NO_TILING, {"base_m": 128}),  # more than M in whole fractals
    (NO_TILING, {"base_n": 224}), (NO_TILING, {"n": 20, "type": FLOAT, "base_n": 32}),
    (NO_TILING, {"m": 512, "n": 512, "base_m": 256, "base_n": 256}),  # 256 KB in L0C
    (NO_TILING, {"n": 512, "base_n": 512, "bias": 1}),  # 2 KB of bias
    (NO_TILING, {"m": 4096, "base_m": 2048, "base_n": 16}),  # not 16 of K in L0A
    (NO_TILING, {"l1": 1024}), (NO_TILING, {"l0c": 512}),
    (NO_TILING, {"is_multi_core": 1, "single_k": 150}),  # the cores' sums would have to be added
    (NO_TILING, {"is_multi_core": 1, "single_m": 16, "single_n": 16}),  # 7 times 13 cores
])
@pytest.mark.parametrize("soc", SOCS)
def test_a_product_that_cannot_be_is_answered_with_failure(ask, soc, outcome, request_):
    assert ask(soc)[0] == ANSWERED
    assert ask(soc, **request_)[0] == outcome


def test_only_910b_multiplies_what_is_not_in_global_memory(ask):
    assert [ask(soc, position=VECIN)[0] for soc in SOCS] == [ANSWERED, REFUSED]
    assert [ask(soc, format=NZ)[0] for soc in SOCS] == [ANSWERED, ANSWERED]
