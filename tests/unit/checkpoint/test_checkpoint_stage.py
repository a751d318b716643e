"""Where changed blocks wait: frames that come piece by piece are put together."""

import numpy as np
import pytest

from hogwild.checkpoint.constants import BLOCK, FRAME_BLOCKS
from hogwild.checkpoint.durable import OS_IO
from hogwild.checkpoint.layout import TensorSpec
from hogwild.checkpoint.stage import Arena, Stage


def tensor(number: int, blocks: int) -> TensorSpec:
    """With a last block that is short."""
    nbytes = blocks * BLOCK - 100
    return TensorSpec(
        name=str(number), number=number, file="f", offset=0, nbytes=nbytes, dtype="U8", shape=(nbytes,), first_block=0
    )


def fill(stage: Stage, spec: TensorSpec, blocks: list[int], contents: dict[tuple[int, int], bytes]) -> None:
    """Stage blocks with random contents, which are noted."""
    rng = np.random.default_rng(blocks[0])
    table = np.array([(block, spec.number) for block in blocks], np.uint64)
    for frame, buffer in stage.slots(spec, np.array(blocks), table):
        assert len(buffer) == frame.nbytes
        buffer[:] = np.frombuffer(rng.bytes(len(buffer)), np.uint8)
        for index, block in enumerate(frame.blocks.tolist()):
            contents[spec.number, block] = buffer[index * BLOCK : (index + 1) * BLOCK].tobytes()


@pytest.mark.parametrize("budget", [1 << 30, 700 * BLOCK, 15 * BLOCK, 0], ids=["all", "most", "some", "nothing"])
def test_frames_hold_what_was_put_into_them(tmp_path, budget):
    arena, contents = Arena(budget), {}
    for again in range(2):  # the memory is used a second time
        contents.clear()
        stage = Stage(arena, OS_IO, tmp_path / "spill")
        first, second = tensor(0, 3000), tensor(1, 50)
        for start in range(0, 3000, 30):
            fill(stage, first, list(range(start, start + 30, 2 + again)), contents)
        fill(stage, second, [0, 3, 49], contents)
        found = {}
        for frame in stage.frames:
            data = stage.read(frame)
            assert len(data) == frame.nbytes and len(frame.blocks) <= FRAME_BLOCKS
            assert frame.table.tolist() == [[block, frame.spec.number] for block in frame.blocks.tolist()]
            for index, block in enumerate(frame.blocks.tolist()):
                found[frame.spec.number, block] = data[index * BLOCK : (index + 1) * BLOCK].tobytes()
        assert found == contents
        assert stage.blocks == len(contents) and stage.nbytes == sum(map(len, contents.values()))
        if budget == 1 << 30:
            assert [len(frame.blocks) for frame in stage.frames] == ([1000, 3] if again else [1020, 480, 3])
        stage.close()


def test_pieces_of_a_tensor_that_changed_everywhere_make_whole_frames(tmp_path):
    stage, spec = Stage(Arena(1 << 30), OS_IO, tmp_path / "spill"), tensor(0, 4 * FRAME_BLOCKS)
    for start in range(0, 4 * FRAME_BLOCKS, FRAME_BLOCKS // 2):
        fill(stage, spec, list(range(start, start + FRAME_BLOCKS // 2)), {})
    assert [len(frame.blocks) for frame in stage.frames] == [FRAME_BLOCKS] * 4
