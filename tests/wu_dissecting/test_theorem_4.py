"""Two layers at initialization come nearer to the theorems as they widen."""

import torch

from common.wu_dissecting.theorem_4 import distances_at_width


def test_distances_fall_with_the_width_and_follow_the_generator():
    narrow, wide = (
        torch.tensor([
            distances_at_width(n, d, 3, samples=512, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
        ]).mean(0)
        for n, d in ((8, 16), (64, 256))
    )  # fmt: skip
    assert (wide[[0, 2, 3]] < narrow[[0, 2, 3]]).all()
    assert wide[0] < 0.05
    assert wide[1] < 0.4  # by chance 1 - 2/64
    first, second = (distances_at_width(8, 16, 3, samples=64, generator=torch.Generator().manual_seed(5)) for _ in "ab")
    assert first == second
    generator = torch.Generator().manual_seed(5)
    assert distances_at_width(8, 16, 3, samples=64, generator=generator) == first
    assert distances_at_width(8, 16, 3, samples=64, generator=generator) != first
