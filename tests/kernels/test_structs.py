"""A structure that Python has otherwise than C++ is refused where the kernels are loaded, before one is called."""

from __future__ import annotations

import ctypes
import re
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import pytest

from cadre.kernels.native import library, structs

FIELDS = (("first", c_void_p), ("second", c_void_p), ("kind", c_int32), ("page_size", c_int32))  # of Cache

needs_kernels = pytest.mark.skipif(library.library() is None, reason="no C++ kernels")


def check(name: str, fields: tuple[tuple[str, Any], ...]) -> None:
    structs.compare_layout(library.kernels(), type(name, (Structure,), {"_fields_": fields}))


@needs_kernels
def test_one_as_it_is_in_cpp_passes() -> None:
    check("Cache", FIELDS)


@needs_kernels
@pytest.mark.parametrize(
    "fields",
    [
        (FIELDS[1], FIELDS[0], *FIELDS[2:]),
        FIELDS[:3],
        (*FIELDS, ("threads", c_int32)),
        (*FIELDS[:3], ("page_size", c_int64)),
        (*FIELDS[:3], ("page_size", c_float)),
        (*FIELDS[:3], ("pages", c_int32)),
    ],
    ids=["order", "missing", "further", "size", "type", "name"],
)
def test_a_slip_is_told(fields: tuple[tuple[str, Any], ...]) -> None:
    cpp = "first, second, kind, page_size: p8@0 p8@8 i4@16 i4@20 of 24"
    with pytest.raises(RuntimeError, match=rf"^internal error: Cache is, in structs\.py, .*; in C\+\+, {re.escape(cpp)}$"):
        check("Cache", fields)


@needs_kernels
def test_all_are_compared_where_the_kernels_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(structs, "compare_layout", lambda library, structure: seen.append(structure.__name__))
    loaded = library._load.__wrapped__()
    assert isinstance(loaded, ctypes.CDLL)
    ours = (each for each in vars(structs).values() if isinstance(each, type) and issubclass(each, structs.Filled))
    assert set(seen) == {each.__name__ for each in ours} - {"Filled"}
    assert "ExpertsTraining" in seen
