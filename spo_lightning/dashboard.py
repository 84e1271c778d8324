"""The W&B workspace and sweep report of a project: ``python -m spo_lightning.dashboard``.

Without a login the same definitions are written to a file, as W&B would be sent them.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="spo-dashboard", description=__doc__)
    parser.add_argument("--project", default="spo_lightning", help="as in logger.wandb.project")
    parser.add_argument("--entity", default=None, help="user or team; your own if left out")
    where = "the file that is written without a login"
    parser.add_argument("--output", type=Path, default=Path("wandb_dashboard.json"), help=where)
    args = parser.parse_args()
    from spo_lightning.records import dashboard
    from spo_lightning.records.loggers import has_login

    if not has_login():
        text = json.dumps(dashboard.definitions(args.project, args.entity or ""), indent=1)
        args.output.write_text(text + "\n", encoding="utf-8")
        print(f"No W&B login (wandb login): the definitions are in {args.output}")
        return
    try:
        for made in (
            dashboard.workspace(args.project, args.entity),
            dashboard.report(args.project, args.entity),
        ):
            made.save()
            print(made.url)
    except Exception as error:  # of the network, or of W&B: not ours to tell apart
        print(f"error: W&B refused: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
