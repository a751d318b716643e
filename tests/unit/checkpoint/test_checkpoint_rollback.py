"""Every kept generation can be brought back, on disk and in the live weights, and nothing is lost by doing so."""

import tarfile

import pytest
import torch

from hogwild.checkpoint.store import CheckpointStore
from hogwild.errors import CheckpointError, NotFound


@pytest.fixture
def history(store, model):
    """Six generations; what was live at each."""
    states = [model.copy()]
    for version in range(1, 6):
        model.views["embed.weight"][version * 10] += version
        if version % 2:
            model.views["layer.down.weight"] += 0.5
        if version == 3:
            model.views["head.weight"].neg_()
        model.views["norm.weight"][version] = version
        store.sync(model.views, weight_version=version)
        states.append(model.copy())
    return states


def check(store, model, state, helpers):
    on_disk = helpers.weights_on_disk(store.directory)
    on_disk.pop("rotary.inv_freq")
    helpers.assert_equal(on_disk, state)
    helpers.assert_equal(model.views, state)
    assert store.verify(model.views).ok


@pytest.mark.parametrize("target", [0, 1, 2, 3, 4, 5])
def test_rollback_to_any_generation_on_disk_and_live(store, model, history, helpers, target):
    pointers = {name: view.data_ptr() for name, view in model.views.items()}
    report = store.rollback(target, model.views, weight_version=9)
    check(store, model, history[target], helpers)
    # Then the live tensors are where they were, so that vLLM serves them
    assert pointers == {name: view.data_ptr() for name, view in model.views.items()}
    if target == 5:
        assert (report.blocks_changed, report.live_blocks_changed, store.head.generation) == (0, 0, 5)
    else:
        assert report.generation == store.head.generation == 6
        assert (store.head.kind, store.head.restores, store.head.weight_version) == ("rollback", target, 9)
        assert report.blocks_changed == report.live_blocks_changed > 0
        assert "norm.weight" in report.tensors


def test_a_rollback_can_be_rolled_back(store, model, history, helpers):
    store.rollback(1, model.views)
    store.rollback(4, model.views)
    check(store, model, history[4], helpers)
    store.rollback(6, model.views)
    check(store, model, history[1], helpers)
    store.rollback(5, model.views)
    check(store, model, history[5], helpers)


def test_rollback_takes_unsynced_training_back(store, model, history, helpers):
    model.views["half.weight"].zero_()
    report = store.rollback(5, model.views)
    check(store, model, history[5], helpers)
    assert report.blocks_changed == 0
    assert report.live_blocks_changed == 2
    assert report.tensors == ("half.weight",)


def test_rollback_on_disk_alone(store, model, history, helpers):
    live = model.copy()
    version = store.head.weight_version
    report = store.rollback(2)
    helpers.assert_equal(model.views, live)
    assert report.weight_version == store.head.weight_version == version + 1
    assert store.rollback(report.generation).weight_version == version + 1  # nothing to do
    assert report.live_blocks_changed == 0
    # ... and the live weights follow when they are restored
    assert store.restore(model.views).blocks_changed == report.blocks_changed
    check(store, model, history[2], helpers)


def test_training_after_a_rollback_leads_on_from_there(store, model, history, helpers):
    store.rollback(2, model.views)
    model.views["norm.weight"][60] = 60
    store.sync(model.views, weight_version=20)
    state = model.copy()
    store.rollback(3, model.views)
    check(store, model, history[3], helpers)
    store.rollback(7, model.views)
    check(store, model, state, helpers)


def test_history_survives_reopening(store, model, history, io, helpers):
    listed = store.generations()
    store.close()
    with CheckpointStore.open(store.directory, io=io) as again:
        assert again.generations() == listed
        again.rollback(1, model.views)
        check(again, model, history[1], helpers)


def test_unknown_generation(store, model, history):
    with pytest.raises(NotFound, match="kept are 0 to 5"):
        store.rollback(17, model.views)


def test_keep_last_prunes_and_the_rest_stays_reachable(model, tmp_path, io, helpers):
    with CheckpointStore.open(tmp_path / "c", source=model.directory, keep_last=3, io=io) as store:
        states = [model.copy()]
        for version in range(1, 30):
            model.views["embed.weight"][version] += 1
            store.sync(model.views, weight_version=version)
            states.append(model.copy())
            kept = [commit.generation for commit in store.generations()]
            assert kept == list(range(max(0, version - 3), version + 1))
            undo = sorted(path.name for path in (store.directory / ".hogwild/generations").glob("*.undo"))
            assert undo == [f"{number:08d}.undo" for number in kept[1:]]
        # Then records do not pile up either
        assert len(list((store.directory / ".hogwild/generations").glob("*.commit"))) < 20
        with pytest.raises(NotFound):
            store.rollback(25)
        store.rollback(26, model.views)
        check(store, model, states[26], helpers)
    with CheckpointStore.open(tmp_path / "c", keep_last=10, io=io) as again:
        assert [commit.generation for commit in again.generations()] == [27, 28, 29, 30]
        again.rollback(28, model.views)
        check(again, model, states[28], helpers)


def test_restore_writes_only_what_differs(store, model, history, helpers):
    model.views["layer.q.weight"].zero_()
    model.views["scale"].zero_()
    around = model.fused.clone()
    report = store.restore(model.views)
    assert report.tensors == ("layer.q.weight", "scale")
    assert report.blocks_changed == 3
    check(store, model, history[5], helpers)
    # Then the neighbours in the fused parameter were not touched
    assert torch.equal(model.fused[:10], around[:10])
    assert torch.equal(model.fused[58:], around[58:])


@pytest.mark.parametrize("generation", [0, 3, 5, None])
def test_export_of_any_generation_is_a_clean_model_directory(store, model, history, tmp_path, helpers, generation):
    target = tmp_path / "export"
    commit = store.export(target, generation)
    state = dict(history[5 if generation is None else generation])
    assert commit.generation == (5 if generation is None else generation)
    exported = helpers.weights_on_disk(target)
    not_live = exported.pop("rotary.inv_freq")
    assert torch.equal(not_live, helpers.weights_on_disk(model.directory)["rotary.inv_freq"])
    helpers.assert_equal(exported, state)
    assert {path.name for path in target.iterdir()} == {
        path.name for path in store.directory.iterdir() if not path.name.startswith(".")
    }
    # ... and the checkpoint itself is as it was
    check(store, model, history[5], helpers)


def test_export_as_tar_file_and_stream(store, history, tmp_path, helpers):
    store.export(tmp_path / "model.tar", 2)
    with (tmp_path / "stream").open("wb") as stream:
        store.export(stream, 2)
    for name in ("model.tar", "stream"):
        target = tmp_path / f"unpacked-{name}"
        with tarfile.open(tmp_path / name) as tar:
            tar.extractall(target, filter="data")
        weights = helpers.weights_on_disk(target)
        weights.pop("rotary.inv_freq")
        helpers.assert_equal(weights, history[2])
    with pytest.raises(CheckpointError, match="exists already"):
        store.export(tmp_path / "model.tar")


def test_export_refuses_a_directory_with_files(store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        store.export(tmp_path / "full")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_sequence_of_actions(model, tmp_path, io, helpers, seed):
    """Syncs, rollbacks, reopening, restoring and exporting in any order, against a plain list of what was live when."""
    rng = torch.Generator().manual_seed(seed)

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=rng))

    store = CheckpointStore.open(tmp_path / "c", source=model.directory, keep_last=4, io=io)
    states = {0: model.copy()}
    for step in range(60):
        action = draw(6)
        if action <= 2:
            for name in list(model.views)[: draw(8)]:
                share = (0.002, 0.2, 1.0)[draw(3)]
                mask = torch.rand(model.views[name].shape, generator=rng) < share
                model.views[name].add_(mask.to(model.views[name].dtype) * (1 + draw(5)))
            report = store.sync(model.views, weight_version=step)
            assert (report.generation in states) == (report.blocks_changed == 0)
            states[report.generation] = model.copy()
        elif action == 3:
            kept = store.generations()
            target = kept[draw(len(kept))].generation
            report = store.rollback(target, model.views, weight_version=step)
            helpers.assert_equal(model.views, states[target])
            states[report.generation] = states[target]
        elif action == 4:
            store.close()
            store = CheckpointStore.open(tmp_path / "c", keep_last=4, io=io)
            model.views["embed.weight"].zero_()
            store.restore(model.views)
            helpers.assert_equal(model.views, states[store.head.generation])
        else:
            kept = store.generations()
            target = kept[draw(len(kept))].generation
            store.export(tmp_path / f"export{step}", target)
            exported = helpers.weights_on_disk(tmp_path / f"export{step}")
            exported.pop("rotary.inv_freq")
            helpers.assert_equal(exported, states[target])
        assert store.verify(model.views).ok
        assert len(store.generations()) <= 5
    store.close()
    assert len(states) > 15
