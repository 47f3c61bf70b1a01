"""An exported program, read without most of what torch imports for it.

Input: the bytes of a `.pt2` file. Output: the program on a device, or None for one that only `torch.export.load` can
read. Invariant: what is read here computes the same operations in the same order as what torch loads, bit for bit.

`torch.export.load` imports 1,240 modules (Dynamo, Inductor, SymPy), which takes longer than to import torch itself, in
each actor and before anything is decoded: 1.7 s of CPU, a third of a small job's time (`jobs/README.md`). The file is a
zip archive of JSON and plain arrays, in the layout of `torch/_export/serde/schema.py`. Only version `_SCHEMA` of it, a
file of this very torch, and what is named below is read; all else is left to torch.
"""

from __future__ import annotations

import io
import json
import math
import operator
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_SCHEMA = {"major": 8, "minor": 20}
# One positional input, which is a tensor; one output, likewise.
_IN_SPEC = [1, {"type": "builtins.tuple", "context": "null", "children_spec": [
    {"type": "builtins.tuple", "context": "null", "children_spec": [
        {"type": None, "context": None, "children_spec": []}]},
    {"type": "builtins.dict", "context": "[]", "children_spec": []}]}]  # fmt: skip
_OUT_SPEC = [1, {"type": None, "context": None, "children_spec": []}]
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_FLOAT32 = 7
_MEMORY_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format,
}  # fmt: skip
_STRIDED = 7
_POSITIONAL, _KEYWORD = 1, 2
# Of sizes, which are plain numbers here.
_OPERATORS = {
    f"_operator.{each.__name__}": each
    for each in (
        operator.eq, operator.ne, operator.le, operator.ge, operator.lt, operator.gt, operator.neg, operator.mul,
        operator.add, operator.sub, operator.floordiv, operator.mod, operator.truediv, operator.and_, operator.or_,
    )
}  # fmt: skip
_OPERATOR = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_SYMBOL = re.compile(r"Symbol\('(\w+)',[^()]*\)")


class _UnknownError(Exception):
    """Something in the file that is not read here."""


@dataclass(frozen=True)
class Archived:
    """A program that was read: a function of a batch, and the shape that it takes, with names of sizes left open."""

    call: Callable[[torch.Tensor], Any]
    shape: list[int | str]


def read_archive(content: bytes, device: torch.device) -> Archived | None:
    """Read an exported program onto a device, as `torch.export.load` and `move_to_device_pass` would.

    Its one input is float32 of four axes, and its one output a tensor of two.

    Returns:
        The program; None for a file that is damaged, of another version, or holds anything that is not read here.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _read(_Files(archive), device)
    except (_UnknownError, zipfile.BadZipFile, KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None  # torch says what is wrong with it


class _Files:
    """The files of an archive, by their names below its one folder."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._root = archive.namelist()[0].partition("/")[0]
        names = [name.removeprefix(f"{self._root}/") for name in archive.namelist()]
        self.models = [name for name in names if name.startswith("models/")]
        _expect(self.read("archive_format") == b"pt2" and self.read("archive_version") == b"0")
        _expect(self.read("byteorder") == b"little" and self.models == ["models/model.json"])

    def read(self, name: str) -> bytes:
        return self._archive.read(f"{self._root}/{name}")

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def read_tensors(self, folder: str, config: str) -> dict[str, torch.Tensor]:
        """Read the arrays of a folder, by the names that the program has for them."""
        stored: dict[str, torch.Tensor] = {}
        tensors = {}
        for name, entry in self.read_json(f"{folder}/{config}")["config"].items():
            meta, path = entry["tensor_meta"], entry["path_name"]
            _expect(not entry["use_pickle"] and meta["layout"] == _STRIDED)
            if path not in stored:
                values = self.read(f"{folder}/{path}")
                dtype = _DTYPES[meta["dtype"]]
                # A copy, in memory that is aligned as all of torch's.
                stored[path] = torch.empty(len(values) // dtype.itemsize, dtype=dtype)
                if values:
                    stored[path].copy_(torch.frombuffer(bytearray(values), dtype=dtype))
            sizes, strides = ([_size(each) for each in meta[axis]] for axis in ("sizes", "strides"))
            tensors[name] = stored[path].as_strided(sizes, strides, _size(meta["storage_offset"]))
        return tensors


def _read(files: _Files, device: torch.device) -> Archived:
    program = files.read_json("models/model.json")
    _expect(program["schema_version"] == _SCHEMA and program["torch_version"] == torch.__version__)
    _expect(not program["guards_code"])
    module = program["graph_module"]
    graph, signature = module["graph"], module["signature"]
    call = module["module_call_graph"][0]["signature"]
    _expect(json.loads(call["in_spec"]) == _IN_SPEC and json.loads(call["out_spec"]) == _OUT_SPEC)
    _expect(len({each["device"]["type"] for each in graph["tensor_values"].values()}) == 1)
    [output] = [_single(each, "user_output")["arg"]["as_tensor"]["name"] for each in signature["output_specs"]]
    _expect(len(graph["tensor_values"][output]["sizes"]) == 2)
    _expect(_DTYPES[graph["tensor_values"][output]["dtype"]].is_floating_point)
    values = files.read_tensors("data/weights", "model_weights_config.json")
    values |= files.read_tensors("data/constants", "model_constants_config.json")
    built = _Built(fx.Graph(), {}, device)
    image = None
    tensors: list[torch.Tensor] = []
    for given, spec in zip(graph["inputs"], signature["input_specs"], strict=True):
        name = given["as_tensor"]["name"]
        if "user_input" in spec:
            _expect(image is None)
            image = name
            built.nodes[name] = built.graph.placeholder("images")
            continue
        [(kind, fields)] = spec.items()
        target = fields[{"parameter": "parameter_name", "buffer": "buffer_name",
                         "tensor_constant": "tensor_constant_name"}[kind]]  # fmt: skip
        built.nodes[name] = built.graph.get_attr(f"value_{len(tensors)}")
        tensors.append(values[target].to(device))
    for node in graph["nodes"]:
        built.add(node)
    built.graph.output(built.nodes[output])
    shape, ranges = _input_shape(graph["tensor_values"][image], program["range_constraints"])
    run = fx.GraphModule({f"value_{number}": tensor for number, tensor in enumerate(tensors)}, built.graph)

    def run_checked(batch_BCHW: torch.Tensor) -> Any:
        for size, (low, high) in zip(batch_BCHW.shape, ranges, strict=True):
            if not low <= size <= high:
                raise ValueError(f"expected the shape {shape}, with {low} to {high}, got {list(batch_BCHW.shape)}")
        return run(batch_BCHW)

    return Archived(run_checked, shape)


def _input_shape(meta: Any, constraints: Any) -> tuple[list[int | str], list[tuple[float, float]]]:
    """Return the shape of the one input, and the least and largest size of each axis."""
    _expect(meta["dtype"] == _FLOAT32 and len(meta["sizes"]) == 4)
    shape: list[int | str] = []
    ranges: list[tuple[float, float]] = []
    for size in meta["sizes"]:
        if "as_int" in size:
            shape.append(_size(size))
            ranges.append((_size(size), _size(size)))
            continue
        symbol = _SYMBOL.fullmatch(size["as_expr"]["expr_str"])
        if symbol is None or symbol[1] in shape:
            raise _UnknownError
        limits = constraints[symbol[1]]
        shape.append(symbol[1])
        ranges.append((limits["min_val"] or 0, math.inf if limits["max_val"] is None else limits["max_val"]))
    return shape, ranges


@dataclass(frozen=True)
class _Built:
    """A graph of torch.fx, as far as it is built: its nodes by the names of their values in the file."""

    graph: fx.Graph
    nodes: dict[str, fx.Node]
    device: torch.device

    def add(self, node: Any) -> None:
        target, inputs = node["target"], node["inputs"]
        if target in _OPERATORS:
            made = self.graph.call_function(_OPERATORS[target], tuple(self._argument(each["arg"]) for each in inputs))
        elif match := _OPERATOR.fullmatch(target):
            function = getattr(getattr(torch.ops.aten, match[1]), match[2])
            _expect(all(each["kind"] in (_POSITIONAL, _KEYWORD) for each in inputs))
            args = [self._argument(each["arg"]) for each in inputs if each["kind"] == _POSITIONAL]
            kwargs = {each["name"]: self._argument(each["arg"]) for each in inputs if each["kind"] == _KEYWORD}
            made = self.graph.call_function(function, tuple(args), kwargs)
        else:
            raise _UnknownError
        names = list(_output_names(node["outputs"]))
        if names and isinstance(names[0], list):  # a list, and nothing else
            _expect(len(names) == 1)
            names = names[0]
        elif len(names) == 1:
            self.nodes[names[0]] = made
            return
        for place, name in enumerate(names):
            self.nodes[name] = self.graph.call_function(operator.getitem, (made, place))

    def _argument(self, argument: Any) -> Any:
        [(kind, value)] = argument.items()
        if kind in _PLAIN:
            return _PLAIN[kind](value)
        if kind == "as_device":  # the one that it was exported on
            return self.device
        if kind == "as_tensor":
            return self.nodes[value["name"]]
        if kind == "as_tensors":
            return [self.nodes[each["name"]] for each in value]
        if kind == "as_optional_tensors":
            return [None if "as_none" in each else self.nodes[each["as_tensor"]["name"]] for each in value]
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            return self._number(value)
        if kind in ("as_sym_ints", "as_sym_bools", "as_sym_floats"):
            return [self._number(each) for each in value]
        raise _UnknownError

    def _number(self, value: Any) -> Any:
        [(kind, given)] = value.items()
        return self.nodes[given] if kind == "as_name" else given


# Infinity and NaN are words in the file.
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_int": int,
    "as_float": float,
    "as_bool": bool,
    "as_string": str,
    "as_ints": lambda values: [int(each) for each in values],
    "as_floats": lambda values: [float(each) for each in values],
    "as_bools": list,
    "as_scalar_type": lambda value: _DTYPES[value],
    "as_memory_format": lambda value: _MEMORY_FORMATS[value],
    "as_layout": lambda value: {_STRIDED: torch.strided}[value],
}


def _output_names(outputs: Any) -> Iterator[Any]:
    for output in outputs:
        [(kind, value)] = output.items()
        if kind == "as_tensor":
            yield value["name"]
        elif kind == "as_tensors":
            yield [each["name"] for each in value]
        elif kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            yield value["as_name"]
        elif len(outputs) > 1 or kind != "as_none":
            raise _UnknownError


def _single(spec: Any, kind: str) -> Any:
    [(found, value)] = spec.items()
    _expect(found == kind)
    return value


def _size(value: Any) -> int:
    size: int = value["as_int"]
    return size


def _expect(is_known: bool) -> None:
    if not is_known:
        raise _UnknownError
