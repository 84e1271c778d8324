"""hardware.compile changes how a step is computed, not what comes out."""

import copy
import shutil
from multiprocessing import get_context

import pytest
import torch
from tiny import gradients, policy, random_pairs

from spo_lightning.data.batch import collate
from spo_lightning.models.scorer import Scorer

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU: install g++"
)


@needs_compiler
@pytest.mark.slow
def test_compiled_equals_eager():
    # in a process of its own: what compiling leaves alive others would count
    process = get_context("spawn").Process(target=compare)
    process.start()
    process.join()
    assert process.exitcode == 0


def compare():
    lm = policy("llama", dtype="float32").lm
    eager, compiled = Scorer(lm, True), Scorer(lm, True)
    compiled.compiled = True
    for seed in (0, 1):  # of other lengths, so that shapes are dynamic
        batch = collate(random_pairs(6, seed), 0)
        found = []
        for scorer in (eager, compiled):
            lm.zero_grad()
            logps = scorer(batch).logps
            logps.sum().backward()
            found.append((logps.detach(), gradients(lm)))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_only_what_is_not_compiled_is_differentiated_twice():
    scorer = Scorer(policy("llama").lm, True)
    assert scorer.twice() is not None
    scorer.compiled = True
    assert scorer.twice() is None


def test_a_copy_compiles_its_own():
    scorer = Scorer(policy("llama").lm, True)
    scorer.compiled = True
    assert scorer._compiled is scorer._compiled
    assert "_compiled" not in copy.deepcopy(scorer).__dict__
