"""Random worlds of coupons, segments and limits, for the knapsack on arrays and over partitions."""

import numpy as np

from couponflow.campaign.choice import pricing
from couponflow.campaign.choice.pricing import NO_LIMIT, Limits, UnitLimit, Users


def random_case(
    seed: int, num_users: int, num_options: int = 4, num_segments: int = 2
) -> tuple[Users, Limits]:
    """Coupons of several discounts and responses; all kinds of limits, loose or tight; ties in odd seeds."""
    draw = np.random.default_rng(seed)
    chance = draw.random((num_users, 1)) ** 3 * 0.2 + 0.005
    chance = np.round(chance, 2) + 0.01 if seed % 2 else chance
    discount = draw.integers(1, 30, num_options) / 10
    response = chance * (1 + discount * 0.3 * draw.random(num_options))
    noise = 1.0 if seed % 2 else draw.random((num_users, num_options)) * 0.6 + 0.7
    value = np.round(response * (5 - discount) * noise * 1e6).astype(np.int64) - 10_000
    cost = np.round(response * discount * 1e6).astype(np.int64) + 20_000
    segment = draw.random((num_users, num_segments)) < draw.random(num_segments) * 0.6 + 0.1
    every = (True,) * num_options
    units = [UnitLimit("max_recipients", "", every, int(draw.integers(num_users // 4, num_users + 1)))]
    for place in range(num_options):
        stock = int(draw.integers(0, num_users // 2 + 1)) if draw.random() < 0.7 else NO_LIMIT
        units.append(UnitLimit("stock", f"c{place}", tuple(place == o for o in range(num_options)), stock))
    for place, size in enumerate(segment.sum(0).tolist()):
        least = int(draw.integers(0, size // 4 + 1))
        most = int(draw.integers(least, size + 1)) if draw.random() < 0.7 else NO_LIMIT
        units.append(UnitLimit("segment_max", f"s{place}", every, most, least))
    member = np.hstack([np.ones((num_users, 1 + num_options), bool), segment])
    budget = int(np.median(cost) * num_users * draw.uniform(0.1, 1.0))
    limits = Limits(budget, tuple(units))
    users = Users(value, cost, np.ones(value.shape, bool), member)
    return pricing.offered(users, limits), limits
