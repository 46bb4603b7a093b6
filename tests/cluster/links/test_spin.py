"""When a wait spins: only where it lately paid, and only on a core that nobody else wants."""

from __future__ import annotations

from cluster.links.spin import LOOK_S, NUM_WAITS, SPIN_S, Spinner, count_runnable


class Machine:
    """Two cores, and so many threads that want one."""

    num_runnable = 1
    num_looks = 0

    def count(self) -> int:
        self.num_looks += 1
        return self.num_runnable


def taught(spinner: Spinner, waited_s: float) -> Spinner:
    for _ in range(NUM_WAITS):
        spinner.learn(waited_s)
    return spinner


def test_short_waits_start_spinning_and_long_ones_end_it() -> None:
    spinner = Spinner(2, Machine().count)
    assert spinner.limit_s(0.0) == 0
    assert taught(spinner, SPIN_S / 2).limit_s(0.0) == SPIN_S
    spinner.learn(1.0)  # one late message is none yet
    assert spinner.limit_s(0.0) == SPIN_S
    assert taught(spinner, 2 * SPIN_S).limit_s(0.0) == 0


def test_a_link_that_mostly_waits_long_never_spins() -> None:
    spinner = Spinner(2, Machine().count)
    for _ in range(50):
        spinner.learn(1.0)
        spinner.learn(0.0)
        spinner.learn(1.0)
        assert spinner.limit_s(0.0) == 0


def test_no_spin_where_the_cores_are_wanted() -> None:
    machine = Machine()
    spinner = taught(Spinner(2, machine.count), 0.0)
    machine.num_runnable = 3
    assert spinner.limit_s(0.0) == 0
    machine.num_runnable = 2  # this thread, and the one that it waits for
    assert spinner.limit_s(LOOK_S / 2) == 0  # it doesn't look all the time
    assert spinner.limit_s(LOOK_S) == SPIN_S
    assert machine.num_looks == 2


def test_the_kernel_counts_this_thread() -> None:
    assert count_runnable() >= 1
