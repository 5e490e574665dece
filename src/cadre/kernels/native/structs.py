"""The C++ kernels' structures, filled from tensors, which must live as long as they are pointed into: those that a `Keeper` has
been given do, as long as it lives itself."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from cadre.kernels.quantized import GROUP, QuantizedMatrix, levels

KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3


class Filled(Structure):
    """A structure that is given all of its fields in order, or some by name: ctypes would take missing ones for zeros."""

    def __init__(self, *values: Any, **named: Any) -> None:
        if values and len(values) != len(self._fields_):
            raise TypeError(f"{type(self).__name__} has {len(self._fields_)} fields, {len(values)} are given")
        super().__init__(*values, **named)


class Matrix(Filled):
    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("table", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("stride", c_int64),
        ("kind", c_int32),
    )


class LatentLayer(Filled):
    _fields_ = (
        *((name, c_void_p) for name in ("norm", "q_a_norm", "kv_a_norm")),
        *((name, Matrix) for name in ("q_a", "q", "kv_a", "kv_b", "o")),
        *((name, c_void_p) for name in ("q_a_bias", "kv_a_bias", "o_bias")),
        *((name, c_float) for name in ("eps", "inner_eps", "scale")),
        *((name, c_int32) for name in ("heads", "nope", "rotary", "value", "latent", "split")),
    )


class GroupedLayer(Filled):
    _fields_ = (
        *((name, c_void_p) for name in ("norm", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o")),
        *((name, c_void_p) for name in ("q_bias", "k_bias", "v_bias", "o_bias")),
        *((name, c_float) for name in ("eps", "scale")),
        *((name, c_int32) for name in ("heads", "groups", "width", "rotary", "together")),
    )


class Heads(Filled):
    _fields_ = (("data", c_void_p), ("token", c_int64), ("head", c_int64))


class CausalAttention(Filled):
    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "k_rotary", "out")),
        *((name, c_void_p) for name in ("log_sum", "turn", "first", "peak")),
        ("scale", c_float),
        *((name, c_int32) for name in ("batch", "queries", "length", "heads", "groups")),
        *((name, c_int32) for name in ("nope", "rotary", "value", "split", "factors", "threads")),
    )


class CausalGradient(Filled):
    _fields_ = tuple((name, Heads) for name in ("out", "q", "k", "v", "k_rotary"))


class DenseLayer(Filled):
    _fields_ = (("norm", c_void_p), *((name, Matrix) for name in ("gate", "up", "down")), ("eps", c_float))


class Router(Filled):
    _fields_ = (
        ("correction", c_void_p),
        ("experts", c_int64),
        *((name, c_int32) for name in ("top_k", "groups", "top_groups", "sigmoid", "normed")),
        ("scaling", c_float),
    )


class ExpertsLayer(Filled):
    _fields_ = (
        ("norm", c_void_p),
        ("router", Router),
        *((name, Matrix) for name in ("router_weight", "gate_up", "down", "shared_gate", "shared_up", "shared_down")),
        ("eps", c_float),
        ("width", c_int32),
    )


class MuonStep(Filled):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "gradient", "momentum")),
        *((name, c_int64) for name in ("batch", "rows", "cols")),
        ("steps", c_int32),
        *((name, c_float) for name in ("beta", "keep", "rate")),
    )


class ExpertsTraining(Filled):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "token", "row", "load", "weight", "gate", "up", "down")),
        *((name, POINTER(Matrix)) for name in ("quantized_gate_up", "quantized_down")),
        *((name, c_void_p) for name in ("inner", "y", "out")),
        *((name, c_int64) for name in ("tokens", "rows", "hidden", "width", "experts", "choices", "further")),
        *((name, c_int32) for name in ("factors", "halves", "adds", "threads")),
    )


class ExpertsGradient(Filled):
    _fields_ = tuple((name, c_void_p) for name in ("out", "x", "weight", "gate", "up", "down", "x_rows", "weight_rows"))


class AdamWStep(Filled):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "gradient", "mean", "square")),
        ("count", c_int64),
        *((name, c_float) for name in ("beta1", "beta2", "eps", "keep", "rate", "unbias")),
    )


class Span(Filled):
    _fields_ = (("data", c_void_p), ("count", c_int64))


class Routing(Filled):
    _fields_ = (
        ("logit", c_void_p),
        ("router", Router),
        *((name, c_void_p) for name in ("score", "expert", "weight")),
        ("tokens", c_int64),
        ("threads", c_int32),
    )


class RoutingGradient(Filled):
    _fields_ = tuple((name, c_void_p) for name in ("weight", "score", "logit"))


class Cache(Filled):
    _fields_ = (("first", c_void_p), ("second", c_void_p), ("kind", c_int32), ("page_size", c_int32))


class Step(Filled):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "turn", "position", "count", "start", "pages")),
        *((name, c_int32) for name in ("tokens", "sequences", "page_columns", "width", "threads")),
    )


def compare_layout(library: ctypes.CDLL, structure: type[Structure]) -> None:
    """Raises `RuntimeError` where C++ has the structure of that name otherwise: a kernel would miss what it is given."""
    layout = getattr(library, f"cadre_layout_{structure.__name__}")
    layout.argtypes, layout.restype = (), c_char_p
    own, native = _layout(structure), layout().decode()
    if own != native:
        raise RuntimeError(f"internal error: {structure.__name__} is, in structs.py, {own}; in C++, {native}")


def _layout(structure: type[Structure]) -> str:
    """In the words of layout.h."""
    names, fields = ", ".join(name for name, *_ in structure._fields_), ""
    for name, kind, *_ in structure._fields_:
        floating, whole = kind in (c_float, c_double), kind in (c_int32, c_int64)
        letter = "f" if floating else "i" if whole else "s" if issubclass(kind, Structure) else "p"
        fields += f" {letter}{ctypes.sizeof(kind)}@{getattr(structure, name).offset}"
    return f"{names}:{fields} of {ctypes.sizeof(structure)}"


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Keeper:
    """Hands out addresses and holds on to what lies there."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def vector(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 copy (or of the tensor itself if it is one); None stays None."""
        if tensor is None:
            return None
        wide = tensor.detach().float().contiguous()
        self.kept.append(wide)
        return wide.data_ptr()

    def matrix(self, weight: Tensor | QuantizedMatrix | None) -> Matrix:
        """A matrix [rows, cols] or a stack [E, rows, cols] seen as one of E * rows rows; None gives an empty one."""
        if weight is None:
            return Matrix()
        if isinstance(weight, QuantizedMatrix):
            table = levels()
            self.kept += [weight, table]
            stride = weight.cols if weight.bits == 8 else weight.scale.shape[1] * GROUP
            kind = INT8 if weight.bits == 8 else INT4
            data, scale = weight.data.data_ptr(), weight.scale.data_ptr()
            return Matrix(data, scale, table.data_ptr(), weight.rows, weight.cols, stride, kind)
        flat = weight.detach().flatten(0, -2)
        if flat.dtype not in KINDS or flat.stride(1) != 1:
            flat = flat.float().contiguous() if flat.dtype not in KINDS else flat.contiguous()
        self.kept.append(flat)
        return Matrix(flat.data_ptr(), None, None, *flat.shape, flat.stride(0), KINDS[flat.dtype])


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the functions' arguments. Raises `RuntimeError` if a structure here is not as it is in C++."""
    for structure in Filled.__subclasses__():
        compare_layout(library, structure)

    def function(name: str, *arguments: Any, result: Any = None) -> None:
        found = getattr(library, f"cadre_{name}")
        found.argtypes, found.restype = arguments, result

    function("latent_attention", POINTER(LatentLayer), POINTER(Cache), POINTER(Step))
    function("grouped_attention", POINTER(GroupedLayer), POINTER(Cache), POINTER(Step))
    function("causal_attention", POINTER(CausalAttention))
    function("causal_attention_gradient", POINTER(CausalAttention), POINTER(CausalGradient))
    function("dense", POINTER(DenseLayer), POINTER(Step))
    function("experts", POINTER(ExpertsLayer), POINTER(Step), c_void_p, c_void_p)
    function("norm", c_void_p, c_float, POINTER(Step), c_void_p)
    function("narrow", POINTER(Matrix), c_int32, c_void_p)
    function("linear", POINTER(Matrix), c_void_p, c_int64, c_int32, c_void_p)
    function("use_sgemm", c_void_p)
    function(
        "product", *(c_void_p, c_int64, c_int32) * 2, c_int32, *(c_int64,) * 3, c_float, c_int32, c_int32, c_void_p, c_int64,
    )  # fmt: skip
    function("sort_choices", c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p)
    function("routing", POINTER(Routing))
    function("routing_gradient", POINTER(Routing), POINTER(RoutingGradient))
    function("top_experts", c_void_p, *(c_int64,) * 3, c_int32, c_void_p)
    function("balance_terms", *(c_void_p,) * 2, *(c_int64,) * 3, c_int32, *(c_void_p,) * 2)
    function("balance_terms_gradient", *(c_void_p,) * 4, *(c_int64,) * 3, c_int32, c_void_p)
    function("cross_entropy", *(c_void_p,) * 3, c_int64, c_int64, c_int32, c_int32, c_void_p)
    sizes = (c_int64, c_int64, c_int32, c_void_p, c_void_p)
    function("norm_training", c_void_p, c_int64, c_void_p, c_float, *sizes)
    function("norm_training_gradient", c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, *sizes)
    function("rotary", c_void_p, c_int64, c_void_p, c_int64, c_int64, *(c_int32,) * 5, c_void_p)
    function("experts_training", POINTER(ExpertsTraining))
    function("experts_training_gradient", POINTER(ExpertsTraining), POINTER(ExpertsGradient))
    function("orthogonalize", c_void_p, *(c_int64,) * 3, c_int32, c_void_p, c_int32, c_int32, c_void_p)
    function("muon", POINTER(MuonStep), c_int64, c_void_p, c_int32, c_int32)
    function("adamw", POINTER(AdamWStep), c_int64, c_int32)
    function("total_norm", POINTER(Span), c_int64, c_int32, result=c_double)
    function("meet", c_void_p, POINTER(c_void_p), c_int64, c_int64, c_double, c_double, result=c_int32)
    function("multiplies", c_int32, result=c_int32)
