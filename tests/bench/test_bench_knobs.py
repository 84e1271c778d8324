"""what=knobs: tiny steps end to end, what it compares, what it refuses. Never how long it took."""

import json
from dataclasses import replace

import pytest
from benches import SHORT, TINY, bench_config, measured, refused
from hydra import initialize_config_dir
from pairs import CONF

from spo_lightning.bench import knobs
from spo_lightning.config import knobs as checks
from spo_lightning.errors import UserError

KNOBS = ("what=knobs", *TINY, *SHORT, "steps=2", "warmup=1", "repetitions=2", "lr=0.01")


@pytest.mark.slow
def test_what_it_leaves_behind(tmp_path):
    few = "only=[spo,micro_batch_size,logits_mib,padded,bf16]"
    numbers = measured(tmp_path / "run", *KNOBS, few, "memory=false")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "bench.json", "table.md"}
    assert json.loads((tmp_path / "run/bench.json").read_text()) == numbers
    rows = numbers["knobs"]
    assert list(rows) == ["dpo", "spo", "micro_batch_size", "logits_mib", "padded", "bf16"]
    assert rows["dpo"]["time"] == {"median": 1, "min": 1, "max": 1}
    assert rows["dpo"]["loss_difference"] == 0
    assert rows["spo"]["words"] == ["loss=spo", "solver=penalty"]
    for name in ("micro_batch_size", "logits_mib", "padded"):
        assert rows[name]["loss_difference"] < 1e-6, name
    assert rows["bf16"]["loss_difference"] > 1e-6
    for row in rows.values():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and "memory" not in row
    text = (tmp_path / "run/table.md").read_text()
    assert "`loss=spo` `solver=penalty`" in text and "losses differ by" in text


@pytest.mark.slow
def test_memory_of_each(tmp_path):
    numbers = measured(tmp_path / "run", *KNOBS, "only=[adamw_8bit]", "repetitions=1")
    rows = numbers["knobs"]
    assert rows["dpo"]["memory"] == 1
    assert all(row["memory_mib"] > 0 for row in rows.values())


def test_every_entry_is_another_configuration():
    asked = bench_config("what=knobs")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = knobs.composed(asked)
    said = {name: str(cfg) for name, cfg in settings.items()}
    assert len(set(said.values())) == len(said) == len(asked.knobs)
    assert settings["bf16"].hardware.precision == "bf16-mixed"
    assert settings["adamw_8bit"].optimizer._target_.endswith("AdamW8bit")
    assert settings["spo"].solver._target_.endswith("Penalty")
    assert all(cfg.optimizer.lr == 1e-4 for cfg in settings.values())


def test_words_win_over_what_stands_on_the_command_line():
    """clip_norm is the bench's own key too; an option of a group is chosen, not set."""
    words = '"clip_norm=0.5","optimizer.lr=0.3","loss=ipo"'
    asked = bench_config("what=knobs", f"+knobs.mine=[{words}]", "only=[mine]")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        base, mine = knobs.composed(asked).values()
    assert (base.clip_norm, mine.clip_norm) == (1.0, 0.5)
    assert (base.optimizer.lr, mine.optimizer.lr) == (1e-4, 0.3)
    assert mine.loss._target_.endswith("ipo") and mine.loss.beta == base.loss.beta


def test_the_command_takes_one_more_entry():
    known = bench_config("what=knobs")
    line = checks.Given(["what", "knobs.mine"], {"what": "knobs"}, known)
    checks.check(bench_config("what=knobs", '+knobs.mine=["clip_norm=null"]'), line)
    with pytest.raises(UserError, match="mine is no setting of this command"):
        checks.check(known, replace(line, touched=["mine"]))


def test_what_is_not_installed_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(knobs, "find_spec", {"torch": True}.get)
    asked = bench_config("what=knobs", "only=[spo,adamw_8bit]")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert list(knobs.composed(asked)) == ["dpo", "spo"]
    assert caplog.messages == ["adamw_8bit is left out, as bitsandbytes is not installed"]


@pytest.mark.parametrize(
    "word, says",
    [
        ("only=[absent]", "only: absent is none of knobs"),
        ('knobs.spo=["loss=nope"]', "knobs.spo: "),
        ('knobs.spo=["hardware.nope=1"]', "knobs.spo: "),
        ('knobs.spo=["hardware=gpu"]', "say hardware.key=value"),
        ("knobs.spo=text", "it must be a list of overrides"),
        ("model.pretrained=x", "model.pretrained has no effect"),
        ("beta=0", "beta=0"),
    ],
)
def test_refused(tmp_path, word, says):
    refused(tmp_path / "run", says, *KNOBS, word)
