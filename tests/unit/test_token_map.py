"""Token maps compose: two stages in a row equal one map from first to last."""

from __future__ import annotations

import pytest
import torch

from secateur.compiler.token_map import TokenMap, compose


def apply(token_map: TokenMap, rows: torch.Tensor) -> torch.Tensor:
    if token_map.mix is not None:
        return token_map.mix @ rows
    return rows.gather(1, token_map.keep.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def random_map(count: int, k: int, mixes: bool, seed: int) -> TokenMap:
    source = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, count, generator=source).topk(k).indices.sort().values
    return TokenMap(keep, torch.rand(2, k, count, generator=source) if mixes else None)


@pytest.mark.parametrize("outer_mixes", [False, True])
@pytest.mark.parametrize("inner_mixes", [False, True])
def test_composition_is_one_after_the_other(inner_mixes: bool, outer_mixes: bool) -> None:
    inner, outer = random_map(9, 5, inner_mixes, 0), random_map(5, 2, outer_mixes, 1)
    rows = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(2))
    both = compose(outer, inner, length=9)
    torch.testing.assert_close(apply(both, rows), apply(outer, apply(inner, rows)))
    positions = torch.arange(9).expand(2, 9)
    kept_in_turn = positions.gather(1, inner.keep).gather(1, outer.keep)
    assert (positions.gather(1, both.keep) == kept_in_turn).all()
    assert (both.mix is None) == (not inner_mixes and not outer_mixes)


def test_composition_asks_for_the_length_it_cannot_know() -> None:
    with pytest.raises(ValueError, match="source length"):
        compose(random_map(5, 2, True, 1), random_map(9, 5, False, 0))
