"""When the loss of nodes is called a mass loss, and when that ends."""

from __future__ import annotations

import pytest

from fleet_server.domain.massloss import MassLoss, MassLossRule


def gone(count: int, at: float = 0.0, rule: MassLossRule | None = None) -> MassLoss:
    loss = MassLoss(rule or MassLossRule())
    for n in range(count):
        loss.left(f"node{n}", at)
    return loss


@pytest.mark.parametrize(
    ("away", "online", "frozen"),
    [
        (6, 4, True),
        (5, 5, False),
        (11, 9, True),
        (1000, 0, True),
        (8, 1, False),  # nine nodes are too few to judge
        (0, 1000, False),
    ],
)
def test_more_than_half_of_at_least_ten_nodes_is_a_mass_loss(away: int, online: int, frozen: bool) -> None:
    assert gone(away).frozen(online, 1.0) is frozen


def test_nodes_that_left_one_by_one_over_a_longer_time_are_none() -> None:
    loss = MassLoss()
    for n in range(12):
        loss.left(f"node{n}", 20.0 * n)
        assert not loss.frozen(20 - n - 1, 20.0 * n)


def test_it_holds_beyond_the_window_while_they_are_away() -> None:
    loss = gone(10)
    assert loss.frozen(2, 1.0)
    assert loss.frozen(2, 299.0)


def test_it_ends_when_half_are_back() -> None:
    loss = gone(10)
    assert loss.frozen(2, 1.0)
    for n in range(4):
        loss.back(f"node{n}")
    assert not loss.frozen(6, 2.0)


def test_it_ends_after_its_time_and_does_not_begin_again_for_the_same_loss() -> None:
    loss = gone(10)
    assert loss.frozen(2, 1.0)
    assert not loss.frozen(2, 301.0)
    assert not loss.frozen(2, 302.0)


def test_a_node_that_comes_back_is_not_counted() -> None:
    loss = gone(6)
    loss.back("node0")
    assert not loss.frozen(5, 1.0)
    assert loss.away == 5
