"""The order of a run: every slice once an epoch, from any place, for any number of processes; a function of seed and epoch only."""

import itertools

import pytest

from datasets.order import MicroBatch, UpdateSampler


def indices(sampler: UpdateSampler) -> list[int]:
    return [index for keys in sampler for _, index in keys]


@pytest.mark.parametrize("length", [1, 2, 30])
def test_every_index_once_an_epoch(length: int) -> None:
    sampler = UpdateSampler(length, 4, 7)
    for epoch in (0, 3):
        sampler.go_to(epoch)
        batches = list(sampler)
        assert len(sampler) == len(batches) == -(-length // 4)
        assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
        assert sorted(key for batch in batches for key in batch) == [(epoch, index) for index in range(length)]
        assert list(sampler) == batches


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, batch_size: int = 4) -> tuple[int, ...]:
        sampler = UpdateSampler(30, batch_size, seed)
        sampler.go_to(epoch)
        return tuple(indices(sampler))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 2) == order(1, 2) == order(1, 2, batch_size=7)


@pytest.mark.parametrize(("length", "batch_size", "accumulate", "processes"), list(itertools.product([1, 5, 11, 24], [1, 2, 3], [1, 2], [1, 2, 3])))
def test_any_number_of_processes_shares_the_same_updates(length: int, batch_size: int, accumulate: int, processes: int) -> None:
    """An update's slices are the next ones of the epoch's order; what each process says of its part adds up."""
    samplers = [UpdateSampler(length, batch_size, 3, accumulate=accumulate, rank=rank, world_size=processes) for rank in range(processes)]
    alone = indices(UpdateSampler(length, 1, 3))
    size = batch_size * accumulate * processes
    assert {sampler.update_size for sampler in samplers} == {size}
    plans = [sampler.plan() for sampler in samplers]
    assert len({len(plan) for plan in plans}) == 1  # none waits for another
    update: list[int] = []
    done = 0
    updates = 0
    for together in zip(*plans, strict=True):
        own = [index for micro in together for _, index in micro.keys[: micro.n_own]]
        assert all(1 <= len(micro.keys) <= batch_size for micro in together)
        assert {micro.n_all for micro in together} == {len(own)}
        assert {micro.n_update for micro in together} == {min(size, length - done)}
        update += own
        assert len({micro.end for micro in together}) == 1
        if together[0].end is not None:
            assert update == alone[done : done + size]
            done, update, updates = done + len(update), [], updates + 1
            assert together[0].end == done
    assert done == length
    assert updates == samplers[0].updates_per_epoch
    assert not update


def test_a_process_without_a_slice_takes_one_that_does_not_count() -> None:
    plans = [UpdateSampler(5, 2, 0, rank=rank, world_size=2).plan() for rank in range(2)]
    assert plans[0][-1] == MicroBatch(plans[0][-1].keys, 1, 1, 1, 5)
    assert plans[1][-1] == MicroBatch(plans[0][-1].keys, 0, 1, 1, 5)


@pytest.mark.parametrize(("before", "after"), [((2, 1, 1), (2, 1, 1)), ((2, 1, 2), (4, 1, 1)), ((4, 1, 1), (1, 2, 2)), ((3, 1, 1), (2, 2, 1))])
def test_it_goes_on_from_any_place_with_any_number_of_processes(before: tuple[int, int, int], after: tuple[int, int, int]) -> None:
    whole = indices(UpdateSampler(23, 1, 5))
    for done in range(0, 23, before[0] * before[1] * before[2]):
        rest = []
        for rank in range(after[2]):
            sampler = UpdateSampler(23, after[0], 5, accumulate=after[1], rank=rank, world_size=after[2])
            sampler.go_to(0, done)
            rest += [(micro.end or 99, index) for micro in sampler.plan() for _, index in micro.keys[: micro.n_own]]
            assert len(sampler) == len(sampler.plan())
        assert sorted(index for _, index in rest) == sorted(whole[done:])
