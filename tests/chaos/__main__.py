"""``python -m chaos``: runs drills and prints what they found as a Markdown table."""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from chaos.drills import DRILLS
from chaos.scene import Delivery, Ground, Outcome, run_drill

_HEAD = (
    "drill", "delivery", "group", "faults", "records", "features", "repeats", "ends of workers",
    "takeovers", "s", "seed", "verdict",
)  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown."""
    rows = [_HEAD, ("---",) * len(_HEAD), *(_row(one) for one in outcomes)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(one: Outcome) -> tuple[str, ...]:
    membership = "static" if one.static_membership else "dynamic"
    return (
        one.drill,
        one.delivery,
        f"{one.group_protocol}, {membership}",
        _counts(one.faults),
        f"{one.records:,}",
        f"{one.features:,}",
        f"{one.repeats:,}",
        _counts(one.ends),
        f"{one.takeovers:,}",
        f"{one.seconds:.0f}",
        str(one.seed),
        f"clean ({one.judges})" if one.is_good else f"**{len(one.problems)} problems**",
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def main() -> int:
    """Exit 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--drill", action="append", choices=list(DRILLS), help="default: all")
    parser.add_argument("--count", type=int, default=20, help="faults of each drill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delivery", choices=get_args(Delivery), action="append")
    parser.add_argument("--json", type=Path, help="where to write the outcomes, too")
    parser.add_argument("--keep", type=Path, help="a new folder for logs; default: a temporary one")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers and workers end with us

    outcomes = []
    with tempfile.TemporaryDirectory(prefix="tapeline-chaos-") as temporary:
        ground = Ground(wanted.keep or Path(temporary))
        try:
            for name in wanted.drill or DRILLS:
                for delivery in DRILLS[name].deliveries:
                    if wanted.delivery and delivery not in wanted.delivery:
                        continue
                    outcome = run_drill(
                        DRILLS[name], ground,
                        seed=wanted.seed, count=wanted.count, delivery=delivery,
                    )  # fmt: skip
                    outcomes.append(outcome)
                    print(_row(outcome), *outcome.problems, sep="\n", file=sys.stderr, flush=True)
                    if wanted.json:
                        rows = [asdict(one) for one in outcomes]
                        wanted.json.write_text(json.dumps(rows, indent=1))
        finally:
            ground.close()
    print(table(outcomes))
    return 0 if all(one.is_good for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
