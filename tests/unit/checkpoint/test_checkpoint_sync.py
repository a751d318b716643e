"""Live weights go to disk block by block, and the result is an ordinary model directory."""

import threading

import pytest
import torch
from safetensors import safe_open

from hogwild.checkpoint.constants import BLOCK
from hogwild.checkpoint.store import CheckpointStore
from hogwild.errors import CheckpointLayout, Conflict


def disk(store, helpers):
    found = helpers.weights_on_disk(store.directory)
    found.pop("rotary.inv_freq")
    return found


def test_clone_is_a_complete_model_directory(store, model, helpers):
    # Then the clone holds weights, index, configuration and tokenizer, and no weights of another format
    names = {path.name for path in store.directory.iterdir()}
    assert names == {path.name for path in model.directory.iterdir()} - {"pytorch_model.bin"} | {".hogwild"}
    helpers.assert_equal(helpers.weights_on_disk(store.directory), helpers.weights_on_disk(model.directory))
    assert [commit.kind for commit in store.generations()] == ["clone"]
    assert store.head.base_model == store.head.fingerprints


def test_nothing_changed_makes_no_generation(store, model):
    report = store.sync(model.views, weight_version=5)
    assert (report.generation, report.blocks_changed, report.bytes_written) == (0, 0, 0)
    assert report.blocks_total == store.layout.blocks
    assert len(store.generations()) == 1


def test_only_changed_blocks_are_written(store, model, helpers):
    # Given one element of each of three tensors changed
    model.views["embed.weight"][40, 3] += 1  # bytes 10246…: block 2
    model.views["layer.down.weight"][63, 32] -= 1  # the short last block of a strided view
    model.views["scale"] *= 2
    # When
    report = store.sync(model.views, weight_version=3, jobs=["a", "b"])
    # Then three blocks went to disk, and what a loader reads is what is live
    assert report.blocks_changed == 3
    assert report.bytes_changed == BLOCK + (64 * 66 - BLOCK) + 4
    helpers.assert_equal(disk(store, helpers), model.views)
    assert (store.head.weight_version, store.head.jobs, store.head.kind) == (3, ("a", "b"), "sync")
    assert not list((store.directory / ".hogwild" / "generations").glob("*.redo"))


def test_many_syncs_of_random_changes(store, model, helpers):
    generator = torch.Generator().manual_seed(1)
    for version in range(1, 12):
        for view in model.views.values():
            if torch.rand((), generator=generator) < 0.5:
                share = float(torch.rand((), generator=generator)) ** 3
                view.add_((torch.rand(view.shape, generator=generator) < share).to(view.dtype) * 0.125)
        store.sync(model.views, weight_version=version)
        helpers.assert_equal(disk(store, helpers), model.views)
        report = store.verify(model.views)
        assert report.ok
        assert report.live_blocks_checked < report.blocks_checked == store.layout.blocks


def test_a_file_of_which_most_changes_is_replaced_and_keeps_its_mode(store, model, helpers):
    path = store.directory / "model-00002-of-00002.safetensors"
    path.chmod(0o640)
    inode = path.stat().st_ino
    other = store.directory / "model-00001-of-00002.safetensors"
    other_inode = other.stat().st_ino
    for name in ("head.weight", "half.weight"):
        model.views[name].neg_()
    model.views["embed.weight"][0, 0] += 1
    with path.open("rb") as before, safe_open(path, "pt") as reader:
        store.sync(model.views, weight_version=1)
        # Then a reader that had the file open goes on seeing the generation it opened
        assert not torch.equal(reader.get_tensor("head.weight"), model.views["head.weight"])
        assert before.read(8) == path.read_bytes()[:8]
    assert path.stat().st_ino != inode
    assert path.stat().st_mode & 0o777 == 0o640
    assert other.stat().st_ino == other_inode
    helpers.assert_equal(disk(store, helpers), model.views)


def test_works_in_place_on_the_models_own_directory(model, io, helpers):
    with CheckpointStore.open(model.directory, source=model.directory, io=io) as store:
        model.views["norm.weight"].zero_()
        store.sync(model.views, weight_version=1)
        helpers.assert_equal(disk(store, helpers), model.views)
    with CheckpointStore.open(model.directory, io=io) as again:
        assert again.head.generation == 1
        assert again.verify(model.views).ok


def test_non_finite_and_negative_zero_survive_bit_for_bit(store, model, helpers):
    model.views["norm.weight"][:4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])
    store.sync(model.views, weight_version=1)
    helpers.assert_equal(disk(store, helpers), model.views)


def test_views_that_do_not_fit_are_refused_by_name(store, model):
    views = dict(model.views)
    views["norm.weight"] = views["norm.weight"].to(torch.bfloat16)
    views["scale"] = torch.zeros(3)
    views["lm_head.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointLayout) as caught:
        store.begin_sync(views, weight_version=1)
    message = str(caught.value)
    assert "norm.weight is bfloat16 live and F32" in message
    assert "scale is (3,) live and () in" in message
    assert "lm_head.bias is not in the checkpoint" in message


def test_training_goes_on_between_begin_and_commit(store, model, helpers):
    model.views["head.weight"] += 1
    pending = store.begin_sync(model.views, weight_version=1)
    at_begin = model.copy()
    model.views["head.weight"] += 1
    model.views["embed.weight"].zero_()
    pending.commit()
    helpers.assert_equal(disk(store, helpers), at_begin)
    store.sync(model.views, weight_version=2)
    helpers.assert_equal(disk(store, helpers), model.views)


def test_one_sync_at_a_time(store, model):
    model.views["norm.weight"].zero_()
    pending = store.begin_sync(model.views, weight_version=1)
    with pytest.raises(Conflict):
        store.begin_sync(model.views, weight_version=1)
    with pytest.raises(Conflict):
        store.rollback(0)
    pending.abandon()
    with pytest.raises(Conflict, match="committed or abandoned"):
        pending.commit()
    assert store.sync(model.views, weight_version=1).blocks_changed == 1


def test_commit_in_another_thread(store, model, helpers):
    model.views["head.weight"] += 1
    pending = store.begin_sync(model.views, weight_version=1)
    reports = []
    thread = threading.Thread(target=lambda: reports.append(pending.commit()))
    thread.start()
    thread.join()
    assert reports[0].generation == 1
    helpers.assert_equal(disk(store, helpers), model.views)


def test_changes_beyond_the_memory_budget_are_spilled(model, tmp_path, io, helpers):
    # Given a budget of three blocks
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io, host_budget=3 * BLOCK) as store:
        for view in model.views.values():
            view.add_(1)
        pending = store.begin_sync(model.views, weight_version=1)
        spill = store.directory / ".hogwild" / "generations" / "stage.spill"
        assert spill.stat().st_size > 8 * BLOCK
        at_begin = model.copy()
        model.views["head.weight"].zero_()
        # When
        pending.commit()
        # Then
        helpers.assert_equal(disk(store, helpers), at_begin)
        assert not spill.exists()


def test_default_budget_is_bounded_by_the_machine_and_the_control_group(monkeypatch, tmp_path):
    import pathlib

    import psutil

    from hogwild.checkpoint import stage

    free = stage.available_memory()
    assert 0 < free <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nfile 300000\n")
    monkeypatch.setattr(stage, "Path", lambda _: pathlib.Path(tmp_path))
    assert stage.available_memory() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert stage.available_memory() > 600_000


def test_prepare_reserves_the_memory_of_the_first_pause(store, model):
    store.prepare(model.views)
    assert store._arena.allocated >= sum(view.numel() * view.element_size() for view in model.views.values())
    with pytest.raises(CheckpointLayout):
        store.prepare({"nothing": torch.zeros(1)})


def test_report_adds_up(store, model):
    model.views["head.weight"] += 1
    report = store.sync(model.views, weight_version=1)
    generations = store.directory / ".hogwild" / "generations"
    assert 0 < report.pause_seconds <= report.durable_seconds <= report.seconds
    assert report.applied
    shard = (store.directory / "model-00002-of-00002.safetensors").stat().st_size
    commit = (generations / "00000001.commit").stat().st_size
    # six of eight blocks: the shard is written anew, and its undo data is made of the old one later
    assert report.undo_bytes == 64 + 48  # a part without frames
    assert report.bytes_written == report.undo_bytes + commit + shard
    assert store.compact() == (generations / "00000001.undo").stat().st_size == store.generations()[-1].undo_bytes
    assert store.compact() == 0

    # A change of one block is written in place, and its undo data at once
    model.views["norm.weight"][0] += 1
    report = store.sync(model.views, weight_version=2)
    assert report.undo_bytes == (generations / "00000002.undo").stat().st_size == store.generations()[-1].undo_bytes
    assert store.compact() == 0
