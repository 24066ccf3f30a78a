"""One process alone as a World."""

import pytest
import torch

from gpt.world import World


def test_one_process_needs_no_process_group(capsys):
    alone = World.join('cpu')
    assert (alone.rank, alone.size, alone.is_main, alone.under_torchrun) == (0, 1, True, False)
    numbers = torch.tensor([1.0, 2.0])
    assert torch.equal(alone.reduce(numbers), torch.tensor([1.0, 2.0]))
    assert alone.gather('a') == ['a'] and alone.broadcast(3) == 3
    assert alone.any(True) and not alone.any(False)
    assert alone.on_main(divmod, 7, 3) == (2, 1)
    with pytest.raises(ValueError, match='no such'):
        alone.on_main(refuse)
    alone.print('a', 1)
    World(rank=1, size=2).print('b')
    assert capsys.readouterr().out == 'a 1\n'
    alone.leave()


def refuse():
    raise ValueError('no such')


def test_autocast_is_off_in_float32():
    for dtype in (torch.float32, torch.bfloat16):
        with World(dtype=dtype).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
