"""Tensors in a file: their memory comes and goes, and what was changed is there again."""

import pytest
import torch

from bitassay.quantization.solvers.shelf import IN_MEMORY, Shelf


def held(*tensors):
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


def test_one_group_at_a_time_is_in_memory_and_changes_stay(tmp_path):
    shelf, first, second = Shelf(tmp_path), torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)
    shelf.add(0, [first, first])
    shelf.add(1, [second])
    assert held(first, second) == [0, 0]
    assert first.shape == (2, 3)
    shelf.enter(0)
    assert held(first, second) == [24, 0]
    assert torch.equal(first, torch.arange(6.0).view(2, 3))
    first += 1
    shelf.changed(first)
    shelf.enter(1)
    second += 1  # nobody says so
    shelf.enter(None)
    assert held(first, second) == [0, 0]
    shelf.enter(1)
    assert torch.equal(second, torch.ones(4, dtype=torch.bfloat16))
    shelf.enter(0)
    assert torch.equal(first, torch.arange(6.0).view(2, 3) + 1)
    assert not list(tmp_path.iterdir())


def test_tensors_are_lent_and_written_where_they_change(tmp_path):
    shelf, moment = Shelf(tmp_path), torch.zeros(3)
    shelf.keep([moment])
    for changed, wanted in ((True, 1), (False, 1)):
        with shelf.lent(moment, changed=changed):
            moment += 1
        assert held(moment) == [0]
        with shelf.lent(moment, changed=False):
            assert moment.tolist() == [wanted] * 3


def test_a_tensor_that_shares_its_memory_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="shares its memory"):
        Shelf(tmp_path).keep([torch.zeros(4)[:2]])


def test_without_a_folder_everything_stays():
    tensor = torch.ones(3)
    IN_MEMORY.add(0, [tensor])
    IN_MEMORY.enter(0)
    with IN_MEMORY.lent(tensor):
        assert tensor.sum() == 3
    assert tensor not in IN_MEMORY
