"""What ONNX files are made of: nothing that TensorRT lacks, and no shape that depends on data."""

import re

import onnx
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.export import export_onnx
from tests.helpers.vits import lively

#: Of a plain ViT.
PLAIN = """Add Concat Conv Expand Gather Gelu Gemm LayerNormalization MatMul Mul Reshape Shape Slice
Softmax Squeeze Transpose"""

#: Strategies that keep as many tokens for each image, and the operators of their files beside
#: those of a plain ViT.
USED = {
    "Strategy": (lambda: tdm.Strategy(), ""),
    "TDM": (
        lambda: tdm.TDM(0.5, (1,)),
        """And ArgMax ArgMin Cast Clip CumSum Div Equal GatherElements Less Log Max Or Pad Range
        ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ScatterElements ScatterND Sub
        TopK Unsqueeze Where""",
    ),
    "WardTDM": (
        lambda: tdm.WardTDM(0.5, (1,)),
        """ArgMax Cast Clip CumSum Div Equal GatherElements Log Min Pad Range ReduceL2 ReduceMax
        ReduceMean ScatterElements ScatterND Sub TopK Unsqueeze""",
    ),
    "EViT": (lambda: tdm.EViT(0.5, (1,)), "GatherElements Range ReduceMean TopK Unsqueeze"),
    "EViT+TokenMerger": (
        lambda: tdm.EViT(0.5, (1,), merger=tdm.TokenMerger()),
        """And ArgMax ArgMin Cast Clip CumSum Div Equal GatherElements Less Log Max Or Pad Range
        ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ScatterElements ScatterND Sub
        TopK Unsqueeze Where""",
    ),
    "TopK": (lambda: tdm.TopK(0.5, (1,)), "Range ReduceMean TopK Unsqueeze"),
    "Random": (lambda: tdm.Random(0.5, (1,)), "Range TopK Unsqueeze"),
    "ToMe": (
        lambda: tdm.ToMe([0, 5, 0]),
        """ArgMax Cast Clip Div Equal GatherElements Log Pad Range ReduceL2 ReduceMax ReduceMean
        ScatterElements ScatterND Sub Tile TopK Unsqueeze""",
    ),
    "DPCKNN": (
        lambda: tdm.DPCKNN(0.5, (1,)),
        """And ArgMin Cast Div Equal GatherElements Less Log Max Or Range ReduceMean ReduceMin
        ScatterElements Sub TopK Unsqueeze Where""",
    ),
    "PiToMe": (
        lambda: tdm.PiToMe(0.5),
        """ArgMax Cast Clip CumSum Div Elu Equal GatherElements Range ReduceL2 ReduceMax
        ReduceMean ScatterElements ScatterND Sub TopK Unsqueeze""",
    ),
    "ToFu": (
        lambda: tdm.ToFu([3, 3, 3, 0]),
        """And ArgMax Cast Clip Div Equal GatherElements Greater Not Range ReduceL2 ReduceMax
        ReduceMean ScatterElements ScatterND Sub Tile TopK Unsqueeze""",
    ),
    "MCTF": (
        lambda: tdm.MCTF([0, 5, 0]),
        """ArgMax Cast Clip CumSum Div Equal GatherElements GatherND Log Max Not Pad Pow Range
        Reciprocal ReduceL2 ReduceMax ReduceMean ScatterElements ScatterND Sub TopK Unsqueeze
        Where""",
    ),
    "DiffRate": (
        lambda: tdm.DiffRate([12, 10, 6]),
        """ArgMax Cast Clip Div Equal GatherElements GreaterOrEqual Less Log Pad Range ReduceL2
        ReduceMax ReduceMean ScatterElements Sub TopK Unsqueeze Where""",
    ),
    "PSViT": (lambda: tdm.PSViT(), "TopK"),
    "EvoViT": (lambda: tdm.EvoViT(0.5), "GatherElements Range ReduceMean TopK Unsqueeze"),
    "DyViT": (lambda: tdm.DyViT(0.5, (1,)), "LogSoftmax Range ReduceMean TopK Unsqueeze"),
    "SPViT": (
        lambda: tdm.SPViT((1,), fixed_count=True),
        """And Cast Div Less LogSoftmax Not Range ReduceMax ReduceMean ReduceSum ScatterElements
        Sigmoid Sub TopK Unsqueeze Where""",
    ),
    "SViTE": (lambda: tdm.SViTE(), ""),
}

#: What the ViT of a strategy needs.
MADE = {
    "ToFu": {"depth": 4},
    "EvoViT": {"depth": 9, "class_token": False, "global_pool": "avg"},
}

#: Those whose shapes follow from what is in the image.
ADAPTIVE = {"AViT", "IARED2", "MPM", "MaMe"}

#: WardTDM tells equal gains apart in double precision; TensorRT makes single precision of it, and
#: takes them in its own order.
IN_DOUBLE = {"WardTDM"}


@pytest.mark.parametrize("name", USED)
def test_operators_that_tensorrt_has(name, tmp_path):
    made, operators = USED[name]
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    vit = lively(VisionTransformer(**{**shape, **MADE.get(name, {})}, num_classes=5).eval())
    model = tdm.attach(vit, made()).eval()
    for parameter in model.strategy.parameters():  # learned scores far from ties too
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    export_onnx(model, tmp_path / "m.onnx")  # and compare the logits
    graph = onnx.load(tmp_path / "m.onnx").graph
    found = {node.op_type for node in graph.node}
    assert found <= {*PLAIN.split(), *operators.split()}
    assert not found & {"NonZero", "Loop", "If", "Scan", "Unique", "Compress"}
    reductions = {a.s for node in graph.node for a in node.attribute if a.name == "reduction"}
    assert reductions <= {b"none"}  # of scatters
    values = [*graph.value_info, *graph.output]
    types = {value.type.tensor_type.elem_type for value in values}
    assert (onnx.TensorProto.DOUBLE in types) == (name in IN_DOUBLE)
    sizes = [size for value in values for size in value.type.tensor_type.shape.dim]
    symbols = {s for size in sizes for s in re.findall(r"[a-z]\w*", size.dim_param)}
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert symbols == {batch}  # no size but the batch's is free


def test_no_strategy_is_left_out():
    strategies = {
        name
        for name in tdm.strategies.__all__
        if issubclass(getattr(tdm, name, object), tdm.Strategy)
    }
    wrappers = {"TokenReduction", "Stack", "Distillation"}  # run what is given to them
    others = {"EViT+TokenMerger", "SViTE"}  # a second form, and one of another room
    assert strategies - wrappers == ADAPTIVE | USED.keys() - others
    assert all(getattr(tdm, name).adaptive for name in ADAPTIVE)
