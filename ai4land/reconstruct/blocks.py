"""Make every block of a cube on the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client, Future
from numpy.typing import NDArray

from ai4land.cube.cube import Block
from ai4land.errors import DataError, MismatchError, StoreError
from ai4land.reconstruct.block import BlockSettings, reconstruct_block
from ai4land.workers.tasks import TRIES, outcomes


def _task(part: NDArray[np.object_], settings: BlockSettings) -> NDArray[np.object_]:
    """Compute the one block in a chunk of the plan and return its receipt."""
    receipt = np.empty(1, dtype=object)
    try:
        receipt[0] = reconstruct_block(part[0], settings)
    except (StoreError, MismatchError) as error:  # returned, not raised: a retry by Dask could not help
        receipt[0] = error
    return receipt


def run_blocks(
    blocks: list[Block], settings: BlockSettings, *, client: Client, progress: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Compute blocks on a Dask cluster by ``map_blocks`` over the plan, and gather their receipts as they arrive.

    A task receives its block and the settings, some hundred bytes, and reads the rest itself. A block that fails is tried three
    times, whether it raises or its worker dies.

    Raises
    ------
    DataError
        If blocks failed. The others are finished first, and running again does only what is missing.
    StoreError, MismatchError
        If the cube cannot be written or belongs to another run by now; the remaining blocks are cancelled.
    WorkerError
        If workers keep dying and no block is finished.
    """
    if not blocks:
        return []
    # One block a chunk, so that a task carries its own block and not the whole plan.
    plan = np.empty(len(blocks), dtype=object)
    plan[:] = blocks
    receipts = da.map_blocks(
        _task, da.from_array(plan, chunks=1), dtype=object, meta=np.empty(0, dtype=object), settings=settings
    )
    futures = client.compute(list(receipts.to_delayed()), retries=TRIES - 1)

    def retry(block: Block) -> Future[Any]:
        part = np.empty(1, dtype=object)
        part[0] = block
        return client.submit(_task, part, settings, retries=TRIES - 1, priority=1, pure=False)

    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for block, outcome in outcomes(dict(zip(futures, blocks, strict=True)), retry, client=client):
        if isinstance(outcome, BaseException):
            failed.append(f"{block}: {outcome!r}")
            continue
        if isinstance(outcome[0], Exception):
            client.cancel(futures)
            raise outcome[0]
        done.append(outcome[0])
        if progress is not None:
            progress(outcome[0])
    if failed:
        raise DataError(
            f"{len(failed)} of {len(plan)} blocks failed, the rest is done; fix the cause and run again:\n  "
            + "\n  ".join(failed[:10])
        )
    return done
