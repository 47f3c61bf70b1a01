"""The validation images of one part, until they are scored and written to the part's prediction file.

Input: images with their positions in the part. Output: their keys and labels in the order of the listing, and their
pixels in blocks. Invariant: an image's position depends on the listing alone; those of skipped images stay empty.

Axes: D values of an image, M positions, N images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.compute.classifiers import sgd_linear
from pipeline.compute.lanes import empty_images, put_images
from pipeline.data.score_join import GivenRows

# Products of `sgd_linear` over which images are brought to the device at once; and of large images so many, within
# bounds, as for fewer `nearest_mean` would spend most of its time on tables.
_BLOCK_PRODUCTS, _BLOCK_IMAGES, _BLOCK_BYTES = 8, 2048, 64 * 2**20


class Part:
    """Images of one part at their positions.

    Args:
        num_positions: M, the listed images of the part.
        num_values: D.
        device: Where they are kept.
        scratch: The folder whose disk keeps them; None for memory or the GPU's.
        dtype: Of the values: uint8 pixels, or features.
        num_logits: Of each image by the user's own model.

    Raises:
        ClusterError: If there is no room on that disk.
    """

    def __init__(
        self,
        num_positions: int,
        num_values: int,
        device: torch.device,
        scratch: str | None,
        dtype: torch.dtype = torch.uint8,
        num_logits: int = 0,
    ) -> None:
        self._images_MD = empty_images(num_positions, num_values, device, scratch, dtype)
        on_disk = scratch if num_logits else None
        self._logits_MO = empty_images(num_positions, num_logits, torch.device("cpu"), on_disk, torch.float32)
        self._labels_M = torch.empty(num_positions, dtype=torch.int64)
        self._is_filled_M = np.zeros(num_positions, np.bool_)
        self._keys: dict[int, pa.StringArray] = {}
        self._given: GivenRows | None = None

    def put(
        self,
        rows_N: npt.NDArray[np.int64],
        keys: pa.ChunkedArray,
        images_ND: torch.Tensor,
        labels_N: torch.Tensor,
        logits_NO: torch.Tensor | None = None,
    ) -> None:
        """Copy a shard's images to their positions.

        Args:
            rows_N: The positions, int64, rising.
            keys: Of the images, string.
            images_ND: uint8.
            labels_N: int64.
            logits_NO: float32, where there is a model.
        """
        if not len(rows_N):
            return
        put_images(self._images_MD, rows_N, images_ND)
        self._labels_M[rows_N] = labels_N.cpu()
        self._is_filled_M[rows_N] = True
        if logits_NO is not None:
            self._logits_MO[rows_N] = logits_NO.cpu()
        # A copy: the column is a view into the object store, which would keep the whole shard's pixels there.
        self._keys[int(rows_N[0])] = pa.array(keys.to_pylist(), pa.string())

    def put_given(self, given: GivenRows) -> None:
        """Take what was predicted elsewhere of all listed images, in their order."""
        assert len(given.positions_N) == len(self._is_filled_M)
        self._given = given

    def given(self, rows: slice, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor] | None:
        """Give what was predicted elsewhere of some of the images that are here: scores, float32, and classes, int64.

        Args:
            rows: Of the images in the order of the listing, skipped ones left out.
            device: Where it is wanted.

        Returns:
            The scores, [N, K], or None where there are predictions alone; and the predictions, [N]. None if nothing was
            predicted elsewhere.
        """
        if self._given is None:
            return None
        positions_N = self.positions()[rows]
        scores_NK = self._given.scores_NK[positions_N]
        codes_N = self._given.codes_N[positions_N].astype(np.int64)
        has_scores = scores_NK.shape[1] > 0
        return torch.from_numpy(scores_NK).to(device) if has_scores else None, torch.from_numpy(codes_N).to(device)

    def keys(self) -> pa.StringArray:
        """Keys of all images, in the order of the listing."""
        return pa.concat_arrays([pa.array([], pa.string()), *(self._keys[row] for row in sorted(self._keys))])

    def positions(self) -> npt.NDArray[np.int64]:
        """Positions of all images, int64 [N]."""
        return np.flatnonzero(self._is_filled_M)

    def labels(self) -> torch.Tensor:
        """Labels of all images, int64 [N], on the CPU."""
        return self._labels_M[torch.from_numpy(np.flatnonzero(self._is_filled_M))]

    def between(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.int64]]:
        """Give the images at some positions, uint8 [N, D], where they are kept; their labels and positions, int64."""
        positions_N = start + np.flatnonzero(self._is_filled_M[start:stop])
        images_ND, labels_N = self.take(positions_N)
        return images_ND, labels_N, positions_N

    def take(self, positions_N: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the images at these positions, uint8 [N, D], where they are kept, and their labels."""
        chosen_N = torch.from_numpy(positions_N)
        return self._images_MD.index_select(0, chosen_N.to(self._images_MD.device)), self._labels_M[chosen_N]

    def keys_of(self, positions_N: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
        """Give the keys, str, of the images at these positions."""
        keys, places_N = self.keys(), np.cumsum(self._is_filled_M)[positions_N] - 1
        return np.array([keys[place].as_py() for place in places_N.tolist()], object)

    def blocks(self, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Give images, labels and logits in blocks of as many rows; an empty one if there is none."""
        rows_N = torch.from_numpy(np.flatnonzero(self._is_filled_M))
        num_values = self._images_MD.shape[1]
        product_rows = sgd_linear.score_rows(num_values)
        num_products = max(_BLOCK_PRODUCTS, min(_BLOCK_IMAGES, _BLOCK_BYTES // num_values) // product_rows)
        for block_N in rows_N.split(num_products * product_rows):
            num_rows = len(block_N)
            # Without a gap they are a view, of which nothing is copied.
            is_run = num_rows > 0 and int(block_N[-1] - block_N[0]) == num_rows - 1
            images_ND = (
                self._images_MD[int(block_N[0]) : int(block_N[-1]) + 1]
                if is_run
                else self._images_MD.index_select(0, block_N.to(self._images_MD.device))
            )
            yield images_ND.to(device), self._labels_M[block_N].to(device), self._logits_MO[block_N].to(device)
