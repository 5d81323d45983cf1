"""The results of stage 2 that views are cut from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.patches import PatchStore


@dataclass(frozen=True, kw_only=True)
class Mined:
    """RoIs and pairs, and partner patches where they were packed.

    Attributes:
        pairs: already limited to the neighbors and the ratio in use (`PairTable.limited`).
        fingerprints: of the tables, by name.
    """

    rois: BoxTable
    pairs: PairTable
    patches: PatchStore | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def patch_rows(self) -> NDArray[np.int64]:
        """[P] int64, sorted: the RoIs (rows of rois.boxes) of which a patch is stored; partners are read from there."""
        return self.patches.rows if self.patches is not None else np.empty(0, np.int64)
