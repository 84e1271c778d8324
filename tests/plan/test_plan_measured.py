"""The plan beside whole runs: what a process of its own held at its peak."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from peaks import CASES, MIB, SIZES, begin, peak, predicted, texts, written

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    at = tmp_path_factory.mktemp("plan")
    texts(at)
    for size in (*SIZES, "nothing"):
        written(at, size)
    return at


def alone(title, at):
    """MiB, of a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(begin, at).result()
        return process.submit(peak, title, at).result()


@pytest.mark.parametrize("title", CASES)
def test_a_run_holds_what_was_planned(title, checkpoints, capsys):
    plan, found = predicted(title, checkpoints), alone(title, checkpoints)
    with capsys.disabled():
        print(f"\n{title}: planned {plan.peak / MIB:.0f} MiB, measured {found:.0f}")
    assert plan.peak / MIB == pytest.approx(found, rel=0.15)
