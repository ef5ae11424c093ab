"""Counter-based randomness."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedkd import seeds


@given(st.integers(0, 2**63), st.text(max_size=8), st.integers(0, 9999), st.integers(0, 10**6))
def test_a_generator_is_philox_keyed_by_the_hash_of_what_it_is_for(seed, purpose, t, client):
    digest = hashlib.sha256(f"{seed}/{purpose}/{t}/{client}".encode()).digest()
    plain = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
    ours = seeds.generator(seed, purpose, t, client)
    assert ours.integers(2**63, size=9).tolist() == plain.integers(2**63, size=9).tolist()
    assert ours.standard_normal(5).tolist() == plain.standard_normal(5).tolist()


def test_purposes_rounds_and_clients_do_not_share_numbers():
    drawn = {
        tuple(seeds.generator(0, purpose, t, client).integers(2**63, size=2).tolist())
        for purpose in ("order", "noise")
        for t in range(3)
        for client in range(5)
    }
    assert len(drawn) == 30
