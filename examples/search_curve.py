"""How fast strategies find: the best schedule so far over the work done, for searches of `hf-tokenprune search --out`.

python examples/search_curve.py FOUND_DYNAMIC FOUND_MONTE_CARLO --out curve
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from hf_tokenprune.pictures.style import COLOURS, new_figure


def curve(result: dict[str, Any]) -> list[tuple[float, float]]:
    """(passes over all inputs so far, the least distortion within the budget so far), the method's rule first.

    A schedule that was measured on a quarter of the inputs is a quarter of a pass.
    """
    passes, best, points = 0.0, float("inf"), []
    for trial in result["trials"]:
        passes += trial["part"]
        if trial["feasible"] and trial["part"] == 1:
            best = min(best, trial["distortion"])
        if best < float("inf"):
            points.append((passes, best))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="with search.json")
    parser.add_argument("--out", type=Path, default=Path("search_curve"), help="OUT.csv and OUT.png")
    args = parser.parse_args()

    results = [json.loads((folder / "search.json").read_text(encoding="utf-8")) for folder in args.folders]
    strategies = list(dict.fromkeys(result["settings"]["strategy"] for result in results))
    figure = new_figure(7, 4)
    axes = figure.subplots()
    with args.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["strategy", "seed", "passes", "distortion"])
        for result in results:
            strategy, seed = result["settings"]["strategy"], result["settings"]["seed"]
            points = curve(result)
            table.writerows([strategy, seed, round(x, 3), f"{y:.6f}"] for x, y in points)
            axes.step(*zip(*points, strict=True), where="post", color=COLOURS[strategies.index(strategy)])
    axes.set_xlabel("passes over the inputs")
    axes.set_ylabel(f"best {results[0]['settings']['goal']} within the budget")
    for colour, strategy in zip(COLOURS, strategies, strict=False):
        axes.plot([], [], color=colour, label=strategy)
    axes.legend(frameon=False)
    figure.savefig(args.out.with_suffix(".png"), dpi=150)
    print(f"{args.out.with_suffix('.csv')}, {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
