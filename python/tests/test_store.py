"""Prevents: a Store method that does not do what its docstring says, or loses saves when its block is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import KIB, MIB, SMALL, MakeRegion, OpenStore

import pccheck
from pccheck import errors


def state(step: int) -> dict[str, Any]:
    return {"w": np.full((8, 16), step, "float32"), "n": np.array(step, "int64")}


def saved(store: pccheck.Store, step: int, **options: Any) -> int:
    return store.save(step, state(step), {"at": str(step)}, **options).durable(30).generation


def steps(store: pccheck.Store) -> list[int]:
    return [info.step for info in store.checkpoints()]


def test_a_save_is_listed_opened_and_restored(store: pccheck.Store) -> None:
    assert store.checkpoints() == []
    generation = saved(store, 7)
    (info,) = store.checkpoints()
    assert (info.generation, info.step, info.run_id, info.tensor_count) == (generation, 7, 0, 2)
    assert (info.pinned, info.raw, info.rejected, info.readers) == (False, False, 0, 0)
    assert info.payload_bytes == pccheck.payload_bytes(state(7), {"at": "7"})
    with store.open() as checkpoint:
        assert checkpoint.metadata == {"at": "7"}
        assert sorted(checkpoint) == ["n", "w"] and len(checkpoint) == 2 and "w" in checkpoint
        np.testing.assert_array_equal(checkpoint["w"], state(7)["w"])
        assert checkpoint["n"].shape == () and checkpoint["n"] == 7
        assert checkpoint.tensors["w"].dtype == "F32" and checkpoint.tensors["w"].shape == (8, 16)
        assert store.checkpoints()[0].readers == 1
    target = {name: np.zeros_like(array) for name, array in state(7).items()}
    with store.restore(target) as checkpoint:
        assert checkpoint.step == 7 and checkpoint.generation == generation
    np.testing.assert_array_equal(target["w"], state(7)["w"])


def test_leaving_the_block_waits_for_saves_in_flight(region: MakeRegion, open_store: OpenStore) -> None:
    path = region(payload_bytes=64 * MIB)
    with pccheck.Store(path, **SMALL) as store:
        save = store.save(1, {"w": np.arange(8 * MIB, dtype="float32")[: 4 * MIB]})
    assert store.closed
    assert save.durable(30).step == 1
    assert steps(open_store(path)) == [1]


def test_an_exception_in_the_block_goes_on_and_loses_no_save(region: MakeRegion, open_store: OpenStore) -> None:
    path = region(payload_bytes=64 * MIB)
    with pytest.raises(ZeroDivisionError), pccheck.Store(path, **SMALL) as store:
        store.save(1, {"w": np.ones(4 * MIB, "float32")})
        raise ZeroDivisionError
    assert store.closed
    assert steps(open_store(path)) == [1]


def test_close_cancels_saves_in_flight(store: pccheck.Store) -> None:
    save = store.save(1, state(1), confirm=True)
    store.close()
    with pytest.raises(errors.Cancelled):
        save.durable(30)


def test_a_closed_store_refuses_and_closes_again(store: pccheck.Store) -> None:
    store.close()
    store.close()
    with store:
        pass
    assert "closed" in repr(store)
    calls: list[Any] = [
        lambda: store.save(1, state(1)),
        lambda: store.raw_save(1, 10),
        store.checkpoints,
        store.open,
        lambda: store.restore(state(1)),
        lambda: store.pin(1),
        lambda: store.unpin(1),
        lambda: store.mark_global(1),
        lambda: store.abandon(1),
        lambda: store.discard_newer(0),
        store.verify,
        store.repair,
        store.drain,
        store.stats,
        store.got,
        store.recovery,
    ]
    for call in calls:
        with pytest.raises(errors.InvalidState, match="the store is closed"):
            call()


def test_a_store_closes_while_an_error_of_its_own_is_handled(store: pccheck.Store) -> None:
    try:
        store.open()
    except errors.NotFound:
        store.close()
    assert store.closed


def test_open_selects(open_store: OpenStore, region: MakeRegion) -> None:
    store = open_store(region(slots=6), keep=4)
    first, second, third = (saved(store, step) for step in (10, 20, 10))
    with store.open() as newest:
        assert newest.generation == third
    with store.open(generation=first) as checkpoint:
        assert checkpoint.step == 10
    with store.open(step=20) as checkpoint:
        assert checkpoint.generation == second
    with store.open(step=10) as checkpoint:
        assert checkpoint.generation == third
    with store.open(older_than=third, verify=False) as checkpoint:
        assert checkpoint.generation == second
    nothing: Any
    for nothing in ({"generation": 999}, {"step": 30}, {"older_than": first}):
        with pytest.raises(errors.NotFound):
            store.open(**nothing)
    with pytest.raises(errors.InvalidArgument, match="at most one"):
        store.open(step=1, generation=1)


def test_keep_and_pins(open_store: OpenStore, region: MakeRegion) -> None:
    path = region(slots=4)
    store = open_store(path)
    pinned = saved(store, 1)
    store.pin(pinned)
    store.pin(pinned)
    for step in (2, 3, 4):
        saved(store, step)
    assert steps(store)[0] == 4 and 1 in steps(store)
    assert next(info for info in store.checkpoints() if info.step == 1).pinned
    with pytest.raises(errors.NoSlot) as refused:
        store.pin(store.checkpoints()[0].generation)
    assert refused.value.advice
    store.close()
    store = open_store(path)
    assert next(info for info in store.checkpoints() if info.generation == pinned).pinned
    store.unpin(pinned)
    for step in (5, 6, 7, 8):
        saved(store, step)
    assert 1 not in steps(store)
    with pytest.raises(errors.NotFound):
        store.pin(pinned)


def test_pin_at_save(open_store: OpenStore, region: MakeRegion) -> None:
    store = open_store(region(slots=4))
    pinned = saved(store, 1, pin=True)
    assert store.checkpoints()[0].pinned
    for step in (2, 3, 4, 5):
        saved(store, step)
    assert pinned in [info.generation for info in store.checkpoints()]
    # Refused at once, however long it may wait for a slot.
    with pytest.raises(errors.NoSlot):
        store.save(6, state(6), pin=True, timeout=None)
    store.unpin(pinned)
    with store.raw_save(7, 4, pin=True) as raw:
        raw.write_at(0, b"abcd")
        raw.commit().durable(30)
    assert store.checkpoints()[0].pinned


def test_hold_mark_global_and_abandon(open_store: OpenStore, region: MakeRegion) -> None:
    store = open_store(region(slots=4), hold=True, run_id=5)
    first = saved(store, 1)
    saved(store, 2)
    assert steps(store) == [2, 1]
    assert store.mark_global(1) == first
    with pytest.raises(errors.InvalidState):
        store.abandon(1)
    assert store.abandon(2) == 1 and steps(store) == [1]
    assert store.abandon(99, timeout=1.0) == 0
    # Nothing is marked after 1, so that every later one is held until all slots are taken.
    saved(store, 3)
    saved(store, 4)
    saved(store, 5)
    with pytest.raises(errors.NoSlot):
        store.save(6, state(6), timeout=0)
    store.mark_global(5)
    saved(store, 6)
    assert steps(store)[:2] == [6, 5]
    with pytest.raises(errors.NotFound):
        store.mark_global(77)


def test_abandon_ends_a_save_in_flight(store: pccheck.Store) -> None:
    save = store.save(3, state(3), confirm=True)
    assert store.abandon(3, timeout=30) == 0
    with pytest.raises(errors.Cancelled):
        save.durable(30)


def test_discard_newer(open_store: OpenStore, region: MakeRegion) -> None:
    store = open_store(region(slots=6), keep=4)
    generations = [saved(store, step) for step in (1, 2, 3)]
    with store.open(), pytest.raises(errors.InvalidState):
        store.discard_newer(generations[0])
    assert store.discard_newer(generations[0]) == 2
    assert steps(store) == [1]
    with pytest.raises(errors.NotFound):
        store.discard_newer(12345)
    assert store.discard_newer(0) == 1 and steps(store) == []


def test_verify_names_damage_and_open_falls_back(open_store: OpenStore, region: MakeRegion) -> None:
    path = region(slots=5)
    store = open_store(path, keep=3)
    noise = np.random.default_rng(0).bytes(2 * MIB)
    for step in (1, 2):
        store.save(step, {"w": np.frombuffer(noise if step == 2 else noise[::-1], "uint8")}).durable(30)
    whole = store.verify()
    assert (whole.intact, whole.damaged, whole.reclaimed) == (2, 0, 0) and len(whole.text.splitlines()) == 2
    store.close()
    medium = bytearray(path.read_bytes())
    medium[medium.index(noise) + MIB + MIB // 2] ^= 1
    path.write_bytes(medium)
    store = open_store(path, keep=3)
    newest = store.checkpoints()[0]
    found = store.verify()
    assert (found.intact, found.damaged) == (1, 1)
    assert store.verify(newest.generation).damaged == 1
    with store.open() as checkpoint:
        assert checkpoint.step == 1 and checkpoint.info.rejected == 1
        assert str(newest.generation) in checkpoint.rejected
    with pytest.raises(errors.Corrupt) as why:
        store.open(generation=newest.generation)
    assert why.value.status == "PCC_CORRUPT" and why.value.path == str(path)
    with store.open(generation=newest.generation, verify=False) as unverified, pytest.raises(errors.Corrupt):
        unverified.read("w")
    target = np.zeros(2 * MIB, "uint8")
    with store.restore({"w": target}) as checkpoint:
        assert checkpoint.step == 1
    assert target.tobytes() == noise[::-1]
    with pytest.raises(errors.NotFound):
        store.verify(999)


def test_stats_got_recovery_and_repair(open_store: OpenStore, region: MakeRegion) -> None:
    path = region()
    store = open_store(path, max_in_flight=1, writers=2, readers=1, queue_depth=4, lock_memory=True)
    generation = saved(store, 1)
    cancelled = store.save(2, state(2), confirm=True)
    assert store.stats().in_flight == 1
    cancelled.cancel()
    store.drain(30)
    stats = store.stats()
    assert (stats.saves_begun, stats.saves_durable, stats.saves_cancelled, stats.in_flight) == (2, 1, 1, 0)
    assert stats.newest_generation == generation and stats.quarantined_slots == 0
    assert stats.durable_bytes == store.checkpoints()[0].payload_bytes
    got = store.got()
    assert (got.max_in_flight, got.keep, got.read_only, got.slot_count) == (1, 1, False, 3)
    assert (got.staging_bytes, got.chunk_bytes) == (SMALL["staging_bytes"], SMALL["chunk_bytes"])
    assert got.durability == "power" and got.medium in ("dax", "mmap", "direct") and len(got.region_uuid) == 32
    assert got.recovered_checkpoints == 0
    assert store.repair() == 0 and store.repair(timeout=1.0) == 0
    store.close()
    again = open_store(path)
    assert again.got().recovered_checkpoints == 1
    assert len(again.recovery().splitlines()) >= 3
    assert generation < saved(again, 3)


def test_drain_without_timeout_refuses_to_wait_for_a_confirmation(region: MakeRegion, open_store: OpenStore) -> None:
    path = region()
    with pytest.raises(errors.InvalidState, match="confirm"), pccheck.Store(path, **SMALL) as store:
        save = store.save(1, state(1), confirm=True)
        with pytest.raises(errors.TimedOut):
            store.drain(0.05)
        with pytest.raises(errors.InvalidState, match=f"generation {save.generation}"):
            store.drain()
    assert store.closed
    with pytest.raises(errors.Cancelled):
        save.durable(30)
    # After an exception it is cancelled at once, and what was not to be confirmed becomes durable.
    with pytest.raises(KeyError), pccheck.Store(path, **SMALL) as store:
        save, other = store.save(2, state(2), confirm=True), store.save(3, state(3))
        raise KeyError
    with pytest.raises(errors.Cancelled):
        save.durable(30)
    assert other.durable(30).step == 3
    assert steps(open_store(path)) == [3]


def test_a_read_only_store_beside_a_live_writer(open_store: OpenStore, region: MakeRegion) -> None:
    path = region()
    writer = open_store(path)
    saved(writer, 1)
    with pccheck.Store(path, read_only=True, **SMALL) as reader:
        assert reader.got().read_only
        with reader.open() as old:
            assert old["n"] == 1
            saved(writer, 2)
            assert steps(reader)[0] == 2
            # The slot of step 1 is overwritten, which no reader can prevent.
            for step in (3, 4, 5, 6):
                saved(writer, step)
            with pytest.raises(errors.Reclaimed):
                old.read("w")
        with reader.open() as newest:
            assert newest["n"] == 6
        refused: list[Any] = [
            lambda: reader.save(1, state(1)),
            lambda: reader.raw_save(1, 10),
            lambda: reader.pin(reader.checkpoints()[0].generation),
            lambda: reader.unpin(reader.checkpoints()[0].generation),
            lambda: reader.mark_global(6),
            lambda: reader.abandon(6),
            lambda: reader.discard_newer(0),
            reader.repair,
        ]
        for call in refused:
            with pytest.raises(errors.ReadOnly) as why:
                call()
            assert why.value.status == "PCC_READ_ONLY"
    assert steps(writer)[0] == 6


def test_media_and_backends(open_store: OpenStore, region: MakeRegion) -> None:
    path = region()
    for step, options in enumerate(({"medium": "mmap"}, {"medium": "direct", "backend": "threads"})):
        store = open_store(path, **options)
        assert store.got().medium == options["medium"]
        saved(store, step)
        store.close()
    assert steps(open_store(path))[0] == 1


def test_grow_keeps_checkpoints_and_pins(open_store: OpenStore, region: MakeRegion) -> None:
    path = region(slots=4)
    store = open_store(path)
    generation = saved(store, 1, pin=True)
    with pytest.raises(errors.InUse):
        pccheck.grow_region(path, slots=6, payload_bytes=8 * MIB, lock_timeout=0.2)
    store.close()
    assert pccheck.grow_region(path, slots=6, payload_bytes=8 * MIB) == 0
    store = open_store(path)
    (info,) = store.checkpoints()
    assert (info.generation, info.pinned, store.got().slot_count) == (generation, True, 6)
    store.save(2, {"w": np.zeros(7 * MIB, "uint8")}).durable(30)
    store.close()
    with pytest.raises(errors.InvalidArgument):
        pccheck.grow_region(path, slots=2, payload_bytes=8 * MIB)


def test_a_store_that_is_dropped_stays_open_for_a_save_in_hand(region: MakeRegion, open_store: OpenStore) -> None:
    path = region(payload_bytes=64 * MIB)
    save = pccheck.Store(path, **SMALL).save(1, {"w": np.ones(4 * MIB, "float32")})
    save.copied(30)
    assert save.durable(30).step == 1
    # The end was seen: the region is free again though the save lives.
    assert steps(open_store(path, lock_timeout=0)) == [1]


def test_checkpoints_outlive_their_store(store: pccheck.Store) -> None:
    saved(store, 4)
    checkpoint = store.open()
    store.close()
    assert checkpoint["n"] == 4
    checkpoint.verify()
    checkpoint.close()
    checkpoint.close()
    assert checkpoint.closed
    for call in (lambda: checkpoint.read("n"), checkpoint.verify, lambda: checkpoint.read_payload(0, bytearray(8))):
        with pytest.raises(errors.InvalidState, match="the checkpoint is closed"):
            call()
    assert checkpoint.metadata == {"at": "4"} and checkpoint.step == 4


def test_reading_parts(store: pccheck.Store) -> None:
    save = store.save(1, {"a": np.arange(1000, dtype="int32"), "b": np.arange(10, dtype="float64")}, {"k": "v"})
    save.durable(30)
    with store.open() as checkpoint:
        out = np.zeros(1000, "int32")
        assert checkpoint.read("a", out) is out and out[999] == 999
        part = np.zeros(3, "int32")
        checkpoint.read_bytes("a", 40, part)
        assert part.tolist() == [10, 11, 12]
        first, last = np.zeros(1, "int32"), np.zeros(1, "float64")
        checkpoint.read_ranges([("a", 3996, first), ("b", 72, last)])
        assert (first[0], last[0]) == (999, 9.0)
        payload = bytearray(checkpoint.info.payload_bytes)
        checkpoint.read_payload(0, payload)
        safetensors = pytest.importorskip("safetensors.numpy")
        np.testing.assert_array_equal(safetensors.load(bytes(payload))["a"], np.arange(1000, dtype="int32"))
        with pytest.raises(errors.InvalidArgument):
            checkpoint.read_bytes("a", 3998, part)
        with pytest.raises(errors.InvalidArgument):
            checkpoint.read_payload(len(payload) - 1, bytearray(2))
        with pytest.raises(errors.InvalidArgument, match="overlap"):
            checkpoint.read_ranges([("a", 0, part), ("a", 0, part)])
        with pytest.raises(errors.NotFound, match="'zz'"):
            checkpoint.read("zz")
        with pytest.raises(errors.InvalidArgument, match="F32 .*|I32"):
            checkpoint.read("a", np.zeros(1000, "float32"))


def test_a_mapping_of_one_checkpoint_is_itself(store: pccheck.Store) -> None:
    saved(store, 1)
    with store.open() as one, store.open() as other:
        assert one == one and one != other and len({one, other}) == 2
        assert "step=1" in repr(one)


def test_tied_tensors_are_stored_once(store: pccheck.Store) -> None:
    shared = np.arange(100 * KIB, dtype="uint8")
    store.save(1, {"a": shared, "b": shared}).durable(30)
    with store.open() as checkpoint:
        assert checkpoint.info.payload_bytes < 2 * shared.nbytes
        assert {t.tied_to for t in checkpoint.tensors.values()} == {None, "a"}
        np.testing.assert_array_equal(checkpoint["a"], checkpoint["b"])


def test_metadata_and_names_are_any_text(store: pccheck.Store) -> None:
    metadata = {"empty": "", "": "empty key", "ü": '😀 \n\t"\\', "big": "x" * 100_000}
    tensors = {"层.0": np.ones(3), "a b/c": np.zeros(2), '"': np.ones(1)}
    store.save(1, tensors, metadata).durable(30)
    with store.open() as checkpoint:
        assert checkpoint.metadata == metadata
        assert set(checkpoint) == set(tensors)


def test_no_tensors_at_all(store: pccheck.Store) -> None:
    store.save(1, {}, {"only": "metadata"}).durable(30)
    with store.open() as checkpoint:
        assert checkpoint.metadata == {"only": "metadata"} and list(checkpoint) == []
        checkpoint.read_into({})
    store.restore({}).close()


def test_chunks_that_are_in_their_places_are_counted_and_not_written(open_store: OpenStore, region: MakeRegion) -> None:
    path = region(slots=2)
    store = open_store(path, max_in_flight=1, chunk_bytes=64 << 10)
    array = np.arange(100_000, dtype=np.float64)
    counts = []
    for step in range(4):
        store.save(step, {"x": array}).durable(30)
        counts.append(store.stats().unchanged_bytes)
    payload = store.checkpoints()[0].payload_bytes
    assert counts == [0, 0, payload, 2 * payload]
    array[-1] = -1.0
    store.save(4, {"x": array}).durable(30)
    assert 2 * payload < store.stats().unchanged_bytes < 3 * payload
    with store.open() as checkpoint:
        assert np.array_equal(checkpoint.read("x"), array)
    store.close()
    store = open_store(path, max_in_flight=1, chunk_bytes=64 << 10, rewrite_every=1)
    store.save(5, {"x": array}).durable(30)
    assert store.stats().unchanged_bytes == 0
    store.close()
    with pytest.raises(errors.InvalidArgument, match="rewrite_every"):
        pccheck.Store(path, rewrite_every=1 << 20)
