"""Many runs from one command: each in a process of its own, watched, recorded, gone on with.

``hydra_plugins`` is where Hydra looks and ``launcher`` what it finds: a sweeper's jobs in, a
``process`` each, how each ended out. ``jobs`` holds what is known of a job and writes sweep.json,
``board`` shows it, ``table`` keeps rows of many sweeps, ``objective`` makes a run's numbers the
one that a search maximises, ``again`` goes on with a sweep that did not end. A job is a command:
this room may not know what a run does, only how its process ended and what its files say.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
PLUGINS = str(HERE)  # the folder above hydra_plugins, for sys.path
# the wheel's copy first, as for conf
SWEEPS = str(
    next(p for p in (HERE.parent / "sweeps", HERE.parent.parent / "sweeps") if p.is_dir())
)
