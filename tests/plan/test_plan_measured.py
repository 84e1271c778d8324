"""The plan beside whole runs: what a process of its own held at its peak."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from peaks import CASES, MIB, SIZES, begin, measured, predicted, texts, written

# what a process holds hangs on its allocator and on its neighbours too: not for every change
pytestmark = [pytest.mark.page, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Checkpoints, and a process that has loaded the code, from which each run's is forked."""
    at = tmp_path_factory.mktemp("plan")
    texts(at)
    for size in (*SIZES, "nothing"):
        written(at, size)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(begin, at).result()
        yield at, process


@pytest.mark.parametrize("title", [*CASES])
def test_a_run_holds_what_was_planned(title, begun, capsys):
    at, process = begun
    plan, found = predicted(title, at), max(process.submit(measured, title, at).result())
    with capsys.disabled():
        print(f"\n{title}: planned {plan.peak / MIB:.0f} MiB, measured {found:.0f}")
    assert plan.peak / MIB == pytest.approx(found, rel=0.1)
