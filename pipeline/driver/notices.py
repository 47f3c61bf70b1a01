"""What a user is told of a dataset or a cluster that is not what it seems.

Input: a listing, counts. Output: warnings, each a line that says what was found and what becomes of it.
"""

from __future__ import annotations

import logging

from pipeline.data import files
from pipeline.data.classes import look_alike
from pipeline.data.listing import Listing
from pipeline.driver.state import ImageCounts, Job
from pipeline.errors import without_secrets

logger = logging.getLogger(__name__)

# Of fewer images, the interval of an accuracy is more than half as wide as all that it can be.
_FEW_IMAGES = 10


def say_what_may_surprise(listing: Listing) -> None:
    """Name classes that were left out or look alike, and files that are no images where they are most."""
    if listing.dropped:
        logger.warning(
            "%d classes are left out for want of images in one split: %s", len(listing.dropped),
            files.enumerate_names(listing.dropped),
        )  # fmt: skip
    if found := look_alike(listing.classes):
        logger.warning(
            "classes: expected names that can be told apart, got %s; they are taken for different ones", found
        )
    num_ignored = sum(listing.num_ignored.values())
    if num_ignored > listing.num_images:
        logger.warning(
            "%s: expected images, got %d files of other endings (%s) beside %d images; the README lists the "
            "endings that are read",
            without_secrets(listing.location.root), num_ignored, files.name_ignored(listing.num_ignored),
            listing.num_images,
        )  # fmt: skip


def say_where_images_are_few(listing: Listing, counts: ImageCounts) -> None:
    """Name the classes of whose accuracy little can be said."""
    confusion_KK = next(iter(counts.confusions.values()))
    found = [(int(number), name) for number, name in zip(confusion_KK.sum(axis=1), listing.classes, strict=True)]
    if few := sorted(each for each in found if each[0] < _FEW_IMAGES):
        logger.warning(
            "validation images: expected at least %d of every class, got fewer of %d of %d classes, whose accuracies "
            "say little: %s", _FEW_IMAGES, len(few), len(found),
            files.enumerate_names([f"{number} of {name}" for number, name in few]),
        )  # fmt: skip


def say_where_gpus_are_missing(job: Job, counts: ImageCounts) -> None:
    """Say how many actors compute on the CPU though they were given a GPU."""
    num_on_cpu = counts.devices.count("cpu")
    if job.allocation.gpus_per_actor > 0 and num_on_cpu:
        logger.warning(
            "%d actors were given GPUs, but torch finds no CUDA device there; they compute on the CPU", num_on_cpu
        )
