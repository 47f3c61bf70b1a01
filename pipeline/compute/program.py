"""The user's own model: a program that torch exported, looked at, and run in batches of one size.

Input: the bytes of a `.pt2` file; uint8 images, as many at a time as arrive. Output: what the program turned out to be;
float32 outputs, one row an image. Invariant: every batch has the same shape and is computed by one thread, so that an
image's output depends neither on its batch nor on how many actors there are.

Such a file holds pickles: to load it is to run it.

Axes: B images of a batch, N images, O outputs of one, D values of one; C, H, W of the model's input.
"""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.compute.archive import Archived, read_archive
from pipeline.compute.threads import Threads
from pipeline.errors import ModelError, counted
from pipeline.model import Model, Probed, Wanted

# Small enough for a CPU's memory, large enough for most of its speed; 256 suit a GPU better.
_BATCH_SIZE = 32
# What an image's output may differ by where it stands elsewhere in a batch, or is computed again, as a share of the
# largest one: more is no rounding.
_MAX_DIFFERENCE = 1e-3
# The largest number that float16 has.
MAX_FEATURE = 65504.0
_EXPORT = "export it by torch.export.export(model.eval(), ...), as the README shows"
# Of what torch raises where it has logged the reason, which is not shown here.
_SEE_ABOVE, _OTHER_FILE = "check the warnings above", "weights alone, or a file of another kind or version"
Call = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Program:
    """A loaded program on a device, and what it says of its one input: float32, None where it takes any number."""

    call: Call
    batch_size: int | None
    channels: int
    height: int | None
    width: int | None


def load_program(content: bytes, device: torch.device) -> Program:
    """Load an exported program onto a device: the one that it was exported on is baked in.

    Raises:
        ModelError: If it is none, or takes and gives something else than a batch of images and a row for each.
    """
    archived = read_archive(content, device) or _load_by_torch(content, device)
    batch, channels, height, width = (size if isinstance(size, int) else None for size in archived.shape)
    if channels not in (1, 3):
        raise ModelError(
            f"--model: expected an input of 1 or 3 channels, got [{', '.join(map(str, archived.shape))}]; {_EXPORT}, "
            "for float32 [N, 1 or 3, H, W]"
        )
    return Program(archived.call, batch, channels, height, width)


def _load_by_torch(content: bytes, device: torch.device) -> Archived:
    logging.getLogger("torch").setLevel(logging.ERROR)  # which would write a traceback, and then raise
    from torch.export.passes import move_to_device_pass

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.load(io.BytesIO(content))
            _check_signature(exported)
            moved = move_to_device_pass(exported, device)
            [shape] = _input_shapes(exported)
            return Archived(moved.module(), shape)
    except ModelError:
        raise
    except Exception as exc:
        raise ModelError(
            f"--model: expected a program that torch {torch.__version__} exported, got "
            f"{_OTHER_FILE if _SEE_ABOVE in str(exc) else _first_line(exc)}; {_EXPORT}, with this version"
        ) from exc


def _check_signature(exported: Any) -> None:
    signature, spec = exported.graph_signature, exported.call_spec
    named = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    inputs, outputs = [named.get(name) for name in signature.user_inputs], signature.user_outputs
    is_plain = spec.in_spec.num_leaves == 1 and len(spec.in_spec.child(0).children()) == 1
    types: list[Any] = [getattr(each, "dtype", None) for each in inputs]
    if not (is_plain and _is_batch(inputs, 4)) or types != [torch.float32] or signature.user_inputs_to_mutate:
        raise ModelError(
            f"--model: expected one input, float32 [N, C, H, W], got {_describe(inputs)}; {_EXPORT}, for such a batch"
        )
    outputs = [named.get(name) for name in outputs]
    if not (spec.out_spec.is_leaf() and _is_batch(outputs, 2)) or not getattr(outputs[0], "is_floating_point", bool)():
        raise ModelError(
            f"--model: expected one output, a row of numbers for each image, got {_describe(outputs)}; wrap the model "
            "in one that returns that"
        )


def _is_batch(values: list[Any], num_axes: int) -> bool:
    return len(values) == 1 and isinstance(values[0], torch.Tensor) and values[0].dim() == num_axes


def _input_shapes(exported: Any) -> list[list[Any]]:
    names = exported.graph_signature.user_inputs
    return [list(node.meta["val"].shape) for node in exported.graph.nodes if node.name in names]


def _describe(values: list[Any]) -> str:
    words = [
        f"{str(each.dtype).removeprefix('torch.')} [{', '.join(map(str, each.shape))}]"
        if isinstance(each, torch.Tensor)
        else type(each).__name__
        for each in values
    ]
    return " and ".join(words) or "none"


def _first_line(exc: Exception) -> str:
    return f"{type(exc).__name__}: {str(exc).strip().partition(chr(10))[0][:200]}"


@torch.inference_mode()
def probe(program: Program, wanted: Wanted, device: torch.device) -> Probed:
    """Find out what a program takes and gives, by running it on noise, black and white, in two sizes of batches.

    Raises:
        ModelError: If it cannot be run, or its outputs are not what is wanted.
    """
    sides = _choose_sides(program, wanted)
    for option, values in (("mean", wanted.mean), ("std", wanted.std)):
        if len(values) not in (1, program.channels):
            raise ModelError(
                f"--model-{option}: expected a number for each of {counted(program.channels, 'channel')}, got "
                f"{len(values)}; give one number, or leave it out"
            )
    if wanted.batch_size is not None and program.batch_size not in (None, wanted.batch_size):
        raise ModelError(
            f"--model-batch-size: expected {program.batch_size}, with which the model was exported, got "
            f"{wanted.batch_size}; leave it out, or export the model with a dynamic batch"
        )
    batch_size = program.batch_size or wanted.batch_size or _BATCH_SIZE
    numbers = torch.Generator().manual_seed(0)
    images_BD = torch.randint(
        0, 256, (batch_size, program.channels * sides[0] * sides[1]), dtype=torch.uint8, generator=numbers
    )
    images_BD[-1], images_BD[-2:-1] = 255, 0
    shape = *sides, program.channels
    prepared_BCHW = prepare(images_BD.to(device), shape, wanted.mean, wanted.std, batch_size)
    outputs_BO = _run(program, prepared_BCHW, "a batch")
    _expect_small(outputs_BO, has_features=wanted.output == "embedding")
    num_outputs = outputs_BO.shape[1]
    if wanted.num_names is not None and num_outputs != wanted.num_names:
        raise ModelError(
            f"--model: expected an output for each of {wanted.num_names} {wanted.names_from}, got {num_outputs}; give "
            "--model-classes with a name a line for these, or --model-output embedding"
        )
    if program.batch_size is None:
        other_size = 2 if batch_size != 2 else 3
        rows = torch.arange(other_size) % batch_size
        some_bCHW = prepare(images_BD[rows].to(device), shape, wanted.mean, wanted.std, other_size)
        others_bO = _run(program, some_bCHW, f"a batch of {other_size}")
        _expect_near(outputs_BO[rows.to(device)], others_bO, "in a batch of another size")
    again_BO = _run(program, prepared_BCHW, "the same batch")
    _expect_near(outputs_BO, again_BO, "when it is computed again")
    copies_BCHW = prepare(images_BD[:1].expand(batch_size, -1).to(device), shape, wanted.mean, wanted.std, batch_size)
    copies_BO = _run(program, copies_BCHW, "a batch of one image")
    first_BO = outputs_BO[:1].expand(batch_size, -1)
    _expect_near(first_BO, copies_BO, "beside other images")
    is_exact = torch.equal(outputs_BO, again_BO) and torch.equal(first_BO, copies_BO)
    return Probed(*sides, program.channels, batch_size, num_outputs, is_exact)


def _choose_sides(program: Program, wanted: Wanted) -> tuple[int, int]:
    asked = wanted.size or wanted.default_size
    sides = program.height or asked[0], program.width or asked[1]
    if wanted.size is not None and sides != wanted.size:
        raise ModelError(
            f"--model-size: expected {sides[0]}x{sides[1]}, for which the model was exported, got "
            f"{wanted.size[0]}x{wanted.size[1]}; leave it out"
        )
    return sides


def _run(program: Program, batch_BCHW: torch.Tensor, what: str) -> torch.Tensor:
    shape, outputs = list(batch_BCHW.shape), _call(program, batch_BCHW, what)
    if outputs.dim() != 2 or len(outputs) != len(batch_BCHW) or outputs.shape[1] == 0:
        raise ModelError(
            f"--model: expected a row of outputs for each image of {shape}, got {list(outputs.shape)}; {_EXPORT}"
        )
    if not outputs.isfinite().all():
        raise ModelError(
            f"--model: expected numbers for {what} of noise, black and white, got NaN or infinite ones; check "
            "--model-mean and --model-std, and the model"
        )
    rows_BO: torch.Tensor = outputs.float()
    return rows_BO


def _call(program: Program, batch_BCHW: torch.Tensor, what: str) -> Any:
    try:
        return program.call(batch_BCHW)
    except Exception as exc:  # whatever a program may raise
        raise ModelError(
            f"--model: expected it to take {what}, float32 {list(batch_BCHW.shape)}, got {_first_line(exc)}; {_EXPORT},"
            " with the batch dynamic, or give its --model-size"
        ) from exc


def _expect_near(outputs_NO: torch.Tensor, others_NO: torch.Tensor, where: str) -> None:
    difference = float((outputs_NO - others_NO).abs().max())
    if difference > _MAX_DIFFERENCE * max(float(outputs_NO.abs().max()), 1e-6):
        raise ModelError(
            f"--model: expected the same output of an image {where}, got one that differs by {difference:.3g}; call "
            "model.eval() before the export"
        )


def _expect_small(outputs_NO: torch.Tensor, *, has_features: bool) -> None:
    most = MAX_FEATURE if has_features else torch.finfo(torch.float32).max
    if not (outputs_NO.abs() <= most).all():  # so that NaN fails too
        raise ModelError(
            f"--model: expected outputs of at most {most:g}, got NaN or larger ones for an image; check "
            "--model-mean and --model-std, and the model"
        )


def prepare(
    images_ND: torch.Tensor,
    shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
) -> torch.Tensor:
    """Turn pixels into what a model takes, as torchvision's `ToTensor` and `Normalize` do; float32 [B, C, H, W].

    Args:
        images_ND: uint8.
        shape: H, W, C.
        mean: Taken off pixels from 0 to 1, for all channels or each.
        std: By which the rest is divided, likewise.
        batch_size: B; behind the images it is filled up with zeros.
    """
    height, width, channels = shape
    # Not by `contiguous`, which leaves grey images with strides by which other kernels are chosen.
    batch_BCHW = torch.zeros(batch_size, channels, height, width, device=images_ND.device)
    pixels_NCHW = batch_BCHW[: len(images_ND)]
    pixels_NCHW.copy_(images_ND.view(-1, *shape).permute(0, 3, 1, 2)).div_(255)
    mean_C11, std_C11 = (torch.tensor(each, device=images_ND.device)[:, None, None] for each in (mean, std))
    pixels_NCHW.sub_(mean_C11).div_(std_C11)
    return batch_BCHW


@dataclass
class _Pending:
    """Images of which not all have their outputs."""

    images_ND: torch.Tensor
    outputs_NO: torch.Tensor
    take: Callable[[torch.Tensor], object]
    num_left: int


class Runner:
    """Images on their way through a program: they are taken in any number, and computed by whole batches.

    Args:
        program: The program.
        model: What is known of it.
        device: Where it is.
        threads: They share batches, on a CPU.
    """

    def __init__(self, program: Program, model: Model, device: torch.device, threads: Threads) -> None:
        self._program, self._model, self._device, self._threads = program, model, device, threads
        self._waiting: deque[_Pending] = deque()
        self._num_waiting = 0
        self._num_started = 0
        self.num_images = 0
        self.busy_s = 0.0

    def put(self, images_ND: torch.Tensor, take: Callable[[torch.Tensor], object]) -> None:
        """Take images, uint8; `take` is called with their outputs, float32 [N, O], when all of them are there."""
        outputs_NO = torch.empty(len(images_ND), self._model.num_outputs, device=self._device)
        if not len(images_ND):
            take(outputs_NO)
            return
        self._waiting.append(_Pending(images_ND, outputs_NO, take, len(images_ND)))
        self._num_waiting += len(images_ND)
        # For all threads at a time, so that none of them has less to do.
        step = self._model.batch_size * self._threads.number
        self._compute(self._num_waiting // step * step)

    def flush(self) -> None:
        """Compute what is left, of which the last batch is filled up."""
        self._compute(self._num_waiting)

    @torch.inference_mode()
    def _compute(self, num_images: int) -> None:
        if not num_images:
            return
        started_s = time.perf_counter()
        batches = [self._next_batch(min(self._model.batch_size, num_images - start))
                   for start in range(0, num_images, self._model.batch_size)]  # fmt: skip
        self._threads.run(self._compute_batch, batches)
        self._num_waiting -= num_images
        self.num_images += num_images
        self.busy_s += time.perf_counter() - started_s
        for pieces in batches:
            for pending, rows in pieces:
                pending.num_left -= rows.stop - rows.start
        while self._waiting and self._waiting[0].num_left == 0:
            done = self._waiting.popleft()
            self._num_started -= len(done.images_ND)
            done.take(done.outputs_NO)

    def _next_batch(self, num_images: int) -> list[tuple[_Pending, slice]]:
        """Choose the next images: rows of what is waiting."""
        pieces, skipped = [], self._num_started
        self._num_started += num_images
        for pending in self._waiting:
            if skipped >= len(pending.images_ND):
                skipped -= len(pending.images_ND)
                continue
            rows = slice(skipped, min(len(pending.images_ND), skipped + num_images))
            pieces.append((pending, rows))
            skipped, num_images = 0, num_images - (rows.stop - rows.start)
            if not num_images:
                break
        return pieces

    def _compute_batch(self, pieces: list[tuple[_Pending, slice]]) -> None:
        model, wanted = self._model, self._model.input
        images_ND = torch.cat([pending.images_ND[rows] for pending, rows in pieces])
        shape = wanted.height, wanted.width, len(wanted.mode)
        batch_BCHW = prepare(images_ND.to(self._device), shape, model.mean, model.std, model.batch_size)
        outputs_NO = _call(self._program, batch_BCHW, "images")[: len(images_ND)].float()
        _expect_small(outputs_NO, has_features=model.has_features)
        start = 0
        for pending, rows in pieces:
            stop = start + rows.stop - rows.start
            pending.outputs_NO[rows] = outputs_NO[start:stop]
            start = stop
