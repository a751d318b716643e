"""Fingerprints of live CPU weights in half the time, where most of them have not changed.

XXH3 of 64 KB at a time runs at memory speed; of 4 KB at a time, calls from Python cost as much again. So a group of 16
blocks is hashed whole first. If that is the hash the group had when its blocks were last fingerprinted, its blocks
still have those fingerprints. What is kept is only "contents with this hash have these fingerprints", true whatever
happens to generations meanwhile. Where training changes nearly everything, looking twice costs more than it saves, and
is left out.
"""

from dataclasses import dataclass

import numpy as np

from hogwild.checkpoint.constants import BLOCK
from hogwild.checkpoint.fingerprints import Bytes, Table, fingerprints
from hogwild.checkpoint.layout import TensorSpec

GROUP = 16
"""Blocks hashed whole: 64 KB, from where on the cost of a call no longer shows."""

DENSE = 0.5
"""Share of changed groups from which groups are not looked at: about where both ways take the same time."""

PROBE = 8
"""Syncs after which a tensor that was dense is looked at by groups again."""


@dataclass
class _Seen:
    groups: Table  # (groups, 2)
    blocks: Table  # (blocks, 2)
    missed: int = 0
    skip: int = 0  # syncs in which groups are left out
    fresh: bool = True  # nothing to compare with yet: that all groups are missed says nothing


class FingerprintMemo:
    """What the tensors of one checkpoint looked like when they were last fingerprinted. Not for several threads."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], _Seen] = {}

    def begin(self, spec: TensorSpec) -> None:
        """Called before the pieces of a tensor."""
        key = (spec.name, spec.nbytes)
        groups = -(-spec.blocks // GROUP)
        seen = self._seen.get(key)
        if seen is None:
            self._seen[key] = _Seen(np.zeros((groups, 2), np.uint64), np.zeros((spec.blocks, 2), np.uint64))
            return
        if seen.skip:
            seen.skip -= 1
            seen.fresh = True
        elif seen.fresh:
            seen.fresh = False
        elif seen.missed > DENSE * groups:
            seen.skip = PROBE
        seen.missed = 0

    def fingerprints(
        self,
        spec: TensorSpec,
        first: int,  # block, a multiple of GROUP
        data: Bytes,  # from that block on; whole groups, unless the tensor ends
    ) -> Table:  # (blocks, 2), valid until the next call
        """Fingerprints of the blocks of a piece."""
        seen = self._seen[spec.name, spec.nbytes]
        blocks = seen.blocks[first : first + -(-len(data) // BLOCK)]
        if seen.skip:
            blocks[:] = fingerprints(data)
            seen.groups[first // GROUP : first // GROUP + -(-len(blocks) // GROUP)] = 0
            return blocks
        now = fingerprints(data, GROUP * BLOCK)
        old = seen.groups[first // GROUP : first // GROUP + len(now)]
        missed = np.flatnonzero((now != old).any(axis=1)).tolist()
        for group in missed:
            part = data[group * GROUP * BLOCK : (group + 1) * GROUP * BLOCK]
            blocks[group * GROUP : (group + 1) * GROUP] = fingerprints(part)
        old[:] = now
        seen.missed += len(missed)
        return blocks
