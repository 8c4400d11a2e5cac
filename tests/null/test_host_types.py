"""Numbers of the programs' types in host memory, bf16 above all, against ml_dtypes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.runtime.backends.host_types import STORAGE, byte_size, from_bf16, load, store, to_bf16

ml_dtypes = pytest.importorskip("ml_dtypes")


def test_every_bf16_is_itself() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    single = from_bf16(bits)
    assert np.array_equal(single, bits.view(ml_dtypes.bfloat16).astype(np.float32), equal_nan=True)
    there = to_bf16(single)
    nan = np.isnan(single)
    assert np.array_equal(there[~nan], bits[~nan])
    assert np.isnan(from_bf16(there[nan])).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=50))
def test_bf16_is_the_nearest(bits: list[int]) -> None:
    single = np.array(bits, np.uint32).view(np.float32)
    want = single.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(from_bf16(to_bf16(single)), want, equal_nan=True)


def test_ties_go_to_the_even_neighbour_and_large_numbers_to_infinity() -> None:
    ulp = 2.0**-7
    values = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 2.0**-23, 3.4e38, -3.4e38], np.float32)
    assert from_bf16(to_bf16(values)).tolist() == [1.0, 1 + 2 * ulp, 1 + ulp, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", STORAGE)
def test_there_and_back(dtype: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]], np.int64)
    stored = np.empty((2, 3), STORAGE[dtype])
    store(values, dtype, stored)
    assert load(stored, dtype).tolist() == values.tolist()
    assert stored.nbytes == byte_size((2, 3), dtype)


def test_fp16_overflows_without_a_warning() -> None:
    stored = np.empty(2, np.float16)
    store(np.array([1e6, -1e6]), "fp16", stored)
    assert stored.tolist() == [np.inf, -np.inf]


def test_scalars_keep_their_shape() -> None:
    assert to_bf16(np.array(1.0)).shape == ()
